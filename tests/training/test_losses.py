"""The loss follows the problem type, the same for Trainer and the Accelerate loop, with and without accumulation."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from example_scripts import load_example
from tiny_models import TINY
from torch import nn

from hf_vit import HfViTConfig, HfViTForImageClassification
from hf_vit.training import HfViTTrainer, HfViTTrainingArguments, classification_loss
from hf_vit.training.losses import image_losses, infer_problem_type


LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 3.0]])


def test_several_labels_cost_what_the_reference_computes():
    """Source: big_vision/utils.py, sigmoid_xent: -(y log s(x) + (1 - y) log s(-x)), summed over classes."""
    flags = torch.tensor([[1, 0, 1], [0, 0, 1]])
    log_on, log_off = LOGITS.double().sigmoid().log(), (-LOGITS.double()).sigmoid().log()
    expected = -(flags * log_on + (1 - flags) * log_off).sum(1).mean()
    for labels in (flags, flags.bool(), flags.float()):
        found = classification_loss(LOGITS, labels, problem_type="multi_label_classification")
        assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_values_cost_the_squared_error_per_output():
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    found = image_losses(LOGITS, labels, problem_type="regression")
    torch.testing.assert_close(found, (LOGITS - labels).square().mean(1))
    one = image_losses(LOGITS[:, :1], torch.tensor([1.0, 2.0]), problem_type="regression")
    torch.testing.assert_close(one, torch.tensor([1.0, 4.0]))


def test_class_weights_multiply_the_loss_of_their_class():
    weights, labels = torch.tensor([0.5, 1.0, 1.5]), torch.tensor([0, 2])
    found = image_losses(LOGITS, labels, class_weights=weights)
    torch.testing.assert_close(found, weights[labels] * image_losses(LOGITS, labels))
    flags = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    found = image_losses(LOGITS, flags, problem_type="multi_label_classification", class_weights=weights)
    by_hand = -(weights * flags * LOGITS.sigmoid().log() + (1 - flags) * (-LOGITS).sigmoid().log()).sum(1)
    torch.testing.assert_close(found, by_hand)


@pytest.mark.parametrize(
    ("labels", "problem_type", "words"),
    [
        (torch.zeros(2, 2), "single_label_classification", r"labels are \(2, 2\)"),
        (torch.zeros(2), "single_label_classification", "expects integer class indices"),
        (torch.zeros(2), "multi_label_classification", r"expects \(2, 3\)"),
        (torch.zeros(2), "regression", r"expects \(2, 3\)"),
        (torch.zeros(2, 3), "ranking", "problem_type is 'ranking'"),
    ],
)
def test_labels_of_another_kind_are_refused(labels, problem_type, words):
    with pytest.raises(ValueError, match=words):
        image_losses(LOGITS, labels, problem_type=problem_type)


def test_the_problem_type_is_inferred_as_transformers_does_and_not_stored():
    config = HfViTConfig(**TINY)
    assert infer_problem_type(config, torch.tensor([0, 1])) == "single_label_classification"
    assert infer_problem_type(config, torch.zeros(2, 5)) == "multi_label_classification"
    assert infer_problem_type(HfViTConfig(**{**TINY, "num_labels": 1}), torch.zeros(2)) == "regression"
    assert config.problem_type is None


def samples(kind: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(8, 3, 32, 32, generator=generator)
    labels = {
        "single": torch.arange(8) % 3,
        "soft": torch.softmax(torch.randn(8, 3, generator=generator), 1),
        "flags": (torch.rand(8, 3, generator=generator) < 0.5).float(),
        "value": torch.randn(8, generator=generator) * 3,
        "values": torch.randn(8, 1, generator=generator) * 3,
    }[kind]
    types = {"single": None, "soft": "single_label_classification", "flags": "multi_label_classification"}
    fields = {"problem_type": types.get(kind, "regression"), "num_labels": 1 if kind.startswith("value") else 3}
    return [{"pixel_values": pixels[i], "labels": labels[i]} for i in range(8)], fields


def tiny(**fields: Any) -> HfViTForImageClassification:
    torch.manual_seed(0)
    return HfViTForImageClassification(HfViTConfig(**{**TINY, "zero_init_head": False, **fields}))


def arguments(folder: Path, **settings: Any) -> HfViTTrainingArguments:
    defaults = {"max_steps": 1, "per_device_train_batch_size": 8, "logging_steps": 1, "report_to": "none"}
    defaults |= {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 1e9, "optim": "sgd"}
    return HfViTTrainingArguments(str(folder), **(defaults | settings))


@pytest.mark.parametrize("kind", ["single", "soft", "flags", "value", "values"])
def test_trainer_has_the_loss_and_gradient_of_the_problem_type_accumulated_or_not(kind, tmp_path):
    rows, fields = samples(kind)
    model = tiny(**fields)
    labels = torch.stack([torch.as_tensor(row["labels"]) for row in rows])
    logits = model(torch.stack([row["pixel_values"] for row in rows])).logits
    expected = {
        "single": lambda: nn.functional.cross_entropy(logits, labels),
        "soft": lambda: nn.functional.cross_entropy(logits, labels),
        "flags": lambda: (
            nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1).mean()
        ),
        "value": lambda: (logits[:, 0] - labels).square().mean(),
        "values": lambda: (logits - labels).square().mean(),
    }[kind]()
    expected.backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
    for accumulation in (1, 2):
        settings = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
        trainer = HfViTTrainer(model=tiny(**fields), args=arguments(tmp_path, **settings), train_dataset=rows)
        trainer.train()
        logged = trainer.state.log_history[0]
        assert logged["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert trainer.evaluate(rows)["eval_loss"] > 0


def test_a_loss_function_and_a_collator_of_the_user_are_used(tmp_path):
    rows, fields = samples("single")
    seen = []

    def collator(batch: list) -> dict:
        seen.append(len(batch))
        return {name: torch.stack([torch.as_tensor(row[name]) for row in batch]) for name in batch[0]}

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return outputs.logits.square().sum() / num_items_in_batch

    model = tiny(**fields)
    expected = model(torch.stack([row["pixel_values"] for row in rows])).logits.square().sum().item() / 8
    trainer = HfViTTrainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=rows,
        data_collator=collator,
        compute_loss_func=loss,
    )
    trainer.train()
    assert seen == [8]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_dataset_without_pixels_or_labels_is_refused_at_construction(tmp_path):
    rows = datasets.Dataset.from_dict({"image": [1, 2], "label": [0, 1]})
    with pytest.raises(ValueError, match=r"has \['image', 'label'\]: expected pixel_values"):
        HfViTTrainer(model=tiny(), args=arguments(tmp_path), train_dataset=rows)
    with pytest.raises(ValueError, match="expected labels beside pixel_values"):
        HfViTTrainer(model=tiny(), args=arguments(tmp_path), train_dataset=[{"pixel_values": torch.zeros(3, 32, 32)}])


def test_a_huggingface_dataset_of_pixels_trains(tmp_path):
    rows, fields = samples("single")
    table = datasets.Dataset.from_dict(
        {"pixel_values": [row["pixel_values"].numpy() for row in rows], "label": [int(row["labels"]) for row in rows]}
    ).with_format("torch")
    losses = []
    for dataset in (rows, table):
        trainer = HfViTTrainer(model=tiny(**fields), args=arguments(tmp_path, max_steps=2), train_dataset=dataset)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_pretraining_by_sigmoids_starts_with_improbable_classes():
    pretrain = load_example("pretrain")
    own = pretrain.PretrainArguments(preset="ViT-Ti_16", objective="sigmoid", image_size=32)
    model = pretrain.make_network(own, ["a", "b"], 0, "multi_label_classification")
    assert model.classifier.bias.tolist() == [-10.0, -10.0]  # init_head_bias of big_vision's i21k configs
    assert model.config.problem_type == "multi_label_classification"
    assert model.config.id2label == {0: "a", 1: "b"}
