"""The model: exact facts, properties of attention, training, and what it refuses."""

import copy
import logging
import re
import warnings

import pytest
import torch
from torchvision.ops import StochasticDepth
from transformers import AutoBackbone, AutoModel, AutoModelForImageClassification, ViTConfig, ViTModel

from hf_vit import (
    HfViTBackbone,
    HfViTConfig,
    HfViTForImageClassification,
    HfViTForMaskedImageModeling,
    HfViTModel,
)
from hf_vit.resnetv2 import pad_same


TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
HYBRID = {**TINY, "patch_size": 1, "resnet_layers": [1, 1, 1], "resnet_width_factor": 0.5}


def tiny(**fields):
    return HfViTConfig(**{**TINY, **fields})


def randomised(model):
    """Every parameter random: the zero head and zero biases of a new model would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# -- names


def test_parameter_names_are_the_published_ones():
    names = set(HfViTForImageClassification(tiny(pooling="map", representation_size=8)).state_dict())
    assert {
        "vit.embeddings.cls_token",
        "vit.embeddings.position_embeddings",
        "vit.embeddings.patch_embeddings.weight",
        "vit.encoder.layer.0.attention_norm.weight",
        "vit.encoder.layer.0.attn.query.weight",
        "vit.encoder.layer.2.attn.out.bias",
        "vit.encoder.layer.1.ffn_norm.bias",
        "vit.encoder.layer.1.ffn.fc1.weight",
        "vit.encoder.layer.1.ffn.fc2.bias",
        "vit.encoder.encoder_norm.weight",
        "vit.pooler.probe",
        "vit.pre_logits.weight",
        "classifier.weight",
    } <= names
    assert "embeddings.hybrid_model.root.conv.weight" in HfViTModel(HfViTConfig(**HYBRID)).state_dict()


# -- attention


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_attention_probabilities_come_with_every_backend_and_change_nothing(backend, pixels):
    model = randomised(HfViTForImageClassification._from_config(tiny(), attn_implementation=backend))
    with torch.no_grad():
        plain, asked = model(pixels).logits, model(pixels, output_attentions=True)
    torch.testing.assert_close(plain, asked.logits, atol=1e-5, rtol=0)  # one more token rounds differently
    assert [tuple(a.shape) for a in asked.attentions] == [(2, 3, 17, 17)] * 3
    for probabilities in asked.attentions:
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 3, 17), atol=1e-6, rtol=0)


def test_a_hook_in_the_last_block_sees_all_tokens(pixels):
    model = randomised(HfViTForImageClassification(tiny()))
    seen = []
    with torch.no_grad():
        model(pixels)
        model.vit.encoder.layer[-1].ffn.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        model(pixels)
    assert seen == [(2, 17, 24)]


def test_the_activation_without_gradients_is_the_one_with_them(pixels):
    model = randomised(HfViTForImageClassification(tiny()))
    with torch.no_grad():
        logits = model(pixels).logits
    torch.testing.assert_close(logits, model(pixels).logits, atol=1e-6, rtol=1e-6)


def test_another_activation_put_in_by_hand_is_the_one_that_counts(pixels):
    model = randomised(HfViTForImageClassification(tiny()))
    for block in model.vit.encoder.layer:
        block.ffn.activation = torch.nn.ReLU()
    with torch.no_grad():
        logits = model(pixels).logits
    torch.testing.assert_close(logits, model(pixels).logits, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("place", ["fc1", "activation"])
def test_a_hook_in_the_mlp_sees_what_came_out_of_its_layer(place, pixels):
    model = randomised(HfViTForImageClassification(tiny()))
    seen = []
    module = model.vit.encoder.layer[0].ffn.get_submodule(place)
    module.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        model(pixels)
    (x, output) = seen[0]
    torch.testing.assert_close(module.forward(x), output)


def test_models_of_an_ensemble_run_at_once_without_gradients(pixels):
    models = [
        randomised(HfViTForImageClassification._from_config(tiny(), attn_implementation="eager")) for _ in range(2)
    ]
    parameters, buffers = torch.func.stack_module_state(models)

    def logits(parameters, buffers):
        return torch.func.functional_call(models[0], (parameters, buffers), (pixels,)).logits

    with torch.no_grad():
        found = torch.vmap(logits)(parameters, buffers)
        for one, model in zip(found, models, strict=True):
            torch.testing.assert_close(one, model(pixels).logits, atol=1e-5, rtol=1e-5)


def test_backends_agree(pixels):
    eager = randomised(HfViTForImageClassification._from_config(tiny(), attn_implementation="eager"))
    sdpa = HfViTForImageClassification._from_config(tiny(), attn_implementation="sdpa").eval()
    sdpa.load_state_dict(eager.state_dict())
    with torch.no_grad():
        a, b = eager(pixels, output_attentions=True), sdpa(pixels, output_attentions=True)
    torch.testing.assert_close(a.logits, b.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(a.attentions[-1], b.attentions[-1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_nobody_looks_at_a_masked_token(backend, pixels):
    model = randomised(HfViTModel._from_config(tiny(), attn_implementation=backend))
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[:, 5] = 0
    with torch.no_grad():
        attentions = model(pixels, attention_mask=mask, output_attentions=True).attentions
    assert max(a[..., 5].max() for a in attentions) == 0


def test_attention_pooling_adds_no_layer_to_the_attentions(pixels):
    model = randomised(HfViTModel(tiny(pooling="map", use_cls_token=False)))
    assert len(model(pixels, output_attentions=True).attentions) == 3


def test_permuting_patches_with_their_positions_leaves_the_class_token_alone(pixels):
    model = randomised(HfViTModel(tiny()))
    permutation = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).reshape(2, 3, 16, 8, 8)[:, :, permutation]
    shuffled = patches.reshape(2, 3, 4, 4, 8, 8).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 32, 32)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        table = model.embeddings.position_embeddings
        moved.embeddings.position_embeddings[:, 1:] = table[:, 1:][:, permutation]
        torch.testing.assert_close(model(pixels).pooler_output, moved(shuffled).pooler_output, atol=1e-5, rtol=0)
        assert not torch.allclose(model(pixels).pooler_output, model(shuffled).pooler_output, atol=1e-3)


def test_a_batch_equals_its_single_images(pixels):
    model = randomised(HfViTForImageClassification(HfViTConfig(**HYBRID)))
    with torch.no_grad():
        together = model(pixels).logits
        alone = torch.cat([model(one[None]).logits for one in pixels])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


# -- outputs


def test_hidden_states_are_the_embeddings_and_every_block(pixels):
    model = randomised(HfViTModel(tiny()))
    with torch.no_grad():
        out = model(pixels, output_hidden_states=True)
        assert len(out.hidden_states) == 4
        assert torch.equal(out.hidden_states[0], model.embeddings(pixels))
        assert torch.equal(model.encoder.encoder_norm(out.hidden_states[-1]), out.last_hidden_state)


def test_pooling_takes_what_its_name_says(pixels):
    states = {pooling: randomised(HfViTModel(tiny(pooling=pooling))) for pooling in ("token", "gap", "none")}
    with torch.no_grad():
        outs = {pooling: model(pixels) for pooling, model in states.items()}
    tokens = outs["token"].last_hidden_state
    assert torch.equal(outs["token"].pooler_output, tokens[:, 0])
    assert torch.equal(outs["gap"].pooler_output, tokens[:, 1:].mean(1))
    assert torch.equal(outs["none"].pooler_output, tokens)


def test_unpooled_logits_are_one_row_a_token(pixels):
    model = HfViTForImageClassification(tiny(pooling="none"))
    labels = torch.randint(0, 5, (2, 17))
    out = model(pixels, labels=labels)
    assert out.logits.shape == (2, 17, 5)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten()))


def test_soft_labels_are_a_cross_entropy_where_the_problem_type_says_so(pixels):
    model = randomised(HfViTForImageClassification(tiny(problem_type="single_label_classification")))
    labels = torch.softmax(torch.randn(2, 5), dim=-1)
    out = model(pixels, labels=labels)
    torch.testing.assert_close(out.loss, -(labels * out.logits.log_softmax(-1)).sum(-1).mean())
    hard = model(pixels, labels=torch.tensor([0, 1])).loss
    one_hot = model(pixels, labels=torch.eye(5)[:2]).loss
    torch.testing.assert_close(hard, one_hot)


# -- images of another size


@pytest.mark.parametrize("size", [(48, 32), (32, 40), (24, 24), (39, 33)])
def test_another_grid_is_refused_by_name_or_resampled(size):
    model = randomised(HfViTForImageClassification(tiny()))
    image = torch.randn(1, 3, *size)
    grid = model.config.grid_of(size)
    if grid == (4, 4):
        assert model(image).logits.shape == (1, 5)  # what does not fill a patch is dropped
        return
    with pytest.raises(ValueError, match=rf"grid of {grid[0]}x{grid[1]} patches.*interpolate_pos_encoding=True"):
        model(image)
    resized = copy.deepcopy(model)
    resized.resize_position_embeddings(size)
    with torch.no_grad():
        assert torch.equal(model(image, interpolate_pos_encoding=True).logits, resized(image).logits)


def test_images_that_do_not_fit_are_refused():
    model = HfViTModel(tiny())
    with pytest.raises(ValueError, match=r"\(2, 1, 32, 32\): expected \(images, 3, height, width\)"):
        model(torch.zeros(2, 1, 32, 32))
    with pytest.raises(ValueError, match=r"\(2, 3, 7, 32\): expected .* of at least one patch \(patch_size 8"):
        model(torch.zeros(2, 3, 7, 32), interpolate_pos_encoding=True)


# -- starting values and training


def test_the_initialisation_is_the_reference_s():
    torch.manual_seed(0)
    config = HfViTConfig(**{**HYBRID, "hidden_size": 192, "intermediate_size": 768, "representation_size": 96})
    state = HfViTForImageClassification(config).state_dict()
    for name in ("classifier.weight", "classifier.bias", "vit.embeddings.cls_token"):
        assert not state[name].any(), name
    bound = (6 / (192 + 192)) ** 0.5
    for name in ("query", "key", "value", "out"):
        weight = state[f"vit.encoder.layer.1.attn.{name}.weight"]
        assert 0.95 * bound < weight.abs().max() <= bound
        assert not state[f"vit.encoder.layer.1.attn.{name}.bias"].any()
    for name in ("fc1", "fc2"):
        assert 0.8e-6 < state[f"vit.encoder.layer.0.ffn.{name}.bias"].std() < 1.2e-6
        assert state[f"vit.encoder.layer.0.ffn.{name}.weight"].abs().max() <= (6 / (192 + 768)) ** 0.5
    stem = "vit.embeddings.hybrid_model.body.block1.unit1"
    assert not state[f"{stem}.gn3.weight"].any()
    assert state[f"{stem}.gn1.weight"].eq(1).all()
    assert state["vit.encoder.encoder_norm.weight"].eq(1).all()
    assert state["vit.embeddings.position_embeddings"].std() == pytest.approx(0.02, rel=0.1)
    # lecun: variance 1 / fan_in, truncated at two deviations
    assert state["vit.pre_logits.weight"].std() == pytest.approx(192**-0.5, rel=0.05)


@pytest.mark.parametrize("fields", [TINY, HYBRID, {**TINY, "pooling": "map", "representation_size": 8}])
def test_every_parameter_gets_a_gradient(fields, pixels):
    model = randomised(HfViTForImageClassification(HfViTConfig(**fields))).train()
    model(pixels, labels=torch.tensor([0, 1])).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # the softmax is blind to what all keys share; a convolution that is standardised to its mean
    assert all(name.endswith("key.bias") for name in without), without


def test_gradient_checkpointing_gives_the_same_gradients(pixels):
    model = randomised(HfViTForImageClassification(tiny())).train()
    again = copy.deepcopy(model)
    for block in again.vit.encoder.layer:
        assert not block.gradient_checkpointing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name that transformers 5.17 knows is old in 5.23
        again.gradient_checkpointing_enable()
    for each in (model, again):
        each(pixels, labels=torch.tensor([0, 1])).loss.backward()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    layer, x = StochasticDepth(0.25, mode="row").train(), torch.ones(4000, 2, 3)
    y = layer(x)
    per_image = y.flatten(1)
    assert per_image.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (per_image == per_image[:, :1]).all()
    assert y.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(layer.eval()(x), x)


def test_drop_path_grows_linearly_to_the_last_block():
    rates = [block.drop_path.p for block in HfViTModel(tiny(drop_path_rate=0.3)).encoder.layer]
    assert rates == pytest.approx([0, 0.15, 0.3])


@pytest.mark.reliability(row="N06")
def test_building_a_second_model_does_not_change_the_first():
    config = tiny()
    first = AutoModel.from_config(config, attn_implementation="eager")
    AutoModel.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    assert first.config._attn_implementation == "eager"
    assert config.dtype is None


# -- the stem


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [(8, 7, 2), (7, 7, 2), (8, 3, 2), (7, 3, 1), (9, 1, 2), (2, 7, 2)]
)
def test_same_padding_puts_the_odd_pixel_last(size, kernel, stride):
    x = torch.ones(1, 1, size, size)
    padded = pad_same(x, kernel, stride)
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    assert padded.shape[-1] == size + total
    assert padded[0, 0, :, total // 2].sum() == size
    assert (padded.shape[-1] - kernel) // stride + 1 == out


# -- heads


def test_masked_image_modelling_reconstructs_hidden_patches_only(pixels):
    model = randomised(HfViTForMaskedImageModeling(tiny(patch_size=(8, 4))))
    mask = torch.zeros(2, 32, dtype=torch.bool)
    mask[:, 9] = True  # row 1, column 1 of a grid of 4x8
    out = model(pixels, bool_masked_pos=mask)
    assert out.reconstruction.shape == pixels.shape
    expected = (pixels - out.reconstruction)[:, :, 8:16, 4:8].abs().mean()
    torch.testing.assert_close(out.loss, expected, atol=1e-5, rtol=1e-4)


def test_masked_image_modelling_takes_odd_images():
    model = HfViTForMaskedImageModeling(tiny(image_size=(35, 50)))
    out = model(torch.randn(1, 3, 35, 50), bool_masked_pos=torch.ones(1, 24))
    assert out.reconstruction.shape == (1, 3, 32, 48)
    assert out.loss.isfinite()


def test_a_backbone_gives_maps_of_the_blocks(pixels):
    backbone = randomised(HfViTBackbone(tiny(out_features=["stem", "stage2"], apply_layernorm=False)))
    model = HfViTModel(tiny()).eval()
    model.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        maps = backbone(pixels).feature_maps
        states = model(pixels, output_hidden_states=True).hidden_states
    for feature_map, tokens in zip(maps, (states[0], states[2]), strict=True):
        assert torch.equal(feature_map.flatten(2).transpose(1, 2), tokens[:, 1:])
    wide = backbone(torch.randn(1, 3, 32, 64)).feature_maps[0]
    assert wide.shape == (1, 24, 4, 8)


# -- saving and loading


@pytest.mark.parametrize("cls", [HfViTModel, HfViTForImageClassification, HfViTForMaskedImageModeling, HfViTBackbone])
def test_a_saved_model_loads_to_equal_weights(cls, tmp_path):
    model = randomised(cls(HfViTConfig(**HYBRID)))
    model.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    assert model.state_dict().keys() == again.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_image_size_at_load_resamples_as_the_forward_does(tmp_path):
    model = randomised(HfViTForImageClassification(tiny()))
    model.save_pretrained(tmp_path)
    image = torch.randn(1, 3, 48, 24)
    loaded = HfViTForImageClassification.from_pretrained(tmp_path, image_size=(48, 24))
    auto = AutoModelForImageClassification.from_pretrained(tmp_path, image_size=[48, 24])
    with torch.no_grad():
        expected = model(image, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(loaded(image).logits, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(auto(image).logits, expected, atol=1e-6, rtol=0)


def test_a_missing_tensor_raises(tmp_path):
    model = HfViTModel(tiny(num_hidden_layers=2))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing: -encoder\.layer\.2\..* and 11 more"):
        HfViTModel.from_pretrained(tmp_path, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"left over: \+encoder\.layer\.1"):
        HfViTModel.from_pretrained(tmp_path, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"mis-shaped: .*fc1"):
        HfViTModel.from_pretrained(tmp_path, intermediate_size=44)


def test_who_asks_for_the_lists_gets_them_instead_of_an_error(tmp_path):
    HfViTModel(tiny(num_hidden_layers=2)).save_pretrained(tmp_path)
    _, info = HfViTModel.from_pretrained(tmp_path, num_hidden_layers=3, output_loading_info=True)
    assert len(info["missing_keys"]) == 16
    assert all(name.startswith("encoder.layer.2.") for name in info["missing_keys"])


def test_weights_may_be_given_as_a_state_dict():
    model = randomised(HfViTModel(tiny()))
    again = HfViTModel.from_pretrained(None, config=tiny(), state_dict=model.state_dict())
    assert torch.equal(model.encoder.layer[1].ffn.fc2.weight, again.encoder.layer[1].ffn.fc2.weight)


def test_a_tensor_that_is_not_finite_raises(tmp_path):
    model = HfViTModel(tiny())
    with torch.no_grad():
        model.encoder.layer[1].ffn.fc1.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"NaN or Inf: !encoder\.layer\.1\.ffn\.fc1\.weight"):
        HfViTModel.from_pretrained(tmp_path)


def test_a_new_head_is_made_when_asked_for_and_said(tmp_path, caplog):
    model = randomised(HfViTForImageClassification(tiny()))
    model.save_pretrained(tmp_path)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING, logger="transformers"):
        other = HfViTForImageClassification.from_pretrained(tmp_path, num_labels=7)
    assert re.search(r"classifier\.weight.*MISMATCH", caplog.text)
    assert other.classifier.weight.shape == (7, 24)
    assert not other.classifier.weight.any()


def test_the_layer_before_the_head_is_dropped_when_asked_for(tmp_path, caplog):
    model = randomised(HfViTForImageClassification(tiny(representation_size=16)))
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        logger = logging.getLogger("transformers")
        logger.propagate = True
        without = HfViTForImageClassification.from_pretrained(tmp_path, representation_size=None)
        logger.propagate = False
    assert without.config.representation_size is None
    assert without.vit.pre_logits is None
    assert without.classifier.weight.shape == (5, 24)
    assert re.search(r"pre_logits\.weight.*UNEXPECTED", caplog.text)
    assert re.search(r"classifier\.weight.*MISMATCH", caplog.text)
    base = HfViTModel.from_pretrained(tmp_path, representation_size=None)
    assert torch.equal(base.encoder.encoder_norm.weight, model.vit.encoder.encoder_norm.weight)
    without.save_pretrained(tmp_path / "without")
    assert HfViTModel.from_pretrained(tmp_path / "without").pre_logits is None


def test_the_base_model_of_a_classifier_loads_alone(tmp_path):
    model = randomised(HfViTForImageClassification(tiny()))
    model.save_pretrained(tmp_path)
    base = HfViTModel.from_pretrained(tmp_path)
    assert torch.equal(base.encoder.layer[2].attn.query.weight, model.vit.encoder.layer[2].attn.query.weight)
    backbone = HfViTBackbone.from_pretrained(tmp_path)
    assert torch.equal(backbone.encoder.layer[2].attn.query.weight, model.vit.encoder.layer[2].attn.query.weight)


def test_auto_classes_know_the_model_and_stock_models_stay_stock():
    config = tiny()
    assert type(AutoModel.from_config(config)) is HfViTModel
    assert type(AutoBackbone.from_config(config)) is HfViTBackbone
    stock = ViTConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    assert type(AutoModel.from_config(stock)) is ViTModel


def test_the_model_compiles_without_a_graph_break(pixels):
    model = randomised(HfViTForImageClassification(HfViTConfig(**HYBRID)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixels).logits, model(pixels).logits, atol=1e-5, rtol=0)
