"""Being told to stop: signals that end training at a step's end, and loader workers that die or outlive them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

import torch


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(RuntimeError):  # noqa: N818
    """Training was told to stop and did so at the end of a step, with everything saved.

    Args:
        signal_number: what told it.
        checkpoint: folder to resume from, whole; None if there was no step to save.
    """

    def __init__(self, signal_number: int, checkpoint: str | None):
        self.signal_number = signal_number
        self.checkpoint = checkpoint
        where = f"everything is saved in {checkpoint}" if checkpoint else "before the first step: nothing to save"
        super().__init__(f"training was stopped by {signal.Signals(signal_number).name}; {where}")

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as of a process that the signal killed: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signal_number


class StopSignals:
    """A context in which the first SIGINT or SIGTERM is noted in `received` and the second ends the process at once.

    Outside the main thread, where Python takes no signals, it notes nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # ty: ignore[invalid-argument-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number

    def agreed(self, device: torch.device) -> int | None:
        """Returns the signal that any process of the group has received, the same on all of them."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.received
        number = torch.tensor(self.received or 0, device=device)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        return int(number) or None


def leave_signals_to_the_trainer(worker_id: int) -> None:
    """Makes a loader worker ignore Ctrl-C, which its whole process group gets; the trainer ends it by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class WorkerDeaths:
    """A context in which a loader worker's death is noticed while a batch is fetched, never in the middle of a step.

    torch raises from a handler of SIGCHLD, wherever the main thread is: in the middle of an optimizer step, too, after
    which half of the parameters have moved; or after training, where the late death of a second worker would take the
    place of the error that says where everything is saved. So torch's handler comes back where training has ended
    well; after an error the deaths are only noted, until the next training.
    """

    def __init__(self) -> None:
        self._raise_if_dead: Callable | None = None
        self._is_fetching = False
        self._is_pending = False
        self._earlier: list[int] = []

    def __enter__(self) -> "WorkerDeaths":
        # of a training that failed in this process, perhaps, and still dying; those that have died are reaped here
        self._earlier = [process.pid for process in multiprocessing.active_children() if process.pid]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._raise_if_dead is not None:
            signal.signal(signal.SIGCHLD, self._raise_if_dead)

    @contextmanager
    def raised_here(self) -> Generator[None]:
        """Raises inside if a worker dies, or has died since the last time."""
        self._stand_before_torch()
        self._is_fetching = True
        try:
            if self._is_pending:
                self._is_pending = False
                self._raise_if_own(signal.SIGCHLD, None)
            yield
        finally:
            self._is_fetching = False
            self._stand_before_torch()

    def _stand_before_torch(self) -> None:
        """Takes the place of the handler that torch installs with the first workers, once it is there."""
        handler = signal.getsignal(signal.SIGCHLD)
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and callable(handler) and handler != self._note:
            earlier = getattr(handler, "__self__", None)
            self._raise_if_dead = earlier._raise_if_dead if isinstance(earlier, WorkerDeaths) else handler
            signal.signal(signal.SIGCHLD, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._is_fetching:
            self._raise_if_own(number, frame)
        else:
            self._is_pending = True

    def _raise_if_own(self, number: int, frame: FrameType | None) -> None:
        """Raises as torch does, but for the death of a worker that was there before this training."""
        try:
            if self._raise_if_dead is not None:
                self._raise_if_dead(number, frame)
        except RuntimeError as error:
            if not any(f"(pid {pid})" in str(error) for pid in self._earlier):
                raise


def describe_worker_failure(error: BaseException, saved: str | None, *, timeout: float) -> str | None:
    """Says what became of a DataLoader worker and where the training is saved; None for an error of another kind.

    Args:
        saved: the checkpoint written since, if any step was made.
        timeout: seconds that a worker may take for a batch.
    """
    gone = isinstance(error, (ConnectionError, EOFError))  # it died while a batch was being handed over
    if not gone and "DataLoader" not in str(error):
        return None
    what = f"DataLoader worker is gone: {error!r}" if gone else str(error)
    where = f"what was trained is saved in {saved}" if saved else "no step was made yet"
    return f"{what} (dataloader_timeout is {timeout:g} s); {where}"
