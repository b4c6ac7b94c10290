"""The three commands of conversion/: what they write, what they prove, and what they refuse."""

import json
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from file_server import serve
from golden_cases import OWN_GOLDENS, import_command, read_cases
from safetensors.torch import load_file, save_file
from transformers import ViTForImageClassification

from hf_vit import HfViTConfig, HfViTForImageClassification, HfViTImageProcessor, HfViTModel
from hf_vit.catalogue.entries import is_published, read_catalogue
from hf_vit.checkpoints.layouts import JaxLayout, Rule, group_by_theirs
from hf_vit.files.errors import CheckpointError
from hf_vit.files.npz import write_npz
from hf_vit.hub.push import HUB_FILES


jax_to_safetensors = import_command("jax_to_safetensors")
safetensors_to_jax = import_command("safetensors_to_jax")
verify_parity = import_command("verify_parity")

CONVERSION = Path(__file__).parents[2] / "conversion"
CASES = read_cases(OWN_GOLDENS)
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TINY |= {"image_size": 32, "patch_size": 16}
TOKEN = OWN_GOLDENS / "vit_p16_tok_rep.npz"
ADDRESS_OF_AUGREG = "gs://vit_models/augreg/Ti_16-i1k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0.npz"


def convert(source, folder, *options):
    jax_to_safetensors.main([str(source), str(folder), *map(str, options)])
    certificate = folder / "parity.json"
    return json.loads(certificate.read_text()) if certificate.is_file() else None


def write_tiny_checkpoint(path, *, head_scale=1.0, **fields):
    config = HfViTConfig(**TINY | fields)
    groups = group_by_theirs(JaxLayout.of_dialect("prelinen").rules(config, config.num_labels))
    torch.manual_seed(0)
    arrays = {name: torch.randn(rules[0].theirs_shape) for name, rules in sorted(groups.items())}
    write_npz(path, ((name, value * (head_scale if "head" in name else 1.0)) for name, value in arrays.items()))
    return path


