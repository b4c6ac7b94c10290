"""Metrics against scikit-learn or a computation by hand, and predictions gathered to the last sample."""

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    mean_absolute_error,
    r2_score,
    top_k_accuracy_score,
)

import hf_vit.evaluation
from hf_vit.evaluation import (
    ClassificationMetrics,
    compute_metrics,
    metrics_for,
    per_class_accuracy,
    per_class_average_precision,
    summarize_logits,
)
from hf_vit.evaluation.metrics import calibration_error
from hf_vit.evaluation.prediction import in_dataset_order


def test_every_public_name_is_one_of_the_package():
    for name in hf_vit.evaluation.__all__:
        value = getattr(hf_vit.evaluation, name)
        assert getattr(value, "__module__", "hf_vit.evaluation").startswith("hf_vit.evaluation"), name
    assert hf_vit.evaluation.evaluate.__module__ == "hf_vit.evaluation.prediction"  # not the library of that name


def sharp_logits(samples=200, classes=12):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(samples, classes, generator=generator)
    labels = torch.randint(classes, (samples,), generator=generator)
    logits[torch.arange(samples), labels] += 1.5
    return logits, labels


def scores(problem_type, logits, labels):
    metrics = metrics_for(problem_type)
    summary = metrics.summarize(logits, labels)
    arrays = tuple(part.numpy() for part in summary) if isinstance(summary, tuple) else summary.numpy()
    return metrics.compute((arrays, labels.numpy()))


@pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
def test_single_label_scores_equal_scikit_learn(problem_type):
    logits, labels = sharp_logits()
    found = scores(problem_type, logits, labels)
    predicted = logits.argmax(1)
    assert found["accuracy"] == pytest.approx(top_k_accuracy_score(labels, logits, k=1), abs=1e-12)
    assert found["top5_accuracy"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5), abs=1e-12)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted), abs=1e-12)
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"), abs=1e-12)


def test_balanced_accuracy_ignores_classes_without_images():
    logits, labels = sharp_logits()
    few = labels < 3  # the logits still choose among 12 classes
    expected = np.mean([(logits[labels == c].argmax(1) == c).double().mean() for c in range(3)])
    assert scores(None, logits[few], labels[few])["balanced_accuracy"] == pytest.approx(float(expected))


@pytest.mark.parametrize(("classes", "has_top5"), [(2, False), (5, False), (6, True)])
def test_top5_is_reported_only_where_there_are_more_than_five_classes(classes, has_top5):
    assert ("top5_accuracy" in scores(None, *sharp_logits(classes=classes))) == has_top5


def test_multi_label_scores_equal_scikit_learn_and_skip_classes_without_images():
    logits, _ = sharp_logits(classes=4)
    labels = (torch.rand(200, 4, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    labels[:, 2] = 0
    found = scores("multi_label_classification", logits, labels)
    probabilities, truth = logits.sigmoid().numpy(), labels.int().numpy()
    precisions = per_class_average_precision(probabilities, labels.numpy())
    assert np.isnan(precisions[2])
    kept = [0, 1, 3]
    assert precisions[kept] == pytest.approx(average_precision_score(truth[:, kept], logits[:, kept], average=None))
    assert found["map"] == pytest.approx(precisions[kept].mean())
    for kind in ("micro", "macro"):  # at a probability of one half, so at a logit of zero
        expected = f1_score(truth, logits.numpy() >= 0, average=kind, zero_division=0)
        assert found[f"{kind}_f1"] == pytest.approx(expected)


def test_regression_scores_equal_scikit_learn_whatever_the_shape_of_the_output():
    values, truth = sharp_logits()[0][:, :1], sharp_logits()[0][:, 1]
    found = scores("regression", values, truth)
    assert found["mae"] == pytest.approx(mean_absolute_error(truth, values), rel=1e-6)
    assert found["mse"] == pytest.approx(float((values[:, 0] - truth).square().mean()), rel=1e-6)
    assert found["r2"] == pytest.approx(r2_score(truth, values), rel=1e-6)
    assert np.isnan(scores("regression", values, torch.ones(200))["r2"])


def test_an_unknown_problem_type_is_refused():
    with pytest.raises(ValueError, match="unknown problem_type 'ranking': expected single_label"):
        metrics_for("ranking")


def test_calibration_error_is_the_sum_over_bins_done_by_hand():
    # two bins of 0.5: |0.3 - 1| * 1/4 and |(0.6 + 0.8 + 0.9) / 3 - 1 / 3| * 3/4
    found = calibration_error(
        np.array([0, 1, 2, 3]), np.array([0, 1, 0, 0]), np.array([0.3, 0.6, 0.8, 0.9]), num_bins=2
    )
    assert found == pytest.approx(0.7 / 4 + (2.3 - 1) / 4)


def test_calibration_uses_the_fifteen_bins_of_guo_et_al():
    # 1/15 < 0.068 < 1/14 and 0.065 < 1/15: one bin with 14 bins or fewer, two with 15; 0.13 and 0.124 part at 16 (1/8)
    pairs = ((0.065, 0.068, True), (0.124, 0.13, False))
    for low, high, is_apart in pairs:
        found = calibration_error(np.array([0, 0]), np.array([0, 1]), np.array([low, high]))
        together = abs((low - 1) + high) / 2
        apart = (abs(low - 1) + high) / 2
        assert found == pytest.approx(apart if is_apart else together)


def test_confidence_one_falls_into_the_last_bin_and_a_perfect_model_has_no_error():
    assert calibration_error(np.array([0, 1]), np.array([0, 1]), np.array([1.0, 1.0])) == 0


def test_a_confidence_between_two_bins_belongs_to_the_lower_one():
    found = calibration_error(np.array([0, 1]), np.array([0, 0]), np.array([0.4, 0.5]), num_bins=2)
    assert found == pytest.approx(abs(0.4 + 0.5 - 1) / 2)


def test_a_class_without_images_has_no_accuracy():
    found = per_class_accuracy(np.array([0, 1, 1]), np.array([0, 0, 1]), 3)
    np.testing.assert_array_equal(found, [0.5, 1.0, np.nan])


def test_batches_added_one_by_one_give_the_same_metrics():
    logits, labels = sharp_logits()
    ranked, confidences = summarize_logits(logits)
    metric = ClassificationMetrics()
    for rows in torch.arange(200).split(64):
        metric.add_batch(predictions=ranked[rows], confidences=confidences[rows], references=labels[rows])
    assert metric.compute() == compute_metrics(((ranked, confidences), labels))


def test_ties_go_to_the_first_class():
    ranked, confidences = summarize_logits(torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 0.0]]))
    assert ranked.tolist() == [[0], [1]]
    torch.testing.assert_close(confidences, torch.tensor([1 / 3, torch.e**2 / (torch.e**2 + 2)]))
    assert summarize_logits(torch.zeros(1, 7))[0].tolist() == [[0, 1, 2, 3, 4]]


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
