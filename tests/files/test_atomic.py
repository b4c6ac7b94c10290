"""Folders are old or new, never a mixture, under exceptions, full disks, SIGKILL and concurrent processes."""

import errno
import os
import re
import signal
import stat
import subprocess
import sys
import threading

import forking
import pytest

from hf_vit.files import atomic
from hf_vit.files.atomic import atomic_file, atomic_folder, exclusive_lock


FILES = ("a.json", "b.safetensors", "sub/c.txt")

# Runs without the package's other imports, so that it can fork hundreds of writers in a second.
DRIVER = f"""
import importlib.util, os, pathlib, signal, sys
sys.path.insert(0, {os.path.dirname(forking.__file__)!r})
from forking import die_at_operation, in_child, status_of
spec = importlib.util.spec_from_file_location("atomic", {atomic.__file__!r})
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)
FILES = {FILES!r}

def fill(folder, content):
    (folder / "sub").mkdir()
    for name in FILES:
        with open(folder / name, "w") as file:
            for part in (content, content):
                sys.audit("os.write", name)  # Python itself announces every file operation but writing
                file.write(part)
                file.flush()

def replace(target, content):
    with atomic.atomic_folder(target) as folder:
        fill(folder, content)
"""


def drive(code, *arguments):
    command = [sys.executable, "-I", "-c", DRIVER + code, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def fill(folder, content):
    (folder / "sub").mkdir()
    for name in FILES:
        (folder / name).write_text(content)


def read(folder):
    return {name: (folder / name).read_text() for name in FILES}


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["exchange", "no exchange"])
def target(request, tmp_path, monkeypatch):
    """An existing folder, on a system with and without renameat2."""
    if request.param == "no exchange":
        monkeypatch.setattr(atomic, "_rename_exchange", raise_enosys)
    target = tmp_path / "parent" / "model"
    target.mkdir(parents=True)
    fill(target, "old")
    return target


def replace_and_raise(target, error_or_full_disk, **options):
    with atomic_folder(target, **options) as folder:
        (folder / "a.json").write_text("new")
        if isinstance(error_or_full_disk, BaseException):
            raise error_or_full_disk
        error_or_full_disk.write("x" * 100_000)


def raise_enosys(*_):
    raise OSError(errno.ENOSYS, "no such system call")


# -- atomic ----------------------------------------------------------------------------------------------------------


def test_a_folder_appears_whole_after_the_block(tmp_path):
    with atomic_folder(tmp_path / "new" / "model") as folder:
        fill(folder, "new")
        assert not (tmp_path / "new" / "model").exists()
    assert set(read(tmp_path / "new" / "model").values()) == {"new"}
    assert os.listdir(tmp_path / "new") == ["model"]


def test_an_existing_folder_changes_as_one_after_the_block(target):
    (target / "stale.bin").write_text("old")
    with atomic_folder(target, owned=["*.bin"]) as folder:
        fill(folder, "new")
        assert set(read(target).values()) == {"old"}
    assert tree(target) == dict.fromkeys(FILES, b"new")
    assert os.listdir(target.parent) == ["model"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_folder_and_no_trace(target, error):
    before = tree(target)
    with pytest.raises(error, match="no"):
        replace_and_raise(target, error("no"))
    assert tree(target) == before
    assert os.listdir(target.parent) == ["model"]


def test_an_exception_leaves_the_old_file_and_no_trace(tmp_path):
    (tmp_path / "a.npz").write_text("old")

    def interrupted_write():
        with atomic_file(tmp_path / "a.npz") as temporary:
            temporary.write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_write()
    assert (tmp_path / "a.npz").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.npz"]


def test_a_file_is_replaced_whole(tmp_path):
    (tmp_path / "a.npz").write_text("old")
    with atomic_file(tmp_path / "a.npz") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "a.npz").read_text() == "old"
    assert (tmp_path / "a.npz").read_text() == "new"
    assert os.listdir(tmp_path) == ["a.npz"]


def test_a_link_stays_a_link_and_its_target_is_replaced(tmp_path, target):
    (tmp_path / "link").symlink_to(target)
    with atomic_folder(tmp_path / "link") as folder:
        fill(folder, "new")
    assert (tmp_path / "link").is_symlink()
    assert set(read(target).values()) == {"new"}


def test_names_of_the_longest_length_work(tmp_path):
    target = tmp_path / ("é" * 127)
    for content in ("old", "new"):
        with atomic_folder(target) as folder:
            fill(folder, content)
    assert set(read(target).values()) == {"new"}


