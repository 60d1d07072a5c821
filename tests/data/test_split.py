"""The split is disjoint, stratified, and depends on ids and seed alone."""

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumo.data.split import split


def table(positives: int, negatives: int) -> pd.DataFrame:
    labels = [1] * positives + [0] * negatives
    detailed = ["Lung Opacity"] * positives + ["Normal", "No Lung Opacity / Not Normal"] * negatives
    names = [f"id{i}" for i in range(len(labels))]
    return pd.DataFrame(
        {"patient": names, "label": labels, "detailed": detailed[: len(labels)], "row": range(len(labels))}
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(20, 60), st.integers(20, 90), st.integers(0, 5), st.randoms(use_true_random=False))
def test_parts_are_disjoint_and_do_not_depend_on_the_order(
    positives: int, negatives: int, seed: int, shuffle: st.DataObject
) -> None:
    index = table(positives, negatives)
    order = list(range(len(index)))
    shuffle.shuffle(order)
    mixed = index.iloc[order].reset_index(drop=True)
    ours, theirs = (split(i, seed=seed, subset="balanced", validate=0.5, calibrate=0.1) for i in (index, mixed))
    for name in ("train", "calibrate", "validate"):
        found = set(index["patient"].iloc[getattr(ours, name)])
        assert found == set(mixed["patient"].iloc[getattr(theirs, name)])
    whole = np.concatenate([ours.train, ours.calibrate, ours.validate])
    assert len(set(whole.tolist())) == len(whole)
    labels = index["label"].to_numpy()[whole]
    assert labels.sum() * 2 == len(labels) == 2 * min(positives, negatives)


def test_the_samples_parts() -> None:
    parts = split(table(400, 400), seed=0, subset="balanced", validate=0.5, calibrate=0.1)
    assert (len(parts.train), len(parts.calibrate), len(parts.validate)) == (320, 80, 400)


def test_a_person_is_in_one_part() -> None:
    index = table(60, 60)
    mapping = {name: f"person{i % 40}" for i, name in enumerate(index["patient"])}
    parts = split(index, seed=2, subset="all", validate=0.5, calibrate=0.1, mapping=mapping)
    people = [
        {mapping[p] for p in index["patient"].iloc[part]} for part in (parts.train, parts.calibrate, parts.validate)
    ]
    assert not people[0] & people[1]
    assert not people[0] & people[2]
    assert not people[1] & people[2]
