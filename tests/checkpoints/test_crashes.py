"""A training that is killed, or has no room, at any moment goes on and ends bit for bit as an undisturbed one."""

import textwrap

import pytest
from measuring import depth, run_alone
from training_runs import make_trainer


# Imported and forked many times: a fork of a process that has imported everything starts at once.
DRIVER = """
import hashlib, logging, os, random, shutil, signal, torch
from forking import die_at_operation, in_child, status_of, unshare_progress_bars, was_killed
from training_runs import make_trainer
from hf_vit.training.checkpointing import checkpoints_of, newest_complete_checkpoint

logging.disable(logging.CRITICAL)
sys.stdout = open(os.devnull, "w")  # Trainer's own
torch.set_num_threads(1)
unshare_progress_bars()
root = Path(sys.argv[1])
STEPS = 7

def trainer_in(folder, **settings):
    defaults = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3, "ema_decay": 0.9, "max_steps": STEPS}
    return make_trainer(folder, **(defaults | settings))

def answer(value):
    os.write(1, b"ANSWER" + json.dumps(value).encode() + b"\\n")

def digest(folder):
    content = [(folder / name).read_bytes() for name in ("model.safetensors", "ema.safetensors")]
    return hashlib.sha256(b"".join(content)).hexdigest()

def whole_training():
    trainer_in(root / "whole").train()
    return digest(root / "whole" / f"checkpoint-{STEPS}")
"""


@pytest.mark.slow
@pytest.mark.reliability(row="R04")
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_any_moment_and_taken_up_again_a_training_ends_as_if_nothing_had_been(workers, figure, tmp_path):
    code = """
    expected = whole_training()
    chance = random.Random(0)
    settings = {"dataloader_num_workers": WORKERS, "dataloader_timeout": 60.0 if WORKERS else 300.0}

    def train(folder, note, resume):
        trainer = trainer_in(folder, **settings)
        step = trainer.training_step
        def noted(*arguments):
            note.write_text(str(trainer.state.global_step))  # steps that are done
            return step(*arguments)
        trainer.training_step = noted
        trainer.train(resume_from_checkpoint=resume)

    def until_first_save(folder):
        start = time.monotonic()
        while not (folder / "checkpoint-1").is_dir():
            time.sleep(0.001)
        return time.monotonic() - start

    pid = in_child(lambda: train(root / "timed", root / "note", None))
    before = until_first_save(root / "timed")
    start = time.monotonic()
    assert status_of(pid) == 0
    after = time.monotonic() - start

    found = {"equal": 0, "lost": 0, "killed between saves": 0}
    for attempt in range(KILLS):
        folder, note = root / f"run-{attempt}", root / f"note-{attempt}"
        pid = in_child(lambda: train(folder, note, None))
        if attempt % 8 == 7:
            time.sleep(chance.uniform(0, before))
        else:
            until_first_save(folder)
            time.sleep(chance.uniform(0, 0.75 * after))  # the rest is the process's own end
        os.kill(pid, signal.SIGKILL)
        killed = was_killed(pid)
        done = int(note.read_text()) if note.exists() and note.read_text() else 0
        saved = [path for path in checkpoints_of(folder) if path.is_dir()]
        kept = int(newest_complete_checkpoint(folder).name.split("-")[1]) if saved else 0
        found["killed between saves"] += killed and 0 < kept < STEPS
        found["lost"] = max(found["lost"], done - kept)
        pid = in_child(lambda: train(folder, note, True if saved else None))
        resumed = status_of(pid) == 0
        strays = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        found["equal"] += resumed and not strays and digest(folder / f"checkpoint-{STEPS}") == expected
        shutil.rmtree(folder)
    answer(found)
    """
    kills = depth(3, 40 if workers == 0 else 10)
    found = run_alone(DRIVER + textwrap.dedent(code), tmp_path, KILLS=kills, WORKERS=workers)
    assert found["equal"] == kills
    assert found["lost"] <= 1
    between = found["killed between saves"]
    assert between > kills / 3
    figure(f"bit-identical, {workers} workers", f"{kills}/{kills} ({between} between the first save and the last)")
    figure("steps lost", found["lost"], at_most=1)


