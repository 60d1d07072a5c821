"""When nothing gets better any more: the class against its definition, and what is refused because it could not act."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pneumo import plan
from pneumo.config import Study
from pneumo.errors import Refused
from pneumo.patience import SAME, Patience, require_effect, require_labels
from pneumo.study.statistics import MIN_BLOCKS

# Few different figures, so that many are equal; some are closer than what counts, and some undefined.
FIGURE = st.one_of(
    st.sampled_from([0.0, 0.5, 0.5 + SAME / 2, 0.5 + 3 * SAME, 0.75, 1.0, math.nan]), st.floats(0.0, 1.0)
)


@st.composite
def studies(draw: st.DrawFn) -> list[dict[int, float]]:
    """The figures of one to three runs after each of up to twenty blocks."""
    runs = draw(st.sets(st.integers(0, 9), min_size=1, max_size=3))
    return draw(st.lists(st.fixed_dictionaries(dict.fromkeys(runs, FIGURE)), min_size=1, max_size=20))


def improved(figures: list[float], block: int) -> bool:
    """Whether a run's figure after a block, counted from 0, exceeds all that it had before."""
    earlier = [figure for figure in figures[:block] if not math.isnan(figure)]
    return figures[block] > max(earlier, default=-math.inf) + SAME


def first_stop(study: list[dict[int, float]], patience: int, least: int) -> int | None:
    """By definition: the number of blocks after which no run has improved in any of the latest `patience` ones."""
    for made in range(least, len(study) + 1):
        latest = range(made - patience, made)
        if latest[0] >= 0 and not any(improved([f[run] for f in study], b) for run in study[0] for b in latest):
            return made
    return None


@given(studies(), st.integers(1, 6), st.integers(1, 8))
def test_it_stops_where_the_definition_does(study: list[dict[int, float]], patience: int, least: int) -> None:
    watched = Patience(patience, least)
    stopped = next((made for made, figures in enumerate(study, 1) if watched.stops(figures)), None)
    assert stopped == first_stop(study, patience, least)
    assert all(len(figures) == (stopped or len(study)) for figures in watched.figures.values())


@given(studies(), st.integers(1, 6))
def test_it_never_stops_before_an_interval_is_possible(study: list[dict[int, float]], patience: int) -> None:
    watched = Patience(patience)
    assert not any(watched.stops(figures) for figures in study[: MIN_BLOCKS - 1])


def test_one_run_that_improves_keeps_all_going() -> None:
    watched = Patience(2, least=1)
    said = [watched.stops({0: 0.5, 1: figure}) for figure in (0.1, 0.2, 0.3, 0.3, 0.1)]
    assert said == [False, False, False, False, True]
    assert watched.unimproved == 2


@pytest.mark.parametrize(("patience", "blocks"), [(1, 7), (5, 7), (6, 8), (20, 22), (0, 1)])
def test_what_can_act_is_accepted(patience: int, blocks: int) -> None:
    require_effect(patience, blocks)


@pytest.mark.parametrize(("patience", "blocks"), [(1, 6), (6, 6), (6, 7), (7, 7), (9, 8), (1, 1)])
def test_what_could_never_act_is_refused_with_the_blocks_that_it_needs(patience: int, blocks: int) -> None:
    with pytest.raises(Refused) as caught:
        require_effect(patience, blocks)
    text = str(caught.value)
    enough = max(patience + 1, MIN_BLOCKS) + 1
    assert f"--patience {patience} " in text
    assert f"at least {enough} --blocks" in text
    require_effect(patience, enough)


def test_fewer_blocks_for_want_of_steps_are_refused_too() -> None:
    """The flags ask for enough blocks, and the epochs have not the steps for them."""
    study = Study(backends=("serial",), ranks=(1,), global_batch=8, epochs=2, blocks=10, patience=3)
    made = plan.make_plan(study, world_size=1, cores=1, local_size=1, gpus=0)
    assert plan.make_schedule(study, made, 48).blocks == 10
    with pytest.raises(Refused, match=r"--patience 3 .* 5 block"):
        plan.make_schedule(study, made, 24)


@pytest.mark.parametrize(
    ("answers", "labels", "word"),
    [("probability", [1, 1], "positive"), ("probability", [0], "negative"), ("boxes", [0, 0], "negative")],
)
def test_patients_without_a_figure_are_refused(answers: str, labels: list[int], word: str) -> None:
    with pytest.raises(Refused, match=f"all {word}"):
        require_labels(3, answers, labels)


@pytest.mark.parametrize(("answers", "labels"), [("probability", [0, 1]), ("boxes", [1]), ("boxes", [0, 1])])
def test_patients_with_a_figure_are_not(answers: str, labels: list[int]) -> None:
    require_labels(3, answers, labels)