def add_files_of_the_user(target):
    """Add files, folders and links to `target`; return the content that must stay."""
    (target / "notes.md").write_text("mine")
    (target / "annotations.json").write_text("mine")
    (target / "checkpoint-5" / "deep").mkdir(parents=True)
    (target / "checkpoint-5" / "deep" / "model.safetensors").write_text("mine")
    (target / "sub" / "mine.txt").write_text("mine")
    (target / "empty").mkdir()
    (target / "latest").symlink_to("checkpoint-5")
    mine = ["notes.md", "annotations.json", "checkpoint-5/deep/model.safetensors", "sub/mine.txt"]
    return dict.fromkeys(mine, b"mine")


@pytest.mark.parametrize("current", [False, True], ids=["exchanged", "in place"])
def test_only_owned_files_are_removed(target, monkeypatch, current):
    kept = add_files_of_the_user(target)
    (target / "model-00001-of-00002.safetensors").write_text("stale")
    (target / "sub" / "stale.png").write_text("stale")
    if current:
        monkeypatch.chdir(target)
    with atomic_folder("." if current else target, owned=["*.json.old", "*.safetensors", "sub/*.png"]) as folder:
        fill(folder, "new")
        assert set(read(target).values()) == {"old"}
    assert tree(target) == dict.fromkeys(FILES, b"new") | kept
    assert os.readlink(target / "latest") == "checkpoint-5"
    assert (target / "empty").is_dir()
    assert not [name for name in os.listdir(target) if name.endswith(".partial")]


def test_files_that_cannot_be_linked_stay_where_they_are(target, monkeypatch):
    kept, inode = add_files_of_the_user(target), target.stat().st_ino

    def refuse(*_, **__):
        raise OSError(errno.EXDEV, "another filesystem is mounted here")

    monkeypatch.setattr(os, "link", refuse)
    with atomic_folder(target) as folder:
        fill(folder, "new")
    assert target.stat().st_ino == inode  # file by file
    assert tree(target) == dict.fromkeys(FILES, b"new") | kept
    assert os.listdir(target.parent) == ["model"]


def test_what_another_program_writes_during_the_exchange_is_kept(target, monkeypatch):
    (target / "log.txt").write_text("1")
    exchange = atomic._move_into_place

    def write_and_exchange(staging, folder):
        (folder / "late.txt").write_text("late")
        (folder / "log.txt").unlink()
        (folder / "log.txt").write_text("12")
        exchange(staging, folder)

    monkeypatch.setattr(atomic, "_move_into_place", write_and_exchange)
    with atomic_folder(target) as folder:
        fill(folder, "new")
    assert tree(target) == dict.fromkeys(FILES, b"new") | {"late.txt": b"late", "log.txt": b"12"}


def test_a_folder_reached_by_a_link_inside_is_written_through_the_link(target, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    os.rename(target / "sub", tmp_path / "elsewhere" / "sub")
    (target / "sub").symlink_to(tmp_path / "elsewhere" / "sub")
    with atomic_folder(target) as folder:
        fill(folder, "new")
    assert (target / "sub").is_symlink()
    assert set(read(target).values()) == {"new"}


def test_in_place_the_description_is_removed_first_and_written_last(target, monkeypatch):
    monkeypatch.chdir(target)
    (target / "config.json").write_text("old")
    (target / "model.safetensors").write_text("old")
    replace, states = os.replace, []

    def watch(source, destination):
        states.append((target / "config.json").exists())
        replace(source, destination)

    monkeypatch.setattr(os, "replace", watch)
    with atomic_folder(".") as folder:
        for name in ("config.json", "model.safetensors", "notes.json"):
            (folder / name).write_text("new")
        states.append((target / "config.json").exists())
    assert states == [True, False, False, False]
    assert (target / "config.json").read_text() == "new"


def test_a_file_and_a_folder_of_one_name_are_refused_and_nothing_changes(target):
    before = tree(target)
    with pytest.raises(NotADirectoryError, match=r"folder is to be written here, found a file: .*a\.json"):
        write_below(target, "a.json/b")
    with pytest.raises(IsADirectoryError, match=r"a file is to be written here, found a folder: .*sub"):
        write_below(target, "sub")
    with pytest.raises(NotADirectoryError, match="expected a folder, got a file"), atomic_folder(target / "a.json"):
        pass
    with pytest.raises(IsADirectoryError, match="expected a file, got a folder"), atomic_file(target):
        pass
    assert tree(target) == before


def write_below(target, name):
    with atomic_folder(target) as folder:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("new")


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with atomic_file(tmp_path / "pipe") as temporary:
        temporary.write_text("new")
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.reliability(row="L07")
def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "model") as folder:
            fill(folder, "new")
            (folder / "b.safetensors").chmod(0o600)
            (folder / "sub").chmod(0o700)
        with atomic_file(tmp_path / "a.npz") as temporary:
            temporary.touch(mode=0o600)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    folders = {"model": 0o750, "sub": 0o750}
    assert modes == dict.fromkeys(["a.json", "b.safetensors", "c.txt", "a.npz"], 0o640) | folders


