"""What `hf_vit.explain` says of a model is what its attentions, computed independently, say."""

import ast
import json
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from hf_vit import HfViTConfig, HfViTForImageClassification, HfViTModel
from hf_vit.checkpoints import open_jax_checkpoint
from hf_vit.explain import (
    TokenGrid,
    attention_distance,
    attention_rollout,
    class_relevance,
    explain,
    occlusion_sensitivity,
    patch_filters,
    pooling_weights,
    position_similarity,
    rank_correlation,
    token_colors,
    visit_attention_gradients,
    visit_attentions,
)


ROOT = Path(__file__).parents[2]
GOLDENS = Path(os.environ.get("HF_VIT_GOLDENS", Path(__file__).parents[1] / "goldens"))
RECORDED = ("vit_jax", "big_vision", "bv_two_towers")
CASES = {
    case["name"]: case
    for case in json.loads((GOLDENS / "cases.json").read_text())["cases"]
    if case["kind"] in RECORDED and (GOLDENS / case["checkpoint"]).is_file()
}
UNPOOLED = {"unpooled": "none", "token_unpooled": "none", "none": "none", "0": "token"}
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
SHAPES = {
    "patches": {"patch_size": 8, "image_size": 32},
    "oblong patches": {"patch_size": (4, 8), "image_size": (16, 32)},
    "hybrid": {"patch_size": 1, "image_size": 32, "resnet_layers": [1, 1], "resnet_width_factor": 0.5},
    "sincos": {"patch_size": 8, "image_size": 32, "position_embedding_type": "sincos2d"},
    "no class token": {"patch_size": 8, "image_size": 32, "use_cls_token": False},
}


