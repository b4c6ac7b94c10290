"""An interrupted training ends bit for bit as an uninterrupted one, from checkpoints that are whole."""

import json
import logging
import os
import shutil
import signal
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from training_runs import (
    WORKERS,
    assert_equal,
    either_loop,
    make_trainer,
    sample_images,
    weights,
)
from transformers import set_seed

from hf_vit import HfViTImageProcessor
from hf_vit.data.augmentation import Augment, AugmentedImages
from hf_vit.files.errors import CheckpointError
from hf_vit.training.checkpointing import (
    Checkpointer,
    checkpoints_of,
    load_weights,
    newest_complete_checkpoint,
    verify_checkpoint,
    write_manifest,
)
from hf_vit.training.interruption import TrainingInterrupted
from hf_vit.training.trainer import HfViTTrainer


def train_whole_and_in_two(
    tmp_path: Path, stop: int, changes: dict | None = None, make: Any = make_trainer, **settings: Any
) -> list[dict]:
    """Weights and losses of one uninterrupted training, and of one that was left at step `stop` and taken up again."""
    ends = []
    whole = make(tmp_path / "whole", save_strategy="steps", save_steps=stop, **settings)
    whole.train()
    ends.append(weights(whole))
    resumed = make(tmp_path / "resumed", **(settings | (changes or {})))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    ends.append(weights(resumed))
    losses = [
        {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        for trainer in (whole, resumed)
    ]
    assert losses[0] == losses[1]
    return ends


@pytest.mark.reliability(row="R03")
@pytest.mark.parametrize("stop", [3, 5, 7], ids=["mid epoch 1", "end of epoch 1", "mid epoch 2"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optim": "adamw_torch_fused", "ema_decay": 0.9, "mixup_alpha": 0.8, "label_smoothing_factor": 0.1},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "layer_decay": 0.5},
        {"eval_strategy": "steps", "eval_steps": 2},
        {"is_random": False},
    ],
    ids=["SGD", "AdamW, EMA, mixup", "accumulation", "evaluation between", "nothing random"],
)
@either_loop
def test_a_resumed_training_ends_bit_for_bit_as_a_whole_one(make, settings, stop, tmp_path):
    whole, resumed = train_whole_and_in_two(tmp_path, stop, make=make, **settings)
    assert_equal(whole, resumed)


@pytest.mark.reliability(row="R03")
@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 5, 7])
@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        (WORKERS, None),
        (WORKERS | {"dataloader_persistent_workers": False}, None),
        (WORKERS, {"dataloader_num_workers": 1}),
        (WORKERS, {"dataloader_num_workers": 0, "dataloader_persistent_workers": False}),
        ({}, WORKERS),
        (WORKERS | {"is_random": False}, None),
        (WORKERS | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "ema_decay": 0.9}, None),
    ],
    ids=["2 persistent", "2", "2 then 1", "2 then 0", "0 then 2", "nothing random", "accumulation, EMA"],
)
def test_workers_do_not_matter_to_a_resumed_training(settings, changes, stop, tmp_path):
    whole, resumed = train_whole_and_in_two(tmp_path, stop, changes, **settings)
    assert_equal(whole, resumed)


@pytest.mark.reliability(row="R03")
def test_another_seed_is_another_training(tmp_path):
    """The negative control: these trainings are random enough to tell."""
    one, other = make_trainer(tmp_path / "one"), make_trainer(tmp_path / "other")
    other.train_dataset = AugmentedImages(
        sample_images(), HfViTImageProcessor.for_model(other.model.config), augment=Augment(), seed=4
    )
    one.train()
    other.train()
    assert not torch.equal(one.model.classifier.weight, other.model.classifier.weight)


@pytest.mark.reliability(row="R01")
def test_every_tensor_is_that_of_the_checkpoint_before_the_first_step(tmp_path):
    first = make_trainer(tmp_path, save_strategy="steps", save_steps=4)
    first.train()
    second = make_trainer(tmp_path)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.zero_()
    second._load_from_checkpoint(str(tmp_path / "checkpoint-4"))
    assert_equal(weights(second), load_file(tmp_path / "checkpoint-4" / "model.safetensors"))


@pytest.mark.reliability(row="R01")
@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_a_checkpoint_of_another_model_is_refused_by_the_tensors_name(change, tmp_path):
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    path = tmp_path / "checkpoint-2" / "model.safetensors"
    tensors = load_file(path)
    if change == "missing":
        del tensors["classifier.bias"]
    elif change == "extra":
        tensors["classifier.more"] = torch.zeros(1)
    else:
        tensors["classifier.bias"] = torch.zeros(7)
    save_file(tensors, path)
    words = {
        "missing": "missing .classifier.bias",
        "extra": "unknown .* .classifier.more",
        "shape": r"\(7,\), expected",
    }
    trainer = make_trainer(tmp_path)
    before = weights(trainer)
    with pytest.raises(CheckpointError, match=words[change]):
        trainer._load_from_checkpoint(str(path.parent))
    assert_equal(before, weights(trainer))


@pytest.mark.reliability(row="R02")
@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_the_best_model_is_returned_whole(ema_decay, tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "metric_for_best_model": "loss",
        "greater_is_better": False,  # the least is in the middle of this training
        "load_best_model_at_end": True,
        "ema_decay": ema_decay,
    }
    trainer = make_trainer(tmp_path, **settings)
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.name != "checkpoint-12"
    if not ema_decay:
        assert_equal(weights(trainer), load_file(best / "model.safetensors"))
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


