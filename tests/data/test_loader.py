"""Every rank's batches, laid together, are serial's; every sample counts once."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pneumo.data.loader import Loader, evaluation, shares


class Pictures:
    """A store in memory."""

    def __init__(self, count: int) -> None:
        self.index = pd.DataFrame(
            {"row": range(count), "patient": [f"p{i}" for i in range(count)], "label": np.arange(count) % 2}
        )

    def images(self, size: int) -> Any:
        return np.random.default_rng(0).integers(0, 256, (len(self.index), size, size), dtype=np.uint8)


def loader(count: int, rank: int, world_size: int, *, seed: int = 1) -> Loader:
    store: Any = Pictures(count)
    where = np.arange(count)
    return Loader(store, where, size=16, global_batch=12, seed=seed, rank=rank, world_size=world_size, augment=True)


@given(st.integers(0, 1000), st.integers(1, 40))
def test_shares_cover_everything_once(count: int, world_size: int) -> None:
    found = [list(range(count))[part] for part in shares(count, world_size)]
    assert [i for part in found for i in part] == list(range(count))
    assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_ranks_batches_together_are_serials(world_size: int) -> None:
    serial = loader(37, 0, 1)
    ranks = [loader(37, rank, world_size) for rank in range(world_size)]
    for step in range(2 * serial.steps_per_epoch):
        whole, parts = serial.batch(step), [one.batch(step) for one in ranks]
        assert {part.total for part in parts} == {len(whole.labels)}
        np.testing.assert_array_equal(np.concatenate([part.images for part in parts]), whole.images)
        np.testing.assert_array_equal(np.concatenate([part.samples for part in parts]), whole.samples)


def test_an_epoch_has_every_sample_once_and_another_order_next_time() -> None:
    one = loader(37, 0, 1)
    orders = [np.concatenate([one.batch(4 * e + s).samples for s in range(4)]) for e in range(2)]
    assert all(sorted(order.tolist()) == list(range(37)) for order in orders)
    assert orders[0].tolist() != orders[1].tolist()
    assert loader(37, 0, 1, seed=2).batch(0).samples.tolist() != one.batch(0).samples.tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_answers_every_sample_once_in_equally_many_batches(world_size: int) -> None:
    store: Any = Pictures(23)
    where = np.arange(2, 23)
    ranks = [
        list(evaluation(store, where, size=16, rank=rank, world_size=world_size, batch=4)) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = np.concatenate([batch.samples for batches in ranks for batch in batches])
    assert sorted(seen.tolist()) == where.tolist()