def run_as_command(monkeypatch, script, *arguments):
    """Run a script as the shell does and return its exit status."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(CONVERSION / f"{script}.py"), run_name="__main__")
    return stop.value.code


# -- a checkpoint in, a folder out


def test_no_file_that_a_conversion_writes_replaces_one_of_the_user(tmp_path):
    convert(TOKEN, tmp_path / "model")
    for path in (tmp_path / "model").iterdir():
        folder = tmp_path / f"of {path.name}"
        folder.mkdir()
        (folder / path.name).write_text("mine")
        with pytest.raises(FileExistsError, match=f"{re.escape(path.name)}.*--overwrite"):
            convert(TOKEN, folder)
        assert [(each.name, each.read_text()) for each in folder.iterdir()] == [(path.name, "mine")]


def test_a_converted_folder_is_complete_and_opens_as_its_checkpoint_does(tmp_path, capsys):
    certificate = convert(TOKEN, tmp_path / "model")
    files = {"README.md", "config.json", "model.safetensors", "parity.json", "preprocessor_config.json", *HUB_FILES}
    assert {path.name for path in (tmp_path / "model").iterdir()} == files
    assert {path.stat().st_mode & 0o444 for path in (tmp_path / "model").iterdir()} == {0o444}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    ours, theirs = (HfViTForImageClassification.from_pretrained(path) for path in (tmp_path / "model", TOKEN))
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert HfViTImageProcessor.from_pretrained(tmp_path / "model").size["height"] == 64
    assert certificate["passed"]
    assert "logits" in capsys.readouterr().out
    assert certificate["sha256"] in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_checkpoint_is_proved(tmp_path, name):
    case = CASES[name]
    options = ("--image_size", *case["image"]) if case["image"][0] != case["image"][1] else ()
    certificate = convert(OWN_GOLDENS / case["checkpoint"], tmp_path / "model", *options)
    depth = case.get("model", case.get("image_model"))
    depth = depth.get("depth") or depth["transformer"]["num_layers"]
    steps = {"tokens", "encoded", "features", *(f"block_{i:02d}" for i in range(depth))}
    assert steps <= certificate["differences"].keys()
    assert ("logits" in certificate["differences"]) == (certificate["head"] == "checkpoint")
    assert max(certificate["relative_differences"].values()) < 1e-5
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert certificate["tensors"] == len(weights)
    assert certificate["source"] == case["checkpoint"]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("vit_p16_tok_rep", ["--image_size", 96], {"image_size": [96, 96], "head": "checkpoint"}),
        ("vit_p16_tok_rep", ["--image_size", 48, 80], {"image_size": [48, 80], "head": "checkpoint"}),
        ("hybrid_r3_wf1", ["--image_size", 50, 37], {"image_size": [50, 37], "head": "checkpoint"}),
        ("lp_scipy_edge_8to26", ["--image_size", 104], {"image_size": [104, 104], "head": "checkpoint"}),
        ("bv_two_towers_scan", ["--image_size", 96], {"image_size": [96, 96], "head": "none"}),
        ("vit_p16_tok_rep", ["--num_labels", 4], {"head": "new"}),
        ("bv_two_towers_scan", ["--num_labels", 4], {"head": "new"}),
        ("bv_gap_bf16", ["--image_size", 96], {"image_size": [96, 96], "head": "checkpoint"}),
        ("bv_gap_bf16", ["--pooling", "none"], {"head": "checkpoint"}),
        ("bv_gap_bf16", ["--pooling", "token"], {"head": "checkpoint"}),
        ("vit_p16_tok_rep", ["--pooling", "none"], {"head": "checkpoint"}),
    ],
)
def test_options_change_the_model_and_the_proof_follows(tmp_path, name, options, expected):
    certificate = convert(OWN_GOLDENS / f"{name}.npz", tmp_path / "model", *options)
    assert certificate["passed"]
    assert {key: certificate[key] for key in expected} == expected
    config = HfViTConfig.from_pretrained(tmp_path / "model")
    height, width = certificate["image_size"]
    assert config.grid_size == config.grid_of((height, width))
    if "--num_labels" in options:
        model = HfViTForImageClassification.from_pretrained(tmp_path / "model")
        assert model.num_labels == 4
        assert not model.classifier.weight.any()


def test_without_proof_there_is_no_certificate(tmp_path):
    assert convert(TOKEN, tmp_path / "model", "--verify", "false") is None
    assert "Parity" not in (tmp_path / "model" / "README.md").read_text()


def test_shards_are_as_large_as_asked_for(tmp_path):
    assert convert(TOKEN, tmp_path / "model", "--max_shard_size", "150KB")["passed"]
    files = list((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 1
    assert max(path.stat().st_size for path in files) < 160_000


def test_a_dry_run_leaves_what_a_push_would_send(tmp_path):
    convert(TOKEN, tmp_path / "model", "--push_to_hub", "me/vit", "--dry_run")
    card = (tmp_path / "model" / "README.md").read_text()
    assert 'from_pretrained("me/vit", trust_remote_code=True)' in card
    assert (tmp_path / "model" / "modeling_hf_vit.py").is_file()
    assert "auto_map" in json.loads((tmp_path / "model" / "config.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--image_size", "1", "2", "3"], "one value, or height and width, got 3"),
        (["--image_size", "8"], "smaller than one patch"),
        (["--max_shard_size", "much"], "not in a valid format"),
        (["--pooling", "map"], "no place for attention pooling"),
    ],
)
def test_an_impossible_wish_is_refused(tmp_path, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        convert(TOKEN, tmp_path / "model", *arguments)
    assert list(tmp_path.iterdir()) == []


# -- the proof


def swap_one_transpose(monkeypatch):
    right = Rule.to_ours
    wrong = "encoder.layer.0.attn.out.weight"
    monkeypatch.setattr(
        Rule,
        "to_ours",
        lambda rule, theirs: right(rule, theirs).T.contiguous() if rule.ours == wrong else right(rule, theirs),
    )


@pytest.mark.parametrize("name", ["vit_p16_tok_rep", "hybrid_r3_wf1", "bv_two_towers_scan"])
def test_where_the_proof_fails_nothing_is_written(tmp_path, monkeypatch, name):
    swap_one_transpose(monkeypatch)
    with pytest.raises(verify_parity.ParityError, match=r"block_00 is .* off, expected at most"):
        convert(OWN_GOLDENS / f"{name}.npz", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("vit_p16_tok_rep", "hidden_act", "gelu"),
        ("vit_p16_tok_rep", "layer_norm_eps", 1e-5),
        ("bv_two_towers_scan", "layer_norm_eps", 1e-5),
        ("hybrid_r3_wf1", "hidden_act", "gelu"),
        ("hybrid_r3_wf1", "resnet_conv_eps_in_root", True),
    ],
)
def test_one_wrong_setting_is_seen(tmp_path, name, field, value):
    checkpoint = OWN_GOLDENS / f"{name}.npz"
    convert(checkpoint, tmp_path / "model", "--verify", "false")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(verify_parity.ParityError, match="does not compute what the checkpoint does"):
        verify_parity.main([str(tmp_path / "model"), "--against", str(checkpoint), "--json", str(tmp_path / "p.json")])
    assert not json.loads((tmp_path / "p.json").read_text())["passed"]


DEEP_STEM = {"resnet_layers": [3, 4, 9], "resnet_width_factor": 0.5, "patch_size": 1, "num_labels": 3}


def test_a_deep_stem_may_differ_by_its_own_rounding(tmp_path):
    path = write_tiny_checkpoint(tmp_path / "x.npz", **DEEP_STEM, image_size=64)
    certificate = convert(path, tmp_path / "model")
    assert certificate["passed"]
    assert "stage_3" in certificate["float32_noise"]
    for name, noise in certificate["float32_noise"].items():
        assert certificate["bounds"][name] == 4 * noise
    assert certificate["bounds"]["stage_3"] < 1e-2


def test_a_deep_stem_that_is_wrong_is_seen(tmp_path, monkeypatch):
    def pad_symmetrically(x, kernel_size, stride):
        side = (kernel_size - 1) // 2
        return torch.nn.functional.pad(x, (side, kernel_size - 1 - side) * 2)

    monkeypatch.setattr("hf_vit.resnetv2.pad_same", pad_symmetrically)
    path = write_tiny_checkpoint(tmp_path / "x.npz", **DEEP_STEM, image_size=64)
    with pytest.raises(verify_parity.ParityError, match="root is"):
        convert(path, tmp_path / "model")


def test_one_changed_weight_is_seen(tmp_path):
    convert(TOKEN, tmp_path / "model", "--verify", "false")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["vit.encoder.layer.1.ffn.fc1.bias"][7] += 1e-2
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(verify_parity.ParityError):
        verify_parity.main([str(tmp_path / "model"), "--against", str(TOKEN)])


@pytest.mark.parametrize(
    ("kind", "fields", "head"),
    [
        (HfViTForImageClassification, {"representation_size": None}, "new"),
        (HfViTForImageClassification, {"representation_size": None, "num_labels": 3}, "new"),
        (HfViTForImageClassification, {"image_size": (80, 48)}, "checkpoint"),
        (HfViTForImageClassification, {"num_labels": 3}, "new"),
        (HfViTModel, {}, "new"),
    ],
)
def test_a_model_that_differs_on_purpose_is_compared_as_far_as_it_goes(tmp_path, kind, fields, head):
    model = kind.from_pretrained(TOKEN, **fields)
    model.save_pretrained(tmp_path / "model")
    certificate = verify_parity.main([str(tmp_path / "model"), "--against", str(TOKEN)])
    assert certificate.passed
    assert certificate.head == head
    assert ("logits" in certificate.differences) == (head == "checkpoint")


def test_positions_that_were_resampled_in_another_way_are_not_compared(tmp_path):
    HfViTModel.from_pretrained(TOKEN, image_size=96, position_resampling="bicubic").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="resampled with 'bicubic', which the reference does not do"):
        verify_parity.main([str(tmp_path / "model"), "--against", str(TOKEN)])


def test_another_model_is_told_apart_by_its_shapes(tmp_path):
    HfViTModel.from_pretrained(TOKEN).save_pretrained(tmp_path / "model")
    other = write_tiny_checkpoint(tmp_path / "other.npz", num_labels=2)
    with pytest.raises(ValueError, match=r"the model gives .* the checkpoint .* not one model"):
        verify_parity.main([str(tmp_path / "model"), "--against", str(other)])


def test_a_fine_tuning_checkpoint_is_proved(tmp_path):
    assert convert(OWN_GOLDENS / "vit_p16_tok_linen.checkpoint_3", tmp_path / "model")["passed"]


# -- the way back


def test_the_way_back_takes_whatever_opens(tmp_path):
    convert(TOKEN, tmp_path / "model", "--max_shard_size", "100KB", "--verify", "false")
    HfViTModel.from_pretrained(TOKEN).save_pretrained(tmp_path / "base")
    for source, count in ((TOKEN, 58), (tmp_path / "model", 58), (tmp_path / "base", 56)):
        safetensors_to_jax.main([str(source), str(tmp_path / "back.npz"), "--overwrite"])
        with (
            np.load(tmp_path / "back.npz", allow_pickle=False) as back,
            np.load(TOKEN, allow_pickle=False) as original,
        ):
            assert len(back.files) == count
            assert set(back.files) <= set(original.files)
            assert all(np.array_equal(back[name], original[name]) for name in back.files)


def test_the_way_back_writes_another_dialect(tmp_path):
    safetensors_to_jax.main([str(TOKEN), str(tmp_path / "linen.npz"), "--dialect", "linen"])
    with np.load(tmp_path / "linen.npz", allow_pickle=False) as archive:
        assert "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel" in archive.files
    certificate = verify_parity.main([str(TOKEN), "--against", str(tmp_path / "linen.npz")])
    assert certificate.passed


def drop_a_tensor(weights):
    return {name: value for name, value in weights.items() if "block_0" not in name and "query.bias" not in name}


def poison(weights):
    weights["vit.encoder.layer.0.ffn.fc1.bias"][0] = torch.nan
    return weights


def reshape(weights):
    name = "vit.encoder.layer.0.ffn.fc1.weight"
    return weights | {name: weights[name].T.contiguous()}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (drop_a_tensor, "missing: -encoder.layer.0.attn.query.bias"),
        (poison, "vit.encoder.layer.0.ffn.fc1.bias has NaN or Inf"),
        (reshape, r"vit.encoder.layer.0.ffn.fc1.weight has shape \(48, 80\); expected .* \(80, 48\)"),
    ],
)
def test_the_way_back_writes_no_defective_model(tmp_path, damage, reason):
    convert(TOKEN, tmp_path / "model", "--verify", "false")
    path = tmp_path / "model" / "model.safetensors"
    save_file(damage(load_file(path)), path)
    with pytest.raises(ValueError, match=reason):
        safetensors_to_jax.main([str(tmp_path / "model"), str(tmp_path / "back.npz")])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_cut_weight_file_is_named(tmp_path):
    convert(TOKEN, tmp_path / "model", "--verify", "false")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is no readable safetensors file"):
        safetensors_to_jax.main([str(tmp_path / "model"), str(tmp_path / "back.npz")])


# -- as commands


def test_bad_input_is_one_line_and_a_status(tmp_path):
    """In a process of its own: what a shell script would see."""
    (tmp_path / "text.npz").write_text("not a checkpoint\n")
    command = [sys.executable, str(CONVERSION / "jax_to_safetensors.py"), "text.npz", "model"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: text.npz: expected an .npz or Flax msgpack file")
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.npz"]


@pytest.mark.parametrize(
    ("script", "arguments", "reason"),
    [
        ("jax_to_safetensors", ["no.npz", "out"], "error: no file no.npz: expected an original checkpoint"),
        ("safetensors_to_jax", ["empty", "out"], "error: "),
        ("verify_parity", ["empty", "--against", "no.npz"], "error: "),
    ],
)
def test_every_command_ends_in_an_error_that_says_what(tmp_path, monkeypatch, capsys, script, arguments, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert run_as_command(monkeypatch, script, *arguments) == 1
    message = capsys.readouterr().err
    assert message.startswith(reason)
    assert message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("script", ["jax_to_safetensors", "safetensors_to_jax"])
def test_an_interrupt_leaves_nothing_half_written(tmp_path, monkeypatch, script):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("kept")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    if script == "jax_to_safetensors":
        target = tmp_path / "out"
        monkeypatch.setattr(
            "hf_vit.checkpoints.processors.HfViTImageProcessor.save_pretrained", interrupt
        )  # weights are written
    else:
        target = tmp_path / "out" / "back.npz"
        monkeypatch.setattr("zipfile._ZipWriteFile.write", interrupt)
    assert run_as_command(monkeypatch, script, TOKEN, target) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old.txt"]


# -- addresses and names


@pytest.fixture
def online(tmp_path, monkeypatch):
    """The network is allowed (to this machine: nothing else answers here), with a cache of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))


