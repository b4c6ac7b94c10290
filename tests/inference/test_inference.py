"""A model prepared for inference: the plain model's numbers, in every configuration, from every kernel."""

import copy
import platform
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import pipeline

from hf_vit import (
    HfViTBackbone,
    HfViTConfig,
    HfViTForImageClassification,
    HfViTForMaskedImageModeling,
    HfViTImageProcessor,
    HfViTModel,
)
from hf_vit.inference import blocks, kernels, onednn, preparation, prepare
from hf_vit.inference.blocks import PreparedBlock
from hf_vit.inference.kernels import BlasLinear, attend_by_products, attend_by_torch
from hf_vit.inference.onednn import PackedConvolution, PackedLinear, attend_in_one_kernel
from hf_vit.inference.quantization import Int8Block
from hf_vit.resnetv2 import StdConv2d
from hf_vit.training.cpu_kernels import gelu_tanh_


TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
    "zero_init_head": False,
}
HYBRID = {"patch_size": 1, "resnet_layers": [1, 1], "resnet_width_factor": 0.5, "image_size": 64}
FIELDS = [
    {},
    HYBRID,
    {"pooling": "gap"},
    {"pooling": "map", "use_cls_token": False},
    {"pooling": "none"},
    {"hidden_act": "gelu"},
    {"hidden_act": "relu"},
    {"qkv_bias": False},
    {"representation_size": 8},
    {"num_hidden_layers": 0},
    {"output_attentions": True},
]


