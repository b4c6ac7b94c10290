"""Defective checkpoints are refused by name and leave nothing behind; those that are only unusual load right."""

import io
import re
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_vit import HfViTConfig, HfViTForImageClassification
from hf_vit.checkpoints import convert_jax_checkpoint
from hf_vit.checkpoints.layouts import JaxLayout, group_by_theirs
from hf_vit.files.errors import CheckpointError


CONFIG = HfViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, num_labels=5
)
BLOCK = "Transformer/encoderblock_1"
QUERY = f"{BLOCK}/MultiHeadDotProductAttention_1/query"
DENSE = f"{BLOCK}/MlpBlock_3/Dense_0"
POSITIONS = "Transformer/posembed_input/pos_embedding"


@pytest.fixture
def arrays():
    """A sound checkpoint: names of the files of 2020, two blocks, five classes."""
    rng = np.random.default_rng(0)
    rules = group_by_theirs(JaxLayout.of_dialect("prelinen").rules(CONFIG, 5))
    return {name: rng.standard_normal(group[0].theirs_shape).astype(np.float32) for name, group in rules.items()}


def poisoned(name, value):
    def damage(arrays):
        arrays[name].flat[-1] = value

    return damage


def cast(name, dtype):
    return lambda arrays: arrays.update({name: arrays[name].astype(dtype)})


def replaced(name, shape):
    return lambda arrays: arrays.update({name: np.ones(shape, np.float32)})


def without(*names):
    return lambda arrays: [arrays.pop(name) for name in names]


def with_extra(name, shape=(32,)):
    return lambda arrays: arrays.update({name: np.ones(shape, np.float32)})


def with_block(number):
    """A third block, whole: two blocks and a number left out between them."""
    return lambda arrays: arrays.update(
        {name.replace("block_1/", f"block_{number}/"): value for name, value in arrays.items() if BLOCK in name}
    )


def transposed(name):
    return lambda arrays: arrays.update({name: np.ascontiguousarray(arrays[name].T)})


def as_mixer(arrays):
    arrays.clear()
    arrays.update({"stem/kernel": np.ones((2, 2), np.float32), "MixerBlock_0/LayerNorm_0/scale": np.ones(2)})


