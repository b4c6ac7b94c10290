"""Tiny models with random weights, and configurations that no model may have."""

from typing import Any

import torch


TINY: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


HOSTILE = [
    {"num_hidden_layers": 1_000_000},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": 10**30},
    {"num_hidden_layers": "12"},
    {"num_hidden_layers": None},
    {"layer_norm_eps": -1.0},
    {"layer_norm_eps": float("nan")},
    {"num_attention_heads": 5},
    {"num_attention_heads": 0},
    {"patch_size": 0},
    {"patch_size": [8, 8, 8]},
    {"patch_size": {}},
    {"image_size": [0, 32]},
    {"image_size": 10**9},
    {"hidden_size": 10**9},
    {"hidden_size": 24.0},
    {"hidden_size": [24]},
    {"intermediate_size": 10**12},
    {"hidden_act": "no such function"},
    {"hidden_act": ["gelu"]},
    {"hidden_dropout_prob": 2.0},
    {"num_channels": -3},
    {"qkv_bias": "yes"},
    {"id2label": 5},
    {"problem_type": {"dtype": float("nan")}},
    {"dtype": "int8"},
    {"dtype": "float8_e4m3fn"},
]
