"""A model prepared for inference: the plain model's outputs for any batch, and one clear line for anything else."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from tiny_models import TINY, randomised
from transformers import pipeline

from hf_vit import (
    HfViTBackbone,
    HfViTConfig,
    HfViTForImageClassification,
    HfViTForMaskedImageModeling,
    HfViTImageProcessor,
    HfViTModel,
)
from hf_vit.inference import load_prepared, prepare
from hf_vit.inference.engines import CompiledEngine
from hf_vit.inference.form import InferenceForm, positions_for
from hf_vit.inference.preparation import _pixel_scale


HYBRID = {"patch_size": 1, "resnet_layers": [1, 1], "resnet_width_factor": 0.5, "image_size": 64}
FIELDS = [
    {},
    HYBRID,
    {"image_size": (32, 48)},
    {"pooling": "gap"},
    {"pooling": "map", "use_cls_token": False},
    {"pooling": "none"},
    {"hidden_act": "relu"},
    {"qkv_bias": False},
    {"representation_size": 8},
    {"num_hidden_layers": 0},
    {"position_embedding_type": "sincos2d"},
]


def build(cls=HfViTForImageClassification, **fields):
    return randomised(cls(HfViTConfig(**{**TINY, **fields})))


def images(number=2, height=32, width=32):
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(1))


def assert_close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, atol=tolerance * float(expected.abs().max().clamp(min=1)), rtol=0)


@pytest.fixture(scope="module")
def plain():
    return build()


@pytest.fixture(scope="module")
def processor(plain):
    fields = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    return HfViTImageProcessor.for_model(plain.config, **fields)


@pytest.fixture(scope="module")
def fast(plain, processor):
    """Prepared for images of any size, and for uint8."""
    return prepare(plain, dynamic=True, image_processor=processor)


# -- the form that is compiled


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("cls", [HfViTForImageClassification, HfViTModel])
def test_the_form_gives_the_plain_models_outputs(cls, fields):
    model = build(cls, **fields)
    size = model.config.image_size
    pixels = images(2, *((size, size) if isinstance(size, int) else size))
    positions = positions_for(model.config, model.base_model.embeddings.position_embeddings, model.config.grid_size)
    form = InferenceForm(model, torch.float32)
    with torch.no_grad():
        found, expected = form(pixels, positions), model(pixels)
    expected = (expected.last_hidden_state, expected.pooler_output) if cls is HfViTModel else (expected.logits,)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("fields", [{}, {"apply_layernorm": False, "reshape_hidden_states": False}])
def test_the_form_gives_the_feature_maps_of_a_backbone(fields):
    model = build(HfViTBackbone, out_features=["stem", "stage2"], **fields)
    positions = positions_for(model.config, model.embeddings.position_embeddings, (5, 6))
    with torch.no_grad():
        found = InferenceForm(model, torch.float32)(images(2, 40, 48), positions)
        expected = model(images(2, 40, 48)).feature_maps
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


def test_the_last_block_of_a_classifier_computes_one_query(plain):
    rows = []
    form = InferenceForm(plain, torch.float32)
    for block in form.model.vit.encoder.layer:
        block.ffn.fc1.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    with torch.no_grad():
        form(images(), plain.vit.embeddings.position_embeddings)
    assert rows == [17, 1]


@pytest.mark.parametrize("fields", [{}, HYBRID])
def test_the_normalisation_of_pixels_is_folded_in(fields):
    model = build(**fields)
    numbers = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "rounding": "round"}
    processor = HfViTImageProcessor.for_model(model.config, **numbers)
    side = model.config.image_size
    pixels = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    normalised = processor(pixels, return_tensors="pt", do_resize=False, do_center_crop=False)["pixel_values"]
    form = InferenceForm(model, torch.float32, _pixel_scale(processor, 3))
    with torch.no_grad():
        found = form(pixels.float(), model.vit.embeddings.position_embeddings)[0]
        assert_close(found, model(normalised).logits, 2e-5)


# -- prepared models


def test_a_prepared_model_gives_the_plain_models_logits_for_any_batch_and_size(plain, fast):
    for shape in ((1, 32, 32), (5, 32, 32), (2, 48, 40), (1, 35, 90)):
        with torch.no_grad():
            expected = plain(images(*shape), interpolate_pos_encoding=True).logits
        assert_close(fast(images(*shape)).logits, expected)
        assert_close(fast(images(*shape), interpolate_pos_encoding=True, return_dict=False)[0], expected)


def test_uint8_and_normalised_floats_give_the_same_logits(plain, fast, processor):
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    floats = processor(pixels, return_tensors="pt", do_resize=False)["pixel_values"]
    with torch.no_grad():
        expected = plain(floats).logits
    assert_close(fast(pixels).logits, expected, 2e-5)
    assert_close(fast(floats).logits, expected, 2e-5)


def test_the_model_stays_as_it_was_and_the_result_does_not_follow_it():
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(images()).logits
        prepared = prepare(model, batch_size=1)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        for parameter in model.parameters():
            parameter.zero_()
    assert_close(prepared(images()).logits, expected)
    with pytest.raises(ValueError, match="the model was prepared for 32x32; pass image_size="):
        prepared(images(1, 48, 40))
    with pytest.raises(ValueError, match="uint8: expected normalised floats, or pass image_processor="):
        prepared(images().byte())


def test_threads_and_copies_share_a_prepared_model(plain, fast):
    batches = [torch.randn(2, 3, 32, 32) for _ in range(12)]
    with torch.no_grad():
        expected = [plain(pixels).logits for pixels in batches]
    copied = copy.deepcopy(fast)
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda pixels: copied(pixels).logits, batches))
    for found, wanted in zip(results, expected, strict=True):
        assert_close(found, wanted)


def test_a_pipeline_accepts_a_prepared_model(plain, fast, processor, caplog):
    image = Image.linear_gradient("L").convert("RGB")
    expected, found = (
        pipeline("image-classification", model=model, image_processor=processor)(image) for model in (plain, fast)
    )
    assert [each["label"] for each in found] == [each["label"] for each in expected]
    assert [each["score"] for each in found] == pytest.approx([each["score"] for each in expected], abs=1e-5)
    assert isinstance(fast, HfViTForImageClassification)
    assert "not supported" not in caplog.text


def test_a_prepared_model_is_saved_and_opened_again(fast, tmp_path):
    fast.save_pretrained(tmp_path / "fast")
    again = load_prepared(tmp_path / "fast")
    for pixels in (images(3), images(1, 48, 40), torch.full((1, 3, 32, 32), 7, dtype=torch.uint8)):
        assert_close(again(pixels).logits, fast(pixels).logits, 1e-6)
    assert again.config.to_dict() == fast.config.to_dict()
    with pytest.raises(FileNotFoundError, match="expected a folder written by a prepared model"):
        load_prepared(tmp_path)
    with pytest.raises(TypeError, match="push the model that it was made of"):
        fast.push_to_hub("somewhere")


def test_only_outputs_are_returned_and_the_rest_is_refused(fast):
    for argument in ({"output_hidden_states": True}, {"output_attentions": True}, {"labels": torch.zeros(2).long()}):
        (name,) = argument
        with pytest.raises(ValueError, match=f"does not support {name}: call the model that it was made of"):
            fast(images(), **argument)
    with pytest.raises(ValueError, match=r"expected \(images, 3, height, width\)"):
        fast(images()[0])
    with pytest.raises(ValueError, match="smaller than one patch"):
        fast(images(1, 7, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float16}, "float16: expected torch.float32, torch.bfloat16 or torch.int8"),
        ({"batch_size": 0}, "batch_size is 0: expected 1 or more"),
        ({"dtype": torch.int8}, "calibration images go with torch.int8"),
        ({"calibration": [images()]}, "calibration images go with torch.int8"),
        ({"image_size": 4}, "image_size is 4: expected at least one patch"),
    ],
)
def test_arguments_are_checked_before_anything_is_compiled(plain, arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare(plain, **arguments)


def test_models_that_cannot_be_prepared_are_refused(plain):
    with pytest.raises(TypeError, match="a HfViTForMaskedImageModeling: expected one of HfViTFor"):
        prepare(build(HfViTForMaskedImageModeling))
    with pytest.raises(ValueError, match="call the plain model for them"):
        prepare(build(output_attentions=True))


def test_without_openvino_the_error_names_the_extra(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"prepare needs openvino on a CPU: pip install 'hf-vit\[openvino\]'"):
        prepare(plain)


def test_bfloat16_falls_back_to_float32_with_a_warning(plain, monkeypatch, caplog):
    import openvino

    class Processor:
        def get_property(self, *names):
            return ["FP32"]

    from hf_vit.inference import engines

    monkeypatch.setattr(openvino, "Core", Processor)
    with caplog.at_level("WARNING"):
        assert engines.supported(torch.bfloat16) == torch.float32
    assert "no bfloat16 instructions" in caplog.text


def test_a_stem_is_prepared_for_one_size_at_a_time():
    with pytest.raises(ValueError, match="prepare one for each image_size="):
        prepare(build(HfViTModel, **HYBRID), dynamic=True)


# -- slow: compiled in every form


@pytest.mark.slow
@pytest.mark.parametrize("cls", [HfViTModel, HfViTBackbone])
@pytest.mark.parametrize("fields", [{}, {"pooling": "map"}, {"position_embedding_type": "sincos2d"}])
def test_every_class_is_prepared_for_any_size(cls, fields):
    model = build(cls, **fields)
    prepared = prepare(model, dynamic=True)
    arguments = {} if cls is HfViTBackbone else {"interpolate_pos_encoding": True}
    for shape in ((1, 64, 64), (3, 67, 90)):
        with torch.no_grad():
            expected = model(images(*shape), **arguments)[0]
        for a, b in zip(prepared(images(*shape))[0], expected, strict=True):
            assert_close(a, b)


@pytest.mark.slow
def test_another_size_is_prepared_with_resampled_positions(plain):
    prepared = prepare(plain, image_size=(48, 40))
    with torch.no_grad():
        expected = plain(images(3, 48, 40), interpolate_pos_encoding=True).logits
    assert_close(prepared(images(3, 48, 40)).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, HYBRID])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_fewer_bits_are_near_the_plain_model(fields, dtype, tmp_path):
    model = build(**fields)
    side = model.config.image_size
    pixels = images(16, side, side)
    prepared = prepare(model, dtype=dtype, calibration=[pixels[:8], pixels[8:]] if dtype == torch.int8 else None)
    with torch.no_grad():
        expected = model(pixels).logits
    found = prepared(pixels).logits
    assert found.dtype == torch.float32
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.05
    prepared.save_pretrained(tmp_path / "saved")
    assert_close(load_prepared(tmp_path / "saved")(pixels).logits, found, 1e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_the_engine_of_other_devices_gives_the_plain_models_outputs(plain):
    engine = CompiledEngine(InferenceForm(plain, torch.float32))
    positions = plain.vit.embeddings.position_embeddings.detach()
    with torch.no_grad():
        expected = plain(images()).logits
    first = engine(images(), positions)[0]
    engine(images() + 1, positions)
    assert_close(first, expected)