def test_a_folder_keeps_the_mode_it_had(target):
    target.chmod(0o2775)
    with atomic_folder(target) as folder:
        fill(folder, "new")
    assert stat.S_IMODE(target.stat().st_mode) == 0o2775


# -- no room ----------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_refused_before_writing(target):
    message = r"\d+ bytes free, \d{18} needed; nothing was written"
    with pytest.raises(OSError, match=message) as caught, atomic_folder(target, needed=10**17):
        pass
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(target.parent) == ["model"]


def test_a_disk_full_while_writing_leaves_the_old_folder_and_says_how_much_is_free(target):
    before = tree(target)
    message = r"No space left on device: \d+ bytes free, 3 written, 9 needed"
    with pytest.raises(OSError, match=message) as caught, open("/dev/full", "w") as full:
        replace_and_raise(target, full, needed=9)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(target)
    assert tree(target) == before
    assert os.listdir(target.parent) == ["model"]


@pytest.mark.reliability(row="R08")
def test_a_full_disk_met_by_safetensors_is_reported_the_same_way(tmp_path):
    code = """
import resource, sys, torch
from safetensors.torch import save_file
from hf_vit.files.atomic import atomic_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
with atomic_folder(sys.argv[1]) as folder:
    save_file({"w": torch.zeros(1 << 20)}, folder / "model.safetensors")
"""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_text("old")
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "model"], capture_output=True, text=True, check=False)
    assert re.search(r"OSError: \[Errno 27\] File too large: \d+ bytes free", run.stderr)
    assert tree(tmp_path / "model") == {"a": b"old"}
    assert os.listdir(tmp_path) == ["model"]


# -- SIGKILL ----------------------------------------------------------------------------------------------------------

KILL_SWEEP = """
target, exchange = pathlib.Path(sys.argv[1]), sys.argv[2]
if exchange == "no":
    def refuse(one, other):
        raise OSError(38, "no such system call")
    atomic._rename_exchange = refuse

def dying_writer(deadline):
    die_at_operation(deadline)
    replace(target, "new")

deadline, died = 0, True
replace(target, "old")
while died:
    status = status_of(in_child(lambda: dying_writer(deadline)))
    died = os.WIFSIGNALED(status)
    assert died or status == 0
    found = {(target / name).read_text() for name in FILES if (target / name).exists()}
    whole = all((target / name).exists() for name in FILES)
    replace(target, "old")
    print(deadline, whole, *sorted(found), *os.listdir(target.parent))
    deadline += 1
"""


@pytest.mark.reliability(row="R09")
@pytest.mark.parametrize("exchange", ["yes", "no"])
def test_sigkill_before_any_file_operation_leaves_old_or_new_and_the_next_writer_cleans_up(tmp_path, exchange):
    lines = [line.split() for line in drive(KILL_SWEEP, tmp_path / "model", exchange).splitlines()]
    assert len(lines) > 40  # file operations, each of which was the last of one writer
    outcomes = [line[1:] for line in lines]
    assert outcomes[0] == ["True", "oldold", "model"]
    assert outcomes[-1] == ["True", "newnew", "model"]
    gap = [["False", "model"]] if exchange == "no" else []  # between the two renames there is no target
    assert all(outcome in (outcomes[0], outcomes[-1], *gap) for outcome in outcomes)
    assert sum(outcome in gap for outcome in outcomes) == len(gap)


def test_an_old_folder_that_stepped_aside_is_put_back_before_the_next_write(target):
    os.rename(target, target.with_name(".model.0123456789abcdef.old"))
    with atomic_folder(target, owned=["a.json"]) as folder:
        assert set(read(target).values()) == {"old"}
        (folder / "a.json").write_text("new")
    assert read(target) == dict.fromkeys(FILES, "old") | {"a.json": "new"}
    assert os.listdir(target.parent) == ["model"]


# -- several at once --------------------------------------------------------------------------------------------------


