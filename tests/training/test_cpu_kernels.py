"""Opt-in kernels for training on a CPU: torch's values and gradients, undone without trace, out of everybody's way."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from tiny_models import TINY, randomised
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_vit import HfViTConfig, HfViTForImageClassification
from hf_vit.training import cpu_kernels
from hf_vit.training.cpu_kernels import ATTENTION, attention_forward, use_cpu_kernels


@pytest.fixture(autouse=True)
def on_a_processor_that_gains(monkeypatch):
    """Use the kernels on every processor that has the operators."""
    monkeypatch.setattr(cpu_kernels, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(cpu_kernels, "products_are_faster", lambda: True)


def linear(bias=True):
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias)
    use_cpu_kernels(layer)
    return layer


def plain(layer, x):
    return F.linear(x, layer.weight, layer.bias)


def classifier(**fields):
    return randomised(HfViTForImageClassification(HfViTConfig(**{**TINY, **fields}))).train()


def images(number=4):
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def gradients_of(model, dtype=None):
    """Return loss and all gradients of one step, as one vector."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        loss = model(images(), labels=torch.arange(4) % 5).loss
    loss.backward()
    return torch.cat([loss.detach().view(1), *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])


def uses_onednn(run):
    with torch.profiler.profile() as profile:
        run()
    return any(event.name == "mkldnn::_linear_pointwise" for event in profile.events())


# -- linear layers


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 0, 24), (1, 24), (7, 24), (2, 5, 24), (3, 1, 2, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_and_its_gradients_equal_torchs(shape, bias):
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


def test_only_the_required_gradients_are_computed():
    layer, x = linear(), torch.randn(3, 24)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((40,), 3.0))


def test_the_second_derivative_equals_torchs():
    layer, x = linear(), torch.randn(3, 24, requires_grad=True)
    penalties = []
    for run in (layer, lambda x: plain(layer, x)):
        (grad,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(grad.square().sum(), layer.weight)[0])
    torch.testing.assert_close(*penalties, atol=1e-3, rtol=1e-4)
    query, key, value = attention()
    gathered = attention_forward(nn.Module(), query, key, value, None, 0.5)[0]
    (grad,) = torch.autograd.grad(gathered.square().sum(), key, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), query)[0].isfinite().all()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own forward mode
def test_transforms_counters_and_compilers_see_torchs_own_operators():
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


# -- attention


def attention(scale=1.0, tokens=(5, 5), dtype=torch.bfloat16):
    torch.manual_seed(0)
    shapes = [(2, 3, length, 16) for length in (tokens[0], tokens[1], tokens[1])]
    return [(torch.randn(shape) * scale).to(dtype).requires_grad_() for shape in shapes]


def by_products(query, key, value, scaling):
    return attention_forward(nn.Module(), query, key, value, None, scaling)[0].transpose(1, 2)


@pytest.mark.parametrize("tokens", [(5, 5), (3, 9)])
@pytest.mark.parametrize("scaling", [0.25, 0.3])
def test_attention_by_products_has_at_most_twice_the_rounding_error_of_torchs_own(tokens, scaling):
    operands = attention(tokens=tokens)
    wide = [x.detach().float().requires_grad_() for x in operands]
    grad = torch.randn(2, 3, tokens[0], 16)

    def with_gradients(run, operands):
        y = run(*operands)
        return [y.float(), *(g.float() for g in torch.autograd.grad(y, operands, grad.to(y.dtype)))]

    expected = with_gradients(lambda *x: F.scaled_dot_product_attention(*x, scale=scaling), wide)
    found = with_gradients(lambda *x: by_products(*x, scaling), operands)
    torchs = with_gradients(lambda *x: F.scaled_dot_product_attention(*x, scale=scaling), operands)
    for ours, theirs, exact in zip(found, torchs, expected, strict=True):
        assert (ours - exact).norm() < 2 * (theirs - exact).norm() + 1e-6


def test_attention_by_products_keeps_only_its_operands():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        operands = attention()
        by_products(*operands, 0.25)
    assert kept == [x.shape for x in operands]


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [({"dtype": torch.float32}, {}), ({"tokens": (2, 1025)}, {}), ({}, {"dropout": 0.5}), ({}, {"mask": True})],
)
def test_attention_outside_plain_bfloat16_training_is_torchs_own(fields, arguments):
    query, key, value = attention(**fields)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool) if arguments.pop("mask", False) else None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        attention_forward(nn.Module(), query, key, value, mask, 0.25, is_causal=False, **arguments)
    assert len(kept) > 3  # the fused kernel keeps its output, too


