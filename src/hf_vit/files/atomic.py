"""Atomic writing of files and folders, and folders that one process holds.

A writer fills a hidden sibling of its target; when that is complete and on the disk, one system call puts it in
place, so that an exception, a full disk or SIGKILL leaves the old target as it was. Files of a folder that the writer
does not own stay in it.

The sibling is a folder `.NAME.<16 hex digits>.partial`, under an advisory lock (flock) as long as its writer lives.
The kernel releases the lock when the writer dies, so the next writer of the same target removes abandoned siblings
only. Concurrent writers of one target have a sibling each; the last one wins.

Folders are exchanged by renameat2(RENAME_EXCHANGE). Where the system does not have it (macOS, some network
filesystems) the old folder steps aside first (`.NAME.<...>.old`): between two renames there is no target, and the next
writer puts the old folder back if its writer was killed there. Without flock, abandoned siblings stay.

A folder that cannot be exchanged (a mount point, the current folder, files that cannot be hard-linked) is filled file
by file: the files that describe the others (config.json, an index) are removed first and written last, so that a kill
in between leaves a folder that does not open, never a mixture that does.
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
import tempfile
from collections.abc import Collection, Generator
from fnmatch import fnmatchcase
from pathlib import Path, PurePath


LOCK_NAME = ".lock"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_DESCRIPTIONS = ("config.json", "*.index.json", "index.html")
_held_locks: set[str] = set()


@contextlib.contextmanager
def atomic_file(path: str | Path, *, needed: int | None = None) -> Generator[Path]:
    """Yield a temporary path to write to, which moves to `path` after the block; an exception leaves `path` unchanged.

    A device or a pipe (`/dev/stdout`) is written to instead of replaced.

    Args:
        needed: Bytes about to be written, where known: refused at once if the disk has less.

    Raises:
        OSError: if the disk is full (ENOSPC; says how much is free and needed), or `path` is a folder.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected a file, got a folder; name a file in it", str(path))
    if is_special(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder, "content")
            with Path(folder, "content").open("rb") as content, open(path, "wb") as stream:
                shutil.copyfileobj(content, stream)
        return
    target = Path(path).resolve()
    with _staging(target.parent, target.name, needed) as staging:
        temporary = staging / target.name
        yield temporary
        _settle(staging)
        os.replace(temporary, target)
        _sync(target.parent)


@contextlib.contextmanager
def atomic_folder(
    path: str | Path, *, needed: int | None = None, owned: Collection[str] | None = None
) -> Generator[Path]:
    """Yield a temporary folder to fill, whose files move to `path` after the block; an exception changes nothing.

    Everything else in an existing folder stays, except what `owned` names. Inside the temporary folder of another
    writer, whose target will change as one, the yielded folder is `path` itself.

    Args:
        needed: Bytes about to be written, where known: refused at once if the disk has less.
        owned: Patterns of relative paths (`model-*.safetensors`, `figures/*.png`; `*` does not match `/`) of files
            that an earlier writer may have left and that must not stay beside the new ones.

    Raises:
        OSError: if the disk is full (ENOSPC; says how much is free and needed), `path` is a file, or a file is where a
            folder is to be written, or the reverse.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "expected a folder, got a file; choose another name", str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_being_written(target):
        target.mkdir(exist_ok=True)
        yield target
        return
    in_place = why_irreplaceable(target) is not None
    with _staging(target if in_place else target.parent, target.name or "root", needed) as staging:
        yield staging
        _settle(staging)
        if not target.is_dir():
            _sync_folders(staging)
            _move_into_place(staging, target)
        else:
            _replace_folder(staging, target, owned or (), in_place=in_place)
        _sync(target.parent)


@contextlib.contextmanager
def exclusive_lock(folder: str | Path) -> Generator[None]:
    """Hold `folder` (made if missing) for this process alone, until the block or the process ends.

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
    """Return why `folder` (a resolved path) cannot be exchanged for another, as the end of a sentence, or None."""
    with contextlib.suppress(FileNotFoundError):  # the current folder itself may be gone
        if Path.cwd().is_relative_to(folder):
            return "holds the current folder"
    if os.path.ismount(folder):
        return "is a mount point"
    if folder.is_dir() and not os.access(folder.parent, os.W_OK | os.X_OK):
        return "lies in a folder that may not be written"
    return None