def test_an_address_is_fetched_once(tmp_path, online):
    with serve(TOKEN.read_bytes(), name="vit.npz") as server:
        certificate = convert(server.url, tmp_path / "model")
        again = HfViTForImageClassification.from_pretrained(server.url)
        assert server.gets == 1
    assert certificate["source"] == server.url
    assert server.url in (tmp_path / "model" / "README.md").read_text()
    ours = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(value, ours[name]) for name, value in again.state_dict().items())


def test_from_pretrained_keeps_downloads_where_it_is_told(tmp_path, online):
    with serve(TOKEN.read_bytes(), name="vit.npz") as server:
        HfViTModel.from_pretrained(server.url, cache_dir=tmp_path / "cache")
        with pytest.raises(OSError, match="offline mode"):
            HfViTModel.from_pretrained(server.url, cache_dir=tmp_path / "other", local_files_only=True)
    assert len(list((tmp_path / "cache").rglob("vit.npz"))) == 1


def test_a_name_of_the_catalogue_is_fetched(tmp_path, monkeypatch, online):
    with serve(TOKEN.read_bytes()) as server:
        monkeypatch.setattr("hf_vit.catalogue.entries.GOOGLE_STORAGE", server.url.removesuffix("model.npz"))
        name = ADDRESS_OF_AUGREG.rpartition("/")[2].removesuffix(".npz")
        assert convert(name, tmp_path / "model")["source"] == ADDRESS_OF_AUGREG
        HfViTModel.from_pretrained(ADDRESS_OF_AUGREG)
        assert server.gets == 1
    card = (tmp_path / "model" / "README.md").read_text()
    assert ADDRESS_OF_AUGREG in card
    assert "steiner2022train" in card  # the paper of these files