def test_only_siblings_of_the_same_target_are_removed(target):
    for name in (
        ".model.0123456789abcdef.partial",
        ".model2.0123456789abcdef.partial",
        ".model.txt.partial",
        "model.old",
    ):
        target.with_name(name).mkdir()
    with atomic_folder(target) as folder:
        fill(folder, "new")
    assert sorted(os.listdir(target.parent)) == [
        ".model.txt.partial",
        ".model2.0123456789abcdef.partial",
        "model",
        "model.old",
    ]


def test_a_living_writer_is_not_disturbed_by_another(target):
    with atomic_folder(target) as slow:
        fill(slow, "slow")
        with atomic_folder(target) as fast:
            fill(fast, "fast")
        assert set(read(target).values()) == {"fast"}
    assert set(read(target).values()) == {"slow"}
    assert os.listdir(target.parent) == ["model"]


@pytest.mark.reliability(row="L02")
def test_eight_writers_of_one_folder_never_interleave(tmp_path):
    code = """
target = pathlib.Path(sys.argv[1])
for _ in range(5):
    pids = [in_child(lambda: replace(target, str(writer))) for writer in range(8)]
    print(*map(status_of, pids), *os.listdir(target.parent))
    assert len({(target / name).read_text() for name in FILES}) == 1
"""
    assert drive(code, tmp_path / "model").splitlines() == ["0 0 0 0 0 0 0 0 model"] * 5


@pytest.mark.reliability(row="L01")
def test_readers_never_see_a_mixture_while_writers_replace_the_folder(tmp_path):
    code = """
target = pathlib.Path(sys.argv[1])
for index in range(60):
    replace(target, f"{sys.argv[2]}-{index};")
"""
    target = tmp_path / "model"
    drive(code.replace("60", "1"), target, "first")
    command = [sys.executable, "-I", "-c", DRIVER + code, target]
    writers = [subprocess.Popen([*command, name], stderr=subprocess.PIPE) for name in "AB"]
    failures, states = [], set()

    def keep_reading():
        while any(writer.poll() is None for writer in writers):
            try:
                before = target.stat()
                seen = set(read(target).values())
                after = target.stat()
                if (before.st_ino, before.st_ctime_ns) != (after.st_ino, after.st_ctime_ns):  # inodes are used again
                    continue  # the folder was replaced meanwhile: its files are read again
            except FileNotFoundError:
                continue
            else:
                states.update(seen)
                failures.extend([seen] * (len(seen) - 1))

    readers = [threading.Thread(target=keep_reading) for _ in range(2)]
    for reader in readers:
        reader.start()
    for thread in readers:
        thread.join()
    assert [writer.communicate()[1] for writer in writers] == [b"", b""]
    assert failures == []
    assert len(states) > 10


# -- one holder -------------------------------------------------------------------------------------------------------


@pytest.mark.reliability(row="L03")
def test_a_folder_in_use_is_refused_with_the_holder_named_and_free_after_its_death(tmp_path):
    code = """
with atomic.exclusive_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-I", "-c", DRIVER + code, tmp_path / "out"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match=f"in use by process {holder.pid} "), exclusive_lock(tmp_path / "out"):
            pass
        holder.send_signal(signal.SIGKILL)
    with exclusive_lock(tmp_path / "out"):
        assert str(os.getpid()) in (tmp_path / "out" / ".lock").read_text()
    assert os.listdir(tmp_path / "out") == []


def test_one_process_cannot_hold_a_folder_twice(tmp_path):
    for name in (tmp_path, tmp_path / "sub" / ".."):
        with exclusive_lock(tmp_path):
            with pytest.raises(RuntimeError, match=rf"in use by this process \({os.getpid()}\)"), exclusive_lock(name):
                pass
            assert (tmp_path / ".lock").exists()


def test_a_worker_forked_by_the_holder_does_not_keep_the_folder(tmp_path):
    code = """
import time
with atomic.exclusive_lock(sys.argv[1]):
    worker = in_child(lambda: time.sleep(60))
    print(worker, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-I", "-c", DRIVER + code, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        worker = int(holder.stdout.readline())
    try:
        with exclusive_lock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_held_folder_that_is_replaced_stays_held(target):
    with exclusive_lock(target):
        with atomic_folder(target) as folder:
            fill(folder, "new")
        code = "with atomic.exclusive_lock(sys.argv[1]): pass"
        command = [sys.executable, "-I", "-c", DRIVER + code, target]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert f"in use by process {os.getpid()} " in run.stderr
    assert not (target / ".lock").exists()
