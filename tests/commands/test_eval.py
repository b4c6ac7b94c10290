"""Evaluation and few-shot probing from the command line, on one process and on two."""

import contextlib
import json
import os
import shutil
import signal
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
from hf_vit.cli import UsageError, run
from hf_vit.data.augmentation import AugmentedImages
from hf_vit.data.datasets import load_splits
from hf_vit.data.images import ImageError
from hf_vit.evaluation import batches_of


EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ["blue", "green", "red"]
COUNTS = [7, 5, 9]  # 21 images: two ranks with batches of 4 must pad


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
    torch.nn.init.normal_(model.classifier.weight)  # predictions of several classes
    model.save_pretrained(folder)
    HfViTImageProcessor.for_model(config).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Class folders whose images are mostly of their colour."""
    root = tmp_path_factory.mktemp("images")
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


def evaluate(model: Path, images: Path, file: Path, *more: str) -> dict:
    arguments = ["--model_name_or_path", str(model), "--dataset", str(images), "--json", str(file)]
    assert load_example("eval").main([*arguments, "--num_workers", "0", *more]) == 0
    return json.loads(file.read_text())


def test_a_figure_of_another_program_beside_the_results_is_refused_and_hf_vits_own_replaced(model, images, tmp_path):
    (tmp_path / "report.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"report\.png was not written by hf-vit.*--picture"):
        evaluate(Path("/nowhere"), images, tmp_path / "report.json")
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]
    for _ in range(2):
        evaluate(model, images, tmp_path / "other.json")
    evaluate(model, images, tmp_path / "report.json", "--picture", str(tmp_path / "report.png"))
    with pytest.raises(UsageError, match="is to hold the results and the figure"):
        evaluate(model, images, tmp_path / "all.png")


@pytest.mark.parametrize("script", ["eval", "predict", "few_shot"])
def test_a_file_that_cannot_be_written_is_found_before_the_model_is_opened(script, images, tmp_path):
    place = [str(images)] if script == "predict" else ["--dataset", str(images)]
    arguments = [*place, "--model_name_or_path", "/nowhere", "--json", str(tmp_path / "none" / "results.json")]
    with pytest.raises(OSError, match="the folder does not exist: make it first"):
        load_example(script).main(arguments)


def test_the_results_equal_those_of_the_model_run_by_hand(model, images, tmp_path, capsys):
    results = evaluate(model, images, tmp_path / "eval.json")
    part = load_splits(str(images))["test"]
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
    assert "top5_accuracy" not in results  # of three classes
    assert results["class_matching"] == "by name"
    assert [row["samples"] for row in results["per_class"].values()] == COUNTS
    assert results["num_samples"] == 21
    printed = capsys.readouterr().out
    assert f"top-1 {results['accuracy']:.2%} among the model's 3 classes" in printed
    assert all(name in printed for name in NAMES)
    with PIL.Image.open(tmp_path / "eval.png") as drawn:
        assert min(drawn.size) > 300


def test_classes_are_matched_by_name_whatever_their_order_and_the_models_other_classes(images, model, tmp_path):
    expected = evaluate(model, images, tmp_path / "a.json")
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
    found = evaluate(tmp_path / "other", images, tmp_path / "b.json", "--restrict_to_classes", "true")
    assert found["restricted_accuracy"] == expected["accuracy"]
    assert found["restricted_ece"] == pytest.approx(expected["ece"], abs=1e-6)
    matrix = np.array(found["confusion_matrix"])  # a last column for the class that the dataset does not have
    assert matrix.shape == (3, 4)
    assert matrix[:, 3].sum() > 0
    assert found["accuracy"] == pytest.approx(np.trace(matrix) / 21)
    assert found["accuracy"] < found["restricted_accuracy"]


def test_classes_that_cannot_be_matched_are_refused(images, tmp_path):
    save_model(tmp_path / "model", ["cat", "dog", "red"])
    with pytest.raises(ValueError, match=r"^2 of the dataset's 3 classes are not classes of the model: blue, green;"):
        evaluate(tmp_path / "model", images, tmp_path / "eval.json")
    assert not (tmp_path / "eval.json").exists()
    (tmp_path / "map.csv").write_text("blue,cat\ngreen,dog\nred,red\n")
    found = evaluate(tmp_path / "model", images, tmp_path / "eval.json", "--label_map", str(tmp_path / "map.csv"))
    assert found["class_matching"] == "by map.csv"


def test_a_broken_training_image_does_not_stop_an_evaluation_of_test(model, images, tmp_path):
    copy = tmp_path / "images"
    shutil.copytree(images, copy)
    (copy / "train" / "red" / "broken.png").write_bytes(b"\x89PNG")
    assert evaluate(model, copy, tmp_path / "eval.json")["num_samples"] == 21
    (copy / "test" / "red" / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(ImageError, match=r"broken\.png"):
        evaluate(model, copy, tmp_path / "eval.json")


def test_a_model_is_evaluated_on_the_split_that_its_training_held_out(images, tmp_path):
    save_model(tmp_path / "model")
    record = {"dataset": "images", "test_size": 0.5, "split_seed": 3}
    (tmp_path / "model" / "results.json").write_text(json.dumps({"split": record}))
    unsplit = tmp_path / "images"
    shutil.copytree(images / "train", unsplit)
    part = load_splits(str(unsplit), seed=3, test_size=0.5)["test"]
    found = evaluate(tmp_path / "model", unsplit, tmp_path / "eval.json")
    assert found["num_samples"] == len(part) == 21
    by_class = np.bincount(part.with_format("arrow")["label"].to_numpy())
    assert [row["samples"] for row in found["per_class"].values()] == by_class.tolist()
    with pytest.raises(ValueError, match="seed is 0, but the model was trained with 3: images that it was trained on"):
        evaluate(tmp_path / "model", unsplit, tmp_path / "eval.json", "--seed", "0")
    requested = ("--seed", "0", "--allow_trained_images", "true")
    assert evaluate(tmp_path / "model", unsplit, tmp_path / "eval.json", *requested)["num_samples"] == 21
    assert evaluate(tmp_path / "model", unsplit, tmp_path / "eval.json", "--split", "all")["num_samples"] == 42


def test_an_interrupt_while_workers_start_is_raised_after_they_have_started():
    class Loader:
        def __iter__(self):
            with contextlib.suppress(KeyboardInterrupt):  # as in a destructor, where it would be lost
                signal.raise_signal(signal.SIGINT)
            yield from (1, 2)

    with pytest.raises(KeyboardInterrupt):
        list(batches_of(Loader()))
    assert list(batches_of([1, 2])) == [1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [(KeyboardInterrupt(), 130, "interrupted"), (ValueError("no such model"), 1, "error: no such model")],
)
def test_a_command_that_is_interrupted_or_fails_prints_one_line(raised, status, line, capsys):
    def main(argv):
        raise raised

    handler = signal.getsignal(signal.SIGINT)
    try:
        assert run(main, []) == status
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err == line + "\n"
    if status == 1:
        with pytest.raises(ValueError, match="no such model"):
            run(main, ["--debug"])


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(model, images, tmp_path):
    expected = evaluate(model, images, tmp_path / "one.json", "--batch_size", "4")
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = ["--model_name_or_path", str(model), "--dataset", str(images), "--json", str(tmp_path / "two.json")]
    command = [sys.executable, *launcher, str(EXAMPLES / "eval.py"), *arguments, "--batch_size", "4"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "two.json").read_text())
    assert found["num_processes"] == 2
    for name in ("num_samples", "accuracy", "macro_f1", "per_class", "confusion_matrix"):
        assert found[name] == expected[name]
    assert found["ece"] == pytest.approx(expected["ece"], abs=1e-6)


def test_few_shot_probes_tell_colours_apart_and_all_results_are_written(model, images, tmp_path, capsys):
    arguments = ["--model_name_or_path", str(model), "--dataset", str(images), "--shots", "2", "5"]
    arguments += ["--seeds", "2", "--num_workers", "0", "--json", str(tmp_path / "few.json")]
    assert load_example("few_shot").main(arguments) == 0
    results = json.loads((tmp_path / "few.json").read_text())
    assert len(results["2_shot"]["fixed_l2"]) == len(results["5_shot"]["chosen_l2"]) == 2
    assert np.mean(results["5_shot"]["chosen_l2"]) > 0.8
    assert min(results["linear"], results["nearest_neighbors"]) > 0.8
    assert "l2 by leave-one-out" in capsys.readouterr().out


def test_few_shot_probes_read_the_embeddings_of_embed(model, images, tmp_path):
    common = ["--model_name_or_path", str(model), "--dataset", str(images), "--num_workers", "0"]
    assert load_example("embed").main([*common, "--output_dir", str(tmp_path / "embeddings")]) == 0
    probe = ["--shots", "5", "--seeds", "2", "--full", "false", "--json"]
    assert load_example("few_shot").main([*common, *probe, str(tmp_path / "a.json")]) == 0
    stored = ["--embeddings", str(tmp_path / "embeddings")]
    assert load_example("few_shot").main([*stored, *probe, str(tmp_path / "b.json")]) == 0
    computed, read = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert read["5_shot"] == computed["5_shot"]
    assert read["embeddings"] == stored[1]


# --- image processor of a checkpoint ---


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
    file = EXAMPLES / "checkpoints" / "vit-mnist.npz"
    config = HfViTForImageClassification.from_pretrained(file).config
    expected = HfViTImageProcessor.for_model(config).to_dict()
    assert processor_of(file, config).to_dict() == expected
    assert processor_of("ViT-B_16", config).to_dict() == expected
    assert not caplog.records
    assert processor_of(tmp_path, config).to_dict() == expected
    assert "has no image processor, taking the reference's" in caplog.text


def test_evaluation_images_pass_through_the_checkpoints_processor(model, images):
    part = load_splits(str(images))["test"]
    processor = processor_of(model, HfViTConfig.from_pretrained(model))
    expected = processor(part[0]["image"], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(AugmentedImages(part, processor)[0]["pixel_values"], expected)
