"""`examples/predict.py`: from files and folders to labels, in the three forms."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from hf_vit import HfViTForImageClassification, HfViTImageProcessor
from hf_vit.checkpoints.processors import at_size, processor_of


ROOT = Path(__file__).parents[2]
MNIST = ROOT / "examples" / "checkpoints" / "vit-mnist.npz"


def run_predict(*arguments):
    specification = importlib.util.spec_from_file_location("predict", ROOT / "examples" / "predict.py")
    assert specification is not None
    assert specification.loader is not None
    script = sys.modules["predict"] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    return script.main([str(argument) for argument in ("--model_name_or_path", MNIST, *arguments)])


@pytest.fixture
def folder(tmp_path):
    digits = load_digits().images * 15
    for number, name in enumerate(("b.png", "a.JPG", "deeper/c.png")):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits[number].astype(np.uint8)).resize((40, 40)).save(path)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


def expected_of(path):
    model = HfViTForImageClassification.from_pretrained(MNIST)
    processor = HfViTImageProcessor.for_model(model.config)
    with torch.no_grad(), Image.open(path) as image:
        return model(processor(image, return_tensors="pt")["pixel_values"]).logits.softmax(-1)[0]


def test_folders_give_table_json_and_csv_of_one_content(folder, tmp_path, capsys):
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


def test_an_unreadable_picture_is_named_and_the_rest_is_done(folder, capsys):
    (folder / "broken.png").write_bytes(b"\x89PNG")
    assert run_predict(folder) == 1
    captured = capsys.readouterr()
    assert "broken.png" in captured.err
    assert len(captured.out.splitlines()) == 3


def test_a_folder_without_pictures_is_refused(tmp_path, capsys):
    assert run_predict(tmp_path) == 1
    assert "no pictures" in capsys.readouterr().err


def test_the_processor_is_the_checkpoints_own_scaled_to_the_pictures(tmp_path):
    model = HfViTForImageClassification.from_pretrained(MNIST)
    assert processor_of(MNIST, model.config).to_dict() == HfViTImageProcessor.for_model(model.config).to_dict()
    HfViTImageProcessor.for_model(model.config, protocol="timm", image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    found = processor_of(tmp_path, model.config, image_size=(64, 64))
    assert found.protocol == "timm"
    assert list(found.image_mean) == [0.1, 0.2, 0.3]
    assert found(Image.new("RGB", (90, 70)), return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)
    assert at_size(found, 64) is found


@pytest.mark.parametrize("numbers", ["float32", "bfloat16", "int8"])
def test_a_prepared_model_names_the_same(numbers, folder, tmp_path):
    assert run_predict(folder, "--json", tmp_path / "plain.json", "--top_k", 1) == 0
    assert run_predict(folder, "--json", tmp_path / "fast.json", "--top_k", 1, "--prepare", numbers) == 0
    plain, fast = (json.loads((tmp_path / name).read_text()) for name in ("plain.json", "fast.json"))
    assert [row["classes"][0]["label"] for row in fast] == [row["classes"][0]["label"] for row in plain]
    for a, b in zip(plain, fast, strict=True):
        assert a["classes"][0]["probability"] == pytest.approx(b["classes"][0]["probability"], abs=0.05)
