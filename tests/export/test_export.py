"""The way out: transformers and timm open what is written and compute the same; ONNX and torch.export agree."""

import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from transformers import ViTForImageClassification, ViTForMaskedImageModeling, ViTImageProcessor, ViTModel

from hf_vit import (
    HfViTBackbone,
    HfViTConfig,
    HfViTForImageClassification,
    HfViTForMaskedImageModeling,
    HfViTImageProcessor,
    HfViTModel,
)
from hf_vit.export.formats import export_onnx, export_program, export_timm, export_transformers


TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 50,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
TIMM_STEM = {"resnet_norm_eps": 1e-5, "resnet_conv_eps": 1e-8, "resnet_conv_eps_in_root": True}


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(1 + noise if name.endswith((".weight",)) and parameter.ndim == 1 else noise)
    return model.eval()


def build(kind=HfViTForImageClassification, **fields):
    return randomised(kind(HfViTConfig(**{**TINY, **fields})))


def sample_images(height=32, width=32, number=2):
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(1))


def assert_same(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(theirs, ours, atol=tolerance, rtol=0)


# -- transformers


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"hidden_act": "gelu", "layer_norm_eps": 1e-12},
        {"image_size": (32, 48), "qkv_bias": False},
        {"position_embedding_type": "sincos2d"},
    ],
)
def test_transformers_opens_a_classifier_to_the_same_logits(tmp_path, fields):
    model = build(**fields, id2label={i: f"kind {i}" for i in range(5)})
    export_transformers(model, tmp_path / "out")
    theirs = ViTForImageClassification.from_pretrained(tmp_path / "out", local_files_only=True)
    x = sample_images(*fields.get("image_size", (32, 32)))
    with torch.no_grad():
        assert_same(model(x).logits, theirs(x).logits)
    assert theirs.config.id2label == {i: f"kind {i}" for i in range(5)}
    assert theirs.config.hidden_act == fields.get("hidden_act", "gelu_pytorch_tanh")


def test_transformers_opens_a_base_model_with_its_pooler(tmp_path):
    model = build(HfViTModel, representation_size=24)
    export_transformers(model, tmp_path / "out")
    theirs = ViTModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        ours, others = model(sample_images()), theirs(sample_images())
    assert_same(ours.last_hidden_state, others.last_hidden_state)
    assert_same(ours.pooler_output, others.pooler_output)


def test_transformers_opens_a_masked_image_model(tmp_path):
    model = build(HfViTForMaskedImageModeling)
    export_transformers(model, tmp_path / "out")
    theirs = ViTForMaskedImageModeling.from_pretrained(tmp_path / "out")
    mask = torch.arange(32).reshape(2, 16) % 3 == 0
    with torch.no_grad():
        ours, others = model(sample_images(), bool_masked_pos=mask), theirs(sample_images(), bool_masked_pos=mask)
    assert_same(ours.reconstruction, others.reconstruction)


def test_transformers_gets_the_processor_of_its_protocol(tmp_path):
    processor = HfViTImageProcessor(protocol="transformers", size={"height": 32, "width": 32})
    export_transformers(build(), tmp_path / "out", processor=processor)
    image = torch.randint(0, 256, (3, 50, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = ViTImageProcessor.from_pretrained(tmp_path / "out")
    assert_same(
        processor(image, return_tensors="pt")["pixel_values"],
        theirs(image, return_tensors="pt")["pixel_values"],
        tolerance=1 / 100,  # one step of 255 in a range of -1...1
    )


def test_a_protocol_that_the_library_lacks_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        export_transformers(build(), tmp_path / "out")
    assert "does not resize as the protocol 'vit_jax'" in caplog.text


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"resnet_layers": [], "patch_size": 4}, "a ResNet stem"),
        ({"pooling": "gap"}, "pooling='gap'"),
        ({"pooling": "gap", "use_cls_token": False}, "without a class token"),
        ({"representation_size": 8}, "representation_size before a classifier"),
    ],
)
def test_what_transformers_lacks_is_refused_and_nothing_is_written(tmp_path, fields, reason):
    with pytest.raises(ValueError, match=f"transformers' ViT has no place for .*{reason}"):
        export_transformers(build(**fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- timm


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"hidden_act": "gelu", "patch_size": 16},
        {"image_size": (32, 48), "qkv_bias": False},
        {"pooling": "gap"},
        {"pooling": "gap", "use_cls_token": False},
        {"pooling": "map"},
        {"pooling": "map", "use_cls_token": False},
        {"pooling": "none"},
        {"position_embedding_type": "sincos2d"},
        {"resnet_layers": [], "patch_size": 4, **TIMM_STEM},
    ],
)
def test_timm_opens_a_classifier_to_the_same_logits(tmp_path, fields):
    model = build(**fields)
    export_timm(model, tmp_path / "out")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = sample_images(*fields.get("image_size", (32, 32)))
    with torch.no_grad():
        assert_same(model(x).logits, theirs(x))