def build(cls=HfViTForImageClassification, **fields):
    torch.manual_seed(0)
    model = cls(HfViTConfig(**{**TINY, **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hybrid_model" not in name and "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.15)
    return model


def pixels_for(model, pictures=2):
    size = model.config.image_size
    return torch.randn(pictures, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[PackedLinear, BlasLinear])
def kernel(request, monkeypatch):
    monkeypatch.setattr(preparation, "fastest_kernel", lambda block, tokens: request.param)
    return request.param


@pytest.fixture(params=[attend_by_products, attend_by_torch, attend_in_one_kernel])
def attention(request, monkeypatch):
    monkeypatch.setattr(blocks, "fastest_attention", lambda *args: request.param)
    return request.param


@pytest.mark.parametrize("fields", FIELDS)
def test_every_kernel_gives_the_plain_models_outputs(fields, kernel, attention):
    model = build(**fields)
    fast, pixels = prepare(model), pixels_for(model)
    assert all(isinstance(block, PreparedBlock) for block in fast.vit.encoder.layer)
    assert all(isinstance(block.ffn.fc1, kernel) for block in fast.vit.encoder.layer)
    with torch.inference_mode():
        assert_close(fast(pixels).logits, model(pixels).logits)
        asked = {"output_hidden_states": True, "output_attentions": True}
        found, expected = fast(pixels, **asked), model(pixels, **asked)
    assert len(found.hidden_states) == len(expected.hidden_states)
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert_close(a, b)
    for a, b in zip(found.attentions, expected.attentions, strict=True):
        assert_close(a, b)


def assert_close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance * float(b.abs().max().clamp(min=1)), rtol=0)


@pytest.mark.parametrize(("pictures", "size"), [(2, 64), (1, 64), (3, 96), (1, 70)])
def test_a_packed_stem_takes_any_picture(pictures, size):
    model = build(**HYBRID)
    fast = prepare(model, batch_size=2)
    assert sum(isinstance(module, PackedConvolution) for module in fast.modules()) == 9
    assert not any(isinstance(module, StdConv2d) for module in fast.modules())
    assert any(isinstance(module, StdConv2d) for module in model.modules())
    pixels = torch.randn(pictures, 3, size, size + 5)
    with torch.inference_mode():
        found, expected = (each(pixels, interpolate_pos_encoding=True).logits for each in (fast, model))
    assert_close(found, expected)


def test_without_the_operator_the_stem_stays_plain(monkeypatch, caplog):
    monkeypatch.setattr(preparation, "convolution_works", lambda dtype: False)
    model = build(**HYBRID)
    with caplog.at_level("WARNING"):
        fast, pixels = prepare(model), pixels_for(model)
    assert "plain convolutions" in caplog.text
    with torch.inference_mode():
        assert_close(fast(pixels).logits, model(pixels).logits)


@pytest.mark.parametrize("cls", [HfViTModel, HfViTBackbone, HfViTForMaskedImageModeling])
def test_every_class_can_be_prepared(cls, kernel):
    model = build(cls)
    fast, pixels = prepare(model), pixels_for(model)
    with torch.inference_mode():
        found, expected = fast(pixels)[0], model(pixels)[0]
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


def test_masked_tokens_and_other_sizes_are_taken(kernel):
    model = build(HfViTModel)
    fast = prepare(model)
    mask = torch.ones(2, 17).tril(12)
    larger = torch.randn(2, 3, 48, 40)
    with torch.inference_mode():
        assert_close(
            fast(pixels_for(model), attention_mask=mask).last_hidden_state[:, :12],
            model(pixels_for(model), attention_mask=mask).last_hidden_state[:, :12],
        )
        assert_close(
            fast(larger, interpolate_pos_encoding=True).pooler_output,
            model(larger, interpolate_pos_encoding=True).pooler_output,
        )


def test_what_a_call_returned_is_not_overwritten_by_the_next(kernel, attention):
    model = build(HfViTModel)
    fast = prepare(model)
    asked = {"output_hidden_states": True, "output_attentions": True}
    results = []
    for mode, pictures in ((torch.inference_mode, 2), (torch.no_grad, 5), (torch.enable_grad, 1), (torch.no_grad, 3)):
        pixels = pixels_for(model, pictures)
        with mode():
            results.append((fast(pixels, **asked), pixels))
    for found, pixels in results:
        with torch.no_grad():
            expected = model(pixels, **asked)
        assert_close(found.last_hidden_state, expected.last_hidden_state)
        for name in asked:
            for a, b in zip(found[name[7:]], expected[name[7:]], strict=True):
                assert_close(a, b)


def test_threads_do_not_share_what_lies_between_the_products(kernel, attention):
    model = build(num_hidden_layers=6)
    fast = copy.deepcopy(prepare(model))
    batches = [torch.randn(4, 3, 32, 32) for _ in range(24)]
    with torch.inference_mode():
        expected = [model(pixels).logits for pixels in batches]

    def run(pixels):
        with torch.inference_mode():
            return fast(pixels).logits

    with ThreadPoolExecutor(4) as threads:
        for found, wanted in zip(threads.map(run, batches), expected, strict=True):
            assert_close(found, wanted)


def test_a_large_batch_goes_through_the_mlp_in_parts(kernel, monkeypatch):
    model = build()
    fast, pixels = prepare(model), pixels_for(model, 7)
    with torch.inference_mode():
        whole = fast(pixels).logits
        monkeypatch.setattr(blocks, "LARGEST_KEPT_BLOCK", 3 * 17 * 96 * 4)  # three pictures
        taken = []
        fast.vit.encoder.layer[0].ffn.fc1.register_forward_hook(
            lambda module, args, output: taken.append(len(args[0]))
        )
        parts = fast(pixels).logits
    assert taken == [3, 3, 1]
    assert_close(parts, whole)


def test_the_model_stays_as_it_was_and_the_copy_does_not_follow_it():
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pixels = pixels_for(model)
    fast = prepare(model)
    with torch.inference_mode():
        logits = fast(pixels).logits
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config._attn_implementation == HfViTForImageClassification(model.config).config._attn_implementation
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with torch.inference_mode():
        assert torch.equal(fast(pixels).logits, logits)


def test_a_prepared_copy_is_not_saved(tmp_path):
    fast = prepare(build())
    with pytest.raises(TypeError, match="save the model that it was made of"):
        fast.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fields", [{}, HYBRID])
@pytest.mark.parametrize("protocol", ["vit_jax", "timm"])
def test_bytes_are_taken_with_the_processors_numbers_folded_in(fields, protocol):
    model = build(**fields)
    processor = HfViTImageProcessor.for_model(
        model.config, protocol=protocol, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4], rounding="round"
    )
    size = model.config.image_size
    picture = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    whole = processor(picture, return_tensors="pt", do_resize=False, do_center_crop=False)["pixel_values"]
    fast = prepare(model, image_processor=processor)
    with torch.inference_mode():
        assert_close(fast(picture).logits, model(whole).logits, 2e-5)
        assert_close(fast(whole).logits, model(whole).logits)


