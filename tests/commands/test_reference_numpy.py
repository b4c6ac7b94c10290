"""The NumPy oracle agrees with the JAX reference by itself, step by step, and one wrong detail is seen to break it."""

import ast
import importlib.util
import json
import math
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest


SOURCE = Path(__file__).parents[2] / "conversion" / "reference_numpy.py"
OWN_GOLDENS = Path(__file__).parents[1] / "goldens"
GOLDENS = Path(os.environ.get("HF_VIT_GOLDENS", OWN_GOLDENS))
KINDS = (
    "vit_jax",
    "load_pretrained",
    "big_vision",
    "bv_two_towers",
    "bv_load_old",
)  # not: finetune, mixers, text towers
POOLING = {"unpooled": "none", "token_unpooled": "none", "none": "none", "0": "token"}  # what no file tells
IGNORED = {"image_u8", "pixels", "head_kernel", "head_bias", "features_2d", "logits_2d", "cls_after"}
IGNORED |= {"token_ids", "zimg", "ztxt", "img_norm"}  # the text tower, and what both towers make together


def import_script(path):
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


reference: Any = import_script(SOURCE)  # a script of its own folder, not a part of the package


def read_cases(folder):
    return {case["name"]: case for case in json.loads((folder / "cases.json").read_text())["cases"]}


CASES = {name: case for name, case in read_cases(GOLDENS).items() if case["kind"] in KINDS}


def overrides_of(case):
    model = case.get("model", {})
    overrides = {}
    if (pooling := model.get("classifier", model.get("pool_type"))) in POOLING:
        overrides["pooling"] = POOLING[pooling]
    if "to_model" in case and case["to_model"]["representation_size"] is None:
        overrides["representation_size"] = None
    return overrides


def run(case, folder=GOLDENS):
    """The recorded arrays and the oracle's, under the same names."""
    params = reference.read_checkpoint(folder / case["checkpoint"])
    with np.load(folder / case["io"], allow_pickle=False) as archive:
        expected = dict(archive)
    if "head_kernel" in expected:
        params |= {"head/kernel": expected["head_kernel"], "head/bias": expected["head_bias"]}
    got = reference.forward(params, expected["pixels"], reference.infer_settings(params, **overrides_of(case)))
    return {name: array for name, array in expected.items() if name not in IGNORED}, got


def bound(name, expected, is_hybrid):
    """What the reference keeps against itself, run operation by operation; the stem's is relative to its range."""
    if name in ("logits", "features"):
        return 2e-5 if is_hybrid else 1e-5
    if name == "posemb":
        return 1e-6
    if name == "root" or name.startswith("stage_"):
        return 1e-5 * float(np.abs(expected).max())
    return 5e-5


def excesses(case, folder=GOLDENS):
    """Name -> (largest difference, bound) of every step that is out of bounds."""
    expected, got = run(case, folder)
    is_hybrid = "resnet" in case.get("model", {})
    result = {}
    for name, array in expected.items():
        mine = (
            got[name][:, -array.shape[1] :] if name == "posemb" else got[name]
        )  # big_vision has taken the class row off
        assert mine.shape == array.shape, name
        assert mine.dtype == np.float32, name
        difference, limit = float(np.abs(mine - array).max()), bound(name, array, is_hybrid)
        if not difference <= limit:
            result[name] = (difference, limit)
    return result


@pytest.mark.parametrize("name", CASES)
def test_every_step_equals_the_reference(name):
    assert excesses(CASES[name]) == {}


def erf_gelu(x):
    return (x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))).astype(np.float32)


def half_pixel_matrix(old, new):
    points = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.clip(1 - np.abs(points[:, None] - np.arange(old)), 0, None)


