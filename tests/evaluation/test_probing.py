"""Closed forms against plain solvers, and features read from a model."""

import inspect

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from hf_vit import HfViTConfig, HfViTForImageClassification, HfViTModel
from hf_vit.evaluation.probing import (
    BIAS_CONSTANT,
    L2_GRID,
    REFERENCE_L2,
    LeastSquaresProbe,
    extract_features,
    pick_shots,
    predict_linear,
    predict_nearest,
)


@pytest.fixture(scope="module")
def digits():
    """Pixels of 1,200 digits to learn from and 597 to test on."""
    features, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    features = features.float()
    return features[:1200], labels[:1200], features[1200:], labels[1200:]


def ridge(features, labels, test, l2, num_classes):
    """Predictions and left-hand sides by the normal equations, solved directly."""
    mean, std = features.mean(0), features.std(0) + 1e-5
    inputs = np.pad((features - mean) / std, ((0, 0), (0, 1)), constant_values=BIAS_CONSTANT)
    targets = 2 * np.eye(num_classes)[labels] - 1
    weights = np.linalg.solve(inputs.T @ inputs + l2 * np.eye(inputs.shape[1]), inputs.T @ targets)
    return (np.pad((test - mean) / std, ((0, 0), (0, 1)), constant_values=BIAS_CONSTANT) @ weights).argmax(1)


@pytest.mark.parametrize("shots", [4, 20])  # fewer samples than features, and more
@pytest.mark.parametrize("l2", [2.0**-4, 2.0**10])
def test_the_decomposed_probe_is_ridge_regression(digits, shots, l2):
    train, labels, test, _ = digits
    rows = pick_shots(labels, shots=shots, seed=0)
    expected = ridge(train[rows].double().numpy(), labels[rows].numpy(), test.double().numpy(), l2, 10)
    np.testing.assert_array_equal(LeastSquaresProbe(train[rows], labels[rows]).predict(test, l2=l2), expected)


@pytest.mark.parametrize("shots", [3, 12])
def test_leaving_one_out_in_closed_form_is_leaving_one_out(digits, shots):
    train, labels, _, _ = digits
    rows = pick_shots(labels, shots=shots, seed=0)
    probe, l2 = LeastSquaresProbe(train[rows], labels[rows]), 64.0
    inputs, targets = probe.inputs.numpy(), probe.targets.numpy()  # whitened once, as in the closed form
    hits = []
    for left_out in range(len(rows)):
        kept = np.arange(len(rows)) != left_out
        gram = inputs[kept].T @ inputs[kept] + l2 * np.eye(inputs.shape[1])
        weights = np.linalg.solve(gram, inputs[kept].T @ targets[kept])
        hits.append((inputs[left_out] @ weights).argmax() == labels[rows][left_out])
    assert float(probe._left_out_accuracy(l2)) == pytest.approx(np.mean(hits))


def test_the_selected_strength_is_in_the_grid_and_beats_no_regularisation(digits):
    train, labels, test, test_labels = digits
    rows = pick_shots(labels, shots=5, seed=0)
    probe = LeastSquaresProbe(train[rows], labels[rows])
    l2 = probe.select_l2()
    assert l2 in L2_GRID
    chosen, unregularised = ((probe.predict(test, l2=value) == test_labels).float().mean() for value in (l2, 1e-12))
    assert chosen > unregularised + 0.02
    assert chosen > 0.7


def test_shots_are_drawn_per_class_are_nested_and_depend_on_the_seed(digits):
    _, labels, _, _ = digits
    five, ten, other = (pick_shots(labels, shots=shots, seed=seed) for shots, seed in ((5, 0), (10, 0), (5, 1)))
    assert torch.bincount(labels[five]).tolist() == [5] * 10
    assert set(five.tolist()) < set(ten.tolist())
    assert set(five.tolist()) != set(other.tolist())
    with pytest.raises(ValueError, match="class 0 has 3 training samples, expected at least 4"):
        pick_shots(torch.tensor([0, 0, 0, 1]), shots=4, seed=0)


def test_the_defaults_are_those_of_the_sources():
    # DINO (Caron et al. 2021), appendix F; big_vision/evaluators/fewshot_lsr.py, l2_reg and bias_constant (1475d53)
    defaults = inspect.signature(predict_nearest).parameters
    assert (defaults["num_neighbors"].default, defaults["temperature"].default) == (20, 0.07)
    assert (REFERENCE_L2, BIAS_CONSTANT) == (1024.0, 100.0)
    assert inspect.signature(LeastSquaresProbe.predict).parameters["l2"].default == 1024.0
    assert (min(L2_GRID), max(L2_GRID), len(L2_GRID)) == (2.0**-10, 2.0**20, 31)


def test_the_vote_of_neighbours_equals_scikit_learn(digits):
    train, labels, test, _ = digits
    neighbors = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    expected = neighbors.fit(train.numpy(), labels.numpy()).predict(test.numpy())
    agreement = (predict_nearest(train, labels, test).numpy() == expected).mean()
    assert agreement > 0.99  # equal but for ties in float32
    assert np.array_equal(predict_nearest(train, labels, train, num_neighbors=1), labels)


def test_the_linear_probe_equals_scikit_learns_logistic_regression(digits):
    train, labels, test, test_labels = digits
    train, labels = train[:300], labels[:300]
    predictions = predict_linear(train, labels, test, l2_values=[1e-2])
    mean, std = train.mean(0), train.std(0, correction=0) + 1e-5
    reference = LogisticRegression(C=1 / (1e-2 * len(train)), max_iter=500, tol=1e-6)
    expected = reference.fit(((train - mean) / std).numpy(), labels.numpy()).predict(((test - mean) / std).numpy())
    assert (predictions.numpy() == expected).mean() > 0.995  # equal but for where the two solvers stop
    assert (predictions == test_labels).float().mean() > 0.85


def test_the_linear_probe_picks_the_strength_that_generalises(digits):
    train, labels, test, _ = digits
    chosen = predict_linear(train[:300], labels[:300], test, l2_values=[1e-2, 100.0])
    assert torch.equal(chosen, predict_linear(train[:300], labels[:300], test, l2_values=[1e-2]))


# --- features ---

TINY = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
}


def batches():
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(size, 3, 8, 8, generator=generator), "labels": torch.arange(size)}
        for size in (3, 2)
    ]


def test_features_are_the_pooled_output_with_and_without_a_head():
    torch.manual_seed(0)
    model = HfViTForImageClassification(HfViTConfig(**TINY, num_labels=5, hidden_dropout_prob=0.5)).train()
    features, labels = extract_features(model, batches())
    assert labels.tolist() == [0, 1, 2, 0, 1]
    assert model.vit.training  # left as it was
    model.eval()
    expected = torch.cat([model.vit(pixel_values=batch["pixel_values"]).pooler_output for batch in batches()])
    torch.testing.assert_close(features, expected.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(extract_features(model.vit, batches())[0], features, rtol=0, atol=0)


def test_a_model_that_does_not_pool_is_refused():
    with pytest.raises(ValueError, match="no pooled output"):
        extract_features(HfViTModel(HfViTConfig(**TINY, pooling="none")), batches())