def is_being_written(folder: Path) -> bool:
    """Return whether `folder` is, or lies in, the temporary folder of a writer."""
    return any(re.fullmatch(r"\..*\.[0-9a-f]{16}\.partial", part) for part in folder.parts)


def is_special(path: str | Path) -> bool:
    """Return whether `path` is a device, a pipe or a socket: something to write to, not to replace."""
    path = Path(path)
    return path.exists() and not path.is_file() and not path.is_dir()


def matches(path: PurePath, patterns: Collection[str]) -> bool:
    """Return whether a relative path matches one of `patterns`, part by part, so that `*` does not match `/`."""
    return any(
        len(parts) == len(path.parts) and all(map(fnmatchcase, path.parts, parts))
        for parts in (PurePath(pattern).parts for pattern in patterns)
    )


# -- the hidden sibling -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _staging(parent: Path, name: str, needed: int | None) -> Generator[Path]:
    """Yield a new, empty, locked folder in `parent` for the target `name`; remove what is at its path afterwards."""
    _sweep(parent, name)
    free = shutil.disk_usage(parent).free
    if needed is not None and free < needed:
        message = f"disk full: {free} bytes free, {needed} needed; nothing was written"
        raise OSError(errno.ENOSPC, message, str(parent / name))
    staging, lock = _make_sibling(parent, name)
    try:
        yield staging
    except Exception as error:
        code = _disk_full_code(error)
        if code is None:
            raise
        raise OSError(code, _explain_disk_full(code, staging, needed), str(parent / name)) from error
    finally:
        _unlock(lock)
        os.close(lock)
        _remove_unless_in_use(staging, known_dead=True)
        with contextlib.suppress(OSError):
            _sweep(parent, name)  # a writer that replaced this folder while it was locked could not remove it


def _make_sibling(parent: Path, name: str) -> tuple[Path, int]:
    while True:
        staging = parent / f"{_sibling_prefix(name)}{secrets.token_hex(8)}.partial"
        staging.mkdir()
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
            if _lock_alone(lock) is not False and _is_at(lock, staging):
                return staging, lock
            os.close(lock)  # another writer took it for abandoned between mkdir and flock, and removes it


def _sibling_prefix(name: str) -> str:
    return "." + os.fsdecode(os.fsencode(name)[:200]) + "."


def _sweep(parent: Path, target: str) -> None:
    """Remove the siblings that dead writers left; put back an old folder that stepped aside before a kill."""
    pattern = re.compile(re.escape(_sibling_prefix(target)) + r"[0-9a-f]{16}\.(partial|old)")
    for name in sorted(os.listdir(parent)):
        if match := pattern.fullmatch(name):
            if match[1] == "old" and not (parent / target).exists():
                with contextlib.suppress(FileNotFoundError):
                    os.rename(parent / name, parent / target)
            else:
                _remove_unless_in_use(parent / name)


def _remove_unless_in_use(folder: Path, *, known_dead: bool = False) -> None:
    """Remove `folder` if no living writer holds it; without flock, only if its writer is known to be dead."""
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
    """Release the lock at once: closing alone does not while a forked child still has the descriptor."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _is_at(descriptor: int, path: str | Path) -> bool:
    """Return whether `path` still names what `descriptor` has open."""
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


def _settle(staging: Path) -> None:
    """Give everything that was written the modes that the umask requests, and bring the files' data to the disk.

    Some writers (safetensors, tempfile) make files that only their owner may read. The kernel made `staging` with the
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


def _sync_folders(top: Path) -> None:
    for folder, _, _ in os.walk(top, topdown=False):
        _sync(folder)


