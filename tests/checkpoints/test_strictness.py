"""Nothing is left at random and nothing is guessed: defective weights and impossible configurations are refused."""

import json
import struct
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from tiny_models import HOSTILE, TINY, randomised
from transformers import ViTConfig, ViTForImageClassification

from hf_vit import HfViTConfig, HfViTForImageClassification, HfViTModel
from hf_vit.checkpoints import write_jax_checkpoint
from hf_vit.files.errors import CheckpointError


@pytest.fixture(params=["own", "transformers", "shards"])
def folder(request, tmp_path):
    """A sound folder of our own layout, of transformers', and of ours in shards."""
    if request.param == "transformers":
        model = ViTForImageClassification(ViTConfig(**TINY))
    else:
        model = HfViTForImageClassification(HfViTConfig(**TINY))
    randomised(model).save_pretrained(tmp_path, max_shard_size="9KB" if request.param == "shards" else "1GB")
    HfViTForImageClassification.from_pretrained(tmp_path)
    return tmp_path


def change_weights(folder, change):
    """Let `change` edit the tensors of the file that holds the first block's first norm."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        name = next((name for name in tensors if "layer.0" in name and "norm" in name and "weight" in name), None)
        if name is not None:
            change(tensors, name)
            save_file(tensors, path, metadata={"format": "pt"})
            return
    raise AssertionError("no such tensor")


def assign(value):
    def change(tensors, name):
        tensors[name] = value(tensors[name])

    return change


def prefix_all(tensors, name):
    for old in list(tensors):
        tensors["wrapper." + old] = tensors.pop(old)


def with_one(tensor, value):
    tensor = tensor.clone()
    tensor[3] = value
    return tensor


DEFECTS = {
    "missing": (lambda tensors, name: tensors.pop(name), "missing: -"),
    "extra": (lambda tensors, name: tensors.update({"vit.encoder.extra": torch.zeros(2)}), "left over: .*extra"),
    "prefixed": (prefix_all, r"missing: -|no layout that is known"),
    "misshapen": (assign(lambda value: torch.zeros(25)), r"mis-shaped|has shape \(25,\)"),
    "nan": (assign(lambda value: with_one(value, float("nan"))), "NaN or Inf"),
    "inf": (assign(lambda value: with_one(value, float("inf"))), "NaN or Inf"),
    "int8": (assign(lambda value: value.to(torch.int8)), "dtype I8; expected floating point"),
    "int64": (assign(lambda value: value.to(torch.int64)), "dtype I64; expected floating point"),
}


@pytest.mark.reliability(row="W04")
@pytest.mark.parametrize("defect", DEFECTS)
def test_defective_weights_raise(folder, defect):
    change, words = DEFECTS[defect]
    change_weights(folder, change)
    with pytest.raises(CheckpointError, match=words) as error:
        HfViTForImageClassification.from_pretrained(folder)
    assert str(folder) in str(error.value)


def test_missing_and_left_over_tensors_are_listed_together(folder):
    def rename(tensors, name):
        tensors["vit.renamed"] = tensors.pop(name)

    change_weights(folder, rename)
    with pytest.raises(CheckpointError, match=r"missing: -.*left over: \+.*renamed"):
        HfViTForImageClassification.from_pretrained(folder)


@pytest.mark.reliability(row="W04")
def test_a_head_of_another_width_is_made_new_only_when_asked_for(folder):
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(i): str(i) for i in range(4)}
    config["label2id"] = {str(i): i for i in range(4)}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"classifier"):
        HfViTForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 8, b"\xff" * 64, struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]"],
)
def test_a_file_that_is_no_safetensors_raises_the_one_error(folder, content):
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="safetensors file"):
        HfViTForImageClassification.from_pretrained(folder)


def test_a_truncated_file_raises_the_one_error(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="safetensors file"):
        HfViTForImageClassification.from_pretrained(folder)


# -- shards


@pytest.mark.reliability(row="W05")
@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../b", "..", "sub/x", "", 7, None])
@pytest.mark.parametrize("kind", ["own", "transformers"])
def test_a_shard_outside_the_folder_is_refused_before_it_is_read(tmp_path, kind, name):
    folder = tmp_path / "model"
    if kind == "own":
        randomised(HfViTForImageClassification(HfViTConfig(**TINY))).save_pretrained(folder)
    else:
        randomised(ViTForImageClassification(ViTConfig(**TINY))).save_pretrained(folder)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")  # sound, but not in the folder
    tensors = load_file(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="expected files beside the index"):
        HfViTForImageClassification.from_pretrained(folder)


@pytest.mark.reliability(row="W05")
@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": {}}}', "[" * 100_000])
def test_an_index_that_is_none_raises_the_one_error(tmp_path, text):
    HfViTConfig(**TINY).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="is no index of shards"):
        HfViTModel.from_pretrained(tmp_path)


# -- configurations


HOSTILE_TIMM = [
    {"depth": 1_000_000},
    {"depth": "2"},
    {"num_heads": 5},
    {"num_heads": 0},
    {"embed_dim": 10**9},
    {"mlp_ratio": 1e9},
    {"mlp_ratio": "wide"},
    {"patch_size": 0},
    {"img_size": 10**9},
    {"img_size": [32, 32, 32]},
    {"img_size": 64},
    {"in_chans": 1},
    {"num_classes": 10**9},
    {"class_token": False},
    {"global_pool": []},
]


# What transformers takes from any configuration for itself, and the word by which each is refused.
HOSTILE_TO_TRANSFORMERS = [
    *(({"dtype": dtype}, "dtype is") for dtype in (3, True, float("nan"), [], "int8", "quick", "float8_e4m3fn")),
    ({"torch_dtype": "int8"}, "torch_dtype is"),
    ({"checkpoint_layout": {"dtype": float("nan")}}, "describes no valid model"),
    ({"label2id": {"dtype": []}}, "describes no valid model"),
    ({"out_indices": [-5]}, "describes no valid model"),
    *(({"_attn_implementation": name}, "expected eager, sdpa") for name in (True, "", "flash_attention_2")),
    ({"attn_implementation": "owner/kernels:attention"}, "expected eager, sdpa"),
    ({"experts_implementation": True}, "expected nothing"),
    ({"output_attentions": "x"}, "output_attentions is"),
    *(({"quantization_config": value}, "quantization_config") for value in (True, [], {"a": 1}, {"quant_method": []})),
    ({"quantization_config": {"quant_method": "no such one"}, "hidden_size": 16_384}, "quantization_config"),
    *(
        ({name: {}}, f"{name} is an attribute of the class")
        for name in ("attribute_map", "to_dict", "__class__", "base_model_tp_plan")
    ),
]


@pytest.mark.reliability(row="W05")
@pytest.mark.parametrize(("fields", "words"), HOSTILE_TO_TRANSFORMERS, ids=str)
def test_what_transformers_would_stumble_over_is_refused_with_the_name_of_the_file(tmp_path, fields, words):
    HfViTForImageClassification(HfViTConfig(**TINY)).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, **fields}))
    with pytest.raises(CheckpointError, match=words) as error:
        HfViTForImageClassification.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_configuration_that_asks_for_attentions_is_saved_and_read_again(tmp_path):
    model = randomised(HfViTForImageClassification(HfViTConfig(**TINY, output_attentions=True)))
    model.save_pretrained(tmp_path)
    HfViTForImageClassification.from_pretrained(tmp_path).save_pretrained(tmp_path)
    again = HfViTForImageClassification.from_pretrained(tmp_path).eval()
    assert again.config._attn_implementation == "sdpa"
    assert len(again(torch.zeros(1, 3, 32, 32)).attentions) == 2


@pytest.mark.reliability(row="W05")
@pytest.mark.parametrize("fields", HOSTILE, ids=str)
@pytest.mark.parametrize("kind", ["own", "transformers"])
def test_a_configuration_that_no_model_has_is_refused_with_the_name_of_the_file(tmp_path, kind, fields):
    if kind == "own":
        randomised(HfViTForImageClassification(HfViTConfig(**TINY))).save_pretrained(tmp_path)
    else:
        randomised(ViTForImageClassification(ViTConfig(**TINY))).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, **fields}))
    with pytest.raises(CheckpointError) as error:
        HfViTForImageClassification.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("fields", HOSTILE_TIMM, ids=str)
def test_arguments_of_timm_that_are_not_those_of_the_weights_are_refused(tmp_path, fields):
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 5}
    save_for_hf(timm.create_model("vit_tiny_patch16_224", **sizes), tmp_path, safe_serialization=True)
    HfViTForImageClassification.from_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["model_args"].update(fields)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError) as error:
        HfViTForImageClassification.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_images_that_are_not_those_of_the_positions_are_refused(tmp_path):
    randomised(ViTForImageClassification(ViTConfig(**TINY))).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, "image_size": 64}))
    with pytest.raises(
        CheckpointError, match=r"says images of 64 pixels, but .*position_embeddings is for 16 patches"
    ):
        HfViTForImageClassification.from_pretrained(tmp_path)


MEASURE = """
import json, resource, sys, time
from pathlib import Path
import hf_vit.checkpoints.loading
from hf_vit import HfViTForImageClassification

folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
stored = json.loads((folder / "config.json").read_text())
costs = []
for fields in [*cases, None]:
    (folder / "config.json").write_text(json.dumps({**stored, **(fields or {})}))
    if fields is None:
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        index = {"metadata": {}, "weight_map": {"a": "../outside.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    begin, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        HfViTForImageClassification.from_pretrained(folder)
    except ValueError as error:
        name = type(error).__name__
    else:
        name = "loaded"
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    costs.append([name, time.process_time() - begin, used * 1024])
print(json.dumps(costs))
"""
COSTLY = [
    {"num_hidden_layers": 1_000_000},
    {"layer_norm_eps": -1.0},
    {"num_attention_heads": 5},
    {"patch_size": 0},
    {"image_size": 8_000},
    {"hidden_size": 10**9},
    {"hidden_size": 16_384, "num_hidden_layers": 20, "intermediate_size": 65_536},
]


@pytest.mark.reliability(row="W05")
@pytest.mark.parametrize("kind", ["own", "transformers"])
def test_an_impossible_folder_is_refused_within_a_second_and_without_memory(tmp_path, kind):
    cases = [*COSTLY, *([{"num_labels": 10**9, "id2label": None}] if kind == "own" else [])]
    model = HfViTForImageClassification(HfViTConfig(**TINY))
    (model if kind == "own" else ViTForImageClassification(ViTConfig(**TINY))).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", MEASURE, tmp_path / "model", json.dumps(cases)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    costs = json.loads(run.stdout.splitlines()[-1])
    assert len(costs) == len(cases) + 1
    for fields, (error, seconds, growth) in zip([*cases, "a shard outside"], costs, strict=True):
        assert error == "CheckpointError", fields
        assert seconds < 1, fields  # of this process alone; the largest was 0.01
        assert growth < 50_000_000, fields


@pytest.mark.reliability(row="W05")
@pytest.mark.parametrize(
    "fields", [{"hidden_size": 16_384, "num_hidden_layers": 20, "intermediate_size": 65_536}, {"image_size": 8_000}]
)
def test_a_large_configuration_over_small_weights_is_refused_before_a_model_is_built(tmp_path, monkeypatch, fields):
    randomised(HfViTForImageClassification(HfViTConfig(**TINY))).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, **fields}))
    monkeypatch.setattr(torch.nn.Linear, "__init__", None)  # any layer at all would raise TypeError
    with pytest.raises(CheckpointError, match="mis-shaped"):
        HfViTForImageClassification.from_pretrained(tmp_path)


@pytest.mark.reliability(row="W05")
def test_heads_that_the_original_checkpoint_did_not_have_are_refused(tmp_path):
    model = randomised(HfViTForImageClassification(HfViTConfig(**TINY)))
    write_jax_checkpoint(model.state_dict(), model.config, tmp_path / "m.npz")
    HfViTForImageClassification.from_pretrained(tmp_path / "m.npz").save_pretrained(tmp_path / "ours")
    HfViTForImageClassification.from_pretrained(tmp_path / "ours")
    stored = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps({**stored, "num_attention_heads": 4}))
    with pytest.raises(CheckpointError, match="has 4 heads; the weights were read from a checkpoint with 2"):
        HfViTForImageClassification.from_pretrained(tmp_path / "ours")


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000])
def test_a_config_that_is_no_object_is_an_error_of_the_file(tmp_path, text):
    randomised(HfViTModel(HfViTConfig(**TINY))).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises((CheckpointError, OSError), match=r"config\.json"):
        HfViTModel.from_pretrained(tmp_path)


def test_a_field_of_the_caller_that_no_model_has_is_a_value_error(tmp_path):
    randomised(HfViTModel(HfViTConfig(**TINY))).save_pretrained(tmp_path)
    for fields in ({"layer_norm_eps": -1.0}, {"pooling": "mean"}, {"hidden_dropout_prob": "much"}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            HfViTModel.from_pretrained(tmp_path, **fields)


# -- pickles


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


@pytest.mark.reliability(row="W06")
@pytest.mark.parametrize("name", ["model.pth", "model.bin", "pytorch_model.bin"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, name):
    torch.save({"cls_token": Evil()}, tmp_path / name)
    ViTConfig(**TINY).save_pretrained(tmp_path)
    source = tmp_path if name == "pytorch_model.bin" else tmp_path / name
    with pytest.raises(CheckpointError, match="cannot be read with weights_only=True"):
        HfViTModel.from_pretrained(source, **({} if source == tmp_path else {"num_attention_heads": 2}))


@pytest.mark.parametrize("state", [{}, [1], {"a": 1}, {1: torch.zeros(2)}, torch.zeros(3)])
def test_a_pickle_without_named_tensors_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="expected tensors by name"):
        HfViTModel.from_pretrained(tmp_path / "model.pth", num_attention_heads=2)
