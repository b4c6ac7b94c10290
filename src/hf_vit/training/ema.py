"""A moving average of a model's weights."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn


class ExponentialMovingAverage:
    """The average of the trainable weights: average <- d * average + (1 - d) * weights, after every step.

    d is the smaller of `decay` and (1 + step) / (10 + step), so that the first steps soon have no weight.

    Args:
        decay: In (0, 1).
    Source: TensorFlow, tf.train.ExponentialMovingAverage with num_updates.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.averages = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the weights as they are after optimizer step number `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, average in self.averages.items():
            average.lerp_(self._weights[name], 1 - decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """Exchange the averages and the model's weights."""
        for name, average in self.averages.items():
            weight = self._weights[name]
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)

    @contextmanager
    def in_model(self) -> Generator[None]:
        """Yield with the averages as the model's weights; exchange them back afterwards."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()
