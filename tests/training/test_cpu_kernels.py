"""The kernels of a CPU: torch's numbers and gradients, and out of the way of whoever looks at the single steps."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from hf_vit import HfViTConfig, HfViTForImageClassification, cpu_kernels
from hf_vit.training.cpu_kernels import Linear, attend_by_products


@pytest.fixture(autouse=True)
def on_a_processor_that_gains(monkeypatch):
    """The operators are there on others, too."""
    monkeypatch.setattr(cpu_kernels, "onednn_multiplies_faster", lambda: True)
    monkeypatch.setattr(cpu_kernels, "_bfloat16_multiplies_faster", lambda: True)


def linear(bias=True):
    torch.manual_seed(0)
    return Linear(24, 40, bias=bias)


def plain(layer, x):
    return F.linear(x, layer.weight, layer.bias)


def uses_onednn(run):
    with torch.profiler.profile() as profile:
        run()
    return any(event.name == "mkldnn::_linear_pointwise" for event in profile.events())


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 0, 24), (1, 24), (7, 24), (2, 5, 24), (3, 1, 2, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_and_its_gradients_are_torchs(shape, bias):
    layer, x = linear(bias), torch.randn(shape, requires_grad=True)
    results = []
    for run in (layer, lambda x: plain(layer, x)):
        y = run(x)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=5e-6, rtol=1e-5)
    assert uses_onednn(lambda: layer(x)) == (len(shape) > 1 and 0 not in shape)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(layer, x), atol=5e-6, rtol=1e-5)


def test_only_the_gradients_that_are_wanted_are_computed():
    layer, x = linear(), torch.randn(3, 24)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((40,), 3.0))


def test_the_gradient_of_a_gradient_is_torchs():
    layer, x = linear(), torch.randn(3, 24, requires_grad=True)
    query, key, value = (torch.randn(1, 2, 5, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    penalties = []
    for run in (layer, lambda x: plain(layer, x)):
        (grad,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(grad.square().sum(), layer.weight)[0])
    torch.testing.assert_close(*penalties, atol=1e-3, rtol=1e-4)
    (grad,) = torch.autograd.grad(attend_by_products(query, key, value, 0.5).square().sum(), key, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), query)[0].isfinite().all()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own forward mode
def test_transforms_counters_and_compilers_see_torchs_own_steps():
    layer, x = linear(), torch.randn(5, 24)
    torch.testing.assert_close(torch.func.vmap(layer)(x), plain(layer, x), atol=5e-6, rtol=1e-5)
    weights = dict(layer.named_parameters())
    loss = lambda weights: torch.func.functional_call(layer, weights, x).sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss)(weights)["bias"], torch.full((40,), 5.0))
    _, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, layer.weight.sum(dim=1).expand(5, -1), atol=5e-6, rtol=1e-5)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 5 * 24 * 40
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), plain(layer, x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.to(torch.float64)(x.double()).dtype == torch.float64
    assert layer.to("meta")(x.to("meta")).device.type == "meta"


def attention(scale=1.0, tokens=(5, 5), dtype=torch.bfloat16):
    torch.manual_seed(0)
    shapes = [(2, 3, length, 16) for length in (tokens[0], tokens[1], tokens[1])]
    return [(torch.randn(shape) * scale).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("tokens", [(5, 5), (3, 9)])
@pytest.mark.parametrize("scaling", [0.25, 0.3])
def test_attention_by_products_rounds_at_most_twice_as_far_as_torchs_own(tokens, scaling):
    operands = attention(tokens=tokens)
    wide = [x.detach().float().requires_grad_() for x in operands]
    grad = torch.randn(2, 3, tokens[0], 16)

    def with_gradients(run, operands):
        y = run(*operands)
        return [y.float(), *(g.float() for g in torch.autograd.grad(y, operands, grad.to(y.dtype)))]

    expected = with_gradients(lambda *x: F.scaled_dot_product_attention(*x, scale=scaling), wide)
    found = with_gradients(lambda *x: attend_by_products(*x, scaling), operands)
    torchs = with_gradients(lambda *x: F.scaled_dot_product_attention(*x, scale=scaling), operands)
    for ours, theirs, exact in zip(found, torchs, expected, strict=True):
        assert (ours - exact).norm() < 2 * (theirs - exact).norm() + 1e-6


def test_attention_by_products_keeps_nothing_but_its_operands():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        operands = attention()
        attend_by_products(*operands, 0.25)
    assert kept == [x.shape for x in operands]


def test_attention_by_products_is_for_training_in_bfloat16_alone():
    assert attend_by_products(*attention(dtype=torch.float32), 0.25) is None
    assert attend_by_products(*attention(tokens=(2, 1025)), 0.25) is None
    with torch.no_grad():
        assert attend_by_products(*attention(), 0.25) is None


def test_a_model_in_bfloat16_trains_by_products_and_gets_torchs_gradients(monkeypatch):
    fields = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = HfViTConfig(**fields, image_size=16, patch_size=4, num_labels=3, zero_init_head=False)
    torch.manual_seed(0)
    model, pixels, labels = HfViTForImageClassification(config), torch.randn(4, 3, 16, 16), torch.arange(4) % 3
    gradients = []
    for gains in (True, False):
        monkeypatch.setattr(cpu_kernels, "_bfloat16_multiplies_faster", lambda gains=gains: gains)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(pixels, labels=labels).loss
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert not torch.equal(*gradients)
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()
