"""The replay against simulated trainings that really lack the cause which it takes away."""

from pathlib import Path

import pytest
import simulated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated import MS, STYLES, Network, asleep
from test_collectives import costs, extra_of

from pneumo.study.account import Account
from pneumo.study.explain import Explainer
from pneumo.study.replay import SCENARIOS, WhatIf
from pneumo.study.results import load_run


def replayed(path: Path) -> WhatIf:
    file = load_run(path)
    found = Explainer(path, file, {0: 0, 1: 0}, replay=True).account(file.runs[1])
    assert isinstance(found, Account)
    assert found.what_if is not None
    return found.what_if


ms = st.integers(0, 20).map(lambda count: count * MS)
networks = st.builds(Network, ms, ms, st.booleans(), waking_ns=ms, looking_ns=st.sampled_from([0, MS // 100]))


def sleepy(rank: int, _step: int, phase: str) -> simulated.Cost | None:
    return asleep(40 * MS) if (rank, phase) == (1, "backward") else None


def delayed(rank: int, step: int, phase: str) -> simulated.Cost | None:
    return (7 * MS, 0, 7 * MS) if (rank + step) % 4 == 0 and phase == "forward" else None


@given(costs, st.sampled_from(STYLES), st.integers(2, 4), networks)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_with_nothing_changed_it_gives_the_recorded_time(
    tmp_path_factory: pytest.TempPathFactory,
    found: dict[tuple[int, int, str], tuple[int, float, float]],
    style: str,
    ranks: int,
    network: Network,
) -> None:
    path = simulated.study(tmp_path_factory.mktemp("r"), ranks, extra=extra_of(found), style=style, network=network)
    result = replayed(path)
    assert result.error == pytest.approx(0, abs=1e-9)
    # Each scenario takes something away, so none can take longer.
    assert all(seconds <= result.recorded_s * (1 + 1e-9) for seconds in result.scenarios_s.values())
    assert tuple(result.scenarios_s) == SCENARIOS


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("ranks", [3, 4])
@pytest.mark.parametrize(
    ("scenario", "extra", "instead", "network"),
    [
        ("no transfer", sleepy, sleepy, Network(0, 0)),
        ("no late peers", sleepy, lambda _r, _s, _p: None, Network(2 * MS, 5 * MS)),
        ("no oversubscription", delayed, lambda _r, _s, _p: None, Network(2 * MS, 5 * MS)),
    ],
)
def test_a_scenario_is_the_training_without_the_cause(
    tmp_path: Path,
    style: str,
    ranks: int,
    scenario: str,
    extra: simulated.Work,
    instead: simulated.Work,
    network: Network,
) -> None:
    with_it = simulated.study(tmp_path / "with", ranks, extra=extra, style=style, network=Network(2 * MS, 5 * MS))
    without = simulated.study(tmp_path / "without", ranks, extra=instead, style=style, network=network)
    expected = replayed(without).recorded_s
    assert replayed(with_it).scenarios_s[scenario] == pytest.approx(expected, rel=1e-6)


def test_what_one_rank_gains_another_may_take(tmp_path: Path) -> None:
    """Two ranks that sleep in turns: subtracting what was waited for would promise more than there is."""

    def in_turns(rank: int, step: int, phase: str) -> simulated.Cost | None:
        return (20 * MS, 0, 20 * MS) if rank == step % 2 and phase == "forward" else None

    path = simulated.study(tmp_path, 2, extra=in_turns, style="fsdp", network=Network(0, 0))
    result = replayed(path)
    assert result.recorded_s - result.scenarios_s["no oversubscription"] == pytest.approx(8 * 0.02)


def test_who_catches_up_before_anybody_waits_was_not_late(tmp_path: Path) -> None:
    """Rank 1 is early with each first bucket, and with the last one, for which all wait, nobody is early or late."""

    def early(records: simulated.Rows) -> simulated.Rows:
        return [r | {"enqueued_ns": r["enqueued_ns"] - 5 * MS * ((r["rank"], r["seq"] % 2) == (1, 0))} for r in records]

    result = replayed(simulated.study(tmp_path, 2, edit=early, network=Network(0, 0)))
    assert result.recorded_s == pytest.approx(result.scenarios_s["no late peers"])
    assert result.error == pytest.approx(0, abs=1e-9)
