"""The fine-tuning command, from its flags to the folder that it leaves."""

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import numpy as np
import PIL.Image
import pytest
import torch
from example_scripts import load_example
from odd_images import READ_RIGHT, REFUSED, write_odd_files
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, pipeline, set_seed

from hf_vit import HfViTConfig, HfViTForImageClassification, HfViTImageProcessor
from hf_vit.data.augmentation import collate_images
from hf_vit.data.datasets import load_splits
from hf_vit.data.images import ImageError
from hf_vit.training import export, make_trainer, parse_arguments, prepare, wants_recipes
from hf_vit.training.checkpointing import newest_complete_checkpoint


SCRIPT = Path(__file__).parents[2] / "examples" / "finetune_trainer.py"
CHECKPOINT = Path(__file__).parents[2] / "examples" / "checkpoints" / "vit-mnist.npz"
BASE = ["--model_name_or_path=m", "--dataset=digits"]


def run(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *argv], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model of 8x8 pixels that knows two classes."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = HfViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        id2label={0: "bright", 1: "dark"},
        label2id={"bright": 0, "dark": 1},
    )
    HfViTForImageClassification(config).save_pretrained(folder)
    HfViTImageProcessor.for_model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Ten bright and ten dark images, in class folders."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name, low in (("bright", 160), ("dark", 0)):
        (folder / name).mkdir()
        for index in range(10):
            pixels = generator.integers(low, low + 90, (9, 11, 3), np.uint8)
            PIL.Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def test_a_recipe_sets_the_arguments_and_flags_override_it():
    model_args, _, args = parse_arguments([*BASE, "--recipe=paper", "--learning_rate=0.5", "--image_size=64"], "")
    assert (args.optim, args.learning_rate, args.max_steps) == ("sgd", 0.5, 850)
    assert model_args.image_size == 64
    _, _, args = parse_arguments([*BASE, "--recipe", "paper", "--num_train_epochs", "2"], "")
    assert (args.max_steps, args.num_train_epochs) == (-1, 2)
    _, _, args = parse_arguments([*BASE, "--gradient_accumulation_steps=3", "--per_device_train_batch_size=5"], "")
    assert (args.total_batch_size, args.gradient_accumulation_steps) == (None, 3)


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="unknown recipe 'best'"):
        parse_arguments([*BASE, "--recipe=best"], "")


@pytest.mark.parametrize(("argv", "wanted"), [(["--recipe", "list"], True), (["--recipe=list"], True), (BASE, False)])
def test_the_list_of_recipes_is_asked_for_by_name(argv, wanted):
    assert wants_recipes(argv) is wanted


def test_fine_tuning_on_a_folder_leaves_a_model_that_pipeline_opens(model_folder, image_folder, tmp_path):
    result = run(
        f"--model_name_or_path={model_folder}",
        f"--dataset={image_folder}",
        f"--output_dir={tmp_path}",
        "--num_train_epochs=6",
        "--learning_rate=0.01",
        "--total_batch_size=8",
        "--per_device_train_batch_size=4",
        "--use_cpu=true",
    )
    assert result.returncode == 0, result.stderr
    assert "held-out images" in result.stdout
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "results.json"} <= names
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert "adamw" in card
    accuracy = json.loads((tmp_path / "results.json").read_text())["eval_accuracy"]
    classify = pipeline("image-classification", model=str(tmp_path))
    answers = [classify(str(image_folder / name / "0.png"))[0]["label"] for name in ("bright", "dark")]
    assert accuracy == 1.0
    assert answers == ["bright", "dark"]


@pytest.mark.slow
@pytest.mark.reliability(row="I03")
def test_a_bad_image_is_named_before_anything_is_trained(model_folder, image_folder, tmp_path):
    broken = tmp_path / "images"
    for path in image_folder.rglob("*.png"):
        copy = broken / path.relative_to(image_folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes() if path.name != "3.png" else path.read_bytes()[:60])
    argv = (f"--model_name_or_path={model_folder}", f"--dataset={broken}", f"--output_dir={tmp_path / 'out'}")
    result = run(*argv, "--use_cpu=true")
    assert result.returncode != 0
    assert "bright/3.png" in result.stderr
    assert "dark/3.png" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.reliability(row="I01")