@pytest.mark.slow
@pytest.mark.reliability(row="R05")
def test_killed_at_any_file_operation_of_a_save_the_newest_checkpoint_is_whole(figure, tmp_path):
    code = """
    folder = root / "run"
    trainer = trainer_in(folder, max_steps=1)
    trainer.train()
    trainer = trainer_in(folder, max_steps=3, allow_changed_arguments=True)

    def save_and_die(deadline):
        save = trainer._save_checkpoint
        def watched(*arguments):
            if trainer.state.global_step == 2:
                die_at_operation(deadline)
            save(*arguments)
            if trainer.state.global_step == 2:
                os._exit(0)  # the whole save was survived
        trainer._save_checkpoint = watched
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))

    steps, bad, strays, deadline, died = [], 0, 0, 0, True
    while died:
        died = was_killed(in_child(lambda: save_and_die(deadline)))
        newest = newest_complete_checkpoint(folder)
        steps.append(int(newest.name.split("-")[1]))
        bad += newest != checkpoints_of(folder)[0]  # the newest by name is always whole
        shutil.rmtree(folder / "checkpoint-2", ignore_errors=True)
        deadline += STEP
    strays = [path.name for path in folder.iterdir() if path.name.endswith(".partial")]
    answer([steps, bad, len(strays)])
    """
    steps, bad, strays = run_alone(DRIVER + textwrap.dedent(code), tmp_path, STEP=depth(6, 1))
    assert set(steps) == {1, 2}
    assert bad == 0
    assert strays == 0
    figure("old or new", f"{len(steps)}/{len(steps)} operations")


@pytest.mark.slow
@pytest.mark.reliability(row="R07")
def test_without_room_for_a_checkpoint_the_older_one_stays_and_training_goes_on_later(figure, tmp_path):
    """A limit on a file's size stands for the full disk: it meets the weights, the optimizer and the small files."""
    code = """
    import resource
    expected = whole_training()
    counts = {"refused": 0, "intact": 0, "named": 0, "equal": 0}
    largest = max(path.stat().st_size for path in (root / "whole" / f"checkpoint-{STEPS}").iterdir())
    for limit in [0, 300, 700, 1500, 3000, *range(5000, largest, max((largest - 5000) // TIMES, 1))]:
        folder = root / f"run-{limit}"
        shutil.copytree(root / "whole" / f"checkpoint-{STEPS - 2}", folder / f"checkpoint-{STEPS - 2}")
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

        def train_without_room():
            trainer = trainer_in(folder)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            trainer.train(resume_from_checkpoint="last")

        source, sink = os.pipe()
        def report():
            try:
                train_without_room()
            except OSError as error:
                os.write(sink, str(error).encode())

        status_of(in_child(report))
        os.close(sink)
        message = os.read(source, 10_000).decode()
        os.close(source)
        after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
        counts["refused"] += bool(message)
        counts["intact"] += after == before
        counts["named"] += "bytes free" in message and "needed" in message
        trainer_in(folder).train(resume_from_checkpoint="last")
        counts["equal"] += digest(folder / f"checkpoint-{STEPS}") == expected
    answer([counts, len(list(root.glob("run-*")))])
    """
    counts, times = run_alone(DRIVER + textwrap.dedent(code), tmp_path, TIMES=depth(3, 8))
    assert counts == dict.fromkeys(counts, times)
    figure("intact, named in bytes, resumed bit-identical", f"{times}/{times}")


def test_a_checkpoint_that_the_disk_has_no_room_for_is_refused_before_writing(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match=r"1000 bytes free, \d{5,} needed; nothing was written"):
        trainer.train()
    assert list(tmp_path.iterdir()) == []