# what is wrong -> (the damage, what the error says)
DEFECTS = {
    "NaN": (poisoned(f"{QUERY}/kernel", np.nan), rf"{QUERY}/kernel has NaN or Inf"),
    "Inf": (poisoned(f"{DENSE}/bias", np.inf), rf"{DENSE}/bias has NaN or Inf"),
    "minus Inf": (poisoned("cls", -np.inf), "cls has NaN or Inf"),
    "NaN in the head": (poisoned("head/bias", np.nan), "head/bias has NaN or Inf"),
    "int8": (cast(f"{DENSE}/kernel", np.int8), rf"{DENSE}/kernel has dtype torch.int8"),
    "int64": (cast("embedding/bias", np.int64), "embedding/bias has dtype torch.int64"),
    "bool": (cast("embedding/bias", bool), r"embedding/bias: expected real values.* got dtype '\|b1'"),
    "complex": (cast("cls", np.complex64), "cls: expected real values.* got dtype '<c8'"),
    "text": (cast("cls", "U4"), "cls: expected real values.* got dtype '<U4'"),
    "objects": (cast("cls", object), r"cls: expected .* got dtype '\|O'"),
    "no class token": (without("cls"), rf"{POSITIONS} is for 5 patches, which is not a square grid"),
    "no positions": (without(POSITIONS), f"has no table of positions; expected {POSITIONS}"),
    "no bias": (without(f"{QUERY}/bias"), rf"missing: -{QUERY}/bias"),
    "no norm": (without(f"{BLOCK}/LayerNorm_2/scale"), rf"missing: -{BLOCK}/LayerNorm_2/scale"),
    "no last norm": (without("Transformer/encoder_norm/bias"), "missing: -Transformer/encoder_norm/bias"),
    "no patches": (without("embedding/kernel"), "holds no Vision Transformer: expected a tensor embedding/kernel"),
    "no bias of the head": (without("head/bias"), "missing: -head/bias"),
    "no kernel of the head": (without("head/kernel"), r"left over: \+head/bias"),
    "one tensor more": (with_extra("extra/kernel"), r"left over: \+extra/kernel"),
    "optimizer state without a prefix": (with_extra("opt/state/step"), r"\+opt/state/step"),
    "a tensor of a third block": (with_extra("Transformer/encoderblock_2/LayerNorm_0/scale"), "encoderblock_2"),
    "a block left out": (with_block(3), "missing: -Transformer/encoderblock_2/"),
    "positions twice": (with_extra("pos_embedding", (1, 4, 32)), r"left over: \+pos_embedding"),
    "stacked and not": (with_extra("Transformer/encoderblock/LayerNorm_0/scale", (2, 32)), "encoderblock"),
    "kernel transposed": (transposed(f"{DENSE}/kernel"), rf"{DENSE}/kernel has shape \(48, 32\); expected \(32, 48\)"),
    "bias that broadcasts": (replaced(f"{DENSE}/bias", (1,)), rf"{DENSE}/bias has shape \(1,\); expected \(48,\)"),
    "scale without size": (replaced(f"{BLOCK}/LayerNorm_0/scale", ()), r"LayerNorm_0/scale has shape \(\)"),
    "token that broadcasts": (replaced("cls", (1, 1, 1)), r"cls has shape \(1, 1, 1\); expected \(1, 1, 32\)"),
    "token without its axis": (replaced("cls", (1, 32)), r"cls has shape \(1, 32\)"),
    "positions that broadcast": (replaced(POSITIONS, (1, 1, 32)), rf"{POSITIONS} .* 0 patches"),
    "positions without an axis": (replaced(POSITIONS, (5, 32)), rf"{POSITIONS} has shape \(5, 32\)"),
    "positions of no square": (replaced(POSITIONS, (1, 7, 32)), rf"{POSITIONS} is for 6 patches"),
    "other heads in one block": (replaced(f"{QUERY}/kernel", (32, 4, 8)), rf"{QUERY}/kernel has shape \(32, 4, 8\)"),
    "patches without an axis": (replaced("embedding/kernel", (768, 32)), r"embedding/kernel has shape \(768, 32\)"),
    "an empty array": (replaced("embedding/kernel", (16, 16, 3, 0)), r"embedding/kernel has shape \(16, 16, 3, 0\)"),
    "width that no head divides": (
        replaced("embedding/kernel", (16, 16, 3, 33)),
        "describes no model: hidden_size 33",
    ),
    "another architecture": (as_mixer, "holds an MLP-Mixer"),
}


def refuse(path, folder, reason):
    """Both doors say why, naming the file, and write nothing."""
    before = sorted(folder.iterdir())
    for open_it in (
        lambda: HfViTForImageClassification.from_pretrained(path),
        lambda: convert_jax_checkpoint(path, folder / "model"),
    ):
        with pytest.raises(CheckpointError, match=reason) as raised:
            open_it()
        assert path.name in str(raised.value)
    assert sorted(folder.iterdir()) == before


@pytest.mark.reliability(row="W01")
@pytest.mark.parametrize(("damage", "reason"), DEFECTS.values(), ids=list(DEFECTS))
def test_a_defective_checkpoint_is_refused_by_name(tmp_path, arrays, damage, reason):
    damage(arrays)
    np.savez(tmp_path / "x.npz", **arrays)
    refuse(tmp_path / "x.npz", tmp_path, reason)


@pytest.mark.reliability(row="W01")
def test_a_member_given_twice_is_refused(tmp_path, arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    member = io.BytesIO()
    np.save(member, arrays["cls"] + 1)
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile says so itself
        archive.writestr("cls.npy", member.getvalue())
    refuse(tmp_path / "x.npz", tmp_path, "cls: expected one member of this name, got two")


@pytest.mark.reliability(row="W01")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: b"", "got an empty one"),
        (lambda data: b"weights go here\n", "expected an .npz or Flax msgpack file"),
        (lambda data: data[: len(data) // 2], "expected a zip directory at the end, got none: truncated"),
        (lambda data: data[:-1], "truncated"),
        (lambda data: b"\x80\x04\x95" + data, "got a pickle|is damaged"),
        (lambda data: data.replace(b"PK\x03\x04", b"PK\x03\x05", 2), "expected|damaged"),
    ],
    ids=["empty", "text", "half", "one byte short", "pickle", "signature"],
)
def test_a_damaged_file_is_refused(tmp_path, arrays, change, reason):
    np.savez(tmp_path / "x.npz", **arrays)
    (tmp_path / "x.npz").write_bytes(change((tmp_path / "x.npz").read_bytes()))
    refuse(tmp_path / "x.npz", tmp_path, reason)