def symmetric_padding(x, kernel, stride):
    return [(0, 0), *[((k - 1) // 2, k - 1 - (k - 1) // 2) for k in kernel], (0, 0)]


@pytest.mark.parametrize(
    ("name", "detail", "wrong"),
    [
        ("vit_p16_tok_rep", "gelu", erf_gelu),
        ("bv_gap_bf16", "gelu", erf_gelu),
        ("bv_two_towers_scan", "gelu", erf_gelu),
        ("bv_two_towers_scan", "LAYER_NORM_EPS", 1e-5),
        ("hybrid_r3_wf1", "GROUPS", 64),
        ("hybrid_r3_wf1", "STANDARDIZATION_EPS", 0.0),
        ("hybrid_r3_wf1", "same_padding", symmetric_padding),
        ("lp_scipy_edge_8to26", "zoom_matrix", half_pixel_matrix),
    ],
)
def test_one_wrong_detail_is_seen(monkeypatch, name, detail, wrong):
    monkeypatch.setattr(reference, detail, wrong)
    assert excesses(read_cases(OWN_GOLDENS)[name], OWN_GOLDENS) != {}


def test_epsilons_show_in_faint_activations():
    """Where the variance is 1e-6 too, an epsilon of 1e-6 leaves 1/sqrt(2).

    The goldens are too loud to tell: 1e-12 in the layer norms reaches 0.8 of a bound, 1e-5 in the group norms 0.6.
    """
    faint = np.resize(np.array([1e-3, -1e-3], np.float32), (1, 2, 2, 64))
    params = {"norm/scale": np.ones(64, np.float32), "norm/bias": np.zeros(64, np.float32)}
    expected = np.sign(faint) / np.sqrt(2)
    np.testing.assert_allclose(reference.layer_norm(params, "norm", faint), expected, atol=1e-6)
    np.testing.assert_allclose(reference.group_norm(params, "norm", faint), expected, atol=1e-6)


def test_standardisation_adds_its_epsilon_to_the_deviation():
    kernel = np.resize(np.array([1e-5, -1e-5], np.float32), (1, 2, 1, 1))
    outputs = reference.std_convolve({"conv/kernel": kernel}, "conv", np.array([[[[1], [0], [1]]]], np.float32))
    np.testing.assert_allclose(outputs.reshape(-1), [0.5, -0.5, 0.5], atol=1e-6)  # 1e-5 / (1e-5 + 1e-5)


def test_resampled_positions_equal_the_reference():
    with np.load(OWN_GOLDENS / "positions.npz", allow_pickle=False) as archive:
        tables = dict(archive)
    for name in {key.split("/")[0] for key in tables}:
        before, after = tables[f"{name}/before"][0], tables[f"{name}/after"][0]
        old, new = math.isqrt(len(before)), math.isqrt(len(after))
        grid = reference.resample(before[-old * old :].reshape(old, old, -1), (new, new)).reshape(new * new, -1)
        assert np.abs(grid - after[-new * new :]).max() <= 1e-6, name


@pytest.mark.parametrize(("old", "new"), [(28, 48), (16, 30), (24, 22), (32, 16)])
@pytest.mark.parametrize("swap", [False, True])
def test_only_some_grids_lose_their_last_row(old, new, swap):
    """One axis at a time: the other one, 14 -> 24 (224 -> 384 pixels at patch size 16), keeps its end."""
    shape, target = ((14, old), (24, new)) if swap else ((old, 14), (new, 24))
    resampled = reference.resample(np.ones((*shape, 2), np.float32), target)
    expected = np.ones((*target, 2))
    expected[(slice(None), -1) if swap else -1] = 0
    np.testing.assert_allclose(resampled, expected, atol=1e-6)


def test_a_ramp_stays_a_ramp_on_a_grid_that_is_not_square():
    ramp = np.add.outer(np.linspace(0, 1, 3), np.linspace(0, 5, 4)).astype(np.float32)[..., None]
    expected = np.add.outer(np.linspace(0, 1, 5), np.linspace(0, 5, 9))[..., None]
    np.testing.assert_allclose(reference.resample(ramp, (5, 9)), expected, atol=1e-6)


def test_a_stored_grid_that_is_not_square_is_taken_from_the_settings():
    name = "vit_p8x16"
    params = reference.read_checkpoint(OWN_GOLDENS / f"{name}.npz")
    pixels = np.zeros((1, 80, 80, 3), np.float32)  # 10 x 5 patches; stored are 6 x 4
    steps = reference.forward(params, pixels, reference.infer_settings(params, grid=(6, 4)))
    stored = params["Transformer/posembed_input/pos_embedding"][0, 1:].reshape(6, 4, -1)
    np.testing.assert_array_equal(steps["posemb"][0, 1:].reshape(10, 5, -1)[::9, ::4], stored[::5, ::3])  # the corners
    with pytest.raises(ValueError, match="24 positions is not a square: give its grid"):
        reference.forward(params, pixels, reference.infer_settings(params))


@pytest.mark.parametrize("name", CASES)
def test_settings_are_read_from_names_and_shapes(name):
    case = CASES[name]
    model = case.get("model", case.get("image_model"))
    settings = reference.infer_settings(reference.read_checkpoint(GOLDENS / case["checkpoint"]))
    assert settings.num_layers == model.get("depth", model.get("transformer", {}).get("num_layers"))
    size = model.get("representation_size", model.get("rep_size"))
    assert settings.representation_size == (model["width"] if size is True else size)
    stem = model.get("resnet")
    assert settings.resnet_layers == (None if stem is None else tuple(stem["num_layers"]))
    pooling = model.get("classifier", model.get("pool_type")).removeprefix("token_")
    if pooling not in POOLING:
        assert settings.pooling == {"tok": "token"}.get(pooling, pooling)


def inline_pooling(key):
    return key.removeprefix("img/").removeprefix("MAPHead_0/") if key.startswith("img/") else None


def count_by_class(key):
    return key.replace("MlpBlock_3", "MlpBlock_0").replace("Attention_1", "Attention_0").replace("Norm_2", "Norm_1")


@pytest.mark.parametrize(
    ("name", "respell", "beside"),
    [
        ("bv_gap_bf16", "params/{}".format, ["opt/mu/embedding/kernel", "chrono/accum_train_time"]),
        ("bv_gap_bf16", "opt/target/{}".format, ["opt/state/step"]),
        ("bv_gap_bf16", "params/img/{}".format, ["params/txt/head/kernel", "params/t", "params/b"]),
        ("bv_two_towers_scan", inline_pooling, []),
        ("vit_p16_tok_rep", count_by_class, []),
    ],
    ids=["params", "opt/target", "params/img", "inlined attention pooling", "Linen"],
)
def test_every_spelling_reads_the_same(tmp_path, name, respell, beside):
    with np.load(OWN_GOLDENS / f"{name}.npz", allow_pickle=False) as archive:
        arrays = {new: archive[key] for key in archive.files if (new := respell(key))}
    np.savez(tmp_path / "respelt.npz", **arrays, **{key: np.ones(1) for key in beside})
    got, expected = (
        reference.read_checkpoint(path) for path in (tmp_path / "respelt.npz", OWN_GOLDENS / f"{name}.npz")
    )
    assert got.keys() == expected.keys()
    assert all(np.array_equal(got[key], expected[key]) for key in expected)


def test_group_norms_are_flat():
    params = reference.read_checkpoint(OWN_GOLDENS / "hybrid_r3_wf1.npz")
    assert {array.ndim for name, array in params.items() if name.startswith("gn_root/") or "/gn" in name} == {1}


@pytest.mark.parametrize("where", ["pos_embedding", "Transformer/pos_embedding"])
def test_an_older_table_has_the_class_row_wherever_it_lies(where):
    """big_vision's fix_old_checkpoints: the row is added to the class token, and dropped where there is none."""
    params = reference.read_checkpoint(OWN_GOLDENS / "vit_p16_gray.npz")
    pixels = np.random.default_rng(2).uniform(-1, 1, (1, 32, 32, 1)).astype(np.float32)
    expected = reference.forward(params, pixels, reference.infer_settings(params))["tokens"]
    params[where] = params.pop("Transformer/posembed_input/pos_embedding")
    np.testing.assert_array_equal(
        reference.forward(params, pixels, reference.infer_settings(params))["tokens"], expected
    )
    del params["cls"]
    tokens = reference.forward(params, pixels, reference.infer_settings(params))["tokens"]
    np.testing.assert_array_equal(tokens, expected[:, 1:])


def test_fixed_positions_are_columns_then_rows():
    table = reference.sincos2d(3, 5, 12)[0].reshape(3, 5, 4, 3)  # omega is 1, 1/100, 1/10000
    np.testing.assert_allclose(table[2, 4, :, 0], [math.sin(4), math.cos(4), math.sin(2), math.cos(2)], atol=1e-7)
    np.testing.assert_allclose(table[2, 4, [0, 2], 1:], [[math.sin(0.04), 4e-4], [math.sin(0.02), 2e-4]], atol=1e-7)


def pack(value):
    """What flax.serialization writes, in msgpack's shortest forms: arrays are extension type 1, scalars type 3."""
    if isinstance(value, dict):
        return bytes([0x80 + len(value)]) + b"".join(pack(item) for pair in value.items() for item in pair)
    if isinstance(value, list):
        return bytes([0x90 + len(value)]) + b"".join(map(pack, value))
    if isinstance(value, str):
        return bytes([0xA0 + len(value)] if len(value) < 32 else [0xD9, len(value)]) + value.encode()
    if isinstance(value, bytes):
        return struct.pack(">BI", 0xC6, len(value)) + value if len(value) > 255 else bytes([0xC4, len(value)]) + value
    if isinstance(value, int):
        return bytes([value]) if value < 128 else struct.pack(">BH", 0xCD, value)
    dtype = "bfloat16" if value.dtype.kind == "V" else value.dtype.name
    payload = pack([list(value.shape), dtype, value.tobytes()])
    header = b"\xd8" if len(payload) == 16 else struct.pack(">BI", 0xC9, len(payload))
    return header + bytes([1 if value.ndim else 3]) + payload


@pytest.fixture
def flax_checkpoint(tmp_path):
    """`bv_gap_bf16` as the reference's fine-tuning would leave it: parameters, optimizer state, step."""
    tree = {}
    with np.load(OWN_GOLDENS / "bv_gap_bf16.npz", allow_pickle=False) as archive:
        for name in archive.files:
            *parents, leaf = name.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = archive[name]
    path = tmp_path / "checkpoint_7"
    path.write_bytes(
        pack(
            {
                "0": tree,
                "1": {"trace": tree, "scale": np.array(1, np.float32), **{str(i): {} for i in range(13)}},
                "2": 7,
            }
        )
    )
    return path


def test_a_flax_checkpoint_reads_like_its_npz(flax_checkpoint):
    pairs = [(flax_checkpoint, OWN_GOLDENS / "bv_gap_bf16.npz")]
    pairs += [(path, path.with_suffix(".npz")) for path in GOLDENS.glob("*.checkpoint_*")]
    for path, npz in pairs:
        got, expected = reference.read_checkpoint(path), reference.read_checkpoint(npz)
        assert got.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name], err_msg=f"{path.name} {name}")


def test_a_checkpoint_cut_short_is_refused(flax_checkpoint):
    whole = flax_checkpoint.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        flax_checkpoint.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"checkpoint_7: neither \.npz nor a whole Flax checkpoint"):
            reference.read_checkpoint(flax_checkpoint)
    flax_checkpoint.write_bytes(whole + b"\x00")
    with pytest.raises(ValueError, match="nothing after it"):
        reference.read_checkpoint(flax_checkpoint)