def make_model(*, pooling="token", shape="patches", **fields):
    """A model all of whose weights are random, with an image that is not as its configuration says."""
    torch.manual_seed(0)
    config = HfViTConfig(**(SIZES | SHAPES[shape] | {"pooling": pooling, "num_labels": 5} | fields))
    model = HfViTForImageClassification(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_image(height=40, width=24, seed=1):
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def numpy_rollout(attentions):
    """The product of the blocks' mixing matrices, written out for one image: (L, K, N, N) to (N, N)."""
    tokens = attentions[0].shape[-1]
    product = np.eye(tokens)
    for block in attentions:
        mixing = np.zeros((tokens, tokens))
        for head in block.astype(np.float64):
            mixing += head / len(block)
        product = (0.5 * mixing + 0.5 * np.eye(tokens)) @ product
    return product


def load_case(case):
    model = case.get("model", {})
    overrides = {"image_size": tuple(case["image"])}
    if (pooling := model.get("classifier", model.get("pool_type"))) in UNPOOLED:
        overrides["pooling"] = UNPOOLED[pooling]
    with open_jax_checkpoint(GOLDENS / case["checkpoint"], **overrides) as checkpoint:
        cls = HfViTForImageClassification if checkpoint.has_head else HfViTModel
    with np.load(GOLDENS / case["io"], allow_pickle=False) as archive:
        recorded = dict(archive)
    pixels = torch.from_numpy(recorded["pixels"]).permute(0, 3, 1, 2)[:1]
    return cls.from_pretrained(GOLDENS / case["checkpoint"], **overrides), pixels, recorded


# --- rollout and the run itself ---


@pytest.mark.parametrize("name", CASES)
def test_attentions_of_the_reference_are_seen_and_rolled_out(name):
    model, pixels, recorded = load_case(CASES[name])
    seen = []
    explanation = explain(
        model, pixels, num_classes=0, visit=lambda layer, attention: seen.append(attention.numpy().copy())
    )
    is_hybrid = "resnet" in CASES[name].get("model", {})
    bound = 2e-5 if is_hybrid else 5e-6
    for layer, attention in enumerate(seen):
        if f"attn_{layer:02d}" in recorded:
            np.testing.assert_allclose(attention, recorded[f"attn_{layer:02d}"][0], rtol=0, atol=bound)
            seen[layer] = recorded[f"attn_{layer:02d}"][0]
    np.testing.assert_allclose(explanation.rollout, numpy_rollout(seen), rtol=0, atol=bound)
    if "logits" in recorded and explanation.logits is not None and recorded["logits"].ndim == 2:
        np.testing.assert_allclose(explanation.logits, recorded["logits"][0], rtol=0, atol=2e-5 if is_hybrid else 1e-5)


def test_rollout_without_the_residual_would_be_seen():
    attentions = torch.softmax(torch.randn(3, 1, 2, 6, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    bare = attentions[2].mean(1) @ attentions[1].mean(1) @ attentions[0].mean(1)
    expected = numpy_rollout([block[0].numpy() for block in attentions])
    np.testing.assert_allclose(attention_rollout(attentions)[0], expected, rtol=0, atol=1e-6)
    assert np.abs(bare[0].numpy() - expected).max() > 0.01


def test_rollout_of_no_blocks_is_refused():
    with pytest.raises(ValueError, match="output_attentions=True"):
        attention_rollout([])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pooling", ["token", "gap", "map", "none"])
def test_shares_sum_to_one_and_the_logits_are_those_of_a_plain_run(pooling, shape):
    model, image = make_model(pooling=pooling, shape=shape), make_image()
    explanation = explain(model, image, num_classes=1, occlusion_steps=2)
    with torch.no_grad():
        plain = model(image, interpolate_pos_encoding=True).logits
    plain = plain.mean(1) if pooling == "none" else plain
    assert (explanation.logits - plain[0]).abs().max() <= 1e-5
    assert explanation.tokens.size == model.config.grid_of((40, 24))
    for rows in (explanation.rollout, explanation.pooling[None], explanation.pooled_attention):
        assert (rows.sum(-1) - 1).abs().max() <= 1e-5
    prefix = model.config.num_prefix_tokens
    shares = (explanation.pooling @ explanation.rollout)[:prefix].sum()
    assert explanation.rollout_map.sum() + shares == pytest.approx(1, abs=1e-5)
    (best,) = explanation.classes
    assert best.index == int(plain.argmax())
    assert best.relevance.shape == explanation.tokens.size
    assert best.relevance.min() >= 0
    assert best.relevance.max() > 0


def test_what_is_pooled_decides_whose_attention_is_shown():
    image, shares = make_image(), {}
    for pooling in ("token", "gap", "map"):
        shares[pooling] = pooling_weights(make_model(pooling=pooling), image)[0]
    assert shares["token"].tolist() == [1.0] + [0.0] * 15
    assert shares["gap"][0] == 0
    assert torch.allclose(shares["gap"][1:], torch.full((15,), 1 / 15))
    model = make_model(pooling="map")
    with torch.no_grad():
        tokens = model.vit(image, interpolate_pos_encoding=True).last_hidden_state[0]  # (N, D)
        attn = model.vit.pooler.attn
        query = attn.query(model.vit.pooler.probe[0, 0]).view(2, 16)
        scores = torch.einsum("kd,nkd->kn", query, attn.key(tokens).view(-1, 2, 16)) / 4
    assert torch.allclose(shares["map"], scores.softmax(-1).mean(0), atol=1e-6)


def test_no_more_than_one_layer_of_attention_is_alive():
    model, alive = make_model(num_hidden_layers=5), []

    def count(layer, attention):
        assert not [ref for ref in alive if ref() is not None], f"block {layer}: an earlier attention is still held"
        alive.append(weakref.ref(attention))

    visit_attentions(model, make_image(), count)
    assert len(alive) == 5
    alive.clear()
    visit_attention_gradients(model, make_image(), 0, lambda layer, attention, gradient: count(layer, attention))
    assert len(alive) == 5


@pytest.mark.parametrize("pooling", ["token", "map"])
def test_the_model_is_left_as_it_was_found(pooling):
    model = make_model(pooling=pooling, hidden_dropout_prob=0.5).train()
    model.vit.embeddings.eval()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    backend = model.config._attn_implementation
    first, again = (explain(model, make_image(), num_classes=1, occlusion_steps=2) for _ in range(2))
    assert torch.equal(first.logits, again.logits)  # no dropout
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert model.training
    assert not model.vit.embeddings.training
    assert model.config._attn_implementation == backend
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("pooling", ["token", "gap", "map"])
def test_a_model_in_bfloat16_is_explained_in_float32(pooling):
    model, image = make_model(pooling=pooling), make_image()
    exact = explain(model, image, num_classes=1, occlusion_steps=2)
    rough = explain(model.bfloat16(), image, num_classes=1, occlusion_steps=2)
    assert rough.rollout.dtype == rough.pooled_attention.dtype == rough.distances.dtype == torch.float32
    assert (rough.rollout_map - exact.rollout_map).abs().max() < 0.02
    assert rough.classes[0].relevance.dtype == torch.float32


def test_a_failing_visitor_leaves_no_hook_behind():
    model = make_model()

    def fail(*arguments):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        explain(model, make_image(), visit=fail)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def stock_vit(**kwargs):
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=4, **SIZES)
    torch.manual_seed(0)
    return transformers.ViTForImageClassification._from_config(config, **kwargs).eval()


def test_stock_models_that_return_attentions_are_explained():
    model, image = stock_vit(attn_implementation="eager"), make_image(32, 32)
    explanation = explain(model, image, num_classes=1, occlusion_steps=2)
    with torch.no_grad():
        plain = model(image, output_attentions=True)
    assert torch.equal(explanation.logits, plain.logits[0])
    assert torch.allclose(explanation.rollout, attention_rollout(plain.attentions)[0], atol=1e-6)
    assert explanation.tokens == TokenGrid((4, 4), (8, 8), 1)
    assert explanation.classes[0].relevance.shape == (4, 4)
    assert position_similarity(model).shape == (4, 4, 4, 4)
    assert patch_filters(model).shape == (28, 3, 8, 8)


def test_a_backend_without_probabilities_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        explain(stock_vit(attn_implementation="sdpa"), make_image(32, 32))


def test_a_model_that_records_nothing_is_refused():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=2)
    with pytest.raises(ValueError, match="does not say where its attentions are"):
        visit_attentions(transformers.ResNetForImageClassification(config), make_image(), print)


@pytest.mark.parametrize("pixels", [torch.zeros(2, 3, 32, 32), torch.zeros(3, 32, 32)])
def test_other_than_one_image_is_refused(pixels):
    with pytest.raises(ValueError, match="expected one image"):
        explain(make_model(), pixels)


# --- relevance for a class ---


def dense_relevance(model, image, class_index):
    """The same by the rules of arXiv:2103.15679 with whole matrices: one graph over all blocks, R + A R."""
    model.set_attn_implementation("eager")
    probes = []
    if model.config.pooling == "map":
        attn = model.vit.pooler.attn
        attn.register_forward_hook(lambda module, args, output: probes.append(output[1]))
    output = model(image, output_attentions=True, interpolate_pos_encoding=True)
    attentions = [*output.attentions, *probes]
    logits = output.logits.mean(1) if output.logits.ndim == 3 else output.logits
    gradients = torch.autograd.grad(logits[0, class_index], attentions)
    blocks = [(a * g)[0].clamp(min=0).mean(0).detach() for a, g in zip(attentions, gradients, strict=True)]
    tokens = blocks[0].shape[-1]
    relevance = torch.eye(tokens)
    for block in blocks[: len(output.attentions)]:
        relevance = relevance + block @ relevance
    if probes:
        return (blocks[-1] @ relevance)[0]
    rows = slice(0, 1) if model.config.pooling == "token" else slice(model.config.num_prefix_tokens, None)
    return (relevance - torch.eye(tokens))[rows].mean(0)


@pytest.mark.parametrize("shape", ["patches", "hybrid", "no class token"])
@pytest.mark.parametrize("pooling", ["token", "gap", "map", "none"])
def test_relevance_equals_the_whole_matrices(pooling, shape):
    model, image = make_model(pooling=pooling, shape=shape), make_image()
    got = class_relevance(model, image, 3)[0]
    expected = dense_relevance(make_model(pooling=pooling, shape=shape), image, 3)
    assert float(expected.max()) > 0
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6 * float(expected.max()))
    assert not torch.allclose(got, class_relevance(model, image, 0)[0], rtol=1e-2, atol=0)


