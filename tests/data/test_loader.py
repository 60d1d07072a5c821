"""The loader: an order of seed and epoch alone, batches that ranks share without loss, and a matching evaluation."""

import numpy as np
import pytest
from fakes import make_store
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumo.data.augment import augment_with_boxes
from pneumo.data.geometry import to_fractions
from pneumo.data.loader import Batch, Loader, evaluation, scale, shares
from pneumo.data.store import Store
from pneumo.errors import Refused

POSITIONS = np.arange(10, 33)
# The store's originals have 64 rows and 80 columns: 8 rows of black come above them.
BOXES = (np.array([(1.5, 10.0, 30.0, 40.25), (0.0, 8.0, 1.0, 1.0)]) / 80).astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of 38 sound patients."""
    return make_store(tmp_path_factory.mktemp("loader") / "store", rows=40)


def make(store: Store, rank: int = 0, world_size: int = 1, **options: object) -> Loader:
    """A loader of 23 of the patients in batches of 8."""
    settings = {"global_batch": 8, "seed": 5, "augment": True, **options}
    return Loader(store, POSITIONS, size=16, rank=rank, world_size=world_size, **settings)  # type: ignore[arg-type]


def joined(batches: list[Batch]) -> tuple[bytes, list[float], list[int]]:
    """The bytes of the images, the labels and the samples of batches, one after another."""
    images = np.concatenate([batch.images for batch in batches])
    labels = np.concatenate([batch.labels for batch in batches])
    return images.tobytes(), labels.tolist(), np.concatenate([batch.samples for batch in batches]).tolist()


@given(count=st.integers(0, 10_000), world_size=st.integers(1, 300))
def test_shares_cover_everything_once_and_evenly(count: int, world_size: int) -> None:
    found = shares(count, world_size)
    assert [i for part in found for i in range(count)[part]] == list(range(count))
    lengths = [len(range(count)[part]) for part in found]
    assert len(found) == world_size
    assert max(lengths) - min(lengths) <= 1
    assert min(world_size, count) == sum(map(bool, lengths))


@given(count=st.integers(0, 3000), world_size=st.integers(1, 20), times=st.integers(1, 12))
def test_share_is_the_union_of_those_of_a_multiple_of_ranks(count: int, world_size: int, times: int) -> None:
    few, many = shares(count, world_size), shares(count, world_size * times)
    for rank, part in enumerate(few):
        own = many[rank * times : (rank + 1) * times]
        assert [i for piece in own for i in range(count)[piece]] == list(range(count)[part])


def test_epochs_are_permutations_that_differ(store: Store) -> None:
    loader = make(store)
    orders = [loader.order(epoch).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(10, 33)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    assert make(store, seed=6).order(0).tolist() != orders[0]


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 4, 11])
def test_ranks_together_see_the_serial_batches_bit_for_bit(store: Store, world_size: int, augment: bool) -> None:
    serial = make(store, augment=augment)
    ranks = [make(store, rank, world_size, augment=augment) for rank in range(world_size)]
    assert serial.steps_per_epoch == 3
    for step in range(2 * serial.steps_per_epoch):
        whole, parts = serial.batch(step), [loader.batch(step) for loader in ranks]
        assert joined(parts) == joined([whole])
        assert {part.total for part in parts} == {whole.total} == {len(whole.labels)}
        assert all(part.images.shape == (len(part.labels), 1, 16, 16) for part in parts)
    assert [len(serial.batch(step).labels) for step in range(3)] == [8, 8, 7]


def test_shares_of_a_short_batch_may_be_empty(store: Store) -> None:
    batch = make(store, rank=0, world_size=10).batch(2)
    assert batch.images.shape == (0, 1, 16, 16)
    assert batch.images.dtype == np.float32
    assert batch.total == 7
    assert batch.lengths == (0,)
    assert batch.groups == 7


def test_groups_are_the_same_for_any_number_of_ranks_that_divides_them(store: Store) -> None:
    for step in range(3):
        whole = make(store, groups=12).batch(step)
        assert sum(whole.lengths) == whole.total
        assert whole.groups == sum(map(bool, whole.lengths))
        for world_size in (1, 2, 3, 4, 6, 12):
            parts = [make(store, rank, world_size, groups=12).batch(step) for rank in range(world_size)]
            assert joined(parts) == joined([whole])
            assert [length for part in parts for length in part.lengths] == list(whole.lengths)
            assert all(sum(part.lengths) == len(part.samples) for part in parts)
            assert {part.groups for part in parts} == {whole.groups}


@settings(max_examples=30)
@given(batch=st.integers(1, 30), world_size=st.integers(1, 5), each=st.integers(1, 5))
def test_rank_has_its_groups_in_order(store: Store, batch: int, world_size: int, each: int) -> None:
    options = {"global_batch": batch, "augment": False}
    serial = make(store, **options)
    for step in range(serial.steps_per_epoch):
        order = serial.batch(step).samples.tolist()
        cut = [order[part] for part in shares(len(order), world_size * each)]
        for rank in range(world_size):
            found = make(store, rank, world_size, groups=world_size * each, **options).batch(step)
            own = cut[rank * each : (rank + 1) * each]
            assert found.samples.tolist() == [sample for group in own for sample in group]
            assert found.lengths == tuple(map(len, own))
            assert found.groups == sum(map(bool, cut))


def test_one_group_a_rank_unless_asked(store: Store) -> None:
    for rank in range(3):
        batch = make(store, rank, 3).batch(2)
        assert batch.lengths == (len(batch.labels),)
        assert batch.groups == 3


@pytest.mark.parametrize("groups", [0, 4, -3])
def test_groups_that_ranks_cannot_share_are_refused(store: Store, groups: int) -> None:
    with pytest.raises(Refused, match=f"{groups} groups of a batch cannot be divided among 3 ranks"):
        make(store, 0, 3, groups=groups)


def test_batch_is_a_function_of_the_step(store: Store) -> None:
    forward, backward = make(store), make(store)
    expected = [joined([forward.batch(step)]) for step in range(7)]
    np.random.seed(1)  # noqa: NPY002 -- the global state must play no part
    assert [joined([backward.batch(step)]) for step in reversed(range(7))] == expected[::-1]


def test_order_of_positions_and_the_rest_of_the_split_play_no_part(store: Store) -> None:
    reverse = Loader(store, POSITIONS[::-1], size=16, global_batch=8, seed=5, rank=0, world_size=1, augment=True)
    assert joined([reverse.batch(1)]) == joined([make(store).batch(1)])


def test_samples_labels_and_pixels_belong_together(store: Store) -> None:
    batch = make(store, augment=False).batch(1)
    rows = store.index["row"].to_numpy()[batch.samples]
    assert np.array_equal(batch.images[:, 0], scale(np.asarray(store.images(16)[rows])))
    assert batch.labels.tolist() == (rows % 2).tolist()
    assert batch.labels.dtype == np.float32
    assert batch.samples.dtype == np.int64


def test_augmentation_differs_between_epochs_and_leaves_the_store_alone(store: Store) -> None:
    before = np.array(store.images(16))
    loader = make(store, global_batch=23)
    first, second = loader.batch(0), loader.batch(1)
    by_sample = [dict(zip(batch.samples.tolist(), batch.images, strict=True)) for batch in (first, second)]
    different = [not np.array_equal(by_sample[0][sample], by_sample[1][sample]) for sample in by_sample[0]]
    assert sum(different) > 15
    assert np.array_equal(store.images(16), before)


def test_without_being_asked_for_boxes_there_are_none(store: Store) -> None:
    assert make(store).batch(0).boxes == ()
    assert all(batch.boxes == () for batch in evaluation(store, POSITIONS, size=16, rank=0, world_size=1, batch=8))


def test_evaluation_has_the_boxes_of_the_index_in_the_square(store: Store) -> None:
    for batch in evaluation(store, POSITIONS, size=16, rank=1, world_size=2, batch=5, boxes=True):
        assert len(batch.boxes) == len(batch.labels)
        for label, boxes in zip(batch.labels, batch.boxes, strict=True):
            assert boxes.dtype == np.float32
            expected = BOXES if label else np.zeros((0, 4))
            assert boxes.shape == expected.shape
            assert np.allclose(boxes, expected, atol=1e-7)


def test_training_boxes_are_those_of_the_augmentation_on_any_number_of_ranks(store: Store) -> None:
    for step in range(4):
        whole = make(store, boxes=True).batch(step)
        assert len(whole.boxes) == len(whole.labels)
        epoch = step // 3
        for image, boxes, sample in zip(whole.images, whole.boxes, whole.samples, strict=True):
            row = store.index.iloc[sample]
            picture, left = augment_with_boxes(
                np.asarray(store.images(16)[row["row"]]),
                to_fractions(row["boxes"], row["rows"], row["columns"]),
                (5, epoch, row["patient"]),
            )
            assert np.array_equal(image[0], scale(picture))
            assert boxes.tolist() == left.tolist()
        for world_size in (2, 3):
            parts = [make(store, rank, world_size, boxes=True).batch(step) for rank in range(world_size)]
            assert joined(parts) == joined([whole])
            together = [boxes.tolist() for part in parts for boxes in part.boxes]
            assert together == [boxes.tolist() for boxes in whole.boxes]


def test_training_boxes_are_not_moved_unless_pictures_are(store: Store) -> None:
    batch = make(store, boxes=True, augment=False, global_batch=23).batch(0)
    assert joined([batch]) == joined([make(store, augment=False, global_batch=23).batch(0)])
    assert {boxes.tobytes() for boxes in batch.boxes} == {BOXES.tobytes(), b""}


def test_labels_stay_where_boxes_are_dropped(store: Store) -> None:
    batch = make(store, boxes=True, global_batch=23).batch(0)
    assert batch.labels.tolist() == (store.index["row"].to_numpy()[batch.samples] % 2).tolist()
    assert {len(boxes) for boxes in batch.boxes} == {0, 1}, "the second box is less than a pixel here"


def test_scaling_is_to_minus_two_and_two() -> None:
    expected = (np.arange(256) / 255 - 0.5) / 0.25
    assert np.allclose(scale(np.arange(256, dtype=np.uint8)), expected, atol=1e-6)
    assert scale(np.zeros((2, 3), np.uint8)).dtype == np.float32


@pytest.mark.parametrize(
    ("count", "world_size", "size"), [(23, 1, 8), (23, 4, 3), (9, 4, 2), (16, 4, 4), (3, 8, 2), (0, 2, 4)]
)
def test_evaluation_is_every_sample_once_in_equally_many_batches(
    store: Store, count: int, world_size: int, size: int
) -> None:
    positions = np.arange(count)[::-1].copy()
    ranks = [
        list(evaluation(store, positions, size=16, rank=rank, world_size=world_size, batch=size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert [int(i) for batches in ranks for batch in batches for i in batch.samples] == positions.tolist()
    for together in zip(*ranks, strict=True):
        assert {batch.total for batch in together} == {sum(len(batch.labels) for batch in together)}
        assert {batch.groups for batch in together} == {sum(len(batch.labels) > 0 for batch in together)}
        assert all(batch.lengths == (len(batch.labels),) for batch in together)
    for batch in (batch for batches in ranks for batch in batches):
        assert len(batch.labels) <= size
        rows = store.index["row"].to_numpy()[batch.samples]
        assert np.array_equal(batch.images[:, 0], scale(np.asarray(store.images(16)[rows])))


def test_nothing_to_train_on_is_refused(store: Store) -> None:
    with pytest.raises(Refused, match="nothing to train on"):
        Loader(store, np.array([], np.int64), size=16, global_batch=8, seed=0, rank=0, world_size=1, augment=False)
