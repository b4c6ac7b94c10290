"""Measuring in turn: every contender once a round, ratios within a round, so that a busy machine hits all alike."""

import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


_PAUSE = 0.05  # seconds


class Timing(NamedTuple):
    """Seconds of every counted round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a share of the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def in_turn(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Return the time of each contender over `rounds` rounds, after one that is not counted.

    Every other round goes backwards, and each starts after a pause: the threads of some libraries go on spinning for a
    while after a run, at the expense of whoever comes next.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name, run in list(contenders.items())[:: 1 if i % 2 else -1]:
            time.sleep(_PAUSE)
            start = clock()
            run()
            if i:
                times[name].append(clock() - start)
    return {name: Timing(seconds) for name, seconds in times.items()}


def ratio(slower: Timing, faster: Timing) -> float:
    """Return how many times faster the second is: the median over rounds."""
    return statistics.median(a / b for a, b in zip(slower.seconds, faster.seconds, strict=True))


class Finished(NamedTuple):
    """A program that ran by itself: its CPU seconds, and the figures of its lines `name N`."""

    seconds: float
    figures: dict[str, float]


def of_process(code: str, *arguments: str) -> Finished:
    """Run a Python program by itself."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = (line.split() for line in done.stdout.splitlines())
    return Finished(seconds, {line[0]: float(line[1]) for line in lines if len(line) == 2})


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    import torch
    import transformers

    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    capabilities = {"vnni": torch.cpu._is_vnni_supported(), "bf16": torch.cpu._is_avx512_bf16_supported()}
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "extras": [name for name, there in capabilities.items() if there],
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def matrix_rate(threads: int) -> float:
    """Return the best GFLOP/s of float32 products of a ViT-B's shape, by torch's linear layer."""
    import torch

    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows, linear = torch.randn(1576, 768), torch.nn.Linear(768, 3072)
    with torch.inference_mode():
        timings = in_turn({"linear": lambda: linear(rows)}, 15)
        best = min(min(timing.seconds) for timing in timings.values())
    torch.set_num_threads(threads_before)
    return 2 * 1576 * 768 * 3072 / best / 1e9


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
