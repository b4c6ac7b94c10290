"""Goals met or not, as a table, and a picture of how many times faster ours is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sections import Cell


Measure = Callable[[Cell], float | None]


@dataclass(frozen=True)
class Goal:
    """A figure to reach, and in which cells.

    Attributes:
        cells: Which cells count.
        reached: The figure of a cell; None where the cell has none.
        bound: The figure is to be no smaller; with a `unit` other than x, no larger.
    """

    text: str
    cells: Callable[[Cell], bool]
    reached: Measure
    bound: float
    unit: str = "x"

    def is_met(self, reached: float) -> bool:
        return reached >= self.bound if self.unit == "x" else reached <= self.bound


def _inference(*words: str) -> Callable[[Cell], bool]:
    return lambda cell: cell.section == "inference" and all(f" {word} " in f" {cell.task} " for word in words)


def _section(name: str, word: str = "") -> Callable[[Cell], bool]:
    return lambda cell: cell.section == name and word in cell.task


def _gain(ours: str, *others: str) -> Measure:
    """How many times faster ours is than the fastest of the others."""

    def gain(cell: Cell) -> float | None:
        gains = [cell.gain(name, ours) for name in others if name in cell.times and ours in cell.times]
        return min(gains, default=None)

    return gain


def _memory_share(ours: str, *others: str) -> Measure:
    """The peak of ours as a percentage of the smallest of the others."""

    def share(cell: Cell) -> float | None:
        peaks = [cell.memory[name] for name in others if name in cell.memory and ours in cell.memory]
        return 100 * cell.memory[ours] / min(peaks) if peaks else None

    return share


TORCH = ("transformers", "timm")
NO_RIVALS = ("prepared", "decoding alone", "copy of the file", "hf-vit after transformers")  # measured for scale
GOALS = (
    Goal(
        "prepared, f32, batch 8, over transformers and timm",
        _inference("f32", "batch 8"),
        _gain("prepared", *TORCH),
        1.6,
    ),
    Goal(
        "prepared, f32, batch 1, over transformers and timm",
        _inference("f32", "batch 1"),
        _gain("prepared", *TORCH),
        1.4,
    ),
    Goal("prepared, f32, batch 8, over OpenVINO", _inference("f32", "batch 8"), _gain("prepared", "openvino"), 1.2),
    Goal("prepared, f32, batch 1, over OpenVINO", _inference("f32", "batch 1"), _gain("prepared", "openvino"), 1.0),
    Goal("prepared, bf16, over transformers and timm", _inference("bf16"), _gain("prepared", *TORCH), 1.35),
    Goal("prepared, bf16, batch 8, over OpenVINO", _inference("bf16", "batch 8"), _gain("prepared", "openvino"), 1.05),
    Goal("prepared, bf16, batch 1, over OpenVINO", _inference("bf16", "batch 1"), _gain("prepared", "openvino"), 1.15),
    Goal("prepared, int8, over OpenVINO", _inference("int8"), _gain("prepared", "openvino"), 1.0),
    Goal("plain, f32, over transformers and timm", _inference("f32"), _gain("plain", *TORCH), 1.05),
    Goal("training step, f32", _section("training", "f32"), _gain("hf-vit", *TORCH), 1.2),
    Goal("training step, bf16", _section("training", "bf16"), _gain("hf-vit", *TORCH), 1.15),
    Goal(
        "training step, memory of transformers and timm",
        _section("training"),
        _memory_share("hf-vit", *TORCH),
        100,
        "%",
    ),
    Goal("JPEG to input, over transformers", _section("pictures"), _gain("hf-vit", "transformers"), 2.0),
    Goal(
        "from_pretrained, over transformers",
        _section("loading", "from a local folder"),
        _gain("hf-vit", *TORCH),
        1 / 0.7,
    ),
    Goal("conversion, over a copy", _section("conversion"), _gain("hf-vit", "copy of the file"), 1 / 2.5),
    Goal("conversion, memory", _section("conversion"), lambda cell: cell.memory["hf-vit"], 150, " MB"),
    Goal(
        "import, beyond transformers' own",
        _section("import"),
        lambda cell: 1e3 * cell.times["hf-vit after transformers"].median,
        100,
        " ms",
    ),
)


def goals_table(cells: list[Cell]) -> str:
    """Return one line a goal and cell: the figure reached and whether it is met."""
    lines = [f"{'goal':55} {'cell':40} {'reached':>8} {'goal':>8}"]
    for goal in GOALS:
        for cell in filter(goal.cells, cells):
            reached = goal.reached(cell)
            if reached is not None:
                digits = 2 if goal.unit == "x" else 0
                found, bound = (f"{figure:.{digits}f}{goal.unit}" for figure in (reached, goal.bound))
                met = "met" if goal.is_met(reached) else "NOT met"
                lines.append(f"{goal.text:55} {cell.task:40} {found:>8} {bound:>8} {met}")
    return "\n".join(lines)


def draw(cells: list[Cell], path: Path) -> None:
    """Draw, for each cell, how many times faster ours is than each other contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for cell in cells for name in list(cell.times)[1:]))
    names = [name for name in names if name not in NO_RIVALS]
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
