"""The one door: transformers', timm's and the seed's layouts, against those libraries side by side."""

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from transformers import (
    DeiTConfig,
    DeiTModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)
from transformers.utils import logging

from hf_vit import (
    HfViTBackbone,
    HfViTConfig,
    HfViTForImageClassification,
    HfViTForMaskedImageModeling,
    HfViTImageProcessor,
    HfViTModel,
)
from hf_vit.checkpoints import write_jax_checkpoint
from hf_vit.checkpoints.from_torch import _TIMM_ARCHITECTURES, TIMM_ACTIVATIONS, TIMM_POOLINGS, _timm_fields
from hf_vit.checkpoints.layouts import torch_rules
from hf_vit.export.formats import export_timm, export_transformers
from hf_vit.files.errors import CheckpointError


STOCK: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "encoder_stride": 8,
    "num_labels": 5,
}
TIMM: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": 32, "num_classes": 5}


def randomised(model):
    """Every parameter random, scales near one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(1 + noise if name.endswith(".weight") and parameter.ndim == 1 else noise)
    return model.eval()


def stock(kind=ViTForImageClassification, **fields):
    return randomised(kind(ViTConfig(**{**STOCK, **fields})))


def of_timm(folder, architecture="vit_tiny_patch16_224", **arguments):
    model = randomised(timm.create_model(architecture, **{**TIMM, **arguments}))
    save_for_hf(model, folder, safe_serialization=True)
    return model


def sample_images(height=32, width=32):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def assert_same(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def assert_equal_weights(model, state):
    ours = model.state_dict()
    assert set(ours) == set(state)
    assert [name for name in state if not torch.equal(ours[name], state[name])] == []


# -- one network in every layout


GAP: dict[str, Any] = {"pooling": "gap", "use_cls_token": False}
TIMM_STEM: dict[str, Any] = {"resnet_layers": [], "patch_size": 2, "resnet_norm_eps": 1e-5, "resnet_conv_eps": 1e-8}


def every_layout(model, folder, dialects):
    """Writes a network in every layout that has a place for it; returns who computes with each, where somebody can."""
    config, state = model.config, model.state_dict()
    model.save_pretrained(folder / "own")
    computes: dict[str, Any] = {"own": model}
    export_timm(model, folder / "timm")
    theirs = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval()
    computes["timm"] = lambda x: SimpleNamespace(logits=theirs(x))
    if config.pooling == "token" and config.resnet_layers is None:
        export_transformers(model, folder / "transformers")
        old = ViTForImageClassification.from_pretrained(folder / "transformers").eval()
        old.save_pretrained(folder / "transformers_v5", save_original_format=False)
        assert any(".q_proj." in name for name in load_file(folder / "transformers_v5" / "model.safetensors"))
        computes |= {"transformers": old, "transformers_v5": old}
    for dialect in dialects:
        write_jax_checkpoint(state, config, folder / f"{dialect}.npz", dialect=dialect)
        computes[f"{dialect}.npz"] = model
    return computes


@pytest.mark.parametrize(
    ("fields", "dialects"),
    [
        ({}, ["linen", "prelinen"]),
        (GAP, ["linen", "prelinen", "big_vision"]),
        ({**TIMM_STEM, "resnet_conv_eps_in_root": True}, ["linen", "prelinen"]),
    ],
    ids=["token", "gap", "hybrid"],
)
def test_one_network_in_every_layout_comes_back_and_computes_what_each_library_does(tmp_path, fields, dialects):
    model = randomised(HfViTForImageClassification(HfViTConfig(**{**STOCK, **fields})))
    computes = every_layout(model, tmp_path, dialects)
    numerics = {name: value for name, value in fields.items() if name.endswith(("eps", "root"))}
    for source, theirs in computes.items():  # an original file does not tell its epsilons: the stem's are timm's here
        told = numerics if source.endswith(".npz") else {}
        loaded = HfViTForImageClassification.from_pretrained(tmp_path / source, **told)
        assert_equal_weights(loaded, model.state_dict())
        with torch.no_grad():
            assert_same(loaded(sample_images()).logits, theirs(sample_images()).logits)


def test_one_network_in_the_layout_of_the_seed_comes_back_with_its_numerics(tmp_path):
    model = randomised(HfViTForImageClassification(HfViTConfig(**STOCK)))
    state = model.state_dict()
    rules = torch_rules("seed", model.config, 5)
    names = {rule.theirs: state.get("vit." + rule.ours, state.get(rule.ours)) for rule in rules}
    assert "transformer.embeddings.patch_embeddings.weight" in names
    torch.save(names, tmp_path / "seed.bin")
    loaded = HfViTForImageClassification.from_pretrained(tmp_path / "seed.bin", num_attention_heads=4)
    assert_equal_weights(loaded, state)
    assert (loaded.config.hidden_act, loaded.config.layer_norm_eps) == ("gelu", 1e-6)


def test_swapped_names_would_be_seen(tmp_path):
    model = stock()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    first, second = (f"vit.encoder.layer.0.attention.attention.{name}.weight" for name in ("query", "key"))
    weights[first], weights[second] = weights[second], weights[first]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = HfViTForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert (loaded(sample_images()).logits - model(sample_images()).logits).abs().max() > 1e-4


# -- transformers


@pytest.mark.parametrize("has_old_names", [True, False])
@pytest.mark.parametrize(
    "fields", [{}, {"hidden_act": "gelu_pytorch_tanh", "qkv_bias": False, "image_size": [32, 48]}]
)
def test_transformers_classifier(tmp_path, has_old_names, fields):
    model = stock(**fields, id2label={i: f"kind {i}" for i in range(5)})
    model.save_pretrained(tmp_path, save_original_format=has_old_names)
    loaded = HfViTForImageClassification.from_pretrained(tmp_path)
    x = sample_images(*fields.get("image_size", (32, 32)))
    with torch.no_grad():
        assert_same(loaded(x).logits, model(x).logits)
    config = loaded.config
    assert (config.layer_norm_eps, config.position_resampling) == (1e-12, "bicubic")
    assert config.hidden_act == fields.get("hidden_act", "gelu")
    assert config.id2label == {i: f"kind {i}" for i in range(5)}


@pytest.mark.parametrize("has_old_names", [True, False])
def test_transformers_base_model_keeps_its_pooler_and_a_head_does_not_use_it(tmp_path, has_old_names, caplog):
    model = stock(ViTModel, pooler_output_size=24)
    model.save_pretrained(tmp_path, save_original_format=has_old_names)
    loaded = HfViTModel.from_pretrained(tmp_path)
    with torch.no_grad():
        ours, theirs = loaded(sample_images()), model(sample_images())
    assert_same(ours.last_hidden_state, theirs.last_hidden_state)
    assert_same(ours.pooler_output, theirs.pooler_output)
    assert loaded.config.representation_size == 24
    logging.enable_propagation()
    classifier = HfViTForImageClassification.from_pretrained(tmp_path, num_labels=7)
    logging.disable_propagation()
    assert classifier.config.representation_size is None
    assert "not read: -pooler.dense.bias, -pooler.dense.weight" in caplog.text
    assert "newly initialized" in caplog.text
    with torch.no_grad():
        assert_same(classifier.vit(sample_images()).pooler_output, theirs.last_hidden_state[:, 0])
    kept = HfViTForImageClassification.from_pretrained(tmp_path, num_labels=7, representation_size=24)
    with torch.no_grad():
        assert_same(kept.vit(sample_images()).pooler_output, theirs.pooler_output)


def test_transformers_base_model_without_pooler(tmp_path):
    model = randomised(ViTModel(ViTConfig(**STOCK), add_pooling_layer=False))
    model.save_pretrained(tmp_path)
    loaded = HfViTModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert_same(loaded(sample_images()).last_hidden_state, model(sample_images()).last_hidden_state)
    assert loaded.pre_logits is None


def test_transformers_head_and_base_load_into_each_other_and_into_a_backbone(tmp_path):
    model = stock()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.vit(sample_images()).last_hidden_state
        assert_same(HfViTModel.from_pretrained(tmp_path)(sample_images()).last_hidden_state, expected)
        backbone = HfViTBackbone.from_pretrained(tmp_path, reshape_hidden_states=False)
        assert_same(backbone(sample_images()).feature_maps[-1], expected)


def test_transformers_masked_image_model(tmp_path):
    model = stock(ViTForMaskedImageModeling)
    model.save_pretrained(tmp_path)
    loaded = HfViTForMaskedImageModeling.from_pretrained(tmp_path)
    mask = torch.arange(32).reshape(2, 16) % 3 == 0
    with torch.no_grad():
        ours, theirs = loaded(sample_images(), bool_masked_pos=mask), model(sample_images(), bool_masked_pos=mask)
    assert_same(ours.reconstruction, theirs.reconstruction)
    assert_same(ours.loss, theirs.loss)


def test_deit_without_its_distillation_token_loads_and_with_it_is_refused(tmp_path):
    model = stock()
    model.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    (tmp_path / "plain" / "config.json").write_text(json.dumps({**config, "model_type": "deit"}))
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    weights = {name.replace("vit.", "deit."): value for name, value in weights.items()}
    save_file(weights, tmp_path / "plain" / "model.safetensors")
    loaded = HfViTForImageClassification.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        assert_same(loaded(sample_images()).logits, model(sample_images()).logits)
    DeiTModel(DeiTConfig(**STOCK)).save_pretrained(tmp_path / "distilled")
    with pytest.raises(CheckpointError, match="a distillation token"):
        HfViTModel.from_pretrained(tmp_path / "distilled")


def test_shards_a_subfolder_and_pickled_weights_load_alike(tmp_path):
    model = stock()
    model.save_pretrained(tmp_path / "a" / "deep", max_shard_size="20KB")
    assert len(list((tmp_path / "a" / "deep").glob("*.safetensors"))) > 1
    (tmp_path / "b").mkdir()
    torch.save(model.state_dict(), tmp_path / "b" / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path / "b")
    expected = model(sample_images()).logits
    for source, options in ((tmp_path / "a", {"subfolder": "deep"}), (tmp_path / "b", {})):
        loaded = HfViTForImageClassification.from_pretrained(source, **options)
        assert_same(loaded(sample_images()).logits, expected)


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.bfloat16}, {"dtype": "float16"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}],
)
def test_loading_options_go_through(tmp_path, options):
    model = stock()
    model.save_pretrained(tmp_path)
    loaded = HfViTForImageClassification.from_pretrained(tmp_path, **options)
    dtype = {"float16": torch.float16}.get(options.get("dtype"), options.get("dtype", torch.float32))
    assert {value.dtype for value in loaded.parameters()} == {dtype}
    expected = model.state_dict()["vit.layernorm.weight"].to(dtype)
    assert torch.equal(loaded.vit.encoder.encoder_norm.weight.cpu(), expected)


def test_the_dtype_of_a_checkpoint_is_kept(tmp_path):
    stock().half().save_pretrained(tmp_path)
    assert HfViTForImageClassification.from_pretrained(tmp_path).dtype == torch.float16


def test_a_loaded_model_is_saved_in_our_own_layout(tmp_path):
    stock().save_pretrained(tmp_path / "stock")
    loaded = HfViTForImageClassification.from_pretrained(tmp_path / "stock")
    loaded.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "hf_vit"
    again = HfViTForImageClassification.from_pretrained(tmp_path / "ours")
    assert_equal_weights(again, loaded.state_dict())
    assert again.config.layer_norm_eps == 1e-12


# -- timm


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_base_patch16_224.augreg_in1k", {"img_size": (32, 48), "patch_size": 8}),
        ("vit_base_patch16_224", {"global_pool": "avg", "fc_norm": False}),
        ("vit_base_patch16_224", {"no_embed_class": True, "act_layer": "gelu_tanh"}),
        ("vit_base_patch16_224_miil", {}),
        ("vit_base_patch16_gap_224", {}),
        ("vit_base_patch16_siglip_224", {}),
        ("vit_base_patch32_siglip_256", {"img_size": 64}),
        ("deit_tiny_patch16_224", {}),
        ("vit_tiny_r_s16_p8_224", {"img_size": 64}),
    ],
)
def test_timm_classifier(tmp_path, architecture, arguments):
    model = of_timm(tmp_path, architecture, **arguments)
    loaded = HfViTForImageClassification.from_pretrained(tmp_path)
    size = arguments.get("img_size", 32)
    x = sample_images(*((size, size) if isinstance(size, int) else size))
    with torch.no_grad():
        assert_same(loaded(x).logits, model(x))
    assert (loaded.config.layer_norm_eps, loaded.config.position_resampling) == (1e-6, "bicubic_antialias")


def test_timm_hybrid(tmp_path):
    model = of_timm(tmp_path, "vit_small_r26_s32_224", depth=1, img_size=64)
    loaded = HfViTForImageClassification.from_pretrained(tmp_path)
    config = loaded.config
    assert (config.resnet_layers, config.patch_size, config.resnet_norm_eps) == ([2, 2, 2, 2], 1, 1e-5)
    with torch.no_grad():  # in float64: 26 random convolutions round to 1e-5 in float32
        x = sample_images(64, 64).double()
        got, expected = loaded.double()(x).logits, model.double()(x)
    assert_same(got, expected, tolerance=1e-9)


def test_timm_without_a_head(tmp_path):
    model = of_timm(tmp_path, num_classes=0)
    with torch.no_grad():
        assert_same(HfViTModel.from_pretrained(tmp_path)(sample_images()).pooler_output, model(sample_images()))
    assert HfViTForImageClassification.from_pretrained(tmp_path, num_labels=3).classifier.out_features == 3


def test_timm_classes_and_preprocessing_come_along(tmp_path):
    of_timm(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["label_names"] = [f"kind {i}" for i in range(5)]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert HfViTForImageClassification.from_pretrained(tmp_path).config.label2id["kind 3"] == 3
    processor = HfViTImageProcessor.from_pretrained(tmp_path)
    assert (processor.protocol, processor.crop_pct) == ("timm", 0.9)


def test_every_accepted_architecture_of_timm_has_the_numbers_that_the_table_says():
    accepted = [name for name in timm.list_models() if _TIMM_ARCHITECTURES.fullmatch(name)]
    assert len(accepted) > 60
    plain = [name for name in accepted if not re.search(r"_r(26|50)?_s\d", name)]
    for name in plain:  # on the meta device; a hybrid measures its stem by running it
        model: Any = timm.create_model(name, device="meta", depth=1)
        sizes = {"use_cls_token": model.has_class_token, "hidden_size": model.embed_dim}
        fields = _timm_fields({"architecture": name}, sizes, {})
        assert fields["num_attention_heads"] == model.blocks[0].attn.num_heads, name
        assert fields["pooling"] == TIMM_POOLINGS[model.global_pool], name
        activation = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh"}[type(model.blocks[0].mlp.act).__name__]
        assert fields["hidden_act"] == activation, name
        assert model.norm.eps == 1e-6, name
    assert set(TIMM_ACTIVATIONS.values()) >= {"gelu", "gelu_pytorch_tanh"}


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("vit_base_patch32_clip_224", "a norm before the blocks, as CLIP"),
        ("vit_small_patch14_dinov2", "layer scale"),
        ("vit_small_patch14_reg4_dinov2", "register tokens"),
        ("deit_tiny_distilled_patch16_224", "a distillation token"),
        ("vit_base_patch16_rpn_224", "a norm after the pooling"),
    ],
)
def test_what_is_no_original_vision_transformer_is_refused_by_name(tmp_path, architecture, reason):
    model = timm.create_model(architecture, embed_dim=32, depth=1, num_heads=4, num_classes=3)
    save_for_hf(model, tmp_path, safe_serialization=True)
    with pytest.raises(CheckpointError, match=reason):
        HfViTForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"qk_norm": True}, "norms of queries and keys"),
        ({"init_values": 0.1}, "layer scale"),
        ({"global_pool": "avg"}, "a norm after the pooling"),
        ({"global_pool": "max", "fc_norm": False}, "global_pool is 'max'"),
        ({"pre_norm": True}, "a norm before the blocks"),
        ({"reg_tokens": 2}, "register tokens"),
        ({"act_layer": "silu"}, "act_layer is 'silu'"),
        ({"global_pool": "map"}, "treats the class token differently"),
    ],
)
def test_an_argument_that_changes_the_model_is_refused_by_name(tmp_path, arguments, reason):
    of_timm(tmp_path, **arguments)
    with pytest.raises(CheckpointError, match=reason):
        HfViTForImageClassification.from_pretrained(tmp_path)


# -- weights alone


def test_timm_weights_alone_need_a_preset_or_the_heads(tmp_path):
    model = of_timm(tmp_path)
    (tmp_path / "config.json").unlink()
    file = tmp_path / "model.safetensors"
    for source in (tmp_path, file):
        with pytest.raises(CheckpointError, match="pass preset="):
            HfViTForImageClassification.from_pretrained(source)
        loaded = HfViTForImageClassification.from_pretrained(source, num_attention_heads=4)
        with torch.no_grad():
            assert_same(loaded(sample_images()).logits, model(sample_images()))
    with pytest.raises(CheckpointError, match="hidden_size is 32, but the preset ViT-Ti_16 has 192"):
        HfViTForImageClassification.from_pretrained(file, preset="ViT-Ti_16")
    with pytest.raises(ValueError, match="no preset is called 'ViT-X'"):
        HfViTForImageClassification.from_pretrained(file, preset="ViT-X")


def test_a_preset_tells_the_heads_of_weights_alone(tmp_path):
    model = randomised(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3))
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "m.pth"
    )
    loaded = HfViTForImageClassification.from_pretrained(tmp_path / "m.pth", preset="ViT-Ti_16")
    assert (loaded.config.num_attention_heads, loaded.config.image_size) == (3, 32)
    with torch.no_grad():
        assert_same(loaded(sample_images()).logits, model(sample_images()))


def test_the_seed_implementation_computes_with_the_exact_gelu(tmp_path):
    model = randomised(HfViTForImageClassification(HfViTConfig(**STOCK, hidden_act="gelu")))
    names = {
        re.sub(r"^vit\.", "transformer.", name).replace("classifier.", "head."): value
        for name, value in model.state_dict().items()
    }
    torch.save(names, tmp_path / "checkpoint.bin")
    loaded = HfViTForImageClassification.from_pretrained(tmp_path / "checkpoint.bin", num_attention_heads=4)
    with torch.no_grad():
        assert torch.equal(loaded(sample_images()).logits, model(sample_images()).logits)
    names["transformer.embeddings.hybrid_model.root.conv.weight"] = torch.zeros(64, 3, 7, 7)
    torch.save(names, tmp_path / "hybrid.bin")
    with pytest.raises(CheckpointError, match=r"load the original \.npz file"):
        HfViTForImageClassification.from_pretrained(tmp_path / "hybrid.bin", num_attention_heads=4)


# -- another size, another head


def test_image_size_resamples_as_each_library_does(tmp_path):
    x = sample_images(48, 64)
    model = stock()
    model.save_pretrained(tmp_path / "stock")
    ours = HfViTForImageClassification.from_pretrained(tmp_path / "stock", image_size=(48, 64))
    with torch.no_grad():
        assert_same(ours(x).logits, model(x, interpolate_pos_encoding=True).logits)
    assert ours.config.image_size == (48, 64)
    of_timm(tmp_path / "timm", patch_size=8)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, img_size=(48, 64)).eval()
    ours = HfViTForImageClassification.from_pretrained(tmp_path / "timm", image_size=(48, 64))
    with torch.no_grad():
        assert_same(ours(x).logits, theirs(x))


def test_num_labels_makes_a_new_head_and_keeps_one_that_fits(tmp_path):
    model = stock()
    model.save_pretrained(tmp_path)
    other = HfViTForImageClassification.from_pretrained(tmp_path, num_labels=3)
    assert other.classifier.weight.shape == (3, 32)
    assert not other.classifier.weight.any()
    same = HfViTForImageClassification.from_pretrained(tmp_path, num_labels=5)
    assert torch.equal(same.classifier.weight, model.classifier.weight)


def test_another_kind_of_model_is_refused_by_its_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="model_type is 'bert'; expected hf_vit, vit, deit"):
        HfViTModel.from_pretrained(tmp_path)


def test_a_library_config_given_by_the_caller_is_understood(tmp_path):
    model = stock()
    model.save_pretrained(tmp_path)
    labels = {i: f"kind {i}" for i in range(5)}
    config = ViTConfig.from_pretrained(tmp_path, id2label=labels)
    assert HfViTForImageClassification.from_pretrained(tmp_path, config=config).config.id2label == labels
