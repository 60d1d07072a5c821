"""The split depends on the seed and on ids, parts are disjoint, and labels keep their proportion."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumo.data.rsna import CLASSES
from pneumo.data.split import Split, split
from pneumo.errors import Refused


def table(positives: int, abnormal: int, normal: int, start: int = 0) -> pd.DataFrame:
    """An index of so many patients of each class, in an order of its own."""
    classes = [CLASSES[2]] * positives + [CLASSES[1]] * abnormal + [CLASSES[0]] * normal
    index = pd.DataFrame({"patient": [f"patient {start + i}" for i in range(len(classes))], "detailed": classes})
    index["label"] = (index["detailed"] == CLASSES[2]).astype("int8")
    return index.sample(frac=1, random_state=1).reset_index(drop=True)


def parts(found: Split, index: pd.DataFrame) -> list[set[str]]:
    """The patients of the three parts."""
    return [set(index["patient"].iloc[part]) for part in (found.train, found.calibrate, found.validate)]


def test_built_in_sample_gives_320_80_400() -> None:
    found = split(table(400, 230, 170), seed=0, subset="balanced")
    assert [len(found.train), len(found.calibrate), len(found.validate)] == [320, 80, 400]


def test_labels_are_halves_of_every_part_of_a_balanced_subset() -> None:
    index = table(60, 130, 110)
    found = split(index, seed=3, subset="balanced")
    for part in (found.train, found.calibrate, found.validate):
        assert index["label"].iloc[part].mean() == 0.5
    taken = index.iloc[np.concatenate([found.train, found.calibrate, found.validate])]
    assert taken["detailed"].value_counts().to_dict() == {CLASSES[2]: 60, CLASSES[1]: 33, CLASSES[0]: 27}


def test_balancing_takes_fewer_positives_where_they_are_the_majority() -> None:
    index = table(50, 12, 8)
    found = split(index, seed=3, subset="balanced")
    assert sum(map(len, (found.train, found.calibrate, found.validate))) == 40


def test_all_takes_everyone_in_the_natural_proportion() -> None:
    index = table(100, 200, 100)
    found = split(index, seed=0, subset="all", validate=0.25, calibrate=0.1)
    assert [len(found.train), len(found.calibrate), len(found.validate)] == [260, 40, 100]
    assert index["label"].iloc[found.validate].sum() == 25


@settings(max_examples=50, deadline=None)
@given(
    counts=st.tuples(st.integers(20, 60), st.integers(0, 60), st.integers(20, 60)),
    seed=st.integers(0, 2**40),
    order=st.integers(0, 2**32 - 1),
    subset=st.sampled_from(["balanced", "all"]),
)
def test_order_of_rows_plays_no_part_and_parts_are_disjoint(
    counts: tuple[int, int, int], seed: int, order: int, subset: str
) -> None:
    index = table(*counts)
    found = parts(split(index, seed=seed, subset=subset), index)  # type: ignore[arg-type]
    shuffled = index.sample(frac=1, random_state=order).reset_index(drop=True)
    assert parts(split(shuffled, seed=seed, subset=subset), shuffled) == found  # type: ignore[arg-type]
    assert sum(map(len, found)) == len(set.union(*found))
    for part in (split(index, seed=seed, subset="all")).train, split(index, seed=seed, subset="all").validate:
        assert (np.diff(part) > 0).all()


def test_another_seed_gives_another_split() -> None:
    index = table(100, 100, 100)
    first, second = (parts(split(index, seed=seed, subset="balanced"), index) for seed in (0, 1))
    assert first != second
    assert set.union(*first) != set.union(*second)  # other negatives are taken, too


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), people=st.integers(12, 60))
def test_images_of_a_person_stay_together(seed: int, people: int) -> None:
    index = table(60, 60, 60)
    rng = np.random.default_rng(seed)
    mapping = {patient: f"person {rng.integers(people)}" for patient in index["patient"][:-9]}
    found = parts(split(index, seed=seed, subset="all", mapping=mapping), index)
    persons = [{mapping.get(patient, patient) for patient in part} for part in found]
    assert sum(map(len, persons)) == len(set.union(*persons))
    assert sum(map(len, found)) == 180
    numbers = split(index, seed=seed, subset="all", mapping=mapping).person
    assert numbers is not None
    whose = [mapping.get(patient, patient) for patient in index["patient"]]
    assert len(set(numbers.tolist())) == len(set(whose)) == len(set(zip(numbers.tolist(), whose, strict=True)))
    assert split(index, seed=seed, subset="all").person is None


def test_mapping_of_one_image_a_person_keeps_the_sizes() -> None:
    index = table(100, 60, 40)
    mapping = {patient: f"person {patient}" for patient in index["patient"]}
    found = split(index, seed=0, subset="all", mapping=mapping)
    assert [len(found.train), len(found.calibrate), len(found.validate)] == [80, 20, 100]


def test_person_with_an_images_name_is_somebody_else() -> None:
    index = table(20, 20, 20)
    stranger, namesake = index["patient"][0], index["patient"][1]
    together = split(index, seed=0, subset="all", mapping={stranger: namesake, namesake: "x"})
    assert sum(map(len, (together.train, together.calibrate, together.validate))) == 60


@pytest.mark.parametrize("counts", [(10, 0, 0), (0, 5, 5)])
def test_one_label_alone_cannot_be_balanced(counts: tuple[int, int, int]) -> None:
    with pytest.raises(Refused, match="needs both"):
        split(table(*counts), seed=0, subset="balanced")


def test_too_few_patients_are_refused_by_the_part_that_is_empty() -> None:
    with pytest.raises(Refused, match="calibrate"):
        split(table(2, 1, 1), seed=0, subset="all")
