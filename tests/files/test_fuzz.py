"""Mutated files: nothing but the one error escapes, and what is accepted is finite and round-trips."""

import pytest
from fuzz import fuzz_containers, fuzz_loader
from measuring import depth


@pytest.mark.reliability(row="W07")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("fuzz", "what", "number", "refused"),
    [(fuzz_containers, "arrays", (1_000, 35_000), 1 / 2), (fuzz_loader, "loader", (200, 16_000), 1 / 3)],
    ids=["arrays", "loader"],
)
def test_fuzzing_finds_nothing_but_checkpoint_errors_and_round_trips(fuzz, what, number, refused, seed, figure):
    inputs = depth(*number)
    findings = fuzz.run(inputs=inputs, seed=seed)
    assert findings.failures == []
    assert findings.outcomes["accepted"] > inputs / 20
    assert findings.outcomes["refused"] > inputs * refused
    figure(f"{what}, seed {seed}", f"{inputs:,} inputs, 1 kind of error, {findings.outcomes['accepted']:,} accepted")
    figure("slowest, seconds", findings.slowest, at_most=1.0)