@pytest.mark.reliability(row="W01")
@pytest.mark.parametrize("name", ["cls", f"{DENSE}/kernel", "head/kernel"])
def test_one_flipped_bit_is_refused(tmp_path, arrays, name):
    np.savez(tmp_path / "x.npz", **arrays)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[data.index(arrays[name].tobytes()) + 5] ^= 1
    (tmp_path / "x.npz").write_bytes(data)
    refuse(tmp_path / "x.npz", tmp_path, rf"{name}: expected data with checksum")


def test_a_wish_that_the_file_does_not_fit_is_refused(tmp_path, arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    for wish, reason in (
        ({"num_hidden_layers": 1}, "left over: .*encoderblock_1"),
        ({"num_hidden_layers": 3}, "missing: .*encoderblock_2"),
        ({"num_attention_heads": 4}, r"has shape .* expected \(32, 4, 8\)|\(4, 8\)"),
        ({"use_cls_token": False, "pooling": "gap"}, r"left over: \+cls"),
        ({"representation_size": 24}, "missing: -pre_logits"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            HfViTForImageClassification.from_pretrained(tmp_path / "x.npz", **wish)


# -- unusual, and right


def bfloat16(array):
    return (array.view(np.uint32) >> 16).astype(np.uint16).view("V2")


VARIANTS = {
    "big-endian": lambda arrays: {name: array.astype(">f4") for name, array in arrays.items()},
    "float64": lambda arrays: {name: array.astype(np.float64) for name, array in arrays.items()},
    "float16": lambda arrays: {name: array.astype(np.float16) for name, array in arrays.items()},
    "big-endian float16": lambda arrays: {name: array.astype(">f2") for name, array in arrays.items()},
    "bfloat16": lambda arrays: {name: bfloat16(array) for name, array in arrays.items()},
    "Fortran order": lambda arrays: {name: np.asfortranarray(array) for name, array in arrays.items()},
    "optimizer's target": lambda arrays: {
        **{f"opt/target/{name}": array for name, array in arrays.items()},
        **{f"opt/state/param_states/{name}/momentum": array for name, array in arrays.items()},
        "opt/state/step": np.int32(7),
    },
    "params and optimizer": lambda arrays: {
        **{f"params/{name}": array for name, array in arrays.items()},
        **{f"opt/mu/{name}": array for name, array in arrays.items()},
        "chrono/accum_train_time": np.float32(1),
    },
    "another order": lambda arrays: dict(sorted(arrays.items(), reverse=True)),
}


def expected_value(array):
    if array.dtype.kind == "V":
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


@pytest.mark.reliability(row="W02")
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "deflated"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
def test_an_unusual_checkpoint_loads_to_the_same_bits(tmp_path, arrays, variant, save):
    written = variant(arrays)
    save(tmp_path / "x.npz", **written)
    prefix = next(prefix for prefix in ("", "opt/target/", "params/") if f"{prefix}cls" in written)
    states = [HfViTForImageClassification.from_pretrained(tmp_path / "x.npz").state_dict()]
    convert_jax_checkpoint(tmp_path / "x.npz", tmp_path / "model")
    states.append({name: value.float() for name, value in load_file(tmp_path / "model/model.safetensors").items()})
    for rule in JaxLayout.of_dialect("prelinen").rules(CONFIG, 5):
        value = rule.to_ours(torch.from_numpy(expected_value(written[prefix + rule.theirs]).copy()))
        for state in states:
            name = rule.ours if rule.ours in state else f"vit.{rule.ours}"
            assert torch.equal(state[name], value), re.sub(r"\d", "N", name)
