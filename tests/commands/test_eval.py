"""Evaluation and few-shot probing from the command line, on one process and on two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from example_scripts import load_example

from hf_vit import HfViTConfig, HfViTForImageClassification, HfViTImageProcessor
from hf_vit.checkpoints.processors import processor_of
from hf_vit.data.augmentation import AugmentedImages
from hf_vit.data.datasets import load_splits


EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ["blue", "green", "red"]
COUNTS = [7, 5, 9]  # 21 pictures: two ranks with batches of 4 must pad


def save_model(folder: Path, names=NAMES, **fields) -> HfViTForImageClassification:
    torch.manual_seed(0)
    config = HfViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        id2label=dict(enumerate(names)),
        **fields,
    )
    model = HfViTForImageClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight)  # sure of itself, in some direction
    model.save_pretrained(folder)
    HfViTImageProcessor.for_model(config).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Class folders whose pictures are mostly of their colour."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for split, factor in (("train", 2), ("test", 1)):
        for channel, (name, count) in enumerate(zip(reversed(NAMES), reversed(COUNTS), strict=True)):
            (root / split / name).mkdir(parents=True)
            for number in range(factor * count):
                pixels = generator.integers(0, 128, (8, 8, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                PIL.Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


def evaluate(model: Path, pictures: Path, file: Path, *more: str) -> dict:
    arguments = ["--model_name_or_path", str(model), "--dataset", str(pictures), "--json", str(file)]
    assert load_example("eval").main([*arguments, "--num_workers", "0", *more]) == 0
    return json.loads(file.read_text())


def test_the_figures_are_those_of_the_model_run_by_hand(model, pictures, tmp_path, capsys):
    results = evaluate(model, pictures, tmp_path / "eval.json")
    part = load_splits(str(pictures))["test"]
    processor = HfViTImageProcessor.from_pretrained(model)
    pixels = processor([row["image"] for row in part], return_tensors="pt")["pixel_values"]
    labels = torch.tensor([row["label"] for row in part])
    with torch.no_grad():
        predicted = HfViTForImageClassification.from_pretrained(model)(pixels).logits.argmax(1)
    matrix = np.zeros((3, 3), dtype=int)
    np.add.at(matrix, (labels.numpy(), predicted.numpy()), 1)
    assert results["confusion_matrix"] == matrix.tolist()
    assert (matrix.sum(axis=0) > 0).sum() > 1  # not one class for all
    assert results["accuracy"] == pytest.approx(float((predicted == labels).double().mean()), abs=1e-12)
    assert results["top5_accuracy"] == 1.0  # of three classes
    assert [row["samples"] for row in results["per_class"].values()] == COUNTS
    assert results["num_samples"] == 21
    printed = capsys.readouterr().out
    assert f"top-1 {results['accuracy']:.2%}" in printed
    assert all(name in printed for name in NAMES)
    with PIL.Image.open(tmp_path / "eval.png") as picture:
        assert min(picture.size) > 300


def test_classes_are_matched_by_name_whatever_their_order_and_company(pictures, model, tmp_path):
    expected = evaluate(model, pictures, tmp_path / "a.json")
    trained = HfViTForImageClassification.from_pretrained(model)
    order = ["red", "mauve", "blue", "green"]
    save_model(tmp_path / "other", order)
    other = HfViTForImageClassification.from_pretrained(tmp_path / "other")
    other.vit.load_state_dict(trained.vit.state_dict())
    with torch.no_grad():
        for row, name in enumerate(NAMES):
            other.classifier.weight[order.index(name)] = trained.classifier.weight[row]
            other.classifier.bias[order.index(name)] = trained.classifier.bias[row]
    other.save_pretrained(tmp_path / "other")
    found = evaluate(tmp_path / "other", pictures, tmp_path / "b.json")
    assert found["confusion_matrix"] == expected["confusion_matrix"]
    assert found["ece"] == pytest.approx(expected["ece"], abs=1e-6)


def test_classes_that_cannot_be_matched_are_refused(pictures, tmp_path):
    save_model(tmp_path / "model", ["cat", "dog"])
    with pytest.raises(ValueError, match=r"the dataset has 3 classes \(blue, green, red.* the model 2 \(cat, dog"):
        evaluate(tmp_path / "model", pictures, tmp_path / "eval.json")
    assert not (tmp_path / "eval.json").exists()


@pytest.mark.slow
def test_two_processes_equal_one_to_the_last_sample(model, pictures, tmp_path):
    expected = evaluate(model, pictures, tmp_path / "one.json", "--batch_size", "4")
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = ["--model_name_or_path", str(model), "--dataset", str(pictures), "--json", str(tmp_path / "two.json")]
    command = [sys.executable, *launcher, str(EXAMPLES / "eval.py"), *arguments, "--batch_size", "4"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "two.json").read_text())
    assert found["num_processes"] == 2
    for name in ("num_samples", "accuracy", "top5_accuracy", "per_class", "confusion_matrix"):
        assert found[name] == expected[name]
    assert found["ece"] == pytest.approx(expected["ece"], abs=1e-6)


def test_few_shots_tell_colours_apart_and_all_figures_are_written(model, pictures, tmp_path, capsys):
    arguments = ["--model_name_or_path", str(model), "--dataset", str(pictures), "--shots", "2", "5"]
    arguments += ["--seeds", "2", "--num_workers", "0", "--json", str(tmp_path / "few.json")]
    assert load_example("few_shot").main(arguments) == 0
    results = json.loads((tmp_path / "few.json").read_text())
    assert len(results["2_shot"]["fixed_l2"]) == len(results["5_shot"]["chosen_l2"]) == 2
    assert np.mean(results["5_shot"]["chosen_l2"]) > 0.8
    assert min(results["linear"], results["nearest_neighbors"]) > 0.8
    assert "l2 by leave-one-out" in capsys.readouterr().out


# --- preprocessing of a checkpoint ---


def test_the_processor_is_the_checkpoints_own_at_the_models_size(tmp_path):
    fields = {"protocol": "timm", "image_mean": [0.1, 0.2, 0.3], "crop_pct": 0.8, "size": 16}
    HfViTImageProcessor(**fields).save_pretrained(tmp_path)
    small, large = (processor_of(tmp_path, HfViTConfig(image_size=size, patch_size=8)) for size in (16, 32))
    assert small.to_dict() == HfViTImageProcessor.from_pretrained(tmp_path).to_dict()
    assert large.to_dict()["crop_size"] == {"height": 32, "width": 32}
    assert large.to_dict()["size"] == {"shortest_edge": 40}
    assert list(large.image_mean) == [0.1, 0.2, 0.3]
    assert large.protocol == "timm"


def test_a_checkpoint_without_preprocessing_gets_the_references(tmp_path, caplog):
    config = HfViTConfig(image_size=16, patch_size=8)
    (tmp_path / "a.npz").write_bytes(b"")
    expected = HfViTImageProcessor.for_model(config).to_dict()
    assert processor_of(tmp_path / "a.npz", config).to_dict() == expected
    assert processor_of("ViT-B_16", config).to_dict() == expected
    assert not caplog.records
    assert processor_of(tmp_path, config).to_dict() == expected
    assert "has no image processor, taking the reference's" in caplog.text


def test_evaluation_pictures_pass_through_the_checkpoints_processor(model, pictures):
    part = load_splits(str(pictures))["test"]
    processor = processor_of(model, HfViTConfig.from_pretrained(model))
    expected = processor(part[0]["image"], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(AugmentedImages(part, processor)[0]["pixel_values"], expected)
