"""Mutated files: nothing but the one error escapes, and what is accepted is finite and round-trips."""

import pytest
from fuzz import fuzz_containers, fuzz_loader
from measuring import depth


@pytest.mark.reliability(row="W07")
@pytest.mark.parametrize("seed", range(2))
def test_fuzzing_the_reader_of_arrays_finds_nothing_but_checkpoint_errors_and_round_trips(seed, figure):
    inputs = depth(1_000, 35_000)
    findings = fuzz_containers.run(inputs=inputs, seed=seed)
    assert findings.failures == []
    assert findings.outcomes["accepted"] > inputs / 20
    assert findings.outcomes["refused"] > inputs / 2
    figure(f"arrays, seed {seed}", f"{inputs:,} inputs, 1 kind of error, {findings.outcomes['accepted']:,} accepted")
    figure("slowest, seconds", findings.slowest, at_most=1.0)


@pytest.mark.reliability(row="W07")
@pytest.mark.parametrize("seed", range(2))
def test_fuzzing_the_loader_finds_nothing_but_checkpoint_errors_and_round_trips(seed, figure):
    inputs = depth(200, 16_000)
    findings = fuzz_loader.run(inputs=inputs, seed=seed)
    assert findings.failures == []
    assert findings.outcomes["accepted"] > inputs / 20
    assert findings.outcomes["refused"] > inputs / 3
    figure(f"loader, seed {seed}", f"{inputs:,} inputs, 1 kind of error, {findings.outcomes['accepted']:,} accepted")
    figure("slowest, seconds", findings.slowest, at_most=1.0)