def test_what_is_no_vision_transformer_is_refused(tmp_path):
    np.savez(tmp_path / "mixer.npz", **{"MixerBlock_0/LayerNorm_0/scale": np.ones(4), "stem/kernel": np.ones(4)})
    with pytest.raises(ValueError, match=r"expected embedding/\.\.\. and Transformer/"):
        reference.read_checkpoint(tmp_path / "mixer.npz")
    np.savez(tmp_path / "objects.npz", **{"embedding/kernel": np.array([{}], dtype=object)})
    with pytest.raises(ValueError, match="allow_pickle=False"):
        reference.read_checkpoint(tmp_path / "objects.npz")


def test_bfloat16_is_the_upper_half_of_float32():
    bits = np.array([0x3F80, 0xC000, 0x3EAB, 0x7F80], np.uint16).view("V2")
    np.testing.assert_array_equal(reference.as_float32(bits), np.array([1, -2, 0.333984375, np.inf], np.float32))


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8", "<i4"])
def test_every_number_becomes_float32(dtype):
    array = reference.as_float32(np.array([1, -2], dtype))
    assert array.dtype == np.float32
    assert array.tolist() == [1, -2]


def test_a_batch_equals_its_single_images():
    case = read_cases(OWN_GOLDENS)["bv_two_towers_scan"]
    params = reference.read_checkpoint(OWN_GOLDENS / case["checkpoint"])
    settings = reference.infer_settings(params)
    pixels = np.random.default_rng(1).uniform(-1, 1, (3, 64, 64, 3)).astype(np.float32)
    together = reference.forward(params, pixels, settings)
    for i in range(3):
        for name, array in reference.forward(params, pixels[i : i + 1], settings).items():
            if name != "posemb":
                np.testing.assert_allclose(
                    array[0], together[name][i], atol=2e-5, err_msg=name
                )  # sums in another order


