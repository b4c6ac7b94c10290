"""Ours beside what one would pick instead, in one run: the same weights, the same pixels, one measurement in turn.

python benchmarks/run.py [--full true] [--sections inference training pictures loading conversion import]

transformers and timm run in torch; onnxruntime and OpenVINO are measured where they are installed. Outputs are
compared before anything is timed. Only ratios within a run mean anything: the machine may be busy, and every figure is
a median over rounds in which each library ran once. The table, figures and a picture go to `benchmarks/results/`, the
first two after every cell.
"""

import datetime
import json
import sys
from dataclasses import dataclass, field
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any, cast

import torch
from measure import machine, matrix_rate
from peers import missing
from report import draw, goals_table
from sections import SECTIONS
from transformers import HfArgumentParser
from transformers.utils import logging


@dataclass
class BenchArguments:
    """What is measured."""

    sections: list[str] = field(
        default_factory=lambda: list(SECTIONS), metadata={"help": f"Among {', '.join(SECTIONS)}."}
    )
    full: bool = field(default=False, metadata={"help": "Every model, size and thread count: an hour, not minutes."})
    rounds: int = field(default=7, metadata={"help": "Measurements of each library."})
    output_dir: str = field(
        default=str(Path(__file__).parent / "results"), metadata={"help": "Where table, figures and picture go."}
    )


def main(argv: list[str]) -> int:
    parser = HfArgumentParser(cast(Any, BenchArguments), description=(__doc__ or "").splitlines()[0])
    args: Any = parser.parse_args_into_dataclasses(argv)[0]
    unknown = [name for name in args.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"--sections: unknown {', '.join(unknown)}; expected some of {', '.join(SECTIONS)}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("hf_vit").setLevel(ERROR)
    cores = torch.get_num_threads()
    report = {"machine": machine(), "gflops": {n: round(matrix_rate(n)) for n in sorted({1, cores})}, "cells": []}
    print(json.dumps(report["machine"]))
    print(f"float32 products reach {report['gflops']} GFLOP/s on as many cores")
    if missing():
        print(f"not installed, so not measured: {', '.join(missing())} (pip install {' '.join(missing())})")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    length = "-full" if args.full else ""
    stem = folder / f"{datetime.date.today()}-{report['machine']['processor'].replace(' ', '-')}{length}"
    for name in args.sections:
        for cell in SECTIONS[name](args.rounds, full=args.full):
            print(cell.line(), flush=True)
            report["cells"].append(cell)
            write(report, stem)  # a long run may be left
    print(goals_table(report["cells"]))
    draw(report["cells"], stem.with_suffix(".png"))
    print(f"written: {stem}.json, .txt, .png")
    return 0


def write(report: dict[str, Any], stem: Path) -> None:
    """Write the figures so far as `stem`.json and, for reading, .txt."""
    figures = {**report, "cells": [cell.as_dict() for cell in report["cells"]]}
    stem.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    lines = [json.dumps(report["machine"]), f"GFLOP/s: {report['gflops']}", ""]
    lines += [*(cell.line() for cell in report["cells"]), "", goals_table(report["cells"]), ""]
    stem.with_suffix(".txt").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