def test_a_class_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="expected an index from 0 to 4"):
        class_relevance(make_model(), make_image(), 5)


def test_a_model_without_classes_is_explained_without_them():
    torch.manual_seed(0)
    explanation = explain(HfViTModel(HfViTConfig(**SIZES, **SHAPES["patches"])), make_image())
    assert explanation.logits is None
    assert explanation.classes == []
    assert explanation.rollout_map.shape == (5, 3)


# --- occlusion ---


def planted_model():
    """A model without blocks whose class 1 counts bright patches, and only these."""
    config = HfViTConfig(
        hidden_size=4, num_hidden_layers=0, num_attention_heads=1, intermediate_size=4, image_size=(24, 32),
        patch_size=4, pooling="gap", use_cls_token=False, num_labels=2, num_channels=1,
    )  # fmt: skip
    model = HfViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.vit.encoder.encoder_norm.weight.fill_(1)
        model.vit.embeddings.patch_embeddings.weight[0] = 1 / 16
        model.vit.embeddings.patch_embeddings.bias[:] = torch.tensor([0.0, 1.0, -1.0, 0.0])
        model.classifier.weight[1, 0] = 5
    return model


def test_occlusion_finds_the_planted_patch_and_nothing_else():
    image = torch.zeros(1, 1, 24, 32)
    image[:, :, 8:12, 20:24] = 4.0  # patch (2, 5)
    drops = occlusion_sensitivity(planted_model(), image, 1, window=(4, 4), stride=(4, 4), batch_size=5)
    assert drops.shape == (6, 8)
    assert divmod(int(drops.argmax()), 8) == (2, 5)
    assert drops[2, 5] > 1e-3
    drops[2, 5] = 0
    assert drops.abs().max() <= 1e-7


