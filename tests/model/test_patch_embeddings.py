"""Patch kernels at another size or for other channels, and FlexiViT's positions, against the reference and timm."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models._manipulate import adapt_input_conv

from hf_vit import patch_embeddings, position_embeddings
from hf_vit.patch_embeddings import adapt_kernel_channels, resize_patch_kernel
from hf_vit.position_embeddings import resample_position_embeddings


FLEXI = Path(__file__).parents[1] / "goldens" / "flexi"
CASES = {case["name"]: case for case in json.loads((FLEXI / "cases.json").read_text())["cases"]}
LEARNED = sorted(name for name, case in CASES.items() if "posemb" not in case["model"])


def kernel_of(name):
    with np.load(FLEXI / f"{name}.npz") as arrays:
        return torch.from_numpy(arrays["embedding/kernel"]).permute(3, 2, 0, 1).contiguous()  # (D, C, h, w)


def kernel_differences():
    """Return side of the patch -> largest difference from the recorded kernel."""
    with np.load(FLEXI / "flexi_gap.io.npz") as recorded:
        kernels = [recorded[name] for name in recorded.files if name.startswith("kernel_")]
    got = [resize_patch_kernel(kernel_of("flexi_gap"), kernel.shape[:2]).permute(2, 3, 1, 0) for kernel in kernels]
    return {k.shape[0]: float(np.abs(g.numpy() - k).max()) for g, k in zip(got, kernels, strict=True)}


def token_difference(name):
    """Return the largest difference of patches with positions from the recorded ones, over all recorded grids."""
    with np.load(FLEXI / f"{name}.npz") as weights, np.load(FLEXI / f"{name}.io.npz") as recorded:
        table, bias = (torch.from_numpy(weights[key]) for key in ("pos_embedding", "embedding/bias"))
        pixels = torch.from_numpy(recorded["image_u8"]).permute(0, 3, 1, 2) / 127.5 - 1
        expected = {side: recorded[f"posed_{side}"] for side in CASES[name]["seqhw"]}
    kernel, differences = kernel_of(name), []
    for side, tokens in expected.items():
        patch = tuple(size // side for size in pixels.shape[2:])
        patches = F.conv2d(pixels, resize_patch_kernel(kernel, patch), bias, stride=patch)
        old, new = tuple(CASES[name]["model"]["posemb_size"]), tuple(patches.shape[2:])
        positions = resample_position_embeddings(table, old, new, num_prefix_tokens=0, method="jax_image")
        ours = patches.flatten(2).transpose(1, 2) + positions  # (B, N, D)
        differences.append(float((ours - torch.from_numpy(tokens)).abs().max()))
    return max(differences)


def test_resized_kernels_equal_the_reference():
    differences = kernel_differences()
    assert set(differences) == {8, 12, 24}
    assert max(differences.values()) < 1e-6


@pytest.mark.parametrize("name", LEARNED)
def test_tokens_at_every_recorded_grid_equal_the_reference(name):
    assert token_difference(name) < 5e-5


def test_a_transposed_resize_matrix_is_seen(monkeypatch):
    plain_resize = lambda old, new: patch_embeddings._bilinear_matrix(old, new).tolist()  # noqa: E731
    monkeypatch.setattr(patch_embeddings, "_inverse_resize", plain_resize)
    assert min(kernel_differences().values()) > 1e-2


def test_positions_without_antialiasing_are_seen(monkeypatch):
    def without_antialiasing(old, new):
        return torch.from_numpy(patch_embeddings._bilinear_matrix(old, new))

    monkeypatch.setattr(position_embeddings, "_triangle_weights", without_antialiasing)
    assert token_difference("flexi_gap") > 1e-2


def test_resized_patches_keep_their_embedding_when_they_grow():
    kernel = torch.randn(5, 3, 6, 4, dtype=torch.float64)
    patch = torch.randn(1, 3, 6, 4, dtype=torch.float64)
    grown = F.interpolate(patch, size=(9, 11), mode="bilinear", align_corners=False)
    expected = F.conv2d(patch, kernel)
    assert torch.allclose(F.conv2d(grown, resize_patch_kernel(kernel, (9, 11))), expected, atol=1e-9)


def test_resizing_is_differentiable_and_keeps_dtype_and_identity():
    kernel = torch.randn(5, 3, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    assert resize_patch_kernel(kernel, (8, 8)) is kernel
    resized = resize_patch_kernel(kernel, (4, 16))
    resized.float().square().sum().backward()
    assert (resized.shape, resized.dtype) == ((5, 3, 4, 16), torch.bfloat16)
    assert kernel.grad.abs().sum() > 0


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_channels_are_adapted_as_timm_does(channels):
    kernel = torch.randn(5, 3, 8, 8)
    assert torch.allclose(adapt_kernel_channels(kernel, channels), adapt_input_conv(channels, kernel), atol=1e-6)


def test_a_gray_kernel_scores_as_the_rgb_copy_does():
    kernel, gray = torch.randn(5, 3, 8, 8), torch.randn(1, 1, 8, 8)
    expected = F.conv2d(gray.expand(1, 3, 8, 8), kernel)
    assert torch.allclose(F.conv2d(gray, adapt_kernel_channels(kernel, 1)), expected, atol=1e-5)
