"""`examples/predict.py`: from files and folders to labels or values, in every output format."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from example_scripts import load_example
from PIL import Image
from sklearn.datasets import load_digits
from tiny_models import TINY, randomised

from hf_vit import HfViTConfig, HfViTForImageClassification, HfViTImageProcessor
from hf_vit.checkpoints.processors import at_size, processor_of
from hf_vit.evaluation import read_shards


ROOT = Path(__file__).parents[2]
MNIST = ROOT / "examples" / "checkpoints" / "vit-mnist.npz"


def run_predict(*arguments, model=MNIST):
    given = ("--model_name_or_path", model, "--num_workers", 0, *arguments)
    return load_example("predict").main([str(argument) for argument in given])


@pytest.fixture
def folder(tmp_path):
    digits = load_digits().images * 15
    for number, name in enumerate(("b.png", "a.JPG", "deeper/c.png")):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits[number].astype(np.uint8)).resize((40, 40)).save(path)
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    return tmp_path / "images"


def expected_of(path):
    model = HfViTForImageClassification.from_pretrained(MNIST)
    processor = HfViTImageProcessor.for_model(model.config)
    with torch.no_grad(), Image.open(path) as image:
        return model(processor(image, return_tensors="pt")["pixel_values"]).logits.softmax(-1)[0]


def test_table_json_and_csv_have_the_same_content(folder, tmp_path, capsys):
    out = (tmp_path / "found.json", tmp_path / "found.csv")
    written = ("--json", out[0], "--csv", out[1])
    assert run_predict(folder, folder / "b.png", "--top_k", 2, "--batch_size", 2, *written) == 0
    rows = json.loads(out[0].read_text())
    assert [Path(row["path"]).name for row in rows] == ["a.JPG", "b.png", "c.png"]  # each once
    for row in rows:
        best = expected_of(row["path"]).topk(2)
        assert [found["label"] for found in row["classes"]] == [str(i) for i in best.indices.tolist()]
        assert [found["probability"] for found in row["classes"]] == pytest.approx(best.values.tolist(), abs=1e-5)
    with out[1].open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["path"], line["label"]) for line in lines] == [
        (row["path"], found["label"]) for row in rows for found in row["classes"]
    ]
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 3
    assert f"{rows[0]['classes'][0]['probability']:.1%} {rows[0]['classes'][0]['label']}" in table[0]


def test_an_unreadable_image_is_named_and_the_others_are_predicted(folder, capsys):
    (folder / "broken.png").write_bytes(b"\x89PNG")
    assert run_predict(folder) == 1
    captured = capsys.readouterr()
    assert "broken.png" in captured.err
    assert len(captured.out.splitlines()) == 3


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no images in .*: expected files ending in"):
        run_predict(tmp_path)


def save_model(folder, **fields):
    model = randomised(HfViTForImageClassification(HfViTConfig(**(TINY | fields))))
    model.save_pretrained(folder)
    HfViTImageProcessor.for_model(model.config).save_pretrained(folder)
    return model


def test_a_regression_model_prints_its_value(folder, tmp_path, capsys):
    model = save_model(tmp_path / "model", num_labels=1)
    out = tmp_path / "found.json"
    assert run_predict(folder / "b.png", "--json", out, model=tmp_path / "model") == 0
    with torch.no_grad(), Image.open(folder / "b.png") as image:
        pixels = HfViTImageProcessor.for_model(model.config)(image.convert("RGB"), return_tensors="pt")
        value = model(**pixels).logits.item()
    assert capsys.readouterr().out.strip().endswith(f"b.png  {value:g}")
    assert list(json.loads(out.read_text())[0]["values"].values()) == pytest.approx([value])


def test_a_multi_label_model_prints_every_class_above_the_threshold(folder, tmp_path, capsys):
    model = save_model(tmp_path / "model", problem_type="multi_label_classification")
    run_predict(folder / "b.png", "--threshold", "0.01", model=tmp_path / "model")
    assert capsys.readouterr().out.count("%") == model.config.num_labels


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"num_labels": 0}, "has no classifier"), ({"pooling": "none"}, 'pooling="none" answers for each token')],
)
def test_a_model_without_an_answer_for_an_image_is_refused(fields, message, folder, tmp_path, capsys):
    save_model(tmp_path / "model", **fields)
    with pytest.raises(ValueError, match=message):
        run_predict(folder, model=tmp_path / "model")
    assert capsys.readouterr().out == ""


def test_parquet_shards_hold_the_same_predictions(folder, tmp_path, capsys):
    (folder / "broken.png").write_bytes(b"\x89PNG")
    assert run_predict(folder, "--json", tmp_path / "found.json", "--top_k", 2) == 1
    capsys.readouterr()
    assert run_predict(folder, "--parquet", tmp_path / "shards", "--top_k", 2) == 1
    assert "broken.png" in capsys.readouterr().err
    rows = read_shards(tmp_path / "shards")[0].to_pylist()
    expected = json.loads((tmp_path / "found.json").read_text())
    assert [row["path"] for row in rows] == [row["path"] for row in expected]
    for row, found in zip(rows, expected, strict=True):
        assert row["labels"] == [item["label"] for item in found["classes"]]
        assert row["scores"] == pytest.approx([item["probability"] for item in found["classes"]])


def test_the_processor_is_the_checkpoints_own_scaled_to_the_images(tmp_path):
    model = HfViTForImageClassification.from_pretrained(MNIST)
    assert processor_of(MNIST, model.config).to_dict() == HfViTImageProcessor.for_model(model.config).to_dict()
    HfViTImageProcessor.for_model(model.config, protocol="timm", image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    found = processor_of(tmp_path, model.config, image_size=(64, 64))
    assert found.protocol == "timm"
    assert list(found.image_mean) == [0.1, 0.2, 0.3]
    assert found(Image.new("RGB", (90, 70)), return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)
    assert at_size(found, 64) is found


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_a_prepared_model_gives_the_same_classes(precision, folder, tmp_path):
    assert run_predict(folder, "--json", tmp_path / "plain.json", "--top_k", 1) == 0
    assert run_predict(folder, "--json", tmp_path / "fast.json", "--top_k", 1, "--prepare", precision) == 0
    plain, fast = (json.loads((tmp_path / name).read_text()) for name in ("plain.json", "fast.json"))
    assert [row["classes"][0]["label"] for row in fast] == [row["classes"][0]["label"] for row in plain]
    for a, b in zip(plain, fast, strict=True):
        assert a["classes"][0]["probability"] == pytest.approx(b["classes"][0]["probability"], abs=0.05)
