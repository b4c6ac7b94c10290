"""`examples/embed.py` and `examples/search.py`: features of many images, resumed after kills, by any process count."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from example_scripts import EXAMPLES, load_example
from tiny_models import TINY, randomised

from hf_vit import HfViTConfig, HfViTImageProcessor, HfViTModel
from hf_vit.data.images import ImageError, read_image
from hf_vit.evaluation import embed, read_shards, search


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = HfViTConfig(**TINY)
    randomised(HfViTModel(config)).save_pretrained(folder)
    HfViTImageProcessor.for_model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(11):
        PIL.Image.fromarray(generator.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f"{number:02d}.png")
    return folder


def arguments_of(model: Path, output: Path, *more: str) -> list[str]:
    sizes = ["--shard_size", "4", "--batch_size", "3", "--num_workers", "0"]
    return ["--model_name_or_path", str(model), "--output_dir", str(output), *sizes, *more]


def run_embed(model: Path, output: Path, *more: str) -> None:
    assert load_example("embed").main(arguments_of(model, output, *more)) == 0


def content_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("part-*.parquet")}


def expected_of(model: Path, images: Path, **options) -> torch.Tensor:
    network = HfViTModel.from_pretrained(model).eval()
    processor = HfViTImageProcessor.from_pretrained(model)
    pixels = processor([read_image(path) for path in sorted(images.iterdir())], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return embed(network, pixels, **options)


def test_shards_hold_each_image_once_in_order_with_its_features(model, images, tmp_path):
    run_embed(model, tmp_path, "--images", str(images))
    assert sorted(content_of(tmp_path)) == [f"part-0000{number}-of-00003.parquet" for number in range(3)]
    table, settings = read_shards(tmp_path)
    assert table["path"].to_pylist() == [str(path) for path in sorted(images.iterdir())]
    np.testing.assert_allclose(table["embedding"].to_pylist(), expected_of(model, images), atol=1e-6)
    assert settings["pooling"] == "pooled"
    assert settings["layer"] is None
    loaded = load_dataset("parquet", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"), split="train")
    assert loaded["path"][:] == table["path"].to_pylist()


@pytest.mark.parametrize(("pooling", "layer"), [("class", None), ("patch_mean", None), ("patch_mean", 1)])
def test_any_block_and_pooling_can_be_embedded(pooling, layer, model, images, tmp_path):
    more = () if layer is None else ("--layer", str(layer))
    run_embed(model, tmp_path, "--images", str(images), "--pooling", pooling, *more)
    network, seen = HfViTModel.from_pretrained(model).eval(), []
    watched = network.encoder.encoder_norm if layer is None else network.encoder.layer[layer - 1]
    watched.register_forward_hook(lambda module, args, output: seen.append(output))
    pixels = HfViTImageProcessor.from_pretrained(model)(read_image(images / "00.png"), return_tensors="pt")
    with torch.no_grad():
        network(**pixels)
    tokens = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]
    expected = tokens[0, 0] if pooling == "class" else tokens[0, 1:].mean(dim=0)
    np.testing.assert_allclose(read_shards(tmp_path)[0]["embedding"][0].as_py(), expected, atol=1e-6)


def test_a_run_that_lost_a_shard_writes_just_that_one_again(model, images, tmp_path):
    run_embed(model, tmp_path, "--images", str(images))
    (tmp_path / "notes.txt").write_text("mine")
    before = content_of(tmp_path)
    times = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    (tmp_path / "part-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match="holds 2 of 3 shards: run the command that wrote them again"):
        read_shards(tmp_path)
    run_embed(model, tmp_path, "--images", str(images))
    assert content_of(tmp_path) == before
    changed = [file.name for file in tmp_path.iterdir() if file.stat().st_mtime_ns != times[file.name]]
    assert changed == ["part-00001-of-00003.parquet"]


def test_shards_of_other_settings_are_refused_and_replaced_on_request(model, images, tmp_path):
    run_embed(model, tmp_path, "--images", str(images))
    with pytest.raises(ValueError, match="holds results with another pooling: choose another folder, or replace"):
        run_embed(model, tmp_path, "--images", str(images), "--pooling", "class")
    run_embed(model, tmp_path, "--images", str(images), "--pooling", "class", "--overwrite", "true")
    assert read_shards(tmp_path)[1]["pooling"] == "class"


def test_a_shard_of_another_program_is_refused(model, images, tmp_path):
    (tmp_path / "part-00000-of-00003.parquet").write_bytes(b"mine")
    with pytest.raises(ValueError, match="was not written by hf-vit"):
        run_embed(model, tmp_path, "--images", str(images), "--overwrite", "true")
    assert (tmp_path / "part-00000-of-00003.parquet").read_bytes() == b"mine"


def test_an_unreadable_image_is_named_and_refused_or_skipped(model, images, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in images.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "05.png").write_bytes(b"\x89PNG")
    with pytest.raises(ImageError, match=r"05\.png.*--bad_images skip leaves it out"):
        run_embed(model, tmp_path / "out", "--images", str(folder))
    assert list(content_of(tmp_path / "out")) == ["part-00000-of-00003.parquet"]  # the finished one is kept
    run_embed(model, tmp_path / "skipped", "--images", str(folder), "--bad_images", "skip")
    names = [Path(path).name for path in read_shards(tmp_path / "skipped")[0]["path"].to_pylist()]
    assert names == [f"{number:02d}.png" for number in range(11) if number != 5]
    assert "05.png" in capsys.readouterr().err
    metadata = pq.read_schema(tmp_path / "skipped" / "part-00001-of-00003.parquet").metadata
    assert "05.png" in json.loads(metadata[b"hf_vit_unreadable"])[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--layer", "3", "--pooling", "class"), "layer is 3, expected a block from 1 to 2"),
        (("--layer", "1"), "expected class or patch_mean for a single block"),
    ],
)
def test_what_the_model_does_not_have_is_refused_before_the_work(more, message, model, images, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_embed(model, tmp_path / "out", "--images", str(images), *more)
    assert not (tmp_path / "out").exists()


def test_search_finds_the_image_itself_first(model, images, tmp_path, capsys):
    run_embed(model, tmp_path, "--images", str(images))
    capsys.readouterr()
    query = str(images / "07.png")
    assert load_example("search").main(["--embeddings", str(tmp_path), query, "--top_k", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[query]
    assert found[0]["path"] == query
    assert found[0]["similarity"] == pytest.approx(1, abs=1e-5)
    assert found[1]["similarity"] < found[0]["similarity"]


def test_exact_search_in_chunks_is_a_sort_of_all_similarities(monkeypatch):
    monkeypatch.setattr("hf_vit.evaluation.embeddings._CHUNK", 7)
    rows, queries = np.random.default_rng(0).normal(size=(50, 8)), np.random.default_rng(1).normal(size=(3, 8))
    unit = [values / np.linalg.norm(values, axis=1, keepdims=True) for values in (rows, queries)]
    similarities = unit[1] @ unit[0].T
    scores, found = search(rows, queries, top_k=5)
    np.testing.assert_array_equal(found, np.argsort(-similarities, axis=1)[:, :5])
    np.testing.assert_allclose(scores, -np.sort(-similarities, axis=1)[:, :5], atol=1e-6)


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(model, images, tmp_path):
    run_embed(model, tmp_path / "one", "--images", str(images))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(EXAMPLES / "embed.py"), *arguments_of(model, tmp_path / "two", "--images", str(images))]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert content_of(tmp_path / "two") == content_of(tmp_path / "one")


@pytest.mark.slow
def test_a_run_killed_at_random_instants_ends_with_the_bytes_of_an_uninterrupted_one(model, images, tmp_path):
    run_embed(model, tmp_path / "one", "--images", str(images), "--shard_size", "1")
    arguments = arguments_of(model, tmp_path / "two", "--images", str(images), "--shard_size", "1")
    command = [sys.executable, str(EXAMPLES / "embed.py"), *arguments]
    seeded, kills = random.Random(0), 0
    for _ in range(4):
        before = len(list(tmp_path.glob("two/*.parquet")))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(tmp_path.glob("two/*.parquet"))) == before:
            time.sleep(0.001)
        time.sleep(seeded.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert content_of(tmp_path / "two") == content_of(tmp_path / "one")
