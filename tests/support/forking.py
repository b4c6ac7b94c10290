"""Forked children, and their death at a chosen file operation; what their parent has imported they need not import."""

import os
import signal
import sys
import threading
from collections.abc import Callable


def in_child(work: Callable[[], object]) -> int:
    """Does `work` in a forked child, which exits with 0, or 1 after an exception; returns the child's process id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(1)
    return pid


def status_of(pid: int) -> int:
    """Waits for a child; returns its status, as `os.waitpid` gives it."""
    return os.waitpid(pid, 0)[1]


def was_killed(pid: int) -> bool:
    """Waits for a child; says whether a signal ended it."""
    return os.WIFSIGNALED(status_of(pid))


def die_at_operation(deadline: int) -> None:
    """From now on counts this process's file operations from 0, and kills it before the one of that number."""
    seen = 0

    def count(event: str, _: object) -> None:
        nonlocal seen
        if event == "open" or event.startswith(("os.", "shutil.", "fcntl.", "ctypes.dlsym")):
            seen += 1
            if seen == deadline + 1:
                os.kill(os.getpid(), signal.SIGKILL)  # announced, too

    sys.addaudithook(count)


def unshare_progress_bars() -> None:
    """Gives tqdm a lock of this process: its own is shared with forks, and who is killed with it stops the others."""
    import tqdm  # not where nothing but a folder is written

    tqdm.tqdm.set_lock(threading.RLock())