def _replace_folder(staging: Path, target: Path, owned: Collection[str], *, in_place: bool) -> None:
    """Put what `staging` holds into the existing folder `target`: by exchange where possible, else file by file."""
    written = set(_files_in(staging))
    _check_kinds(written, target)
    if not in_place and (kept := _carry_over(target, staging, owned)) is not None:
        _copy_owner_and_mode(target, staging)
        _sync_folders(staging)
        _move_into_place(staging, target)
        _rescue(staging, target, written, kept, owned)
    else:
        _move_files(staging, target, written, owned)


def _files_in(top: Path) -> Generator[PurePath]:
    """Yield the relative path of every file, link, and device below `top`; links to folders are not followed."""
    for folder, folders, files in os.walk(top):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in [*files, *links]:
            yield PurePath(folder, name).relative_to(top)


def _check_kinds(written: Collection[PurePath], target: Path) -> None:
    """Refuse a user's folder where a file is to be written, and a user's file where a folder is."""
    for path in written:
        if (target / path).is_dir():
            raise IsADirectoryError(errno.EISDIR, "a file is to be written here, found a folder", str(target / path))
        for parent in path.parents[:-1]:
            if os.path.lexists(target / parent) and not (target / parent).is_dir():
                message = "a folder is to be written here, found a file"
                raise NotADirectoryError(errno.ENOTDIR, message, str(target / parent))


def _carry_over(old: Path, new: Path, owned: Collection[str]) -> dict[PurePath, int] | None:
    """Hard-link into `new` what `old` holds besides and `owned` does not name.

    Returns:
        The inode of each file that was linked, by its relative path; None where that is not possible.
    """
    kept: dict[PurePath, int] = {}
    for folder, folders, files in os.walk(old):
        here = PurePath(folder).relative_to(old)
        paths = [here / name for name in files]
        for path in [here / name for name in folders]:
            if (old / path).is_symlink():
                if (new / path).is_dir():
                    return None  # written through the link, into the folder that it names
                paths.append(path)
        stay = [path for path in paths if not os.path.lexists(new / path) and not matches(path, owned)]
        if (stay or not paths) and not (new / here).is_dir():
            _make_folders_like(old, new, here)
        for path in stay:
            try:
                os.link(old / path, new / path, follow_symlinks=False)
            except FileNotFoundError:  # its owner removed it meanwhile
                continue
            except OSError:  # a filesystem without hard links, another one mounted here, or a file of another user
                return None
            kept[path] = (new / path).lstat().st_ino
    return kept


def _make_folders_like(old: Path, new: Path, path: PurePath) -> None:
    for each in [*reversed(path.parents[:-1]), path]:
        if not (new / each).is_dir():
            (new / each).mkdir()
            _copy_owner_and_mode(old / each, new / each)
            shutil.copystat(old / each, new / each)


def _copy_owner_and_mode(old: Path, new: Path) -> None:
    state = old.stat()
    with contextlib.suppress(PermissionError):
        os.chown(new, state.st_uid, state.st_gid)
    new.chmod(stat.S_IMODE(state.st_mode))


def _rescue(
    old: Path, target: Path, written: Collection[PurePath], kept: dict[PurePath, int], owned: Collection[str]
) -> None:
    """Move to `target` what another program has put into the old folder since it was looked through."""
    for path in list(_files_in(old)):
        with contextlib.suppress(FileNotFoundError):
            is_new = path not in kept and path not in written and not matches(path, owned)
            if is_new or (path in kept and (old / path).lstat().st_ino != kept[path]):
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                os.replace(old / path, target / path)


def _move_files(staging: Path, target: Path, written: Collection[PurePath], owned: Collection[str]) -> None:
    """Replace the files of `target` one by one; what describes the others goes first and comes last."""
    descriptions = [path for path in written if matches(path, _DESCRIPTIONS)]
    stale = [path for path in _files_in(target) if matches(path, owned) and path not in written]
    for path in [*descriptions, *stale]:
        (target / path).unlink(missing_ok=True)
    for path in sorted(written, key=lambda path: (path in descriptions, path.name == "config.json", path)):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / path, target / path)
    for folder in {(target / path).parent for path in written} | {target}:
        _sync(folder)


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
        aside = target.with_name(f"{_sibling_prefix(target.name)}{secrets.token_hex(8)}.old")
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