def test_bytes_are_refused_where_nothing_says_what_they_mean():
    model = build()
    picture = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="uint8: expected normalised floats"):
        model(picture)
    with pytest.raises(ValueError, match="image_processor="):
        prepare(model)(picture)


def test_a_pipeline_takes_a_prepared_model():
    model = build()
    processor = HfViTImageProcessor.for_model(model.config)
    picture = Image.linear_gradient("L").convert("RGB")
    plain, fast = (
        pipeline("image-classification", model=each, image_processor=processor)(picture)
        for each in (model, prepare(model))
    )
    assert [found["label"] for found in fast] == [found["label"] for found in plain]
    assert [found["score"] for found in fast] == pytest.approx([found["score"] for found in plain], abs=1e-5)


# -- other numbers


def test_bfloat16_computes_in_bfloat16_where_the_processor_can(monkeypatch):
    monkeypatch.setattr(preparation, "has_bfloat16", lambda: True)
    monkeypatch.setattr(preparation, "fastest_kernel", lambda block, tokens: BlasLinear)
    model = build()
    fast, pixels = prepare(model, dtype=torch.bfloat16), pixels_for(model)
    half = build().to(torch.bfloat16)
    with torch.inference_mode():
        expected = model(pixels).logits
        found, stock = fast(pixels).logits, half(pixels).logits
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 2 * (stock - expected).abs().max()


def test_bfloat16_falls_back_to_float32_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(preparation, "has_bfloat16", lambda: False)
    model = build()
    with caplog.at_level("WARNING"):
        fast = prepare(model, dtype=torch.bfloat16)
    assert "no bfloat16 instructions" in caplog.text
    with torch.inference_mode():
        assert_close(fast(pixels_for(model)).logits, model(pixels_for(model)).logits)


def test_a_build_without_the_operators_falls_back_and_says_so(monkeypatch, caplog):
    for module in (kernels, preparation):
        monkeypatch.setattr(module, "linear_works", lambda dtype: False)
    monkeypatch.setattr(kernels, "attention_works", lambda dtype: False)
    kernels._fastest_attention.cache_clear()
    model, pixels = build(), pixels_for(build())
    with caplog.at_level("WARNING"):
        fast = prepare(model)
    kernels._fastest_attention.cache_clear()
    assert "no oneDNN linear operators" in caplog.text
    block = fast.vit.encoder.layer[0]
    assert isinstance(block.ffn.fc1, BlasLinear)
    assert block.attn.attend is not attend_in_one_kernel
    with torch.inference_mode():
        assert_close(fast(pixels).logits, model(pixels).logits)


@pytest.mark.parametrize("fields", [{}, HYBRID, {"pooling": "gap"}, {"hidden_act": "gelu"}, {"qkv_bias": False}])
def test_int8_is_near(fields):
    model = build(**fields)
    pixels = pixels_for(model, 16)
    fast = prepare(model, dtype=torch.int8, calibration=[pixels[:8], pixels[8:]])
    assert all(isinstance(block, Int8Block) for block in fast.vit.encoder.layer)
    with torch.inference_mode():
        expected, found = model(pixels).logits, fast(pixels).logits
        hidden = model(pixels, output_hidden_states=True).hidden_states
        near = fast(pixels, output_hidden_states=True, output_attentions=True)
    assert float((found - expected).std() / expected.std()) < 0.05
    assert [a.shape for a in near.hidden_states] == [a.shape for a in hidden]
    assert near.attentions[0].sum(-1).allclose(torch.ones(()), atol=1e-5)


def test_int8_products_do_not_overflow_in_16_bits():
    ones = torch.ones(8, 768)
    linear = onednn.Int8Linear(ones, torch.zeros(8), 1.0, 0, rows=4)
    found = linear(torch.full((4, 768), 255, dtype=torch.uint8))
    torch.testing.assert_close(found, torch.full((4, 8), 255.0 * 768), rtol=1e-6, atol=0)