@pytest.mark.parametrize("suffix", [".npy", ".ppm"])
def test_the_command_prints_the_five_largest_logits(tmp_path, capsys, suffix):
    case = read_cases(OWN_GOLDENS)["vit_p16_tok_rep"]
    expected, _ = run(case, OWN_GOLDENS)
    with np.load(OWN_GOLDENS / case["io"], allow_pickle=False) as archive:
        image = np.rint(archive["pixels"][0] * 127.5 + 127.5).astype(np.uint8)
    path = tmp_path / f"image{suffix}"
    if suffix == ".npy":
        np.save(path, image)
    else:
        path.write_bytes(b"P6\n64 64\n255\n" + image.tobytes())
    reference.main([str(OWN_GOLDENS / case["checkpoint"]), str(path)])
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[-5:]]
    best = np.argsort(-expected["logits"][0])[:5]
    assert [int(index) for index, _ in printed] == best.tolist()
    np.testing.assert_allclose([float(value) for _, value in printed], expected["logits"][0, best], atol=1e-5)


def test_the_command_resamples_and_resizes(capsys):
    reference.main([str(OWN_GOLDENS / "hybrid_r3_wf1.npz"), "--image_size", "48", "40"])
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_the_oracle_imports_numpy_and_the_standard_library_alone():
    imported = set()
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported - sys.stdlib_module_names == {"numpy"}
