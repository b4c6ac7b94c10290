"""Weight files are recognised by their content; what is not a weight file is named, and two readings are refused."""

import argparse
import gzip
import json
import logging
import shutil
import zipfile

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from tiny_models import TINY, randomised
from transformers import ViTConfig, ViTForImageClassification

from hf_vit import HfViTConfig, HfViTForImageClassification
from hf_vit.checkpoints import CheckpointError, write_jax_checkpoint


load = HfViTForImageClassification.from_pretrained
STOCK = {name: value for name, value in TINY.items() if name != "num_labels"}


@pytest.fixture
def messages(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture(scope="module")
def stock():
    return randomised(ViTForImageClassification(ViTConfig(**STOCK, num_labels=5)))


@pytest.fixture(scope="module")
def own():
    return randomised(HfViTForImageClassification(HfViTConfig(**TINY)))


def head_of(path, **arguments):
    return load(path, **arguments).classifier.bias.detach()


# -- by content


@pytest.mark.parametrize("name", ["best.pth.tar", "last.ckpt", "weights.pkl", "weights.PTH", "weights", "weights.npz"])
@pytest.mark.parametrize("is_legacy", [False, True])
def test_a_state_dict_opens_under_every_name(tmp_path, stock, name, is_legacy):
    torch.save(stock.state_dict(), tmp_path / name, _use_new_zipfile_serialization=not is_legacy)
    assert torch.equal(head_of(tmp_path / name, num_attention_heads=2), stock.classifier.bias)


@pytest.mark.parametrize("name", ["model.bin", "model.pth", "model"])
def test_safetensors_and_original_files_open_under_every_name(tmp_path, stock, own, name):
    save_file(stock.state_dict(), tmp_path / name)
    assert torch.equal(head_of(tmp_path / name, num_attention_heads=2), stock.classifier.bias)
    write_jax_checkpoint(own.state_dict(), own.config, tmp_path / "x.npz")
    shutil.move(tmp_path / "x.npz", tmp_path / name)
    assert torch.equal(head_of(tmp_path / name), own.classifier.bias)


def test_own_weights_open_as_a_file_of_their_folder_and_alone(tmp_path, own):
    own.save_pretrained(tmp_path / "own")
    assert torch.equal(head_of(tmp_path / "own" / "model.safetensors"), own.classifier.bias)
    torch.save(own.state_dict(), tmp_path / "own.pth")
    loaded = load(tmp_path / "own.pth", num_attention_heads=2)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in own.state_dict().items())


def test_a_folder_with_one_original_file_opens(tmp_path, own):
    write_jax_checkpoint(own.state_dict(), own.config, tmp_path / "ViT.npz")
    (tmp_path / "notes.txt").write_text("mine")
    assert torch.equal(head_of(tmp_path), own.classifier.bias)
    shutil.copy(tmp_path / "ViT.npz", tmp_path / "other.npz")
    with pytest.raises(CheckpointError, match=r"several checkpoints \(ViT.npz, other.npz\): name one"):
        load(tmp_path)


def test_the_last_step_of_a_work_folder_of_the_reference_opens(tmp_path, own, messages):
    for step in (5, 10):
        write_jax_checkpoint(own.state_dict(), own.config, tmp_path / f"{step}.npz")
        (tmp_path / f"{step}.npz").rename(tmp_path / f"checkpoint_{step}")
    assert torch.equal(head_of(tmp_path), own.classifier.bias)
    assert any("reading checkpoint_10" in message for message in messages())


def test_a_folder_of_orbax_is_named(tmp_path):
    (tmp_path / "_METADATA").write_text("{}")
    with pytest.raises(CheckpointError, match="orbax or tensorstore"):
        load(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 9\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "x.npz", "x.pth", "x.pkl", "x"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "Git LFS pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"<html>", "web page"),
        (gzip.compress(b"weights"), "gzip.*gunzip"),
    ],
    ids=["pointer", "doctype", "page", "gzip"],
)
def test_what_is_not_a_weight_file_is_named_under_every_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / name, num_attention_heads=2)