def test_a_refused_file_is_an_error_with_advice(tmp_path, monkeypatch, online):
    with serve(b"", faults=["403"] * 20) as server:
        monkeypatch.setattr("hf_vit.catalogue.entries.GOOGLE_STORAGE", server.url.removesuffix("model.npz"))
        with pytest.raises(OSError, match=r"403.*google/vit-base-patch16-224-in21k"):
            convert("ViT-B_16", tmp_path / "model")
    assert not (tmp_path / "model").exists()


# -- what the classes are called, and how their scores are read


def test_the_classes_of_imagenet_have_their_names(tmp_path):
    path = write_tiny_checkpoint(tmp_path / "x.npz", num_labels=1000)
    convert(path, tmp_path / "model", "--verify", "false")
    for model in (HfViTForImageClassification.from_pretrained(source) for source in (path, tmp_path / "model")):
        assert model.config.id2label[0] == "tench, Tinca tinca"
        assert model.config.label2id["tench, Tinca tinca"] == 0
        assert model.config.problem_type is None
    named = HfViTForImageClassification.from_pretrained(path, id2label={i: f"class {i}" for i in range(1000)})
    assert named.config.id2label[0] == "class 0"
    assert HfViTForImageClassification.from_pretrained(path, num_labels=7).config.id2label[0] == "LABEL_0"