def damage(folder: Path, how: str) -> str:
    """Damages a checkpoint; returns the name of the file that must be named."""
    name = {"no manifest": "manifest.json", "half a manifest": "manifest.json"}.get(how, "optimizer.pt")
    path = folder / name
    if how in ("no manifest", "deleted"):
        path.unlink()
    elif how in ("truncated", "half a manifest"):
        path.write_bytes(path.read_bytes()[:-20])
    elif how == "one bit":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    return name


@pytest.mark.reliability(row="R13")
@pytest.mark.reliability(row="R06")
@pytest.mark.parametrize("how", ["deleted", "truncated", "one bit", "no manifest", "half a manifest"])
def test_a_damaged_checkpoint_is_skipped_and_named(how, tmp_path, caplog):
    make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2).train()
    name = damage(tmp_path / "checkpoint-4", how)
    with caplog.at_level(logging.WARNING):
        assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert "checkpoint-4" in caplog.text
    assert name in caplog.text
    with pytest.raises(CheckpointError, match=name):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def spoil(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "one bit":
        content[len(content) // 3] ^= 4
        path.write_bytes(content)
    else:
        path.write_bytes(b"\x80\x02cos\nsystem\n(S'touch ran'\ntR.")


@pytest.mark.reliability(row="R06")
def test_whatever_is_damaged_in_a_checkpoint_it_is_skipped_and_the_older_one_taken(figure, tmp_path, caplog):
    make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, ema_decay=0.5).train()
    newest, cases = tmp_path / "checkpoint-4", 0
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        for how in ("deleted", "emptied", "cut", "one bit", "pickle"):
            spoil(path, how)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2", (path.name, how)
            assert "skipped a damaged checkpoint" in caplog.text
            assert path.name in caplog.text or path.name == "manifest.json"  # whose damage may show at another file
            path.write_bytes(content)
            cases += 1
    assert newest_complete_checkpoint(tmp_path) == newest
    assert cases >= 45
    figure("damages skipped and named", f"{cases}/{cases}")


@pytest.mark.reliability(row="R06")
@pytest.mark.reliability(row="W06")
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_a_pickle_with_a_manifest_that_fits_runs_no_code(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_trainer(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=2).train()
    spoil(tmp_path / "out" / "checkpoint-2" / name, "pickle")
    write_manifest(tmp_path / "out" / "checkpoint-2")
    with pytest.raises((CheckpointError, UnpicklingError), match=r"Weights only load failed|cannot be read"):
        make_trainer(tmp_path / "out", allow_changed_arguments=True).train(resume_from_checkpoint="last")
    assert not (tmp_path / "ran").exists()


@pytest.mark.reliability(row="R13")
def test_resuming_with_nothing_complete_is_an_error(tmp_path):
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    damage(tmp_path / "checkpoint-2", "deleted")
    with pytest.raises(CheckpointError, match="got 1 damaged"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError, match="got none"):
        make_trainer(tmp_path).train(resume_from_checkpoint="last")


@pytest.mark.reliability(row="R13")
def test_averages_are_wanted_but_not_in_the_checkpoint(tmp_path):
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    with pytest.raises(CheckpointError, match=r"ema\.safetensors missing"):
        make_trainer(tmp_path, ema_decay=0.9).train(resume_from_checkpoint="last")


def test_a_checkpoint_holds_no_pickle_of_arguments_and_lists_all_its_files(tmp_path):
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    verify_checkpoint(folder)
    names = {path.name for path in folder.iterdir()}
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == names - {"manifest.json"}
    assert "training_args.json" in names
    assert "training_args.bin" not in names


@pytest.mark.reliability(row="R07")
def test_a_failed_save_leaves_the_older_checkpoint_and_no_stray(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)

    def disk_full(*_: Any) -> None:
        if trainer.state.global_step == 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpointer, "_save_optimizer", disk_full)
    with pytest.raises(OSError, match=r"bytes free, .* nothing was changed, make room"):
        trainer.train()
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-2"]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2"}


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_evaluation_due_at_the_interrupted_step_is_made_up_for(strategy, ema_decay, tmp_path):
    settings = {"eval_strategy": strategy, "eval_steps": 5, "ema_decay": ema_decay}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    stopped = make_trainer(tmp_path / "stopped", **settings)
    fetch = stopped.get_batch_samples

    def fetch_and_stop(*args: Any) -> Any:
        if stopped.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return fetch(*args)

    stopped.get_batch_samples = fetch_and_stop
    with pytest.raises(TrainingInterrupted):
        stopped.train()
    assert [entry for entry in stopped.state.log_history if "eval_loss" in entry] == []
    resumed = make_trainer(tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint="last")
    found, expected = (
        {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
        for trainer in (resumed, whole)
    )
    assert 5 in expected
    assert found == expected
    assert_equal(weights(whole), weights(resumed))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own question
def test_adapters_are_resumed_bit_for_bit_and_refused_where_a_tensor_is_missing(tmp_path):
    def with_adapters(folder: Path, **settings: Any) -> HfViTTrainer:
        trainer = make_trainer(folder, optim="adamw_torch_fused", **settings)
        set_seed(5)
        config = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
        trainer.model = trainer.model_wrapped = get_peft_model(trainer.model, config)
        set_seed(3)
        return trainer

    whole = with_adapters(tmp_path / "whole", save_strategy="steps", save_steps=5)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    resumed = with_adapters(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_equal(weights(whole), weights(resumed))
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    gone = next(name for name in tensors if "lora_B" in name)
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != gone}, checkpoint / "adapter_model.safetensors"
    )
    with pytest.raises(CheckpointError, match=f"missing .{gone}"):
        load_weights(with_adapters(tmp_path / "other").model, checkpoint)
