"""The optimizer, clipping and schedule of the reference, step by step, and the parameter groups."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hf_vit import HfViTConfig, HfViTForImageClassification
from hf_vit.training.optimizers import (
    MomentumSGD,
    clip_by_global_norm_,
    create_scheduler,
    depth_of,
    parameter_groups,
    takes_weight_decay,
)


GOLDENS = Path(os.environ.get("HF_VIT_GOLDENS", Path(__file__).parents[1] / "goldens"))
CASES = {case["name"]: case for case in json.loads((GOLDENS / "cases.json").read_text())["cases"]}
FINE_TUNINGS = sorted(name for name in CASES if name.startswith("ft_") and (GOLDENS / f"{name}.io.npz").exists())


def replay(name: str, *, accumulator_dtype=None, late: int = 0, nesterov: bool = False) -> dict[str, float]:
    """Returns how far, at most, a repetition of the reference's fine-tuning is from what the reference recorded."""
    case, recorded = CASES[name], np.load(GOLDENS / f"{name}.io.npz")
    model = HfViTForImageClassification.from_pretrained(
        GOLDENS / case["checkpoint"],
        num_labels=case["to_classes"],
        image_size=case["to_image"],
        representation_size=None,
    )
    dtype = accumulator_dtype or getattr(torch, case.get("accum_dtype", "bfloat16"))
    groups = parameter_groups(model, lr=case["base_lr"])
    optimizer = (
        torch.optim.SGD(groups, momentum=0.9, nesterov=True)
        if nesterov
        else MomentumSGD(groups, accumulator_dtype=dtype)
    )
    scheduler = create_scheduler(
        optimizer,
        base_lr=case["base_lr"],
        total_steps=case["steps"],
        warmup_steps=case["warmup"],
        schedule=case["decay"],
    )
    optimizer.step()  # no gradient yet, so nothing moves; torch wants it before the schedule of the negative control
    for _ in range(late):
        scheduler.step()
    errors = {"losses": 0.0, "grad_norms": 0.0, "lrs": 0.0}
    for step in range(case["steps"]):
        pixels = torch.from_numpy((recorded["image_u8"][step] - 127.5) / 127.5).permute(0, 3, 1, 2).float()
        loss = model(pixels, labels=torch.from_numpy(recorded["labels"][step]).long()).loss
        loss.backward()
        norm = clip_by_global_norm_(model.parameters(), case["clip"])
        seen = {"losses": loss.item(), "grad_norms": norm.item(), "lrs": scheduler.get_last_lr()[0]}
        for key, value in seen.items():
            errors[key] = max(errors[key], abs(value - float(recorded[key][step])))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    with torch.no_grad():
        pixels = torch.from_numpy(recorded["pixels"]).permute(0, 3, 1, 2)
        errors["logits"] = np.abs(model(pixels).logits.numpy() - recorded["logits"]).max()
    after = {
        "Transformer/encoder_norm/bias": model.vit.encoder.encoder_norm.bias,
        "Transformer/encoder_norm/scale": model.vit.encoder.encoder_norm.weight,
        "Transformer/posembed_input/pos_embedding": model.vit.embeddings.position_embeddings,
        "head/bias": model.classifier.bias,
        "head/kernel": model.classifier.weight.T,
    }
    for key, tensor in after.items():
        errors[key] = np.abs(tensor.detach().numpy() - recorded[f"after/{key}"]).max()
    return errors


@pytest.mark.parametrize("name", FINE_TUNINGS)
def test_fine_tuning_repeats_the_reference_step_by_step(name):
    errors = replay(name)
    assert max(errors.values()) < 5e-6, errors


@pytest.mark.parametrize(
    "change",
    [{"late": 1}, {"nesterov": True}, {"accumulator_dtype": torch.bfloat16}],
    ids=["schedule one step ahead", "Nesterov", "bfloat16 momentum"],
)
def test_another_update_is_seen_to_differ(change):
    assert max(replay("ft_sgd_f32", **change).values()) > 5e-5


def test_a_bfloat16_accumulator_rounds_what_is_stored_and_its_momentum_but_not_the_step():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = MomentumSGD([weight], 1.0)
    weight.grad = torch.tensor([1.001])
    optimizer.step()
    assert weight.item() == -torch.tensor(1.001).item()
    assert optimizer.state[weight]["momentum_buffer"].item() == 1.0
    weight.data.zero_()
    optimizer.step()
    torch.testing.assert_close(weight.data, torch.tensor([-(1.001 + 0.8984375)]), rtol=1e-7, atol=0)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 50])
def test_the_schedule_equals_the_written_out_formula_at_every_step(schedule, warmup):
    total, peak = 500, 0.03
    optimizer = MomentumSGD([nn.Parameter(torch.ones(1))], peak)
    scheduler = create_scheduler(optimizer, base_lr=peak, total_steps=total, warmup_steps=warmup, schedule=schedule)
    steps = np.arange(total, dtype=np.float64)
    progress = np.clip((steps - warmup) / (total - warmup), 0, 1)
    expected = (
        1e-5 + (peak - 1e-5) * (1 - progress) if schedule == "linear" else peak / 2 * (1 + np.cos(np.pi * progress))
    )
    expected = expected * np.minimum(1, steps / warmup) if warmup else expected
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(seen, expected, rtol=1e-12, atol=1e-18)
    assert (seen[0] == 0) == (warmup > 0)


