"""Metrics against a second computation by hand, and predictions gathered to the last sample."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

from hf_vit.evaluation.metrics import (
    ConfusionMatrix,
    ExpectedCalibrationError,
    PerClassAccuracy,
    TopKAccuracy,
    compute_metrics,
    in_dataset_order,
    summarize_logits,
)


def sharp_logits(samples=200, classes=12):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(samples, classes, generator=generator)
    labels = torch.randint(classes, (samples,), generator=generator)
    logits[torch.arange(samples), labels] += 1.5
    return logits, labels


def test_accuracies_are_scikit_learns():
    logits, labels = sharp_logits()
    ranked, confidences = summarize_logits(logits)
    scores = compute_metrics(((ranked.numpy(), confidences.numpy()), labels.numpy()))
    for k, name in ((1, "accuracy"), (5, "top5_accuracy")):
        assert scores[name] == pytest.approx(top_k_accuracy_score(labels, logits, k=k), abs=1e-12)


def test_calibration_error_is_the_sum_over_bins_done_by_hand():
    # two bins of 0.5: |0.3 - 1| * 1/4 and |(0.6 + 0.8 + 0.9) / 3 - 1 / 3| * 3/4
    found = ExpectedCalibrationError().compute(
        predictions=[0, 1, 2, 3], references=[0, 1, 0, 0], confidences=[0.3, 0.6, 0.8, 0.9], num_bins=2
    )
    assert found["ece"] == pytest.approx(0.7 / 4 + (2.3 - 1) / 4)


def test_confidence_one_falls_into_the_last_bin_and_a_perfect_model_has_no_error():
    perfect = {"predictions": [0, 1], "references": [0, 1], "confidences": [1.0, 1.0]}
    assert ExpectedCalibrationError().compute(**perfect)["ece"] == 0


def test_a_confidence_between_two_bins_belongs_to_the_lower_one():
    found = {"predictions": [0, 1], "references": [0, 0], "confidences": [0.4, 0.5]}
    assert ExpectedCalibrationError().compute(**found, num_bins=2)["ece"] == pytest.approx(abs(0.4 + 0.5 - 1) / 2)


def test_the_confusion_matrix_is_scikit_learns_and_a_class_without_samples_has_no_accuracy():
    logits, labels = sharp_logits()
    pair = {"predictions": logits.argmax(1), "references": labels % 11}
    found = ConfusionMatrix().compute(**pair, num_classes=12)["confusion_matrix"]
    np.testing.assert_array_equal(found, confusion_matrix(pair["references"], pair["predictions"], labels=range(12)))
    accuracies = PerClassAccuracy().compute(**pair, num_classes=12)["per_class_accuracy"]
    np.testing.assert_allclose(accuracies[:11], found.diagonal()[:11] / found.sum(1)[:11])
    assert np.isnan(accuracies[11])


def test_batches_added_one_by_one_give_what_the_whole_gives():
    logits, labels = sharp_logits()
    ranked, _ = summarize_logits(logits)
    metric = TopKAccuracy()
    for rows in torch.arange(200).split(64):
        metric.add_batch(predictions=ranked[rows], references=labels[rows])
    assert metric.compute() == TopKAccuracy().compute(predictions=ranked, references=labels)


def test_three_classes_have_three_candidates_and_ties_go_to_the_first():
    ranked, confidences = summarize_logits(torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 0.0]]))
    assert ranked.tolist() == [[0, 1, 2], [1, 0, 2]]
    torch.testing.assert_close(confidences, torch.tensor([1 / 3, torch.e**2 / (torch.e**2 + 2)]))


def test_a_sample_counts_once_however_the_batches_were_filled_up():
    batches = [
        {"index": torch.tensor([3, 0]), "value": torch.tensor([[30], [0]])},
        {"index": torch.tensor([1, 2]), "value": torch.tensor([[10], [20]])},
        {"index": torch.tensor([3, 0]), "value": torch.tensor([[30], [0]])},  # padding of a last batch
    ]
    assert in_dataset_order(batches, 4)["value"].flatten().tolist() == [0, 10, 20, 30]


def test_a_sample_that_was_not_evaluated_is_an_error():
    batches = [{"index": torch.tensor([0, 2]), "value": torch.zeros(2)}]
    with pytest.raises(RuntimeError, match=r"2 of 4 samples were not evaluated, first \[1, 3\]"):
        in_dataset_order(batches, 4)