def test_an_archive_names_what_it_holds(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("ViT.npz", b"x")
    with pytest.raises(CheckpointError, match=r"zip archive that holds ViT.npz: unpack it"):
        load(tmp_path / "x.zip")


class Settings:
    pass


def test_an_object_in_a_checkpoint_is_named_without_the_advice_to_run_it(tmp_path, stock):
    torch.save({"model": stock.state_dict(), "args": Settings()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"object of [\w.]*Settings.*torch.save\(model.state_dict") as error:
        load(tmp_path / "x.pth", num_attention_heads=2)
    assert "weights_only=False" not in str(error.value)


# -- training checkpoints


@pytest.mark.parametrize("is_legacy", [False, True])
def test_a_checkpoint_with_a_namespace_of_settings_opens(tmp_path, stock, is_legacy, messages):
    state = {"model": stock.state_dict(), "epoch": 3, "args": argparse.Namespace(lr=0.1, blr=None, layers=[1, 2])}
    torch.save(state, tmp_path / "mae.pth", _use_new_zipfile_serialization=not is_legacy)
    assert torch.equal(head_of(tmp_path / "mae.pth", num_attention_heads=2), stock.classifier.bias)
    assert any("not read" in message and "epoch" in message and "args" in message for message in messages())


@pytest.mark.parametrize("key", ["state_dict", "model", "module", "model_state_dict", "teacher", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "backbone.", "encoder.", "module.model."])
def test_wrappers_and_prefixes_are_taken_off(tmp_path, stock, key, prefix):
    state = {prefix + name: value for name, value in stock.state_dict().items()}
    torch.save({key: state, "optimizer": {"state": {}}}, tmp_path / "x.pth")
    assert torch.equal(head_of(tmp_path / "x.pth", num_attention_heads=2), stock.classifier.bias)


def test_of_two_sets_of_weights_the_choice_is_named_and_can_be_changed(tmp_path, stock, messages):
    state, average = stock.state_dict(), {name: value + 1 for name, value in stock.state_dict().items()}
    torch.save({"state_dict_ema": average, "state_dict": state}, tmp_path / "x.pth")
    assert torch.equal(head_of(tmp_path / "x.pth", num_attention_heads=2), state["classifier.bias"])
    assert any("reading state_dict, not state_dict_ema (weights='ema' decides)" in message for message in messages())
    ema = head_of(tmp_path / "x.pth", num_attention_heads=2, weights="ema")
    assert torch.equal(ema, average["classifier.bias"])
    with pytest.raises(CheckpointError, match="weights='best' is not in the file; expected one of state_dict"):
        load(tmp_path / "x.pth", num_attention_heads=2, weights="best")


def test_two_models_under_prefixes_of_one_file_are_told_apart(tmp_path, stock, messages):
    state = {f"model.{name}": value for name, value in stock.state_dict().items()}
    state |= {f"ema.{name}": value + 1 for name, value in stock.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    assert torch.equal(head_of(tmp_path / "x.ckpt", num_attention_heads=2), stock.classifier.bias)
    ema = head_of(tmp_path / "x.ckpt", num_attention_heads=2, weights="ema")
    assert torch.equal(ema, stock.classifier.bias + 1)


def test_an_incomplete_model_behind_a_prefix_is_refused(tmp_path, stock):
    state = {f"model.{name}": value for name, value in stock.state_dict().items()}
    state.pop(next(name for name in state if "layer.1" in name or "layers.1" in name))
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="missing: -"):
        load(tmp_path / "x.pth", num_attention_heads=2)


# -- two readings


def of_timm(folder, **arguments):
    arguments = {"embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 5, **arguments}
    model = randomised(timm.create_model("vit_tiny_patch16_224", **arguments))
    save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    return model


def test_timm_weights_alone_that_fit_two_grids_ask_for_the_image_size(tmp_path):
    model = of_timm(tmp_path, img_size=(224, 256))
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"14x16 .*15x15.*image_size=\(224, 256\) or image_size=\(240, 240\)"):
        load(path, num_attention_heads=2)
    pixels = torch.randn(1, 3, 224, 256)
    with torch.no_grad():
        ours = load(path, num_attention_heads=2, image_size=(224, 256), hidden_act="gelu")(pixels).logits
        torch.testing.assert_close(ours, model(pixels), atol=1e-5, rtol=0)


def rewritten(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_timm_folder_without_arguments_asks_for_the_heads_of_another_width(tmp_path):
    of_timm(tmp_path, img_size=32)
    rewritten(tmp_path, lambda config: config.pop("model_args"))
    with pytest.raises(CheckpointError, match=r"192 wide, but the weights are 24 wide.*num_attention_heads="):
        load(tmp_path)
    assert load(tmp_path, num_attention_heads=2).config.num_attention_heads == 2


def test_average_pooling_beside_a_class_token_asks_for_the_pooling(tmp_path):
    of_timm(tmp_path, img_size=32)
    rewritten(tmp_path, lambda config: config.update(global_pool="avg"))
    with pytest.raises(CheckpointError, match=r"global_pool='avg'.*'token'.*pooling="):
        load(tmp_path)
    rewritten(tmp_path, lambda config: config["model_args"].update(global_pool="avg"))
    with pytest.raises(CheckpointError, match=r"'avg' beside a class token.*pooling="):
        load(tmp_path)
    assert load(tmp_path, pooling="gap").config.pooling == "gap"
    assert load(tmp_path, pooling="token").config.pooling == "token"


def test_a_big_vision_table_of_fifty_rows_asks_for_the_image_size(tmp_path):
    model = randomised(HfViTForImageClassification(HfViTConfig(**{**TINY, "image_size": 56})))
    write_jax_checkpoint(model.state_dict(), model.config, tmp_path / "linen.npz", dialect="linen")
    with np.load(tmp_path / "linen.npz") as arrays:
        renamed = {name.replace("Transformer/posembed_input/", ""): arrays[name] for name in arrays.files}
    np.savez(tmp_path / "old.npz", **renamed)
    with pytest.raises(CheckpointError, match=r"7x7 .*5x10.*image_size=\(56, 56\) or image_size=\(40, 80\)"):
        load(tmp_path / "old.npz")
    assert load(tmp_path / "old.npz", image_size=56).config.grid_size == (7, 7)
    assert load(tmp_path / "old.npz", image_size=(40, 80)).config.grid_size == (5, 10)
