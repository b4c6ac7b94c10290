"""The trainer's own: signals, non-finite numbers, workers that die, one training per folder, losses and averages."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_runs import CLASSES, WORKERS, assert_equal, either_loop, make_trainer, sample_images, weights

from hf_vit import HfViTForImageClassification, HfViTImageProcessor
from hf_vit.data.augmentation import AugmentedImages
from hf_vit.training.checkpointing import checkpoints_of, newest_complete_checkpoint
from hf_vit.training.ema import ExponentialMovingAverage
from hf_vit.training.interruption import TrainingInterrupted, describe_worker_failure
from hf_vit.training.losses import NonFiniteLossError, classification_loss, describe_samples


def at_step(trainer: Any, step: int, action: Any) -> None:
    """Calls `action` while the batches of step number `step` (from 1) are fetched."""
    fetch = trainer.get_batch_samples

    def fetch_and_act(*args: Any) -> Any:
        if trainer.state.global_step == step - 1:
            action()
        return fetch(*args)

    trainer.get_batch_samples = fetch_and_act


@pytest.mark.reliability(row="R12")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@either_loop
def test_a_signal_ends_training_at_the_steps_end_with_an_exact_checkpoint(make, number, status, tmp_path):
    whole = make(tmp_path / "whole")
    whole.train()
    trainer = make(tmp_path / "stopped")
    at_step(trainer, 4, lambda: os.kill(os.getpid(), number))
    with pytest.raises(TrainingInterrupted) as caught:
        trainer.train()
    assert caught.value.exit_status == status
    assert caught.value.checkpoint == str(tmp_path / "stopped" / "checkpoint-4")
    resumed = make(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint="last")
    assert_equal(weights(whole), weights(resumed))


@either_loop
def test_handlers_are_put_back_after_training(make, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    make(tmp_path, max_steps=1).train()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


SCRIPT = """
    import sys, time
    sys.path.insert(0, {tests!r})
    from training_runs import {make}
    from hf_vit.training.interruption import TrainingInterrupted

    if __name__ == "__main__":
        trainer = {make}({folder!r}, max_steps=100_000, **{settings!r})
        training_step = trainer.training_step

        def slow_step(*args):
            if trainer.state.global_step == 2:
                print("going", flush=True)
                time.sleep({pause})
            return training_step(*args)

        trainer.training_step = slow_step
        try:
            trainer.train()
        except TrainingInterrupted as interruption:
            print(interruption, flush=True)
            sys.exit(interruption.exit_status)