def test_windows_cover_the_image_to_its_edge():
    image = torch.zeros(1, 1, 24, 32)
    image[:, :, 20:, 28:] = 4.0
    drops = occlusion_sensitivity(planted_model(), image, 1, window=(10, 6), stride=(8, 8))
    assert drops.shape == (3, 5)  # rows 0, 8, 14; columns 0, 8, 16, 24, 26
    assert divmod(int(drops.argmax()), 5) == (2, 4)


def test_a_window_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="24x32 pixels"):
        occlusion_sensitivity(planted_model(), torch.zeros(1, 1, 24, 32), 0, window=(25, 4), stride=(4, 4))


def test_on_handwriting_every_view_sees_the_stroke():
    model = HfViTForImageClassification.from_pretrained(ROOT / "examples" / "checkpoints" / "vit-mnist.npz")
    with np.load(ROOT / "examples" / "checkpoints" / "vit-mnist.io.npz", allow_pickle=False) as archive:
        pixels = torch.from_numpy(archive["pixels"]).permute(0, 3, 1, 2)
    for image in pixels[:3]:
        found = explain(model, image[None], num_classes=1, occlusion_steps=0)
        (best,) = found.classes
        hidden = occlusion_sensitivity(model, image[None], best.index, window=(4, 4), stride=(4, 4))
        ink = torch.nn.functional.avg_pool2d(image.mean(0, keepdim=True), 4)[0] > -0.5  # (8, 8)
        for view in (found.rollout_map, best.relevance, hidden):
            assert view[ink].mean() > 1.3 * view[~ink].mean().clamp(min=0)


# --- figures of the paper ---


def test_distance_is_measured_in_pixels_between_patches():
    tokens = TokenGrid((2, 2), (3, 4), 1)
    looks = torch.zeros(1, 3, 5, 5)
    looks[0, 0] = torch.eye(5)  # at itself
    looks[0, 1, 1:, 4] = 1  # all at the lower right patch
    looks[0, 2, :, 0] = 0.5  # half at the class token, the rest at the patch to the right or left
    for query, key in ((1, 2), (2, 1), (3, 4), (4, 3)):
        looks[0, 2, query, key] = 0.5
    expected = [0, (5 + 3 + 4 + 0) / 4, 4]
    assert attention_distance(looks, tokens)[0].tolist() == pytest.approx(expected)


