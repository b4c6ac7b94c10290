"""Checkpoints at another patch size or for other channels: FlexiViT against the reference, plain models by fact."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models import save_for_hf
from tiny_models import TINY, randomised
from torch.nn.functional import interpolate

from hf_vit import HfViTConfig, HfViTForImageClassification, HfViTImageProcessor
from hf_vit.checkpoints import CheckpointError, convert_jax_checkpoint, write_jax_checkpoint


FLEXI = Path(__file__).parents[1] / "goldens" / "flexi"
CASES = {case["name"]: case for case in json.loads((FLEXI / "cases.json").read_text())["cases"]}
LOADS = [(name, *sizes) for name, case in CASES.items() for sizes in case["load"]]
TRAINED = (8, 10, 12, 15, 16, 20, 24, 30, 40, 48)


def pixels_of(recorded):
    return torch.from_numpy(recorded["image_u8"]).permute(0, 3, 1, 2) / 127.5 - 1  # (B, C, H, W)


@torch.no_grad()
def load_differences(name, patch, grid, **arguments):
    """Return the largest differences of positions and logits from the reference's `load` into fixed sizes."""
    image_size = CASES[name]["image"][0]
    model = HfViTForImageClassification.from_pretrained(
        FLEXI / f"{name}.npz", patch_size=patch, image_size=image_size, **arguments
    )
    with np.load(FLEXI / f"{name}.io.npz") as recorded:
        positions = model.vit.embeddings.position_embeddings[:, model.config.num_prefix_tokens :]
        assert model.config.grid_size == (grid, grid)
        theirs = recorded[f"load_posemb_{patch}_{grid}"], recorded[f"load_logits_{patch}_{grid}"]
        ours = positions, model.eval()(pixels_of(recorded)).logits
    return [float(np.abs(mine.numpy() - other).max()) for mine, other in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize(("name", "patch", "grid"), LOADS)
def test_a_flexivit_loaded_at_a_fixed_size_equals_the_reference(name, patch, grid):
    positions, logits = load_differences(name, patch, grid)
    assert positions < 1e-6
    assert logits < 1e-5


def test_positions_resized_as_at_run_time_are_seen():
    assert load_differences("flexi_gap", 24, 4, position_resampling="bicubic_antialias")[1] > 1e-3


# -- published files: the name decides


@pytest.fixture
def published(tmp_path):
    """Return a function that writes a model of 32x32 patches and 7x7 positions under a published file's name."""

    def write(name):
        config = HfViTConfig(**{**TINY, "image_size": 224, "patch_size": 32, "pooling": "gap", "use_cls_token": False})
        model = randomised(HfViTForImageClassification(config))
        path = tmp_path / name
        write_jax_checkpoint(model.state_dict(), config, path, dialect="big_vision")
        return path

    return write


def test_a_published_flexivit_without_a_size_names_those_it_was_trained_at(published):
    with pytest.raises(CheckpointError, match=r"8 \(30x30\).*16 \(15x15\).*48 \(5x5\).*patch_size=16") as error:
        HfViTForImageClassification.from_pretrained(published("flexivit_s_i1k.npz"))
    assert all(f"{patch} (" in str(error.value) for patch in TRAINED)
    with pytest.raises(CheckpointError, match="several patch sizes"):
        HfViTForImageClassification.from_pretrained(published("flexivit_l_i1k_300ep.npz"), image_size=240)


def test_a_published_flexivit_is_converted_only_with_a_size(published, tmp_path):
    path = published("flexivit_s_i1k.npz")
    with pytest.raises(CheckpointError, match="several patch sizes"):
        convert_jax_checkpoint(path, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    config = convert_jax_checkpoint(path, tmp_path / "folder", patch_size=24)
    assert (config.patch_size, config.image_size, config.grid_size) == (24, 240, (10, 10))
    assert HfViTForImageClassification.from_pretrained(tmp_path / "folder").config.patch_size == 24


@pytest.mark.parametrize(("name", "patch"), [("vit_b16_i21k_300ep.npz", 16), ("vit_b30_i21k_300ep.npz", 30)])
def test_the_baselines_open_at_the_patch_size_they_were_trained_with(published, name, patch):
    path = published(name)
    config = HfViTForImageClassification.from_pretrained(path).config
    assert (config.patch_size, config.image_size) == (patch, 240)
    assert dict(HfViTImageProcessor.from_pretrained(path).crop_size) == {"height": 240, "width": 240}


def test_the_same_shapes_under_another_name_are_a_plain_model(published):
    config = HfViTForImageClassification.from_pretrained(published("mine.npz")).config
    assert (config.patch_size, config.image_size) == (32, 224)


# -- timm


@pytest.mark.parametrize("image_size", [32, 48])
def test_flexivit_folders_of_timm_open_to_its_logits(tmp_path, image_size):
    arguments = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": image_size, "num_classes": 5}
    theirs = randomised(timm.create_model("flexivit_small", patch_size=8, **arguments))
    save_for_hf(theirs, tmp_path, model_args={**arguments, "patch_size": 8})
    ours = HfViTForImageClassification.from_pretrained(tmp_path)
    pixels = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels).logits, theirs(pixels), atol=1e-5, rtol=0)