def test_a_head_trained_with_a_sigmoid_is_marked_until_it_is_replaced(tmp_path):
    path = write_tiny_checkpoint(tmp_path / "x.npz", num_labels=21843)
    convert(path, tmp_path / "model", "--verify", "false")
    for source in (path, tmp_path / "model"):
        config = HfViTForImageClassification.from_pretrained(source).config
        assert config.problem_type == "multi_label_classification"
        assert len(config.id2label) == 21843
        assert HfViTForImageClassification.from_pretrained(source, num_labels=7).config.problem_type is None
    softmax = HfViTForImageClassification.from_pretrained(path, problem_type="single_label_classification")
    assert softmax.config.problem_type == "single_label_classification"


def test_a_head_of_zeros_is_said(tmp_path, caplog):
    path = write_tiny_checkpoint(tmp_path / "x.npz", num_labels=21843, head_scale=0.0)
    with caplog.at_level(logging.WARNING):
        config = HfViTForImageClassification.from_pretrained(path).config
    assert "every weight of the head is zero" in caplog.text
    assert config.problem_type is None
    caplog.clear()
    HfViTModel.from_pretrained(path)
    HfViTForImageClassification.from_pretrained(path, num_labels=3)
    assert "every weight of the head is zero" not in caplog.text


# -- memory

