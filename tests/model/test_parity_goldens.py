"""Every golden checkpoint, opened by `from_pretrained`, computes what the JAX reference recorded."""

import numpy as np
import pytest
import torch
from golden_cases import GOLDENS, OWN_GOLDENS, import_command, load_arguments, read_cases

from hf_vit import HfViTForImageClassification, position_embeddings, resnetv2
from hf_vit.checkpoints.layouts import Rule


record_steps = import_command("verify_parity").record_steps

CASES = read_cases()
OWN_CASES = read_cases(OWN_GOLDENS)
IGNORED = {"image_u8", "pixels", "head_kernel", "head_bias", "pooled", "features_2d", "logits_2d", "cls_after"}
IGNORED |= {"token_ids", "zimg", "ztxt", "img_norm"}  # the text tower, and what both towers make together


def run(case, folder=GOLDENS, **arguments):
    """The recorded arrays and ours, under the same names."""
    with np.load(folder / case["io"], allow_pickle=False) as archive:
        expected = dict(archive)
    model = HfViTForImageClassification.from_pretrained(
        folder / case["checkpoint"], **load_arguments(case), **arguments
    )
    if "head_kernel" in expected:
        with torch.no_grad():
            model.classifier.weight.copy_(torch.from_numpy(expected["head_kernel"]).T)
            model.classifier.bias.copy_(torch.from_numpy(expected["head_bias"]))
    got = record_steps(model.eval(), expected["pixels"])
    return {name: array for name, array in expected.items() if name not in IGNORED}, got


def bound(name, expected, is_hybrid):
    """What the reference keeps against itself, run operation by operation; the stem's is relative to its range."""
    if name in ("logits", "features") or name.startswith("attn_"):
        return 2e-5 if is_hybrid else 1e-5
    if name == "posemb":
        return 1e-6
    if name == "root" or name.startswith("stage_"):
        return 1e-5 * float(np.abs(expected).max())
    return 5e-5


def excesses(case, folder=GOLDENS, **arguments):
    """Name -> (largest difference, bound) of every step that is out of bounds."""
    expected, got = run(case, folder, **arguments)
    is_hybrid = "resnet" in case.get("model", {})
    result = {}
    for name, array in expected.items():
        if name == "posemb" and name not in got:
            continue  # fixed positions are no parameter
        ours = got[name][:, -array.shape[1] :] if name == "posemb" else got[name]  # big_vision has no class row
        assert ours.shape == array.shape, name
        difference, limit = float(np.abs(ours - array).max()), bound(name, array, is_hybrid)
        if not difference <= limit:
            result[name] = (difference, limit)
    return result


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_every_step_equals_the_reference(name, attention):
    assert excesses(CASES[name], attn_implementation=attention) == {}


def swap_one_transpose(monkeypatch):
    right = Rule.to_ours

    def to_ours(rule, theirs):
        value = right(rule, theirs)
        return value.T.contiguous() if rule.ours == "encoder.layer.0.attn.out.weight" else value

    monkeypatch.setattr(Rule, "to_ours", to_ours)


def pad_symmetrically(monkeypatch):
    def pad_same(x, kernel_size, stride):
        side = (kernel_size - 1) // 2
        return torch.nn.functional.pad(x, (side, kernel_size - 1 - side) * 2)

    monkeypatch.setattr(resnetv2, "pad_same", pad_same)


def resample_half_pixel(monkeypatch):
    def linear_weights(old, new, *, zero_edge):
        points = ((torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5).clamp(0, old - 1)
        return (1 - (points[:, None] - torch.arange(old)).abs()).clamp(min=0)

    monkeypatch.setattr(position_embeddings, "_linear_weights", linear_weights)


@pytest.mark.parametrize("name", ["vit_p16_tok_rep", "bv_two_towers_scan", "hybrid_r3_wf1", "lp_scipy_edge_8to26"])
def test_one_swapped_transpose_is_seen(monkeypatch, name):
    swap_one_transpose(monkeypatch)
    assert excesses(OWN_CASES[name], OWN_GOLDENS) != {}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("vit_p16_tok_rep", {"hidden_act": "gelu"}),
        ("bv_two_towers_scan", {"hidden_act": "gelu"}),
        ("hybrid_r3_wf1", {"hidden_act": "gelu"}),
        ("vit_p16_tok_rep", {"layer_norm_eps": 1e-5}),
        ("bv_two_towers_scan", {"layer_norm_eps": 1e-5}),
        ("hybrid_r3_wf1", {"resnet_conv_eps_in_root": True}),
        ("lp_scipy_edge_8to26", {"position_resampling": "jax_corrected"}),
        ("lp_scipy_edge_8to26", {"position_resampling": "bicubic"}),
    ],
)
def test_one_wrong_setting_is_seen(name, wrong):
    assert excesses(OWN_CASES[name], OWN_GOLDENS, **wrong) != {}


@pytest.mark.parametrize(
    ("name", "break_it"), [("hybrid_r3_wf1", pad_symmetrically), ("lp_scipy_edge_8to26", resample_half_pixel)]
)
def test_one_wrong_formula_is_seen(monkeypatch, name, break_it):
    break_it(monkeypatch)
    assert excesses(OWN_CASES[name], OWN_GOLDENS) != {}


@pytest.mark.parametrize("path", sorted(GOLDENS.glob("*.checkpoint_*")), ids=lambda path: path.name)
def test_a_fine_tuning_checkpoint_opens_as_its_npz_does(path):
    one, other = (
        HfViTForImageClassification.from_pretrained(source).state_dict() for source in (path, path.with_suffix(".npz"))
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