def test_distance_of_even_attention_is_the_mean_over_all_pairs():
    tokens = TokenGrid((3, 2), (8, 8), 0)
    centres = [(row * 8, column * 8) for row in range(3) for column in range(2)]
    expected = np.mean([math.dist(a, b) for a in centres for b in centres])
    assert float(attention_distance(torch.full((1, 1, 6, 6), 1 / 6), tokens)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", ["patches", "hybrid"])
def test_filters_are_the_principal_components_of_what_sees_the_image(shape):
    model = make_model(shape=shape)
    weight = model.vit.embeddings.patch_embeddings.weight
    if shape == "hybrid":
        weight = model.vit.embeddings.hybrid_model.root.conv.standardized_weight()
    rows = weight.detach().double().flatten(1).numpy()
    values, vectors = np.linalg.eigh(np.cov(rows.T))
    filters = patch_filters(model, 3).double().flatten(1).numpy()
    for i in range(3):
        expected = vectors[:, -1 - i] * np.sign(vectors[np.abs(vectors[:, -1 - i]).argmax(), -1 - i])
        np.testing.assert_allclose(filters[i], expected / np.abs(expected).max(), atol=1e-4)
    assert values[-1] > values[-2]


def test_positions_are_compared_without_the_class_token():
    model = make_model(shape="oblong patches")
    table = model.vit.embeddings.position_embeddings[0, 1:].detach().double()
    similarity = position_similarity(model)
    assert similarity.shape == (4, 4, 4, 4)
    a, b = table[1 * 4 + 2], table[3 * 4 + 0]
    assert float(similarity[1, 2, 3, 0]) == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-6)
    assert torch.allclose(similarity.reshape(16, 16).diagonal(), torch.ones(16))


def test_fixed_positions_are_most_like_their_neighbours():
    similarity = position_similarity(make_model(shape="sincos"))
    assert similarity[0, 0, 0, 1] > similarity[0, 0, 0, 3]
    assert similarity[0, 0, 1, 0] > similarity[0, 0, 3, 0]


def test_patches_of_like_tokens_get_like_colours():
    tokens = TokenGrid((2, 4), (1, 1), 1)
    states = torch.randn(9, 16, generator=torch.Generator().manual_seed(0)) * 0.01
    states[1:5] += 3 * torch.randn(16, generator=torch.Generator().manual_seed(1))
    colors = token_colors(states, tokens)
    assert colors.shape == (2, 4, 3)
    assert (colors.amin((0, 1)).tolist(), colors.amax((0, 1)).tolist()) == ([0, 0, 0], [1, 1, 1])
    assert (colors[0, :, 0] - colors[1, :, 0]).abs().min() > 0.9  # the first component parts the rows
    assert torch.equal(token_colors(torch.ones(9, 16), tokens), torch.zeros(2, 4, 3))


def test_ranks_are_compared_and_ties_share_theirs():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(a, a.exp()) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(a, torch.tensor([1.0, 1.0, 2.0, 2.0])) == pytest.approx(4 / math.sqrt(5 * 4))
    assert rank_correlation(a, torch.ones(4)) == 0


# --- what it may import ---


def test_figures_load_neither_matplotlib_nor_training():
    code = (
        "import sys, hf_vit.explain; heavy = {'matplotlib', 'datasets', 'evaluate'};"
        "ours = {f'hf_vit.{n}' for n in ('training', 'probing', 'inference', 'hub')};"
        "print(sorted((heavy | ours) & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


def test_explain_imports_nothing_that_stands_beside_it():
    for path in (ROOT / "src" / "hf_vit" / "explain").glob("*.py"):
        names = {
            f"{'.' * node.level}{node.module or ''}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
        }
        beside = {"training", "probing", "inference", "hub", "checkpoints"}
        assert not {name for name in names if name.lstrip(".").removeprefix("hf_vit.").split(".")[0] in beside}, path
