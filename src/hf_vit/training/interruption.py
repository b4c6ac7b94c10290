"""Signals that end training at the end of a step, and loader workers that die or do not answer."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(RuntimeError):  # noqa: N818
    """Training was stopped by a signal, with everything saved.

    Args:
        signal_number: The signal that was received.
        checkpoint: Complete folder to resume from; None if nothing was saved.
    """

    def __init__(self, signal_number: int, checkpoint: str | None):
        self.signal_number = signal_number
        self.checkpoint = checkpoint
        where = f"everything is saved in {checkpoint}" if checkpoint else "nothing was saved"
        super().__init__(f"training was stopped by {signal.Signals(signal_number).name}; {where}")

    @property
    def exit_status(self) -> int:
        """128 + the signal number, as of a process that the signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signal_number


class StopSignals:
    """A context in which the first SIGINT or SIGTERM is noted in `received` and the second ends the process at once.

    The first is acknowledged on standard error. Outside the main thread, where Python receives no signals, the
    context does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        name = signal.Signals(number).name
        message = f"\n{name} received: saving at the end of this step; send it again to end at once\n"
        os.write(2, message.encode())  # a print could interrupt another print

    def agreed(self, device: torch.device) -> int | None:
        """Return the signal that any process of the group has received, the same on all of them."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.received
        number = torch.tensor(self.received or 0, device=device)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        return int(number) or None


def leave_signals_to_the_trainer(worker_id: int) -> None:
    """Make a loader worker ignore Ctrl-C, which its whole process group receives, and end quietly on SIGTERM.

    A worker that SIGTERM kills makes torch raise wherever the main process is; one that exits with status 0 does not.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def is_worker_failure(error: BaseException) -> bool:
    """Return whether an error comes from a DataLoader worker that died or did not answer in time."""
    gone = isinstance(error, (ConnectionError, EOFError))  # it died while a batch was being handed over
    return gone or (isinstance(error, RuntimeError) and "DataLoader" in str(error))


def describe_worker_failure(error: BaseException, saved: str | None, *, timeout: float) -> str:
    """Return a message about a worker's failure that says where the training is saved.

    Args:
        saved: The checkpoint to resume from, if there is one.
        timeout: Seconds that a worker may take for a batch.
    """
    gone = isinstance(error, (ConnectionError, EOFError))
    what = f"DataLoader worker is gone: {error!r}" if gone else str(error)
    where = f"what was trained is saved in {saved}" if saved else "nothing of this training was saved"
    return f"{what} (dataloader_timeout is {timeout:g} s); {where}"