@pytest.mark.reliability(row="I03")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")  # Pillow's own, before ours
@pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning")
@pytest.mark.parametrize("script", ["finetune_trainer", "finetune_accelerate"])
def test_among_odd_files_all_images_are_trained_on_and_the_others_are_named(
    script, model_folder, image_folder, tmp_path, caplog
):
    images, out = tmp_path / "images", tmp_path / "out"
    for good, among in (("bright", "odd"), ("dark", "even")):
        shutil.copytree(image_folder / good, images / among)
    write_odd_files(images, READ_RIGHT | REFUSED)
    main = run_path(str(SCRIPT.with_stem(script)))["main"]
    flags = [f"--model_name_or_path={model_folder}", f"--dataset={images}", f"--output_dir={out}", "--use_cpu=true"]
    flags += ["--total_batch_size=1", "--per_device_train_batch_size=1", "--num_train_epochs=1", "--logging_steps=1"]
    with pytest.raises(ImageError, match="9 of 50 images cannot be read") as refusal:
        main(flags)
    assert {name for name in READ_RIGHT | REFUSED if f"/{name}: " in str(refusal.value)} == set(REFUSED) - {
        "drawing.eps"
    }
    assert not out.exists()
    with caplog.at_level(logging.WARNING):
        assert main([*flags, "--bad_images=skip", "--disable_tqdm=true"]) == 0
    assert {name for name in READ_RIGHT | REFUSED if f"/{name}: " in caplog.text} == set(REFUSED) - {"drawing.eps"}
    splits = load_splits(str(images), bad_images="skip")
    assert len(splits["train"]) + len(splits["test"]) == 20 + len(READ_RIGHT)
    history = json.loads((newest_complete_checkpoint(out) / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == len(splits["train"])  # a step for each image
    assert np.isfinite(losses).all()
    assert HfViTForImageClassification.from_pretrained(out).config.id2label == {0: "even", 1: "odd"}


def prepared(model_folder, image_folder, folder, *more: str):
    """The task and trainer that the command makes of its flags."""
    flags = [f"--model_name_or_path={model_folder}", f"--dataset={image_folder}", f"--output_dir={folder}"]
    flags += ["--use_cpu=true", "--dataloader_num_workers=0", "--dataloader_persistent_workers=false"]
    flags += ["--save_strategy=no", "--eval_strategy=no", "--disable_tqdm=true", "--total_batch_size=8"]
    arguments = parse_arguments([*flags, "--per_device_train_batch_size=8", *more], "")
    set_seed(arguments[-1].seed)
    task = prepare(*arguments)
    return task, make_trainer(task, arguments[-1])


def test_layers_of_the_commands_optimizer_learn_at_powers_of_the_decay(model_folder, image_folder, tmp_path):
    flags = ["--recipe=modern", "--learning_rate=0.01", "--layer_decay=0.5"]
    task, trainer = prepared(model_folder, image_folder, tmp_path, *flags)
    names = {id(parameter): name for name, parameter in task.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    assert rates.keys() == set(names.values())
    layers = task.model.config.num_hidden_layers
    for name, rate in rates.items():
        block = re.search(r"encoder\.layer\.(\d+)", name)
        depth = int(block[1]) + 1 if block else 0 if ".embeddings." in name else layers + 1
        assert rate == pytest.approx(0.01 * 0.5 ** (layers + 1 - depth), rel=1e-12), name
    assert len(set(rates.values())) == layers + 2
    _, plain = prepared(model_folder, image_folder, tmp_path, *flags[:2], "--layer_decay=1")
    assert {group["lr"] for group in plain.create_optimizer().param_groups} == {0.01}


def test_mixup_of_the_command_mixes_pixels_and_labels_in_one_proportion(model_folder, image_folder, tmp_path):
    flags = ["--recipe=modern", "--cutmix_alpha=0", "--mixup_alpha=0.8", "--label_smoothing_factor=0.1"]
    flags += ["--randaugment_layers=0", "--random_erasing=0", "--crop_scale=1", "--horizontal_flip=false"]
    task, trainer = prepared(model_folder, image_folder, tmp_path, *flags)
    plain, _ = prepared(model_folder, image_folder, tmp_path, *flags, "--mixup_alpha=0")
    samples = [task.train[index] for index in range(8)]
    mixed, alone = task.collator(samples), plain.collator(samples)
    pixels, labels = alone["pixel_values"].double(), nn.functional.one_hot(alone["labels"], 2).double()
    partners, other = pixels.roll(1, 0), labels.roll(1, 0)
    share = ((mixed["pixel_values"] - partners) * (pixels - partners)).sum() / (pixels - partners).square().sum()
    assert 0 < share < 1
    torch.testing.assert_close(
        mixed["pixel_values"].double(), share * pixels + (1 - share) * partners, atol=1e-5, rtol=0
    )
    targets = share * labels + (1 - share) * other
    torch.testing.assert_close(mixed["labels"].double(), targets, atol=1e-5, rtol=0)
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, dict(mixed), num_items_in_batch=torch.tensor(len(mixed["labels"])))
    with torch.no_grad():
        logs = trainer.model(pixel_values=mixed["pixel_values"]).logits.double().log_softmax(-1)
    smooth = 0.9 * targets + 0.1 / 2
    assert loss.item() == pytest.approx(-(smooth * logs).sum(-1).mean().item(), abs=1e-5)
    assert not torch.equal(mixed["pixel_values"], alone["pixel_values"])  # the negative control: without it they are


def test_the_averaged_weights_are_those_evaluated_and_exported(model_folder, image_folder, tmp_path):
    flags = ["--recipe=adamw", "--max_steps=6", "--learning_rate=0.01", "--ema_decay=0.7"]
    task, trainer = prepared(model_folder, image_folder, tmp_path, *flags)
    by_hand = {name: weight.detach().clone() for name, weight in task.model.named_parameters()}

    class Watch(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            step = state.global_step + 1
            decay = min(0.7, (1 + step) / (10 + step))
            for name, weight in model.named_parameters():
                by_hand[name] = decay * by_hand[name] + (1 - decay) * weight.detach()

        def on_train_end(self, args, state, control, model=None, **kwargs):
            self.last = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    results = trainer.evaluate()
    export(
        trainer.model, tmp_path / "out", task=task, results=results, settings={"dataset": "d", "fine-tuned from": "m"}
    )
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for name, average in by_hand.items():
        torch.testing.assert_close(saved[name], average, atol=1e-6, rtol=0)
    assert max(float((saved[name] - watch.last[name]).abs().max()) for name in saved) > 1e-3  # not the last weights
    exported = HfViTForImageClassification.from_pretrained(tmp_path / "out")
    batch = collate_images([task.test[index] for index in range(len(task.test))])
    with torch.no_grad():
        loss = exported(batch["pixel_values"], labels=batch["labels"]).loss
    assert results["eval_loss"] == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.slow
def test_a_stream_trains_as_long_as_told_and_is_evaluated_whole(model_folder, image_folder, tmp_path, capsys):
    for script in ("finetune_trainer", "finetune_accelerate"):
        flags = [f"--model_name_or_path={model_folder}", f"--dataset={image_folder}", "--streaming=true"]
        flags += ["--max_steps=12", "--learning_rate=0.01", "--total_batch_size=4", "--per_device_train_batch_size=4"]
        flags += [f"--output_dir={tmp_path / script}", "--use_cpu=true", "--save_strategy=steps", "--save_steps=6"]
        flags += ["--eval_strategy=no", "--dataloader_num_workers=0", "--dataloader_persistent_workers=false"]
        flags += ["--shuffle_buffer=8", "--logging_steps=1"]
        result = subprocess.run(
            [sys.executable, str(SCRIPT.with_stem(script)), *flags], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert "on 4 held-out images" in result.stdout
    losses = [
        [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        for state in (
            json.loads((tmp_path / script / "checkpoint-12" / "trainer_state.json").read_text())
            for script in ("finetune_trainer", "finetune_accelerate")
        )
    ]
    assert len(losses[0]) == 12
    assert losses[0] == losses[1]


def test_a_stream_without_a_length_of_training_is_refused(model_folder, image_folder, tmp_path):
    with pytest.raises(ValueError, match="max_steps"):
        prepared(model_folder, image_folder, tmp_path, "--streaming=true")


def test_a_dry_run_completes_the_folder_for_the_hub_and_sends_nothing(model_folder, image_folder, tmp_path, capsys):
    flags = [f"--model_name_or_path={model_folder}", f"--dataset={image_folder}", f"--output_dir={tmp_path / 'out'}"]
    flags += ["--max_steps=2", "--total_batch_size=8", "--per_device_train_batch_size=8", "--save_strategy=no"]
    flags += ["--push_to_hub=true", "--hub_model_id=somebody/something", "--dry_run=true", "--use_cpu=true"]
    flags += ["--dataloader_num_workers=0", "--dataloader_persistent_workers=false"]
    assert run_path(str(SCRIPT))["main"](flags) == 0
    assert "ready for somebody/something; nothing was sent" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"modeling_hf_vit.py", "README.md", "model.safetensors", "training_curves.png"} <= names
    card = (tmp_path / "out" / "README.md").read_text()
    assert "top-1 accuracy" in card
    assert not any(name.startswith(("events.out", "runs")) for name in names)  # no tensorboard unless asked for


@pytest.mark.reliability(row="R10")
@pytest.mark.slow
def test_ctrl_c_leaves_the_last_checkpoint_loadable(image_folder, model_folder, tmp_path):
    argv = [
        f"--model_name_or_path={model_folder}",
        f"--dataset={image_folder}",
        f"--output_dir={tmp_path}",
        "--max_steps=100000",
        "--eval_strategy=no",
        "--save_strategy=steps",
        "--save_steps=1",
        "--logging_steps=1",
        "--disable_tqdm=true",
        "--use_cpu=true",
    ]
    with subprocess.Popen(
        [sys.executable, "-u", str(SCRIPT), *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "loss" in line:
                break
        process.send_signal(2)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    folder = newest_complete_checkpoint(tmp_path)
    last = errors.strip().splitlines()[-1]
    assert str(folder) in last
    assert "--resume_from_checkpoint last" in last
    HfViTForImageClassification.from_pretrained(folder)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "bar"), [("paper", 0.985), ("modern", 0.99)])
def test_a_recipe_reaches_its_accuracy_on_digits(recipe, bar, tmp_path):
    result = run(
        f"--model_name_or_path={CHECKPOINT}",
        "--dataset=digits",
        f"--recipe={recipe}",
        f"--output_dir={tmp_path}",
        "--eval_strategy=no",
        "--save_strategy=no",
        "--use_cpu=true",
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "results.json").read_text())["eval_accuracy"] >= bar


@pytest.mark.slow
def test_the_default_recipe_learns_digits_from_the_embedded_checkpoint(tmp_path):
    result = run(
        f"--model_name_or_path={CHECKPOINT}",
        "--dataset=digits",
        f"--output_dir={tmp_path}",
        "--eval_strategy=no",
        "--save_strategy=no",
        "--use_cpu=true",
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "results.json").read_text())["eval_accuracy"] >= 0.98
    HfViTForImageClassification.from_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own question
@pytest.mark.parametrize(("recipe", "epochs", "bar"), [("linear_probe", 6, 0.93), ("lora", 4, 0.9)])
def test_what_a_part_of_the_model_learnt_loads_again_and_evaluates_as_said(recipe, epochs, bar, tmp_path, capsys):
    out = tmp_path / "out"
    flags = [f"--model_name_or_path={CHECKPOINT}", "--dataset=digits", f"--recipe={recipe}", f"--output_dir={out}"]
    flags += [f"--num_train_epochs={epochs}", "--eval_strategy=no", "--use_cpu=true", "--disable_tqdm=true"]
    assert run_path(str(SCRIPT))["main"](flags) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["eval_accuracy"] >= bar
    assert f"accuracy {results['eval_accuracy']:.2%} on 360 held-out images" in capsys.readouterr().out
    arguments = [f"--model_name_or_path={out}", "--dataset=digits", f"--json={tmp_path / 'eval.json'}"]
    assert load_example("eval").main(arguments) == 0
    evaluated = json.loads((tmp_path / "eval.json").read_text())
    assert [evaluated[name] for name in ("num_samples", "accuracy")] == [360, results["eval_accuracy"]]
    assert evaluated["ece"] == pytest.approx(results["eval_ece"], abs=1e-4)
    trained = HfViTForImageClassification.from_pretrained(out).eval()
    base = HfViTForImageClassification.from_pretrained(CHECKPOINT, num_labels=10).eval()
    if recipe == "lora":
        with_adapters = PeftModel.from_pretrained(base, str(newest_complete_checkpoint(out))).eval()
        pixels = torch.randn(4, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(with_adapters(pixel_values=pixels).logits, trained(pixels).logits)
    else:
        frozen = dict(base.vit.named_parameters())
        assert all(torch.equal(weight, frozen[name]) for name, weight in trained.vit.named_parameters())
