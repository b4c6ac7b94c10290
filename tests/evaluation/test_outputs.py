"""Outputs as answers, for every problem type, beside transformers' own pipeline where it has one."""

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_models import TINY, randomised
from transformers import pipeline

from hf_vit import HfViTConfig, HfViTForImageClassification, HfViTImageProcessor
from hf_vit.evaluation import answers, problem_type_of


NAMES = {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "eel", 5: "fox"}


def config_of(**fields) -> HfViTConfig:
    return HfViTConfig(**{key: value for key, value in TINY.items() if key != "num_labels"}, **fields)


def test_a_single_label_model_names_the_five_most_probable_classes_by_default():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0, -2.0]])
    found = answers(logits, config_of(id2label=NAMES))[0]
    assert [label for label, _ in found.scores] == ["bee", "dog", "cat", "ant", "eel"]
    assert [score for _, score in found.scores] == pytest.approx(logits.softmax(-1)[0][[1, 3, 2, 0, 4]].tolist())
    assert str(answers(logits, config_of(id2label=NAMES), top_k=1)[0]) == " 63.4% bee"


def test_a_multi_label_model_names_every_class_above_the_threshold():
    config = config_of(id2label=NAMES, problem_type="multi_label_classification")
    logits = torch.tensor([[-1.0, 3.0, 0.1, 2.0, 1.5, 0.2], [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]])
    found = answers(logits, config)
    assert [label for label, _ in found[0].scores] == ["bee", "dog", "eel", "fox", "cat"]
    assert found[0].scores[0][1] == pytest.approx(torch.sigmoid(torch.tensor(3.0)).item())
    assert str(found[1]) == "no class reaches the threshold"
    assert [len(answer.scores) for answer in answers(logits, config, threshold=0.1)] == [6, 2]
    assert [len(answer.scores) for answer in answers(logits, config, top_k=2)] == [2, 2]  # a ranking was requested


def test_a_regression_model_answers_with_its_value():
    assert str(answers(torch.tensor([[37.42]]), config_of(num_labels=1))[0]) == "37.42"
    several = config_of(id2label={0: "width", 1: "height"}, problem_type="regression")
    assert str(answers(torch.tensor([[2.0, 3.5]]), several)[0]) == "width 2  height 3.5"


def test_a_headless_model_and_logits_of_tokens_are_refused():
    with pytest.raises(ValueError, match="no classifier"):
        answers(torch.zeros(1, 24), config_of(num_labels=0))
    with pytest.raises(ValueError, match=r'pooling="none" answers for each token'):
        answers(torch.zeros(1, 16, 5), config_of(num_labels=5, pooling="none"))


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_answers_agree_with_the_pipeline(problem_type):
    model = randomised(HfViTForImageClassification(config_of(id2label=NAMES, problem_type=problem_type)))
    processor = HfViTImageProcessor.for_model(model.config)
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    expected = pipeline("image-classification", model=model, image_processor=processor)(image, top_k=6)
    with torch.no_grad():
        found = answers(model(**processor(image, return_tensors="pt")).logits, model.config, top_k=6)[0]
    assert [label for label, _ in found.scores] == [item["label"] for item in expected]
    assert [score for _, score in found.scores] == pytest.approx([item["score"] for item in expected], abs=1e-6)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_labels": 3}, "single_label_classification"),
        ({"num_labels": 1}, "regression"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "multi_label_classification"),
    ],
)
def test_the_problem_type_is_the_one_that_transformers_infers(fields, expected):
    assert problem_type_of(config_of(**fields)) == expected