# -- plain models


@pytest.fixture
def plain(tmp_path):
    model = randomised(HfViTForImageClassification(HfViTConfig(**TINY)))
    write_jax_checkpoint(model.state_dict(), model.config, tmp_path / "plain.npz")
    return model, tmp_path / "plain.npz"


@torch.no_grad()
def test_enlarged_images_score_alike_at_the_enlarged_patch_size(plain):
    model, path = plain
    tall = HfViTForImageClassification.from_pretrained(path, patch_size=(8, 16), image_size=(32, 64))
    pixels = torch.randn(1, 3, 4, 8, 4, 8)  # every patch by itself, so that interpolation does not mix them
    patches = pixels.permute(0, 2, 4, 1, 3, 5).reshape(16, 3, 8, 8)
    grown = interpolate(patches, size=(8, 16), mode="bilinear", align_corners=False)
    grown = grown.reshape(1, 4, 4, 3, 8, 16).permute(0, 3, 1, 4, 2, 5).reshape(1, 3, 32, 64)
    expected = model(pixels.reshape(1, 3, 32, 32)).logits
    torch.testing.assert_close(tall(grown).logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_gray_image_scores_as_its_rgb_copy(plain):
    model, path = plain
    gray = HfViTForImageClassification.from_pretrained(path, num_channels=1)
    pixels = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(gray(pixels).logits, model(pixels.expand(2, 3, 32, 32)).logits, atol=1e-5, rtol=0)


def test_each_adaptation_is_reported_once(plain, caplog):
    import logging

    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        HfViTForImageClassification.from_pretrained(plain[1], patch_size=4, num_channels=5)
    texts = [record.getMessage() for record in caplog.records]
    assert sum("patch kernel resized from 8 to 4 pixels" in text for text in texts) == 1
    assert sum("from 3 to 5 channels" in text for text in texts) == 1


# -- a FlexiViT that stays flexible


@torch.no_grad()
def run_time_differences(name):
    """Return the largest differences of tokens and logits over all recorded grids, from one flexible model."""
    fixed = {"image_size": 80} if name == "flexi_sincos" else {}  # the file has no table that tells its 5x5 grid
    model = HfViTForImageClassification.from_pretrained(
        FLEXI / f"{name}.npz", flexible_patch_size=True, **fixed
    ).eval()
    tokens, logits = [], []
    with np.load(FLEXI / f"{name}.io.npz") as recorded:
        pixels = pixels_of(recorded)
        for side in CASES[name]["seqhw"]:
            patch = tuple(size // side for size in pixels.shape[2:])
            encoded, theirs = model.vit(pixels, patch_size=patch).last_hidden_state, recorded[f"encoded_{side}"]
            tokens.append(float((encoded[:, -theirs.shape[1] :] - torch.from_numpy(theirs)).abs().max()))
            expected = torch.from_numpy(recorded[f"logits_{side}"])
            logits.append(float((model(pixels, patch_size=patch).logits - expected).abs().max()))
    return max(tokens), max(logits)


@pytest.mark.parametrize("name", CASES)
def test_a_flexible_model_equals_the_reference_at_every_recorded_grid(name):
    tokens, logits = run_time_differences(name)
    assert tokens < 5e-5
    assert logits < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_a_flexible_model_is_written_back_byte_for_byte(tmp_path, name):
    model = HfViTForImageClassification.from_pretrained(FLEXI / f"{name}.npz", flexible_patch_size=True)
    model.save_pretrained(tmp_path / "folder")
    saved = HfViTForImageClassification.from_pretrained(tmp_path / "folder")
    assert saved.config.flexible_patch_size
    write_jax_checkpoint(saved.state_dict(), saved.config, tmp_path / "back.npz")
    with np.load(FLEXI / f"{name}.npz") as theirs, np.load(tmp_path / "back.npz") as ours:
        assert set(theirs.files) == set(ours.files)
        assert all(np.array_equal(theirs[key], ours[key]) for key in theirs.files)


def test_a_flexible_model_keeps_its_kernel_and_table():
    for sizes in ({"patch_size": 8}, {"image_size": 160}):
        with pytest.raises(ValueError, match="keeps its patch kernel"):
            HfViTForImageClassification.from_pretrained(FLEXI / "flexi_gap.npz", flexible_patch_size=True, **sizes)


def test_a_published_flexivit_opens_flexible_without_a_size(published):
    config = HfViTForImageClassification.from_pretrained(
        published("flexivit_b_i1k.npz"), flexible_patch_size=True
    ).config
    assert (config.patch_size, config.image_size, config.grid_size) == (32, 240, (7, 7))
