"""What the numbers do at their edges: extreme pixels, low precision, backends, batches and threads."""

import pytest
import torch

from hf_vit import HfViTConfig, HfViTForImageClassification, HfViTImageProcessor


BACKENDS = ("eager", "sdpa")
# The incumbent's largest difference of logits between the backends, with the scores of attention times 1 and times 8.
BOUNDS = {
    (torch.float32, 1): 1e-5,
    (torch.float32, 8): 1e-5,
    (torch.bfloat16, 1): 1.2e-2,
    (torch.bfloat16, 8): 1.05e-1,
    (torch.float16, 1): 1.5e-3,
    (torch.float16, 8): 1.4e-2,
}


def model_of(backend: str, dtype: torch.dtype, *, sharpness: float = 1.0) -> HfViTForImageClassification:
    """A model with logits of about 1 and sharper attention by `sharpness`: queries and keys are scaled."""
    torch.manual_seed(0)
    config = HfViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
        num_labels=10,
        zero_init_head=False,
    )
    model = HfViTForImageClassification._from_config(config, attn_implementation=backend).eval()
    with torch.no_grad():
        model.classifier.weight.normal_(std=0.05)
        for block in model.vit.encoder.layer:
            for linear in (block.attn.query, block.attn.key):
                linear.weight.mul_(sharpness)
    return model.to(dtype)


def logits_of(model: HfViTForImageClassification, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(pixels.to(model.dtype)).logits.float()


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


EXTREMES = {
    "1e3": lambda pixels: pixels * 1e3,
    "1e4": lambda pixels: pixels * 1e4,
    "black": lambda pixels: torch.full_like(pixels, -1.0),
    "unnormalised": lambda pixels: (pixels + 1) * 127.5,
    "zero": torch.zeros_like,
}


@pytest.mark.reliability(row="N03")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sharpness", [1.0, 1000.0])
def test_extreme_images_give_finite_logits_with_every_backend(sharpness, dtype, pixels, figure):
    finite = {}
    for backend in BACKENDS:
        model = model_of(backend, dtype, sharpness=sharpness)
        for name, change in EXTREMES.items():
            finite[backend, name] = bool(logits_of(model, change(pixels)).isfinite().all())
    different = [name for name in EXTREMES if finite["eager", name] != finite["sdpa", name]]
    assert different == []
    assert all(finite.values()), finite
    figure(f"finite, {str(dtype).removeprefix('torch.')}, q k x{sharpness:g}", f"{len(finite)}/{len(finite)}")


@pytest.mark.reliability(row="N03")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_pixel_that_is_no_number_is_refused_where_images_come_in(value, pixels):
    processor = HfViTImageProcessor(size=32)
    bad = pixels[0].clone()
    bad[1, 4, 5] = value
    for image in (bad, bad.numpy(), bad.permute(1, 2, 0).numpy().astype("float64")):
        with pytest.raises(ValueError, match="values that are NaN or infinite"):
            processor(image, return_tensors="pt", do_rescale=False)


@pytest.mark.reliability(row="N04")
@pytest.mark.parametrize(("kind", "bound"), BOUNDS.items(), ids=str)
def test_the_backends_differ_by_no_more_than_the_incumbents(kind, bound, pixels, figure):
    dtype, factor = kind
    one, other = (logits_of(model_of(backend, dtype, sharpness=factor**0.5), pixels) for backend in BACKENDS)
    assert 0.3 < float(one.abs().max()) < 3
    difference = float((one - other).abs().max())
    assert difference <= bound
    figure(f"{str(dtype).removeprefix('torch.')} scores x{factor}", difference, at_most=bound)


@pytest.mark.reliability(row="N05")
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_has_its_logits_whatever_its_company_the_threads_and_the_time(backend, pixels, figure):
    model = model_of(backend, torch.float32)
    together = logits_of(model, pixels)
    alone = torch.cat([logits_of(model, pixels[index : index + 1]) for index in range(len(pixels))])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with_two = logits_of(model, pixels)
    finally:
        torch.set_num_threads(threads)
    assert float((together - alone).abs().max()) <= 1e-6
    assert torch.equal(together, with_two)
    assert torch.equal(together, logits_of(model, pixels))
    figure("alone and in a batch", float((together - alone).abs().max()), at_most=1e-6)
    figure("threads and repeats", 0.0, at_most=0.0)
