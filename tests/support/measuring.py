"""How deep tests go, and what code costs that runs in a process of its own."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any


IS_FULL = os.environ.get("HF_VIT_RELIABILITY") == "full"

_PRELUDE = """
import json, resource, sys, time, warnings
sys.path.insert(0, {tests!r})
from pathlib import Path

def peak_reset():
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here

def megabytes(name="VmHWM"):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

class Costs:
    def __enter__(self):
        peak_reset()
        self.before, self.start = megabytes("VmRSS"), time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.start
        self.megabytes = max(megabytes() - self.before, 0.0)
"""


def depth(short: int, full: int) -> int:
    """Returns `full` under `make reliability`, else `short`."""
    return full if IS_FULL else short


def run_alone(code: str, *arguments: Any, **fields: Any) -> Any:
    """Runs `code` in a process of its own; returns what it passed to `answer`.

    The code has `Costs`, a context whose `seconds` and `megabytes` (growth to the peak) can be read after it, the
    arguments in `sys.argv[1:]` and the `fields` by their names.
    """
    prelude = textwrap.dedent(_PRELUDE).format(tests=str(Path(__file__).parent))
    prelude += "".join(f"{name} = {value!r}\n" for name, value in fields.items())
    prelude += "def answer(value):\n    print('ANSWER' + json.dumps(value), flush=True)\n"
    command = [sys.executable, "-c", prelude + textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert done.returncode == 0, done.stderr[-3000:]
    assert lines, done.stdout[-1000:]
    return json.loads(lines[-1].removeprefix("ANSWER"))
