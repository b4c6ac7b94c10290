"""Files and folders that appear whole or not at all, and folders that one process holds.

A writer fills a hidden sibling of its target, on the same filesystem; only when that is complete and on the disk does
it take the target's place, in one system call. Whatever interrupts - an exception, a full disk, SIGKILL - leaves the
old target as it was.

The sibling is a folder `.NAME.<16 hex digits>.partial`, under an advisory lock (flock) for as long as its writer
lives. The kernel drops the lock when the writer dies, so the next writer of the same target knows which siblings are
dead, and removes those only. Two
writers of one target never meet: each has its own sibling, and who comes last replaces the other's work whole.

Folders are exchanged by renameat2(RENAME_EXCHANGE). Where the system has none (macOS, some network filesystems) the
old folder steps aside first (`.NAME.<...>.old`): between two renames there is no target, and a writer killed right
there leaves it to the next writer to put the old one back. Where there is no flock, dead siblings stay.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Collection, Generator
from fnmatch import fnmatchcase
from pathlib import Path


LOCK_NAME = ".lock"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_held_locks: set[str] = set()


@contextlib.contextmanager
def atomic_file(path: str | Path, *, needed: int | None = None) -> Generator[Path]:
    """Yield a temporary path to write to; after the block it is at `path`, after an exception nothing has changed.

    Args:
        needed: bytes about to be written, where known: refused at once if the disk has less.
    Raises:
        OSError: the disk is full (ENOSPC; says how much is free and needed), or `path` is a folder.
    """
    target = Path(path).resolve()
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected a file, got a folder; name a file in it", str(path))
    with _staging(target, needed) as staging:
        temporary = staging / target.name
        yield temporary
        _settle(staging)
        os.replace(temporary, target)
        _sync(target.parent)


@contextlib.contextmanager
def atomic_folder(
    path: str | Path, *, needed: int | None = None, owned: Collection[str] | None = None
) -> Generator[Path]:
    """Yield a temporary folder to fill; after the block it is at `path`, after an exception nothing has changed.

    Args:
        needed: bytes about to be written, where known: refused at once if the disk has less.
        owned: patterns (as in `*.safetensors`) of what belongs to the thing that is written. What the old folder holds
            beside these and was not written anew (notes, training checkpoints) is carried over, as hard links. None:
            the folder is replaced as a whole and nothing is carried over.
    Raises:
        OSError: the disk is full (ENOSPC; says how much is free and needed), or `path` is a file.
        ValueError: `path` is the current folder or holds it, or is a mount point; those cannot be exchanged.
    """
    target = Path(path).resolve()
    _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _staging(target, needed) as staging:
        yield staging
        _settle(staging)
        if target.is_dir():
            _carry_over(target, staging, ("*",) if owned is None else owned)
            staging.chmod(stat.S_IMODE(target.stat().st_mode))
        for folder, _, _ in os.walk(staging, topdown=False):
            _sync(folder)
        _move_into_place(staging, target)
        _sync(target.parent)


@contextlib.contextmanager
def steady_folder(path: str | Path) -> Generator[Path]:
    """Yield a path under which the folder's present content stays readable, even while writers replace the folder.

    Opening several files of one folder by its name can meet the old folder for the first and the new one for the
    second. The yielded path (`/proc/self/fd/N`; the folder's own where there is no /proc) means one folder for good:
    writers of this module leave what they replaced in place until its readers are done. Use it inside the block only,
    and record `path`, not the yielded one. The temporary folder of a writer, who reads what he has written so far, is
    yielded as it is.
    """
    if is_being_written(Path(path).resolve()):  # its lock is the writer's, who would wait for himself
        yield Path(path)
        return
    while True:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with contextlib.suppress(OSError):  # no flock here: nothing removes it either
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            if not _is_at(descriptor, path):
                continue
            steady = Path(f"/proc/self/fd/{descriptor}")
            yield steady if steady.is_dir() else Path(path)
            return
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def exclusive_lock(folder: str | Path) -> Generator[None]:
    """Hold `folder` (made if missing) for this process alone; however the process ends, the kernel lets go.

    Raises:
        RuntimeError: another process, or this one, holds it already; says which.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    if str(path) in _held_locks:
        raise RuntimeError(
            f"{folder} is in use by this process ({os.getpid()}): finish that run or choose another folder"
        )
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # lockf: a forked worker does not inherit it
        except OSError as error:
            holder = os.read(descriptor, 300).decode(errors="replace") or "another process"
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise RuntimeError(
                f"{folder} is in use by {holder}: wait for it to end or choose another folder"
            ) from error
        if _is_at(descriptor, path):
            break
        os.close(descriptor)  # its holder removed it on leaving, between our open and our lock
    with contextlib.suppress(OSError):  # a full disk: the lock holds without its holder's name
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    _held_locks.add(str(path))
    try:
        yield
    finally:
        _held_locks.discard(str(path))
        if _is_at(descriptor, path):
            path.unlink()
        os.close(descriptor)


def why_irreplaceable(folder: Path) -> str | None:
    """Say why `folder` (a resolved path) cannot be exchanged for another, if so: the end of a sentence about it."""
    with contextlib.suppress(FileNotFoundError):  # the current folder itself may be gone
        if Path.cwd().is_relative_to(folder):
            return "holds the current folder"
    if os.path.ismount(folder):
        return "is a mount point"
    if folder.is_dir() and not os.access(folder.parent, os.W_OK | os.X_OK):
        return "lies in a folder that may not be written"
    return None


def is_being_written(folder: Path) -> bool:
    """Say whether `folder` is, or lies in, the temporary folder of a writer."""
    return any(re.fullmatch(r"\..*\.[0-9a-f]{16}\.partial", part) for part in folder.parts)


# -- the hidden sibling -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _staging(target: Path, needed: int | None) -> Generator[Path]:
    """Yield a new, empty, locked sibling folder of `target`; remove afterwards whatever is at its path then."""
    _sweep(target)
    free = shutil.disk_usage(target.parent).free
    if needed is not None and free < needed:
        raise OSError(errno.ENOSPC, f"disk full: {free} bytes free, {needed} needed; nothing was written", str(target))
    staging, lock = _make_sibling(target)
    try:
        yield staging
    except Exception as error:
        code = _disk_full_code(error)
        if code is None:
            raise
        raise OSError(code, _explain_disk_full(code, staging, needed), str(target)) from error
    finally:
        _unlock(lock)
        os.close(lock)
        _remove_unless_in_use(staging, known_dead=True)
        with contextlib.suppress(OSError):
            _sweep(target)  # a writer that replaced our folder while we had it locked could not remove it


def _make_sibling(target: Path) -> tuple[Path, int]:
    while True:
        staging = target.with_name(f"{_sibling_prefix(target)}{secrets.token_hex(8)}.partial")
        staging.mkdir()
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
            if _lock_alone(lock) is not False and _is_at(lock, staging):
                return staging, lock
            os.close(lock)  # another writer took it for dead between mkdir and flock, and removes it


def _sibling_prefix(target: Path) -> str:
    return "." + os.fsdecode(os.fsencode(target.name)[:200]) + "."


def _sweep(target: Path) -> None:
    """Remove the siblings that dead writers left; put back an old folder that stepped aside for nothing."""
    pattern = re.compile(re.escape(_sibling_prefix(target)) + r"[0-9a-f]{16}\.(partial|old)")
    for name in sorted(os.listdir(target.parent)):
        if match := pattern.fullmatch(name):
            if match[1] == "old" and not target.exists():
                with contextlib.suppress(FileNotFoundError):
                    os.rename(target.with_name(name), target)
            else:
                _remove_unless_in_use(target.with_name(name))


def _remove_unless_in_use(folder: Path, *, known_dead: bool = False) -> None:
    """Remove `folder` if neither a living writer nor a reader holds it; without flock, only if known to be dead."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    is_alone = _lock_alone(lock)
    if (known_dead if is_alone is None else is_alone) and _is_at(lock, folder):  # else it is the target by now
        shutil.rmtree(folder, ignore_errors=True)
    _unlock(lock)
    os.close(lock)


def _lock_alone(descriptor: int) -> bool | None:
    """Try to lock; return whether it worked, None where this filesystem has no flock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _unlock(descriptor: int) -> None:
    """Let go at once: closing alone would not while a forked child still has the descriptor."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _is_at(descriptor: int, path: str | Path) -> bool:
    """Say whether `path` still names what `descriptor` has open."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _disk_full_code(error: BaseException | None) -> int | None:
    """Return the errno if `error`, or what caused it, is a disk or a quota that has no room left."""
    while error is not None:
        for code in _DISK_FULL:
            if getattr(error, "errno", None) == code or f"os error {code})" in str(error):
                return code  # libraries written in Rust give the number in the text only
        error = error.__cause__ or error.__context__
    return None


def _explain_disk_full(code: int, staging: Path, needed: int | None) -> str:
    free = shutil.disk_usage(staging).free
    written = sum(file.lstat().st_size for file in staging.rglob("*") if not file.is_dir())
    wanted = f", {needed} needed" if needed is not None else ""
    return f"{os.strerror(code)}: {free} bytes free, {written} written{wanted}; nothing was changed, make room"


# -- into place -------------------------------------------------------------------------------------------------------


def _check_replaceable(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "expected a folder, got a file; choose another name", str(target))
    reason = why_irreplaceable(target)
    if reason is not None:
        raise ValueError(f"{target} {reason}, so it cannot be replaced whole: write to a folder inside it")


def _settle(staging: Path) -> None:
    """Give everything that was written the modes that the umask asks for, and bring the files' data to the disk.

    Some writers (safetensors, tempfile) make files that only their owner may read. The kernel made `staging` by the
    umask.
    """
    mode = stat.S_IMODE(staging.stat().st_mode) & 0o777
    for folder, _, files in os.walk(staging):
        if Path(folder) != staging:
            os.chmod(folder, stat.S_IMODE(os.stat(folder).st_mode) | mode)
        for name in files:
            file = Path(folder, name)
            if not file.is_symlink():
                file.chmod(mode & 0o666)
                _sync(file)


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _carry_over(old: Path, new: Path, owned: Collection[str]) -> None:
    for entry in os.scandir(old):
        is_owned = any(fnmatchcase(entry.name, pattern) for pattern in owned) and entry.name != LOCK_NAME
        if is_owned or os.path.lexists(new / entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.copytree(entry.path, new / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry.path, new / entry.name)


def _link(source: str, destination: str | Path) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:  # a filesystem without hard links, or another one mounted here
        shutil.copy2(source, destination, follow_symlinks=False)


def _move_into_place(staging: Path, target: Path) -> None:
    """Make `staging` the target; a folder that was the target is at the path of `staging` afterwards."""
    while True:
        try:
            if target.exists():
                _exchange(staging, target)
            else:
                os.rename(staging, target)
            return
        except OSError as error:  # another writer came or went between the question and the answer: ask again
            if error.errno not in (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY) or not staging.exists():
                raise


def _exchange(staging: Path, target: Path) -> None:
    try:
        _rename_exchange(staging, target)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        aside = target.with_name(f"{_sibling_prefix(target)}{secrets.token_hex(8)}.old")
        os.rename(target, aside)
        try:
            os.rename(staging, target)
        except OSError:
            with contextlib.suppress(OSError):  # if another writer's folder came in between, this old one is obsolete
                os.rename(aside, target)
            raise
        os.rename(aside, staging)


def _rename_exchange(one: Path, other: Path) -> None:
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    current_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    if renameat2(current_folder, os.fsencode(one), current_folder, os.fsencode(other), exchange):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one), None, str(other))