# -- models


def test_a_model_gets_torchs_gradients_and_every_linear_layer_takes_part():
    model = classifier()
    expected = gradients_of(model)
    with use_cpu_kernels(model):
        assert uses_onednn(lambda: gradients_of(model))
        replaced = [module for module in model.modules() if "forward" in vars(module)]
        assert replaced == [module for module in model.modules() if type(module) is nn.Linear]
        torch.testing.assert_close(gradients_of(model), expected, atol=1e-5, rtol=1e-4)


def test_a_model_trains_by_products_in_bfloat16(monkeypatch):
    model = classifier()
    expected = gradients_of(model, torch.bfloat16)
    with use_cpu_kernels(model):
        found = gradients_of(model, torch.bfloat16)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_undoing_leaves_the_model_as_it_was():
    model = classifier()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    undo = use_cpu_kernels(model)
    assert model.config._attn_implementation == ATTENTION
    use_cpu_kernels(model).close()  # a second use finds nothing to replace, and so nothing to restore
    assert model.config._attn_implementation == ATTENTION
    undo.close()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == "sdpa"


def test_a_saved_model_does_not_depend_on_the_kernels(tmp_path):
    model = classifier()
    keys = list(model.state_dict())
    with use_cpu_kernels(model):
        model.save_pretrained(tmp_path / "saved")
        assert list(model.state_dict()) == keys
    assert ATTENTION not in (tmp_path / "saved" / "config.json").read_text()
    again = HfViTForImageClassification.from_pretrained(tmp_path / "saved")
    assert again.config._attn_implementation == "sdpa"


def test_copies_are_models_of_their_own():
    model = classifier()
    with use_cpu_kernels(model):
        expected = gradients_of(model)
        copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(gradients_of(copied), expected, atol=1e-5, rtol=1e-4)


def test_a_hook_may_edit_a_linear_layers_output_in_place():
    results = []
    for is_fast in (False, True):
        model = classifier()
        if is_fast:
            use_cpu_kernels(model)
        model.vit.encoder.layer[0].ffn.fc1.register_forward_hook(lambda module, args, output: output.add_(1.0))
        model.vit.encoder.layer[1].attn.value.register_forward_hook(lambda module, args, output: output.mul_(2.0))
        results.append(gradients_of(model))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")  # the name of both supported versions
def test_activation_checkpointing_and_compilation_give_the_same_gradients():
    model = classifier()
    expected = gradients_of(model)
    with use_cpu_kernels(model):
        model.gradient_checkpointing_enable()
        torch.testing.assert_close(gradients_of(model), expected, atol=1e-5, rtol=1e-4)
        model.gradient_checkpointing_disable()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        loss = compiled(images(), labels=torch.arange(4) % 5).loss
    torch.testing.assert_close(loss.detach(), expected[0], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # raised by PEFT
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_peft_layers_train_as_without_the_kernels(method):
    results = []
    for is_fast in (False, True):
        torch.manual_seed(0)
        targets = ["query", "value", "fc1"]
        config = (
            peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
            if method == "lora"
            else peft.AdaLoraConfig(init_r=2, target_r=1, target_modules=targets, total_step=10)
        )
        model = peft.get_peft_model(classifier(), config)
        if is_fast:
            use_cpu_kernels(model)
            assert any("base_layer" in name for name, module in model.named_modules() if "forward" in vars(module))
        results.append(gradients_of(model))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def test_without_the_operators_nothing_is_replaced(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(cpu_kernels, "_product", lambda *args: torch.ops.mkldnn._no_such_operator(*args))
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    for probe in (cpu_kernels.onednn_is_faster, cpu_kernels.products_are_faster):
        probe.cache_clear()
    model = classifier()
    with use_cpu_kernels(model):
        assert not any("forward" in vars(module) for module in model.modules())
        assert model.config._attn_implementation == "sdpa"
    for probe in (cpu_kernels.onednn_is_faster, cpu_kernels.products_are_faster):
        probe.cache_clear()