"""


def start_training(tmp_path: Path, make: Any, *, pause: float, **settings: Any) -> subprocess.Popen:
    """A training in a process group of its own, past its second step."""
    script = tmp_path / "train.py"
    tests = str(Path(__file__).parents[1] / "support")
    script.write_text(
        textwrap.dedent(SCRIPT).format(
            tests=tests, make=make.__name__, folder=str(tmp_path / "out"), settings=settings, pause=pause
        )
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "going" in line:
            return process
    raise AssertionError(f"the training ended with status {process.wait()}")


@pytest.mark.reliability(row="R10")
@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, WORKERS], ids=["0 workers", "2 workers"])
@either_loop
def test_sigterm_to_the_process_saves_at_once_and_leaves_with_its_own_status(make, settings, figure, tmp_path):
    with start_training(tmp_path, make, pause=0.0, **settings) as process:
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        output = next(line for line in process.stdout if "is saved in" in line)
        seconds = time.monotonic() - start
        process.communicate(timeout=120)
    assert process.returncode == 143, output
    assert str(newest_complete_checkpoint(tmp_path / "out")) in output
    assert {path.name.partition("-")[0] for path in (tmp_path / "out").iterdir()} == {"checkpoint"}
    figure("exit status", "143")
    figure("seconds until saved", seconds, at_most=2.0)


@pytest.mark.reliability(row="R11")
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@either_loop
def test_a_signal_to_the_whole_group_with_workers_leaves_a_whole_checkpoint(make, number, tmp_path):
    with start_training(tmp_path, make, pause=0.5, **WORKERS) as process:
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, output
    assert str(newest_complete_checkpoint(tmp_path / "out")) in output


@pytest.mark.reliability(row="R11")
@pytest.mark.slow
@either_loop
def test_a_second_signal_ends_the_process_at_once(make, tmp_path):
    with start_training(tmp_path, make, pause=600.0) as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == -signal.SIGTERM
    assert checkpoints_of(tmp_path / "out") == []


@pytest.mark.reliability(row="N01")
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("pixel", [1e30, float("nan"), float("inf")])
@either_loop
def test_a_bad_pixel_stops_training_before_the_step_and_is_named(make, pixel, ema_decay, tmp_path):
    trainer = make(tmp_path, save_strategy="steps", save_steps=1, ema_decay=ema_decay)
    prepare = trainer.train_dataset._prepare

    def poisoned(row: Any, index: int, epoch: int) -> dict:
        sample = prepare(row, index, epoch)
        if index == 7:
            sample["pixel_values"][0, 3, 3] = pixel
        return sample

    trainer.train_dataset._prepare = poisoned
    with pytest.raises(NonFiniteLossError, match=r"before the weights were moved; training samples: 7\b"):
        trainer.train()
    for folder in checkpoints_of(tmp_path):
        fresh = make_trainer(tmp_path / "fresh")
        fresh._load_from_checkpoint(str(folder))
        assert all(torch.isfinite(tensor).all() for tensor in weights(fresh).values())


@pytest.mark.reliability(row="N02")
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch_fused"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("warmup", [0, 3])
@either_loop
def test_divergence_is_an_error_and_nothing_of_it_is_saved(make, warmup, clip, optim, tmp_path):
    settings = {"optim": optim, "max_grad_norm": clip, "warmup_steps": warmup, "max_steps": 40}
    trainer = make(tmp_path, learning_rate=1e6, save_strategy="steps", save_steps=1, **settings)
    with pytest.raises(NonFiniteLossError, match=r"the (loss|norm of the gradients) is \S+ at step \d+, before"):
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(loss < 1e4 for loss in losses)
    for folder in checkpoints_of(tmp_path):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(folder / "model.safetensors").values())


def test_the_stock_way_to_save_on_sigterm_is_refused(tmp_path):
    with pytest.raises(ValueError, match="enable_jit_checkpoint must be false"):
        make_trainer(tmp_path, enable_jit_checkpoint=True)


@pytest.mark.reliability(row="N02")
@either_loop
def test_a_gradient_that_is_not_finite_stops_before_the_step(make, tmp_path):
    trainer = make(tmp_path)
    bias = trainer.model.classifier.bias
    bias.register_hook(lambda gradient: gradient * float("inf"))
    before = weights(trainer)
    with pytest.raises(NonFiniteLossError, match="norm of the gradients"):
        trainer.train()
    assert_equal(before, weights(trainer))


@pytest.mark.reliability(row="L03")
@either_loop
def test_two_trainings_do_not_share_a_folder(make, tmp_path):
    first, second = make(tmp_path), make(tmp_path)
    refusals = []

    def begin_the_second() -> None:
        with pytest.raises(RuntimeError, match="in use") as caught:
            second.train()
        refusals.append(caught.value)

    at_step(first, 2, begin_the_second)
    first.train()
    assert len(refusals) == 1
    assert first.state.global_step == 12
    second.train()


@pytest.mark.reliability(row="L04")
@pytest.mark.slow
@pytest.mark.parametrize("persistent", [True, False])
@either_loop
def test_a_killed_worker_ends_training_with_its_cause_and_a_checkpoint(make, persistent, figure, tmp_path):
    # twenty batches an epoch: more are wanted than lie ready when the workers die
    settings = WORKERS | {"dataloader_persistent_workers": persistent, "per_device_train_batch_size": 1}
    trainer = make(tmp_path, max_steps=1000, **settings)
    begin = []

    def kill_the_workers() -> None:
        begin.append(time.monotonic())
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        own = _command("self")
        workers = [int(pid) for pid in children if _command(pid) == own]  # not multiprocessing's own helpers
        for pid in workers:  # torch raises from here on
            os.kill(pid, signal.SIGKILL)

    at_step(trainer, 4, kill_the_workers)
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* what was trained is saved in .*checkpoint-\d+"):
        trainer.train()
    figure("seconds from kill to error", time.monotonic() - begin[0], at_most=5.0)
    newest_complete_checkpoint(tmp_path)


def _command(pid: str) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def stalls_at(index: int) -> Any:
    """A dataset in which a row's preparation never ends."""

    class Stalled(AugmentedImages):
        def __getitem__(self, row: int) -> dict:
            if row == index and self.epoch == 1:
                time.sleep(3600)
            return super().__getitem__(row)

    return Stalled


def test_a_worker_failure_before_the_first_save_says_that_nothing_was_saved():
    message = describe_worker_failure(RuntimeError("DataLoader worker (pid 1) exited"), None, timeout=60)
    assert (
        message == "DataLoader worker (pid 1) exited (dataloader_timeout is 60 s); nothing of this training was saved"
    )