@pytest.mark.slow
@pytest.mark.parametrize("units", [[3, 4, 9], [2, 2, 2, 2]])
def test_timm_opens_a_hybrid_to_the_same_logits(tmp_path, units):
    model = build(resnet_layers=units, patch_size=1, **TIMM_STEM)
    export_timm(model, tmp_path / "out")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).double().eval()
    model.double()  # 50 random convolutions in a row: float32 rounds to 1e-5 where the numbers are equal
    with torch.no_grad():
        assert_same(model(sample_images().double()).logits, theirs(sample_images().double()), tolerance=1e-9)


def test_timm_gets_classes_and_preprocessing(tmp_path):
    processor = HfViTImageProcessor(protocol="timm", size={"height": 32, "width": 32}, crop_pct=0.8)
    export_timm(build(id2label={i: f"kind {i}" for i in range(5)}), tmp_path / "out", processor=processor)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["label_names"] == [f"kind {i}" for i in range(5)]
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    data = resolve_model_data_config(model)
    assert (data["interpolation"], data["crop_pct"], data["mean"]) == ("bicubic", 0.8, [0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"layer_norm_eps": 1e-5}, "computes with layer_norm_eps=1e-06"),
        ({"resnet_layers": [], "patch_size": 4}, "computes with resnet_norm_eps=1e-05, resnet_conv_eps=1e-08"),
        ({"resnet_layers": [1], "patch_size": 1, **TIMM_STEM}, r"a stem of \(1,\)"),
        ({"representation_size": 8}, "a representation_size"),
        ({"use_cls_token": False, "pooling": "token"}, "without a class token"),
        ({"hidden_act": "silu"}, "hidden_act='silu'"),
    ],
)
def test_what_timm_lacks_is_refused_and_nothing_is_written(tmp_path, fields, reason):
    with pytest.raises(ValueError, match=f"timm has no place for .*{reason}"):
        export_timm(build(**fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- ONNX and torch.export


ONNX_CASES = [
    ({}, HfViTForImageClassification, ["logits"]),
    ({"pooling": "map"}, HfViTModel, ["last_hidden_state", "pooler_output"]),
    (
        {"resnet_layers": [1, 1], "patch_size": 1, "resnet_width_factor": 0.5, "image_size": 33},
        HfViTForImageClassification,
        ["logits"],
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "kind", "outputs"), ONNX_CASES)
def test_onnxruntime_computes_the_same_for_any_batch(tmp_path, fields, kind, outputs):
    model = build(kind, **fields)
    export_onnx(model, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == outputs
    side = fields.get("image_size", 32)
    for number in (1, 2, 5):
        x = sample_images(side, side, number)
        got = session.run(None, {"pixel_values": x.numpy()})
        with torch.no_grad():
            expected = model(x)
        for name, value in zip(outputs, got, strict=True):
            assert_same(expected[name], torch.from_numpy(value), tolerance=1e-4)


@pytest.mark.parametrize("fields", [{}, ONNX_CASES[2][0]])
def test_an_exported_program_computes_the_same_for_any_batch(tmp_path, fields):
    model = build(**fields).train()
    export_program(model, tmp_path / "model.pt2")
    assert model.training  # as it was before
    program = torch.export.load(tmp_path / "model.pt2").module()
    side = fields.get("image_size", 32)
    for number in (1, 3):
        x = sample_images(side, side, number)
        with torch.no_grad():
            assert_same(model.eval()(x).logits, program(x)[0])


def test_a_backbone_is_refused_by_name(tmp_path):
    model = build(HfViTBackbone)
    for write in (export_onnx, export_program, export_timm, export_transformers):
        with pytest.raises(ValueError, match="no place for a HfViTBackbone"):
            write(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# -- the command


def command():
    path = Path(__file__).parents[2] / "examples" / "export.py"
    spec: Any = importlib.util.spec_from_file_location("export_example", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["export_example"] = module
    spec.loader.exec_module(module)
    return module.main


def test_the_command_writes_what_the_suffix_or_the_format_says(tmp_path):
    build().save_pretrained(tmp_path / "model")
    model = ["--model_name_or_path", str(tmp_path / "model")]
    assert command()([*model, "--output", str(tmp_path / "m.pt2")]) == 0
    assert command()([*model, "--output", str(tmp_path / "t"), "--format", "timm", "--image_size", "48"]) == 0
    assert torch.export.load(tmp_path / "m.pt2") is not None
    theirs: Any = timm.create_model(f"local-dir:{tmp_path / 't'}", pretrained=True)
    assert theirs.patch_embed.img_size == (48, 48)
    with pytest.raises(SystemExit):
        command()([*model, "--output", str(tmp_path / "nothing")])
