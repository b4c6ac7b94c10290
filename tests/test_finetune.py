"""The fine-tuning command, from its flags to the folder that it leaves."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import pipeline

from hf_vit import HfViTConfig, HfViTForImageClassification, HfViTImageProcessor
from hf_vit.training.checkpointing import newest_complete_checkpoint
from hf_vit.training.finetuning import parse_arguments, wants_recipes


SCRIPT = Path(__file__).parent.parent / "examples" / "finetune_trainer.py"
CHECKPOINT = Path(__file__).parent.parent / "examples" / "checkpoints" / "vit-mnist.npz"
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
def picture_folder(tmp_path_factory):
    """Ten bright and ten dark pictures, in class folders."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name, low in (("bright", 160), ("dark", 0)):
        (folder / name).mkdir()
        for index in range(10):
            pixels = generator.integers(low, low + 90, (9, 11, 3), np.uint8)
            PIL.Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def test_a_recipe_sets_the_arguments_and_flags_override_it():
    model_args, _, args = parse_arguments([*BASE, "--recipe=paper", "--learning_rate=0.5", "--image_size=64"], "")
    assert (args.optim, args.learning_rate, args.max_steps) == ("sgd", 0.5, 700)
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


def test_fine_tuning_on_a_folder_leaves_a_model_that_pipeline_opens(model_folder, picture_folder, tmp_path):
    result = run(
        f"--model_name_or_path={model_folder}",
        f"--dataset={picture_folder}",
        f"--output_dir={tmp_path}",
        "--num_train_epochs=6",
        "--learning_rate=0.01",
        "--total_batch_size=8",
        "--per_device_train_batch_size=4",
        "--use_cpu=true",
    )
    assert result.returncode == 0, result.stderr
    assert "held-out pictures; the model is in" in result.stdout
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "results.json"} <= names
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert "adamw" in card
    accuracy = json.loads((tmp_path / "results.json").read_text())["eval_accuracy"]
    classify = pipeline("image-classification", model=str(tmp_path))
    answers = [classify(str(picture_folder / name / "0.png"))[0]["label"] for name in ("bright", "dark")]
    assert accuracy == 1.0
    assert answers == ["bright", "dark"]


def test_a_bad_picture_is_named_before_anything_is_trained(model_folder, picture_folder, tmp_path):
    broken = tmp_path / "pictures"
    for path in picture_folder.rglob("*.png"):
        copy = broken / path.relative_to(picture_folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes() if path.name != "3.png" else path.read_bytes()[:60])
    argv = (f"--model_name_or_path={model_folder}", f"--dataset={broken}", f"--output_dir={tmp_path / 'out'}")
    result = run(*argv, "--use_cpu=true")
    assert result.returncode != 0
    assert "bright/3.png" in result.stderr
    assert "dark/3.png" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ctrl_c_leaves_the_last_checkpoint_loadable(picture_folder, model_folder, tmp_path):
    argv = [
        f"--model_name_or_path={model_folder}",
        f"--dataset={picture_folder}",
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
