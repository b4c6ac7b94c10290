"""What must never go wrong: every row tested at full depth, and the table of ours beside the incumbents'.

    python benchmarks/reliability.py [--only R03 W07] [--markdown] [--json FILE]

A row passes if it has tests, all of them pass, and no figure is above its bound. The exit status is 0 only if every
row passes. The incumbents' figures and their source are in `reliability.toml`; ours are measured now.
"""

import argparse
import json
import os
import sys
import textwrap
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


ROOT = Path(__file__).parents[1]
MINUTES = 20
WIDTHS = {"id": 3, "area": 8, "check": 34, "incumbent, measured": 38, "ours, measured now": 44, "": 4}


@dataclass
class Row:
    """One promise and what was found of it."""

    id: str
    area: str
    check: str
    incumbent: str
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    figures: dict[str, tuple[Any, float | None]] = field(default_factory=dict)  # name -> worst value, its bound

    def add_figure(self, name: str, value: Any, bound: float | None) -> None:
        """Take in a figure; of numbers the largest is kept."""
        known = self.figures.get(name)
        if known is None or isinstance(value, str) or value > known[0]:
            self.figures[name] = (value, bound)

    @property
    def passes(self) -> bool:
        within = (bound is None or value <= bound for value, bound in self.figures.values())
        return self.passed > 0 and not self.failed and all(within)

    @property
    def ours(self) -> str:
        shown = [f"{name} {_shown(value)}{_limit(bound)}" for name, (value, bound) in self.figures.items()]
        tests = f"{self.passed} of {self.passed + len(self.failed)} tests pass"
        return "; ".join([*shown, tests if self.passed or self.failed else "NO TEST"])


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.3g}" if isinstance(value, float) else f"{value:,}"


def _limit(bound: float | None) -> str:
    return "" if bound is None else f" (at most {bound:g})"


class Collector:
    """A plugin of pytest that puts every outcome and figure into its row."""

    def __init__(self, rows: dict[str, Row]):
        self.rows = rows

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and not report.failed:
            return
        properties = report.user_properties
        for row in (self.rows[str(value)] for name, value in properties if name == "row"):
            if report.failed:
                row.failed.append(report.nodeid)
            else:
                row.passed += 1
            for name, value in properties:
                if name == "figure":
                    row.add_figure(*value)  # ty: ignore[not-iterable]


def measure(rows: dict[str, Row], *, processes: int) -> int:
    """Run the tests behind `rows`; pytest shows the progress. Returns pytest's exit status."""
    os.environ["HF_VIT_RELIABILITY"] = "full"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    chosen = " or ".join(f"reliability(row={name!r})" for name in rows)
    arguments = ["-q", "-n", str(processes), "-o", "addopts=", "-m", chosen, "--durations=5", str(ROOT / "tests")]
    return int(pytest.main(["--rootdir", str(ROOT), *arguments], plugins=[Collector(rows)]))


def table(rows: dict[str, Row]) -> str:
    """The rows as text in columns."""
    lines = []
    for cells in [list(WIDTHS), *([*_cells(row)] for row in rows.values())]:
        parts = [textwrap.wrap(cell, width) or [""] for cell, width in zip(cells, WIDTHS.values(), strict=True)]
        for number in range(max(map(len, parts))):
            texts = [part[number] if number < len(part) else "" for part in parts]
            line = "  ".join(f"{text:<{width}}" for text, width in zip(texts, WIDTHS.values(), strict=True))
            lines.append(line.rstrip())
        lines.append("-" * (sum(WIDTHS.values()) + 2 * len(WIDTHS) - 2))
    return "\n".join(lines)


def markdown(rows: dict[str, Row]) -> str:
    """The rows as a table in Markdown."""
    lines = ["| " + " | ".join(WIDTHS) + " |", "|---" * len(WIDTHS) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(_cells(row)) + " |" for row in rows.values())])


def _cells(row: Row) -> tuple[str, ...]:
    return row.id, row.area, row.check, row.incumbent, row.ours, "pass" if row.passes else "FAIL"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="ID", help="rows to measure; all of them otherwise")
    parser.add_argument("--processes", type=int, default=2, help="tests that run at a time")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    described = tomllib.loads((ROOT / "benchmarks" / "reliability.toml").read_text(encoding="utf-8"))
    unknown = set(arguments.only or ()) - set(described)
    if unknown:
        parser.error(f"no rows {', '.join(sorted(unknown))}; expected some of {', '.join(described)}")
    rows = {name: Row(name, **described[name]) for name in arguments.only or described}
    if arguments.only is None:
        print(f"{len(rows)} rows at full depth: about {MINUTES} minutes on two cores")
    start = time.monotonic()
    status = measure(rows, processes=arguments.processes)
    print((markdown if arguments.markdown else table)(rows))
    failing = [row.id for row in rows.values() if not row.passes]
    verdict = f"{len(rows) - len(failing)} of {len(rows)} rows pass"
    print(f"{verdict}{': not ' + ', '.join(failing) if failing else ''} ({time.monotonic() - start:.0f} s)")
    if arguments.json is not None:
        found = {row.id: {"passes": row.passes, "ours": row.ours, "figures": row.figures} for row in rows.values()}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return int(bool(failing) or status != 0)


if __name__ == "__main__":
    sys.exit(main())
