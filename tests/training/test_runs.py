"""Runs as users start them: output folders, resuming with other arguments, recipes, early stopping, small sets."""

import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from example_scripts import load_example
from safetensors.torch import load_file
from tiny_models import TINY
from training_runs import either_loop, make_trainer, weights

from hf_vit import HfViTConfig, HfViTForImageClassification, HfViTImageProcessor
from hf_vit.files.errors import CheckpointError
from hf_vit.training import effective_settings, format_settings, parse_arguments
from hf_vit.training.checkpointing import checkpoints_of
from hf_vit.training.command_line import fit_to_small_set
from hf_vit.training.exporting import wilson_interval


PEFT_ASKS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
SCRIPTS = ["finetune_trainer", "finetune_accelerate"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A model of two classes and two folders of twelve images each."""
    root = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    config = (
        HfViTConfig(
            **{**TINY, "image_size": 8, "patch_size": 4, "hidden_dropout_prob": 0.1},
            id2label={0: "bright", 1: "dark"},
            label2id={"bright": 0, "dark": 1},
            zero_init_head=False,
        )
        if "num_labels" not in TINY
        else HfViTConfig(
            **{**{k: v for k, v in TINY.items() if k != "num_labels"}, "image_size": 8, "patch_size": 4},
            hidden_dropout_prob=0.1,
            id2label={0: "bright", 1: "dark"},
            label2id={"bright": 0, "dark": 1},
            zero_init_head=False,
        )
    )
    HfViTForImageClassification(config).save_pretrained(root / "model")
    HfViTImageProcessor.for_model(config).save_pretrained(root / "model")
    generator = np.random.default_rng(0)
    for name, low in (("bright", 160), ("dark", 0)):
        (root / "images" / name).mkdir(parents=True)
        for index in range(12):
            pixels = generator.integers(low, low + 90, (9, 11, 3), np.uint8)
            PIL.Image.fromarray(pixels).save(root / "images" / name / f"{index}.png")
    return root


def flags(root: Path, out: Path, *more: str) -> list[str]:
    given = {flag.partition("=")[0] for flag in more}
    defaults = [
        f"--model_name_or_path={root / 'model'}",
        f"--dataset={root / 'images'}",
        f"--output_dir={out}",
        "--max_steps=4",
        "--total_batch_size=4",
        "--eval_strategy=no",
        "--save_strategy=steps",
        "--save_steps=2",
        "--logging_steps=1",
        "--learning_rate=0.01",
        "--dataloader_num_workers=0",
        "--disable_tqdm=true",
        "--use_cpu=true",
    ]
    return [flag for flag in defaults if flag.partition("=")[0] not in given] + list(more)


def run(script: str, root: Path, out: Path, *more: str) -> int:
    return load_example(script).main(flags(root, out, *more))


# -- output folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_with_a_run_is_refused_and_nothing_of_it_changes(script, root, tmp_path):
    assert run(script, root, tmp_path) == 0
    (tmp_path / "annotations.json").write_text("{}")
    (tmp_path / "best_of_mine.safetensors").write_bytes(b"mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match=r"--resume_from_checkpoint last.*--overwrite_output_dir true"):
        run(script, root, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert run(script, root, tmp_path, "--overwrite_output_dir=true", "--max_steps=2", "--seed=1") == 0
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-2"]
    assert (tmp_path / "annotations.json").read_text() == "{}"
    assert (tmp_path / "best_of_mine.safetensors").read_bytes() == b"mine"


def test_a_card_of_the_user_and_a_path_below_a_file_are_refused_before_the_images_are_read(root, tmp_path):
    (tmp_path / "README.md").write_text("# My notes\n")
    with pytest.raises(FileExistsError, match=r"README\.md was not written by hf-vit"):
        run("finetune_trainer", root, tmp_path, "--dataset=/nowhere")
    with pytest.raises(OSError, match="file"):
        run("finetune_trainer", root, tmp_path / "README.md" / "out", "--dataset=/nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    "options", [[], ["--trainable=lora", "--lora_rank=2", "--merge_adapters=false"]], ids=["model", "adapter"]
)
@PEFT_ASKS
def test_no_file_that_a_training_writes_replaces_one_of_the_user(options, root, tmp_path):
    assert run("finetune_trainer", root, tmp_path / "run", "--max_steps=1", *options) == 0
    names = {path.name for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert {"README.md", "results.json", "recipe.toml", "training_curves.png", "log.jsonl"} <= names
    for name in sorted(names):
        folder = tmp_path / f"of {name}"
        folder.mkdir()
        (folder / name).write_text("mine")
        for more in ([], [f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-1'}"]):
            with pytest.raises(FileExistsError, match=f"(?s){re.escape(name)}.*--overwrite_output_dir true"):
                run("finetune_trainer", root, folder, "--dataset=/nowhere", *options, *more)
        assert [path.name for path in folder.iterdir()] == [name]
        assert (folder / name).read_text() == "mine"


def test_a_card_written_into_a_stopped_run_is_not_replaced_by_resuming(root, tmp_path):
    assert run("finetune_trainer", root, tmp_path, "--max_steps=2") == 0
    assert run("finetune_trainer", root, tmp_path, "--max_steps=2", "--resume_from_checkpoint=last") == 0
    (tmp_path / "README.md").write_text("# My notes\n")
    with pytest.raises(FileExistsError, match=r"README\.md was not written by hf-vit"):
        run("finetune_trainer", root, tmp_path, "--max_steps=2", "--resume_from_checkpoint=last")
    assert (tmp_path / "README.md").read_text() == "# My notes\n"


def test_the_current_folder_is_a_place_for_a_model(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_example("finetune_trainer").main(flags(root, Path(), "--save_strategy=no", "--max_steps=1")) == 0
    HfViTForImageClassification.from_pretrained(tmp_path)


# -- resuming -------------------------------------------------------------------------------------------------------


@either_loop
def test_a_finished_run_that_is_resumed_trains_nothing_more(make, tmp_path):
    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 7, "ema_decay": 0.9}  # in the second epoch
    first = make(tmp_path, **settings)
    first.train()
    second = make(tmp_path, **settings)
    second.train(resume_from_checkpoint="last")
    assert second.state.global_step == 7
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-7"]
    left, right = weights(first), weights(second)
    assert all(torch.equal(left[name], right[name]) for name in left)


@either_loop
def test_arguments_that_change_the_result_are_refused_unless_allowed(make, tmp_path, caplog):
    make(tmp_path, max_steps=4, save_strategy="steps", save_steps=2).train()
    changed = {"max_steps": 4, "learning_rate": 0.5}
    with pytest.raises(CheckpointError, match=r"learning_rate 0\.01 -> 0\.5; .*--allow_changed_arguments true"):
        make(tmp_path, **changed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again = make(tmp_path, **changed, allow_changed_arguments=True)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    rates = [entry["learning_rate"] for entry in again.state.log_history if entry["step"] > 2 and "loss" in entry]
    assert rates == pytest.approx([0.5 * 0.5, 0.5 * 0.25], rel=1e-3)  # the new rate is in force
    with caplog.at_level(logging.WARNING):
        make(tmp_path, max_steps=4, logging_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "logging_steps 1 -> 2" in caplog.text
    caplog.clear()
    same = make(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    same.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "other settings" not in caplog.text


@pytest.mark.parametrize(
    "flag", ["--split_seed=1", "--test_size=0.4", "--mixup_alpha=0.2", "--seed=5", "--ema_decay=0.5"]
)
def test_another_split_or_training_is_not_resumed(flag, root, tmp_path):
    if not checkpoints_of(root / "resumed"):
        assert run("finetune_trainer", root, root / "resumed") == 0
    with pytest.raises(CheckpointError, match=flag.strip("-").partition("=")[0] + "|ema.safetensors missing"):
        run("finetune_trainer", root, root / "resumed", flag, "--resume_from_checkpoint=last")


@pytest.mark.parametrize("wanted", ["True", "true", "last"])
def test_resuming_without_a_checkpoint_says_so(wanted, root, tmp_path):
    with pytest.raises(CheckpointError, match="expected a complete checkpoint to resume from, got none"):
        run("finetune_trainer", root, tmp_path, f"--resume_from_checkpoint={wanted}")


def test_a_mistyped_checkpoint_is_named(root, tmp_path):
    with pytest.raises(CheckpointError, match="lst: there is no such folder; expected `last`"):
        run("finetune_trainer", root, tmp_path, "--resume_from_checkpoint=lst")


# -- the commands' settings -----------------------------------------------------------------------------------------


def test_any_flag_wins_over_the_recipe_in_every_command():
    base = ["--dataset=d", "--output_dir=o", "--image_size=64", "--use_cpu=true"]
    pretrain = load_example("pretrain")
    own, _, args = parse_arguments(base, "", model_arguments=pretrain.PretrainArguments, recipe="scratch")
    assert (own.image_size, own.preset, args.total_batch_size) == (64, "ViT-S_16", 1024)
    own, _, _ = parse_arguments(base[:2], "", model_arguments=pretrain.PretrainArguments, recipe="scratch")
    assert own.image_size == 224
    _, _, args = parse_arguments(["--model_name_or_path=m", *base, "--total_batch_size=16"], "")
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (16, 1)


def test_pretrain_lists_its_flags_and_writes_nothing_before_they_are_complete(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        load_example("pretrain").main(["--help"])
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--preset", "--objective", "--total_batch_size", "--dataset", "--recipe"))
    with pytest.raises(SystemExit):
        load_example("pretrain").main(["--output_dir=out"])  # no --dataset
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_file_sets_arguments_over_its_base(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text('base = "paper"\nlearning_rate = 0.002\ntrainable = "head"\nhorizontal_flip = false\n')
    command = ["--model_name_or_path=m", "--dataset=d", f"--recipe={file}", "--use_cpu=true"]
    model_args, _, args = parse_arguments(command, "")
    assert (args.optim, args.learning_rate, model_args.trainable) == ("sgd", 0.002, "head")
    assert args.horizontal_flip is False
    _, _, args = parse_arguments([*command, "--learning_rate=0.5"], "")
    assert args.learning_rate == 0.5
    file.write_text("learning_rat = 1\n")
    with pytest.raises(ValueError, match="sets learning_rat: expected names of this command's flags"):
        parse_arguments(command, "")
    file.write_text("learning_rate = \n")
    with pytest.raises(ValueError, match="is not valid TOML"):
        parse_arguments(command, "")


def test_the_printed_settings_are_a_recipe_that_gives_the_same_settings(capsys, tmp_path):
    command = ["--model_name_or_path=m", "--dataset=d", "--recipe=modern", "--learning_rate=0.3", "--use_cpu=true"]
    assert load_example("finetune_trainer").main([*command, "--print_config=true"]) == 0
    file = tmp_path / "mine.toml"
    file.write_text(capsys.readouterr().out)
    first = parse_arguments(command, "")
    second = parse_arguments([*command[:2], f"--recipe={file}", "--use_cpu=true"], "")
    left, right = effective_settings(*first), effective_settings(*second)
    assert {**left, "recipe": ""} == {**right, "recipe": ""}
    assert format_settings(left).startswith("model_name_or_path")


@pytest.mark.parametrize(
    ("images", "given", "batch", "steps"),
    [
        (48, (), 8, 204),
        (300, (), 32, 200),
        (5000, (), 128, 400),
        (48, ("num_train_epochs",), 8, 60),
        (48, ("total_batch_size", "max_steps"), 128, 10),
    ],
)
def test_the_default_recipe_makes_at_least_200_steps(images, given, batch, steps):
    _, data_args, args = parse_arguments(["--model_name_or_path=m", "--dataset=d", "--use_cpu=true"], "")
    data_args.given = frozenset(given)
    fit_to_small_set(data_args, args, images)
    assert args.total_batch_size == batch
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == batch
    assert -(-images // batch) * args.num_train_epochs == pytest.approx(steps, rel=0.03)


def test_the_summary_has_the_uncertainty_of_few_images():
    assert wilson_interval(1.0, 12) == pytest.approx((0.7575, 1.0), abs=1e-3)
    assert wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-3)


# -- what a run leaves ----------------------------------------------------------------------------------------------


@PEFT_ASKS
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_leaves_its_log_its_settings_and_a_card_of_plain_values(script, root, tmp_path, capsys):
    assert (
        run(script, root, tmp_path, "--lora_rank=2", "--trainable=lora", "--eval_strategy=steps", "--eval_steps=2")
        == 0
    )
    printed = capsys.readouterr().out
    assert "2 classes" in printed
    assert "95 % interval" in printed
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4]
    assert {entry["step"] for entry in entries if "eval_loss" in entry} >= {2, 4}
    card = (tmp_path / "README.md").read_text()
    for row in ("| lora_rank | 2 |", "| max_steps | 4 |", "| trainable | lora |", "| hidden_dropout_prob | 0.1 |"):
        assert row in card
    assert "num_train_epochs" not in card
    assert "OptimizerNames" not in card
    assert "momentum_dtype" not in card  # of SGD alone
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["split"] == {
        "evaluated_on": "test",
        "images": {"train": 20, "test": 4},
        "test_size": 0.2,
        "split_seed": 0,
    }
    assert (tmp_path / "recipe.toml").is_file()


@PEFT_ASKS
def test_lora_is_the_same_training_for_trainer_and_the_loop(root, tmp_path):
    for script in SCRIPTS:
        assert run(script, root, tmp_path / script, "--trainable=lora", "--lora_rank=2", "--max_steps=8") == 0
    left, right = (load_file(tmp_path / script / "model.safetensors") for script in SCRIPTS)
    assert all(torch.equal(left[name], right[name]) for name in left)


@PEFT_ASKS
def test_adapters_can_be_kept_apart(root, tmp_path):
    more = ["--trainable=lora", "--merge_adapters=false", "--lora_targets", "fc1", "fc2", "--lora_alpha=8"]
    assert run("finetune_trainer", root, tmp_path, *more, "--save_strategy=no") == 0
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (sorted(config["target_modules"]), config["lora_alpha"], config["r"]) == (["fc1", "fc2"], 8, 16)
    assert not (tmp_path / "model.safetensors").exists()


def test_the_head_and_the_dropout_of_a_checkpoint_with_the_same_classes_are_kept(root, tmp_path):
    command = flags(root, tmp_path)
    arguments = parse_arguments(command, "")
    from hf_vit.training.finetuning import load_model

    stored = HfViTForImageClassification.from_pretrained(root / "model")
    kept = load_model(arguments[0], ["bright", "dark"])
    assert torch.equal(kept.classifier.weight, stored.classifier.weight)
    assert kept.config.hidden_dropout_prob == 0.1
    assert kept.config.problem_type == "single_label_classification"
    changed = load_model(dataclasses.replace(arguments[0], hidden_dropout_prob=0.3), ["dark", "bright"])
    assert changed.classifier.weight.abs().max() == 0
    assert changed.config.hidden_dropout_prob == 0.3


def test_frozen_blocks_do_not_move(root, tmp_path):
    assert run("finetune_trainer", root, tmp_path, "--freeze_blocks=1", "--save_strategy=no") == 0
    before, after = load_file(root / "model" / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(".embeddings." in name or ".layer.0." in name for name in moved)
    assert any(".layer.1." in name for name in moved)
    with pytest.raises(ValueError, match="freeze_blocks is 9, expected 1 to 2 blocks"):
        run("finetune_trainer", root, tmp_path / "other", "--freeze_blocks=9")


@either_loop
def test_the_best_checkpoint_is_saved_and_early_stopping_ends_with_it(make, tmp_path):
    settings: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "best",
        "early_stopping_patience": 2,
        "learning_rate": 0.5,
        "max_steps": 40,
    }
    trainer = make(tmp_path, **settings)
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = evaluated.index(min(evaluated)) + 1
    assert trainer.state.global_step == best + 2 < 40
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    saved = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights(trainer).items())


@pytest.mark.parametrize("script", SCRIPTS)
def test_unusual_loader_flags_do_not_change_the_evaluation(script, root, tmp_path):
    more = ["--dataloader_drop_last=true", "--dataloader_persistent_workers=true", "--eval_strategy=epoch"]
    more += ["--gradient_checkpointing=true", "--per_device_eval_batch_size=3"]
    assert run(script, root, tmp_path, *more) == 0
    assert 0 <= json.loads((tmp_path / "results.json").read_text())["eval_accuracy"] <= 1


def test_class_weights_are_inverse_frequencies_with_mean_one_or_those_of_a_file(root, tmp_path):
    from hf_vit.training.finetuning import prepare

    for extra in (1, 2, 3):
        (root / "images" / "bright" / f"{extra}.png").rename(tmp_path / f"{extra}.png")
    try:
        task = prepare(*parse_arguments(flags(root, tmp_path / "out", "--class_weights=auto"), ""))
        counts = torch.tensor([7.0, 10.0])
        torch.testing.assert_close(task.class_weights, (1 / counts) / (1 / counts).mean())
    finally:
        for extra in (1, 2, 3):
            (tmp_path / f"{extra}.png").rename(root / "images" / "bright" / f"{extra}.png")
    file = tmp_path / "weights.json"
    file.write_text('{"bright": 2, "dark": 0.5}')
    task = prepare(*parse_arguments(flags(root, tmp_path / "out", f"--class_weights={file}"), ""))
    assert task.class_weights.tolist() == [2.0, 0.5]
    file.write_text('{"bright": 2}')
    with pytest.raises(ValueError, match="expected one weight of at least 0 for each of bright, dark"):
        prepare(*parse_arguments(flags(root, tmp_path / "out", f"--class_weights={file}"), ""))


def test_a_trainer_made_by_hand_keeps_its_folder_free_of_logs(tmp_path):
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