def test_int8_needs_pictures_and_a_gelu():
    model = build()
    with pytest.raises(ValueError, match="calibration"):
        prepare(model, dtype=torch.int8)
    with pytest.raises(ValueError, match="calibration"):
        prepare(model, calibration=[pixels_for(model)])
    with pytest.raises(ValueError, match="calibration is empty"):
        prepare(model, dtype=torch.int8, calibration=[])
    with pytest.raises(ValueError, match="hidden_act is relu"):
        prepare(build(hidden_act="relu"), dtype=torch.int8, calibration=[pixels_for(model)])
    with pytest.raises(ValueError, match="float16: expected"):
        prepare(model, dtype=torch.float16)


def test_compiling_a_prepared_model_changes_nothing(kernel):
    model = build()
    compiled, pixels = torch.compile(prepare(model), backend="eager"), pixels_for(model)
    with torch.inference_mode():
        assert_close(compiled(pixels).logits, model(pixels).logits)


def test_a_batch_size_that_is_none_is_refused():
    with pytest.raises(ValueError, match="batch_size is 0: expected"):
        prepare(build(), batch_size=0)


# -- parts


def test_the_quick_gelu_is_the_tanh_gelu():
    x = torch.linspace(-20, 20, 400_001).view(-1, 1)
    x = torch.cat([x, torch.tensor([[1e15], [-1e15], [0.0]])])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(gelu_tanh_(x.clone()), F.gelu(x, approximate="tanh"), atol=2e-6, rtol=1e-6)
        x, bias = torch.randn(300, 7), torch.randn(7)
        torch.testing.assert_close(gelu_tanh_(x.clone(), bias), F.gelu(x + bias, approximate="tanh"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other limits")
def test_freed_memory_is_kept_for_the_next_call():
    code = """
import resource, sys, torch
from hf_vit.inference.kernels import keep_pages
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(2**23, dtype=torch.uint8).zero_()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
keep_pages()
faults()
print(faults())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 2048  # what one block of 8 MiB takes; without, each of the twenty


def test_attention_of_one_kernel_takes_any_layout_and_leaves_torchs_settings_alone():
    was_enabled = torch._C._jit_llga_enabled()
    for pictures, queries, tokens in ((1, 5, 5), (3, 5, 5), (2, 3, 7), (2, 1, 1)):
        key, value = torch.randn(2, pictures, tokens, 3, 8).transpose(2, 3)
        query = torch.randn(pictures, 3, queries, 8)
        torch.testing.assert_close(
            attend_in_one_kernel(query, key, value), attend_by_products(query, key, value), atol=2e-6, rtol=1e-5
        )
    assert torch._C._jit_llga_enabled() == was_enabled


def test_attention_of_a_long_sequence_goes_by_parts_of_the_queries(monkeypatch):
    monkeypatch.setattr(onednn, "_MOST_QUERIES", 16)
    monkeypatch.setattr(onednn, "_QUERIES_OF_MANY", 7)  # the last part has three
    query, key, value = torch.randn(3, 2, 17, 3, 8).transpose(2, 3)
    torch.testing.assert_close(
        attend_in_one_kernel(query, key, value), attend_by_products(query, key, value), atol=2e-6, rtol=1e-5
    )


def test_attention_of_one_kernel_is_built_anew_for_another_number_of_threads():
    query, key, value = torch.randn(3, 2, 3, 5, 8)
    threads, results, built = torch.get_num_threads(), [], []
    try:
        for number in (1, 2, 1):
            torch.set_num_threads(number)
            results.append(attend_in_one_kernel(query, key, value))
            built.append(onednn._attention_kernel.cache_info().misses)
    finally:
        torch.set_num_threads(threads)
    assert built[0] < built[1] == built[2]
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 3, 37, 45), (1, 3, 8, 8)])
def test_patches_by_one_product_are_those_of_the_convolution(shape):
    conv = torch.nn.Conv2d(3, 16, (8, 8), stride=8)
    product = preparation.PatchProduct(conv.weight, conv.bias, 2)
    pixels = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(product(pixels), conv(pixels), atol=2e-6, rtol=1e-5)


def test_the_operators_of_this_build_are_found_and_agree():
    assert onednn.linear_works(torch.float32)
    assert onednn.attention_works(torch.float32)
    assert onednn.int8_works()
