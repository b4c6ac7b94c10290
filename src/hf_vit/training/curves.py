"""Training curves: loss, held-out accuracy, learning rate, norm of the gradients."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


_PANELS = (
    ("loss", {"loss": "training", "eval_loss": "held out"}),
    ("accuracy", {"eval_accuracy": "top-1, held out"}),
    ("learning rate of the head", {"learning_rate": None}),
    ("norm of the gradients", {"grad_norm": None}),
)


def draw_curves(history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw the log of a training against its steps; panels without entries are left out.

    Args:
        history: Trainer's log, entries with `step` and some of `loss`, `eval_loss`, `eval_accuracy`, ...
    """
    from matplotlib.figure import Figure

    curves = {
        title: {label: points for name, label in lines.items() if (points := _points(history, name))}
        for title, lines in _PANELS
    }
    curves = {title: lines for title, lines in curves.items() if lines}
    columns = min(len(curves), 2) or 1
    rows = -(-len(curves) // columns) or 1
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    last = max((entry["step"] for entry in history), default=1)
    for index, (title, lines) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(rows, columns, index)
        for label, points in lines.items():
            marker = "o" if len(points) < 50 else None
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3)
        axes.set(title=title, xlabel="optimizer step", xlim=(0, 1.03 * last))
        axes.grid(alpha=0.3)
        if any(lines):
            axes.legend()
    figure.savefig(path, format="png", dpi=120)


def _points(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[name]) for entry in history if name in entry]
