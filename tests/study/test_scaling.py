"""Efficiencies and laws against closed forms and simulated trainings."""

from pathlib import Path

import numpy as np
import pytest
import simulated
from accounts import account_of
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import MS, Network, asleep

from pneumo.study.explain import Explainer
from pneumo.study.results import load_run
from pneumo.study.scaling import fit, pop, speedups


def test_pop_of_an_even_training_loses_by_communication_only(tmp_path: Path) -> None:
    account = account_of(simulated.study(tmp_path, 4, style="fsdp", network=Network(0, 5 * MS)))
    found = pop(account)
    assert found is not None
    compute = sum(simulated.WHOLE.values()) / 4 / MS
    assert found.load_balance == pytest.approx(1)
    assert found.communication_efficiency == pytest.approx(compute / (compute + 10))
    assert found.computation_scalability == pytest.approx(1)
    lost, whole = account.total("lost"), account.whole_s
    assert lost is not None
    assert found.global_efficiency == pytest.approx(1 - lost / whole)
    assert found.transfer_efficiency is None


def test_pop_tells_imbalance_from_transfer_and_from_more_work(tmp_path: Path) -> None:
    def extra(rank: int, _step: int, phase: str) -> simulated.Cost | None:
        if phase != "forward":
            return None
        return asleep(20 * MS) if rank == 1 else (5 * MS, 5 * MS, 0)

    path = simulated.study(tmp_path, 2, extra=extra, style="fsdp", network=Network(0, 5 * MS))
    file = load_run(path)
    account = Explainer(path, file, {0: 0, 1: 0}, replay=True).account(file.runs[1])
    assert account is not None
    found = pop(account)
    assert found is not None
    own = np.array([101 / 2 + 5, 101 / 2 + 20])  # ms a step of either rank
    assert found.load_balance == pytest.approx(own.mean() / own.max())
    assert found.communication_efficiency == pytest.approx(own.max() / (own.max() + 10))
    assert found.computation_scalability == pytest.approx(101 / own.sum())
    assert found.transfer_efficiency == pytest.approx(own.max() / (own.max() + 10))
    assert found.serialisation_efficiency == pytest.approx(1)


@given(st.floats(0.01, 0.6))
@settings(deadline=None)
def test_amdahl_is_found_again(serial: float) -> None:
    found = fit("Amdahl", {n: 1 / (serial + (1 - serial) / n) for n in (1, 2, 4, 8)}, cores=8)
    fraction = found.parameters["serial fraction"]
    assert fraction.value == pytest.approx(serial, rel=1e-4)
    assert fraction.low is not None
    assert fraction.high is not None
    assert fraction.low <= fraction.value <= fraction.high
    assert found.speedup(16) == pytest.approx(1 / (serial + (1 - serial) / 16), rel=1e-3)


@given(st.floats(0.01, 0.3), st.floats(0.001, 0.05))
@settings(deadline=None)
def test_usl_is_found_again(contention: float, coherency: float) -> None:
    points = {n: n / (1 + contention * (n - 1) + coherency * n * (n - 1)) for n in (2, 4, 8, 16)}
    found = fit("USL", points, cores=16)
    assert found.parameters["contention"].value == pytest.approx(contention, rel=1e-2, abs=1e-3)
    assert found.parameters["coherency"].value == pytest.approx(coherency, rel=1e-2, abs=1e-4)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, serial, n, hits = np.random.default_rng(0), 0.2, np.array([2, 4, 8, 16]), 0
    for _ in range(300):
        noisy = 1 / (serial + (1 - serial) / n) * np.exp(rng.normal(0, 0.03, n.size))
        fraction = fit("Amdahl", dict(zip(n.tolist(), noisy.tolist(), strict=True)), cores=16).parameters[
            "serial fraction"
        ]
        assert fraction.low is not None
        assert fraction.high is not None
        hits += fraction.low <= serial <= fraction.high
    assert 0.91 <= hits / 300 <= 0.99


def test_too_few_points_are_said() -> None:
    assert fit("USL", {1: 1.0, 2: 1.8}, cores=8).parameters == {}
    assert "cannot give them" in fit("USL", {1: 1.0, 2: 1.8}, cores=8).cannot_tell[0]
    exact = fit("Amdahl", {2: 1.8}, cores=8)
    assert exact.parameters["serial fraction"].low is None
    assert "nothing is left to check it by" in exact.cannot_tell[0]


def test_more_ranks_than_cores_are_said() -> None:
    said = " ".join(fit("Amdahl", {2: 1.8, 4: 1.9, 8: 1.9}, cores=2).cannot_tell)
    assert "At 4, 8 ranks on 2 cores" in said


@given(st.dictionaries(st.sampled_from([2, 4, 8, 16]), st.floats(0.05, 40), min_size=1))
@settings(deadline=None)
def test_no_limit_leaves_its_parameters_domain(points: dict[int, float]) -> None:
    for law, most in (("Amdahl", {"serial fraction": 1}), ("USL", {"contention": 1, "coherency": np.inf})):
        for name, p in fit(law, points, cores=16).parameters.items():
            assert 0 <= p.value <= most[name]
            if p.low is not None and p.high is not None:
                assert 0 <= p.low <= p.value <= p.high <= most[name]


def test_a_law_at_its_limit_does_not_pass_for_a_fit() -> None:
    """Amdahl's law gives no speedup below 1: at 0.52 the nearest is 1, 92 % above it."""
    slower = fit("Amdahl", {2: 0.52}, cores=2)
    said = " ".join(slower.cannot_tell)
    assert slower.parameters["serial fraction"].value == pytest.approx(1)
    assert "at its limit of 1: slower than serial, which Amdahl cannot describe" in said
    assert "misses its 1 point by up to 92 %" in said
    assert "exactly" not in said
    faster = " ".join(fit("Amdahl", {2: 2.5}, cores=2).cannot_tell)
    assert "at its limit of 0." in faster
    assert "misses its 1 point by up to 25 %" in faster


@pytest.mark.parametrize(("blocks", "kind"), [(6, "interval"), (2, "range")])
def test_blocks_give_limits_where_one_point_leaves_no_freedom(blocks: int, kind: str) -> None:
    fractions = np.linspace(0.1, 0.3, blocks)
    by_block = {2: {i: 1 / (f + (1 - f) / 2) for i, f in enumerate(fractions.tolist())}}
    found = fit("Amdahl", {2: 1 / (0.2 + 0.8 / 2)}, cores=2, blocks=by_block)
    p = found.parameters["serial fraction"]
    # Of 6 blocks the exact signed-rank interval leaves out no pair's mean.
    assert (p.value, p.low, p.high) == pytest.approx((0.2, 0.1, 0.3))
    assert found.limits == kind
    alone = fit("Amdahl", {2: 1.5}, cores=2, blocks={2: {0: 1.5}})
    assert (alone.limits, alone.parameters["serial fraction"].low) == (None, None)


def test_speedups_of_blocks_are_ratios_of_lengths(tmp_path: Path) -> None:
    def extra(rank: int, step: int, phase: str) -> simulated.Cost | None:
        return asleep(10 * MS) if (rank, phase) == (1, "forward") and step >= 4 else None

    account = account_of(simulated.study(tmp_path, 2, extra=extra, style="fsdp", network=Network(0, 5 * MS)))
    assert speedups(account) == pytest.approx({1: 101 / (101 / 2 + 10), 2: 101 / (101 / 2 + 20)})