def test_groups_keep_their_fraction_of_the_rate():
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": parameters[:1], "lr": 0.5}, {"params": parameters[1:], "lr": 1.0}])
    scheduler = create_scheduler(optimizer, base_lr=1.0, total_steps=10, warmup_steps=3)
    for _ in range(10):
        low, high = scheduler.get_last_lr()
        assert low == high / 2
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base_lr": 0.0, "total_steps": 5}, "positive learning rate"),
        ({"base_lr": 0.1, "total_steps": 5, "warmup_steps": 6}, "6 warmup steps are more than the 5"),
        ({"base_lr": 0.1, "total_steps": 5, "schedule": "stairs"}, "cosine, linear, constant"),
    ],
)
def test_an_impossible_schedule_is_refused(settings, words):
    optimizer = MomentumSGD([nn.Parameter(torch.ones(1))], 0.1)
    with pytest.raises(ValueError, match=words):
        create_scheduler(optimizer, **settings)


def test_weight_decay_is_refused_where_it_would_be_ignored():
    with pytest.raises(ValueError, match="no weight decay"):
        MomentumSGD([{"params": [nn.Parameter(torch.ones(1))], "weight_decay": 0.1}], 0.1)


def test_clipping_leaves_small_gradients_alone_and_has_no_epsilon():
    small, large = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    small.grad, large.grad = torch.tensor([0.3, 0.4]), torch.tensor([3e-7, 4e-7])
    assert clip_by_global_norm_([small], 1.0) == 0.5
    assert torch.equal(small.grad, torch.tensor([0.3, 0.4]))
    assert math.isclose(clip_by_global_norm_([large], 1e-7), 5e-7, rel_tol=1e-6)
    torch.testing.assert_close(large.grad, torch.tensor([6e-8, 8e-8]), rtol=1e-6, atol=0)  # 6e-8 / 11 with torch's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_state_survives_saving_bit_for_bit(dtype):
    def train(steps: int, state: dict | None, start: torch.Tensor) -> tuple[torch.Tensor, dict]:
        weight = nn.Parameter(start.clone())
        optimizer = MomentumSGD([weight], 0.1, accumulator_dtype=dtype)
        if state:
            optimizer.load_state_dict(state)
        for _ in range(steps):
            weight.grad = torch.sin(weight.detach() * 7)
            optimizer.step()
        return weight.detach(), optimizer.state_dict()

    start = torch.linspace(-1, 1, 33)
    whole, _ = train(6, None, start)
    half, state = train(3, None, start)
    assert state["state"][0]["momentum_buffer"].dtype == dtype
    resumed, state = train(3, state, half)
    assert torch.equal(whole, resumed)
    assert state["state"][0]["momentum_buffer"].dtype == dtype


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return HfViTForImageClassification(
        HfViTConfig(
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
    )


def test_only_kernels_take_weight_decay(model):
    kept = {name for name, parameter in model.named_parameters() if not takes_weight_decay(name, parameter)}
    assert "vit.embeddings.cls_token" in kept
    assert "vit.embeddings.position_embeddings" in kept
    assert "vit.encoder.layer.0.attention_norm.weight" in kept
    assert "vit.encoder.encoder_norm.weight" in kept
    assert "classifier.bias" in kept
    decayed = {name for name, _ in model.named_parameters()} - kept
    assert decayed == {
        "vit.embeddings.patch_embeddings.weight",
        "classifier.weight",
        *(
            f"vit.encoder.layer.{i}.{part}.weight"
            for i in (0, 1)
            for part in ("attn.query", "attn.key", "attn.value", "attn.out", "ffn.fc1", "ffn.fc2")
        ),
    }


def test_layers_learn_slower_with_depth_below_the_head(model):
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    names = dict(model.named_parameters())
    assert len(rates) == len(names)
    assert rates[id(names["vit.embeddings.cls_token"])] == 0.125
    assert rates[id(names["vit.encoder.layer.0.ffn.fc1.weight"])] == 0.25
    assert rates[id(names["vit.encoder.layer.1.ffn.fc1.bias"])] == 0.5
    assert rates[id(names["vit.encoder.encoder_norm.weight"])] == 1.0
    assert rates[id(names["classifier.weight"])] == 1.0


def test_depth_ignores_wrappers_and_counts_the_stem_as_embeddings():
    assert depth_of("module.base_model.model.vit.encoder.layer.10.attn.query.lora_A.default.weight", 12) == 11
    assert depth_of("vit.embeddings.hybrid_model.root.conv.weight", 12) == 0
    assert depth_of("vit.pooler.probe", 12) == 13


def test_frozen_parameters_are_left_out_and_all_frozen_is_an_error(model):
    try:
        model.vit.requires_grad_(False)
        assert sum(len(group["params"]) for group in parameter_groups(model, lr=1.0)) == 2
        model.classifier.requires_grad_(False)
        with pytest.raises(ValueError, match="no parameter of the model is trainable"):
            parameter_groups(model, lr=1.0)
    finally:
        model.requires_grad_(True)


def test_everything_decays_when_a_recipe_says_so(model):
    assert {group["weight_decay"] for group in parameter_groups(model, lr=1.0, weight_decay=0.1)} == {0.0, 0.1}
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, decay_all_parameters=True)
    assert {group["weight_decay"] for group in groups} == {0.1}