@pytest.mark.reliability(row="L04")
@pytest.mark.slow
@either_loop
def test_a_stalled_worker_ends_training_within_the_timeout_with_a_checkpoint(make, figure, tmp_path):
    assert 0 < make(tmp_path).args.dataloader_timeout < float("inf")  # the default
    trainer = make(tmp_path, **(WORKERS | {"dataloader_timeout": 2.0}))
    processor = HfViTImageProcessor.for_model(trainer.model.config)
    trainer.train_dataset = stalls_at(3)(sample_images(), processor)
    with pytest.raises(RuntimeError, match=r"timed out after 2.* seconds.*saved in"):
        trainer.train()
    newest_complete_checkpoint(tmp_path)
    figure("stall: error and checkpoint after", "the timeout set (2 s; 300 by default)")


def test_soft_labels_give_the_same_loss_as_hard_ones_and_leave_the_model_as_it_is(tmp_path):
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    hard = classification_loss(logits, labels)
    torch.testing.assert_close(hard, nn.functional.cross_entropy(logits, labels))
    soft = classification_loss(logits, nn.functional.one_hot(labels, 4).float())
    torch.testing.assert_close(soft, hard)
    torch.testing.assert_close(classification_loss(logits, labels, num_samples=10.0), hard / 2)
    with pytest.raises(ValueError, match=r"labels are \(5, 3\)"):
        classification_loss(logits, torch.zeros(5, 3))
    trainer = make_trainer(tmp_path, mixup_alpha=0.8, max_steps=2)
    trainer.train()
    assert trainer.model.config.problem_type is None


@pytest.mark.parametrize("mixup_alpha", [0.0, 0.8])
def test_two_halves_accumulated_are_one_batch(mixup_alpha, tmp_path):
    """Without dropout; and of mixup, which pairs images of one pass, only the scale of the loss can be compared."""
    losses = {}
    for accumulation in (1, 2):
        trainer = make_trainer(
            tmp_path / str(accumulation),
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            mixup_alpha=mixup_alpha,
            is_random=False,
        )
        trainer.train()
        losses[accumulation] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tolerance = 1e-5 if mixup_alpha == 0 else 0.5
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[2]), rtol=0, atol=tolerance)


def test_label_smoothing_is_for_training_alone(tmp_path):
    plain, smooth = make_trainer(tmp_path), make_trainer(tmp_path, label_smoothing_factor=0.3)
    assert plain.evaluate()["eval_loss"] == smooth.evaluate()["eval_loss"]
    smooth.train()
    plain.train()
    assert plain.state.log_history[0]["loss"] != smooth.state.log_history[0]["loss"]


def test_averages_follow_the_weights_as_the_formula_says():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema = ExponentialMovingAverage(model, 0.5)
    expected = 1.0
    for step in range(1, 8):
        nn.init.constant_(model.weight, float(step))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert ema.averages["weight"].item() == pytest.approx(expected, rel=1e-6)
    with ema.in_model():
        assert model.weight.item() == pytest.approx(expected, rel=1e-6)
    assert model.weight.item() == 7.0


def test_the_averaged_model_is_evaluated_and_kept(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=0.9, eval_strategy="steps", eval_steps=12, learning_rate=0.1)
    plain = make_trainer(tmp_path, learning_rate=0.1)
    trainer.train()
    plain.train()
    logged = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.evaluate()["eval_loss"] == logged
    assert not torch.equal(trainer.model.classifier.weight, plain.model.classifier.weight)


def test_the_reference_optimizer_and_schedule_are_the_trainers(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=6, warmup_steps=2, learning_rate=0.05, lr_scheduler_type="cosine")
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    expected = [0.0, 0.025, 0.05, 0.04267767, 0.025, 0.00732233]  # what the reference recorded
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected), rtol=0, atol=1e-8)


def test_the_head_learns_faster_than_the_embeddings_with_layer_decay(tmp_path):
    def moved(layer_decay: float) -> float:
        trainer = make_trainer(tmp_path, layer_decay=layer_decay, max_steps=3)
        before = weights(trainer)
        trainer.train()
        after = weights(trainer)
        change = {name: (after[name] - before[name]).norm() for name in after}
        return float(change["vit.embeddings.patch_embeddings.weight"] / change["classifier.weight"])

    assert moved(0.1) < 0.01 * moved(1.0)


def test_samples_are_named_with_their_files(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict(
        {"image": [{"path": f"a/{index}.png", "bytes": None} for index in range(3)]},
        features=datasets.Features({"image": datasets.Image(decode=False)}),
    )
    dataset = AugmentedImages.__new__(AugmentedImages)
    dataset.dataset = rows
    assert describe_samples(dataset, [2, 0]) == "2 (a/2.png), 0 (a/0.png)"
    assert describe_samples([], range(10)) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


def test_training_a_head_alone_leaves_the_rest(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    assert isinstance(trainer.model, HfViTForImageClassification)
    trainer.model.vit.requires_grad_(False)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert trainer.model.classifier.out_features == CLASSES
