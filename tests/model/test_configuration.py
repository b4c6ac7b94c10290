"""The configuration: what it refuses, what it derives, and the models of the papers."""

import pytest
import torch

from hf_vit import PRESETS, HfViTConfig, HfViTForImageClassification


# Source: vit_jax/models_test.py, MODEL_SIZES (c6de1e5): 1,000 classes, 224 pixels.
PARAMETERS = {
    "ViT-Ti_16": 5_717_416,
    "ViT-S_16": 22_050_664,
    "ViT-S_32": 22_878_952,
    "ViT-B_8": 86_576_872,
    "ViT-B_16": 86_567_656,
    "ViT-B_32": 88_224_232,
    "ViT-L_16": 304_326_632,
    "ViT-L_32": 306_535_400,
    "ViT-H_14": 632_045_800,
    "ViT-S_16-gap-norep": 22_049_896,
    "ViT-S_32-gap-norep": 22_878_184,
    "ViT-B_16-gap-norep": 86_566_120,
    "ViT-B_32-gap-norep": 88_222_696,
    "R+ViT-Ti_16": 6_337_704,
    "R26+ViT-S_32": 36_431_912,
    "R26+ViT-B_32": 101_383_976,
    "R50+ViT-B_16": 98_659_112,
    "R50+ViT-L_32": 328_994_856,
}


def test_every_preset_is_counted():
    assert set(PARAMETERS) == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_the_parameters_of_the_reference(preset):
    with torch.device("meta"):
        model = HfViTForImageClassification(HfViTConfig.from_preset(preset, num_labels=1000))
    assert model.num_parameters() == PARAMETERS[preset]


def test_the_default_is_vit_b_16():
    config = HfViTConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.patch_size, config.image_size) == (768, 12, 16, 224)
    assert config.hidden_act == "gelu_pytorch_tanh"
    assert config.layer_norm_eps == 1e-6


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no preset is called 'ViT-XXL'; expected one of ViT-Ti_16"):
        HfViTConfig.from_preset("ViT-XXL")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers must be from 0 to 1000"),
        ({"num_hidden_layers": 999, "hidden_size": 131_072, "num_attention_heads": 8}, "above the limit"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps must be above 0 and at most 1"),
        ({"num_attention_heads": 5}, "multiple of num_attention_heads"),
        ({"patch_size": 0}, "patch_size must be from 1"),
        ({"image_size": 8}, "smaller than one patch"),
        ({"image_size": [224]}, "one number or .height, width."),
        ({"pooling": "mean"}, "pooling must be one of token, gap, map, none"),
        ({"position_embedding_type": "sincos2d", "hidden_size": 30, "num_attention_heads": 3}, "multiple of 4"),
        ({"drop_path_rate": 1.5}, "drop_path_rate must be from 0 to 1"),
        ({"resnet_layers": [0]}, "resnet_layers must be from 1"),
        ({"resnet_layers": [1], "resnet_width_factor": 0.1}, "32 groups"),
        ({"image_size": 100_000, "patch_size": 1}, "above the limit of 1048576 tokens"),
    ],
)
def test_what_no_model_can_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HfViTConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "grid"),
    [
        ({"image_size": (70, 55)}, (4, 3)),  # VALID: the rest is dropped
        ({"image_size": 64, "patch_size": (8, 16)}, (8, 4)),
        ({"image_size": (71, 53), "patch_size": 1, "resnet_layers": [1, 1, 1]}, (5, 4)),  # SAME: rounded up
        ({"image_size": (101, 67), "patch_size": 8, "resnet_layers": []}, (3, 2)),
        ({"image_size": 224, "patch_size": 1, "resnet_layers": [2, 2, 2, 2]}, (7, 7)),
    ],
)
def test_the_grid_follows_the_padding_of_the_reference(fields, grid):
    assert HfViTConfig(**fields).grid_size == grid


def test_a_configuration_survives_its_file(tmp_path):
    config = HfViTConfig(image_size=(32, 48), patch_size=1, resnet_layers=(1, 2), out_features=["stage1", "stage3"])
    config.save_pretrained(tmp_path)
    again = HfViTConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.out_features == ["stage1", "stage3"]
    assert again.grid_size == config.grid_size
