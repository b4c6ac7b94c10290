"""What every test needs: no network, two cores, and the goldens computed by the JAX reference."""

import os
from collections.abc import Callable

import pytest


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several test processes share two cores
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MPLBACKEND", "Agg")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tells reports which rows of `benchmarks/reliability.toml` a test stands behind."""
    for item in items:
        item.user_properties += [("row", mark.kwargs["row"]) for mark in item.iter_markers("reliability")]


@pytest.fixture
def figure(record_property) -> Callable[..., None]:
    """Notes a figure for the table of `make reliability`: figure("MB", 3.1, at_most=50) or figure("kills", "50/50").

    Bounds are judged there, and not by the test: a time limit in a test fails on a busy machine.
    """

    def note(name: str, value: float | str, *, at_most: float | None = None) -> None:
        record_property("figure", (name, value, at_most))

    return note
