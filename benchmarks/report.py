"""Goals met or not, as a table, and a picture of how many times faster ours is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sections import Cell


@dataclass(frozen=True)
class Goal:
    """A ratio to reach, and in which cells.

    Attributes:
        ours: Which of our contenders is compared.
        others: With the fastest of these.
        cells: Which cells count.
        least: The ratio; how many times faster ours is to be.
    """

    text: str
    ours: str
    others: tuple[str, ...]
    cells: Callable[[Cell], bool]
    least: float


def _inference(*words: str) -> Callable[[Cell], bool]:
    return lambda cell: cell.section == "inference" and all(f" {word} " in f" {cell.task} " for word in words)


TORCH = ("transformers", "timm")
GOALS = (
    Goal("prepared, f32, batch 8, over transformers and timm", "prepared", TORCH, _inference("f32", "batch 8"), 1.6),
    Goal("prepared, f32, batch 1, over transformers and timm", "prepared", TORCH, _inference("f32", "batch 1"), 1.4),
    Goal("prepared, f32, batch 8, over OpenVINO", "prepared", ("openvino",), _inference("f32", "batch 8"), 1.2),
    Goal("prepared, f32, batch 1, over OpenVINO", "prepared", ("openvino",), _inference("f32", "batch 1"), 1.0),
    Goal("prepared, bf16, over transformers and timm", "prepared", TORCH, _inference("bf16"), 1.35),
    Goal("prepared, bf16, batch 8, over OpenVINO", "prepared", ("openvino",), _inference("bf16", "batch 8"), 1.05),
    Goal("prepared, bf16, batch 1, over OpenVINO", "prepared", ("openvino",), _inference("bf16", "batch 1"), 1.15),
    Goal("prepared, int8, over OpenVINO", "prepared", ("openvino",), _inference("int8"), 1.0),
    Goal("plain, f32, over transformers and timm", "plain", TORCH, _inference("f32"), 1.05),
    Goal("training step, f32", "hf-vit", TORCH, lambda c: c.section == "training" and "f32" in c.task, 1.2),
    Goal("training step, bf16", "hf-vit", TORCH, lambda c: c.section == "training" and "bf16" in c.task, 1.15),
    Goal("JPEG to input, over transformers", "hf-vit", ("transformers",), lambda c: c.section == "pictures", 2.0),
    Goal("from_pretrained, over transformers", "hf-vit", TORCH, lambda c: c.section == "loading", 1 / 0.7),
    Goal("conversion, over a copy", "hf-vit", ("copy of the file",), lambda c: c.section == "conversion", 1 / 2.5),
)


def goals_table(cells: list[Cell]) -> str:
    """Return one line a goal and cell: the ratio reached and whether it is met."""
    lines = [f"{'goal':55} {'cell':40} {'reached':>8} {'goal':>6}"]
    for goal in GOALS:
        for cell in filter(goal.cells, cells):
            others = [name for name in goal.others if name in cell.times]
            if goal.ours not in cell.times or not others:
                continue
            reached = min(cell.gain(name, goal.ours) for name in others)
            met = "met" if reached >= goal.least else "NOT met"
            lines.append(f"{goal.text:55} {cell.task:40} {reached:7.2f}x {goal.least:5.2f}x {met}")
    return "\n".join(lines)


def draw(cells: list[Cell], path: Path) -> None:
    """Draw, for each cell, how many times faster ours is than each other contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for cell in cells for name in list(cell.times)[1:]))
    names = [name for name in names if name not in ("prepared", "decoding alone", "copy of the file")]
    rows = [(cell, "prepared" if "prepared" in cell.times else next(iter(cell.times))) for cell in cells]
    rows = [(cell, ours) for cell, ours in rows if any(name in cell.times for name in names)][::-1]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.42 * len(rows)), layout="constrained")
    height = 0.8 / max(len(names), 1)
    for k, name in enumerate(names):
        places = [i for i, (cell, _) in enumerate(rows) if name in cell.times]
        gains = [rows[i][0].gain(name, rows[i][1]) for i in places]
        axes.barh([i + 0.4 - (k + 0.5) * height for i in places], gains, height, label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{cell.section}: {cell.task}" for cell, _ in rows], fontsize=8)
    axes.set_xlabel("how many times faster hf-vit is (1 = as fast)")
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