MEASURE = """
import sys
import torch, hf_vit, hf_vit.checkpoints.loading
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
before = peak()
sys.path.insert(0, sys.argv[1])
__import__(sys.argv[2]).main(sys.argv[3:])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "most"), [(1000, 150), (21843, 175)])
def test_a_conversion_needs_little_memory(tmp_path, classes, most):
    """A B/16 is 330 to 390 MB. Measured above the interpreter with torch and the package loaded: 80 or 132 to 154 MB,
    back 23 or 151 (the head of 21,843 classes is 67 MB, and transposed at once).
    """
    torch.manual_seed(0)
    config = HfViTConfig.from_preset("ViT-B_16", num_labels=classes)
    groups = group_by_theirs(JaxLayout.of_dialect("prelinen").rules(config, classes))
    write_npz(tmp_path / "b16.npz", ((name, torch.randn(groups[name][0].theirs_shape)) for name in sorted(groups)))

    def megabytes(script, *arguments):
        command = [sys.executable, "-c", MEASURE, str(CONVERSION), script, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
        return float(result.stdout.splitlines()[-1])

    assert megabytes("jax_to_safetensors", tmp_path / "b16.npz", tmp_path / "model", "--verify", "false") <= most
    assert megabytes("safetensors_to_jax", tmp_path / "model", tmp_path / "back.npz") <= most
    with (
        np.load(tmp_path / "b16.npz", allow_pickle=False) as one,
        np.load(tmp_path / "back.npz", allow_pickle=False) as two,
    ):
        assert set(one.files) == set(two.files)
        assert all(np.array_equal(one[name], two[name]) for name in one.files)
    shutil.rmtree(tmp_path / "model")


# -- the page


def test_the_page_names_published_files_only():
    page = (CONVERSION / "README.md").read_text(encoding="utf-8")
    rows = page[page.index("| name | what it is |") : page.index("MLP-Mixers")].splitlines()[2:]
    names = [name for row in rows if row for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(names) > 25
    assert [name for name in names if not is_published(name)] == []
    assert f"lists {len(read_catalogue())} of them" in page


def test_conversion_keeps_the_source_and_every_file_of_the_user_in_its_folder(tmp_path):
    source = shutil.copy(TOKEN, tmp_path / "ViT.npz")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_text("mine")
    convert(source, tmp_path)
    convert(source, tmp_path)  # the same source again
    assert (tmp_path / "ViT.npz").read_bytes() == TOKEN.read_bytes()
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "other" / "model.safetensors").read_text() == "mine"
    HfViTForImageClassification.from_pretrained(tmp_path)


def test_another_model_and_an_edited_card_are_refused_before_the_work_starts(tmp_path, monkeypatch):
    convert(TOKEN, tmp_path)
    other = OWN_GOLDENS / "vit_p16_gray.npz"
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(jax_to_safetensors, "convert_jax_checkpoint", None)
        with pytest.raises(FileExistsError, match=r"already holds .* pass --overwrite"):
            convert(other, tmp_path)
        (tmp_path / "README.md").write_text("my words")
        with pytest.raises(FileExistsError, match="was not written by hf-vit, or was edited"):
            convert(TOKEN, tmp_path)
        (tmp_path / "README.md").write_bytes(before[tmp_path / "README.md"])
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    convert(other, tmp_path, "--overwrite")
    assert json.loads((tmp_path / "parity.json").read_text())["source"] == other.name


PLAIN = OWN_GOLDENS / "vit_p16_tok_linen.npz"


def test_a_stock_folder_opens_without_the_package_and_has_the_checkpoints_logits(tmp_path):
    convert(
        PLAIN,
        tmp_path / "stock",
        "--format",
        "transformers",
        "--license",
        "apache-2.0",
    )
    names = {path.name for path in (tmp_path / "stock").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "parity.json", "preprocessor_config.json"}
    certificate = json.loads((tmp_path / "stock" / "parity.json").read_text())
    assert certificate["passed"]
    assert certificate["differences"]["logits"] < 1e-5
    card = (tmp_path / "stock" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert certificate["sha256"] in card
    assert "auto_map" not in (tmp_path / "stock" / "config.json").read_text()
    stock = ViTForImageClassification.from_pretrained(tmp_path / "stock").eval()
    model = HfViTForImageClassification.from_pretrained(PLAIN).eval()
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(stock(pixels).logits, model(pixels).logits, atol=1e-5, rtol=0)


def test_a_model_that_stock_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="transformers' ViT has no place for"):
        convert(OWN_GOLDENS / "hybrid_r3_wf1.npz", tmp_path / "stock", "--format", "transformers")
    assert not (tmp_path / "stock").exists()
