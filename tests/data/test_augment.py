"""Augmentation: decided by its key alone, its steps independent of each other, and never a word to the network.

Boxes stay around what they enclose.
"""

import os
import random
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest

from pneumo.data.augment import LEAST_VISIBLE, augment, augment_with_boxes

Picture = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def picture() -> Picture:
    """A dark right half without texture, a lighter left half."""
    shown = np.full((64, 64), 60, np.uint8)
    shown[:, :32] = 160
    return shown


def seen(result: Picture) -> tuple[bool, bool, bool]:
    """Whether a result is flipped, noisy, and changed in its greys (by brightness or gamma)."""
    flipped = result[:, :32].mean() < result[:, 32:].mean()
    upright = result[:, ::-1] if flipped else result
    noisy = upright[:, :32].std() > 0
    greys = abs(upright[:, :32].mean() - 160) > 0.4 or abs(upright[:, 32:].mean() - 60) > 0.4
    return bool(flipped), bool(noisy), bool(greys)


def test_key_decides_whatever_was_called_before(picture: Picture) -> None:
    keys = [(seed, epoch, f"id-{i}") for seed in (0, 1) for epoch in (0, 1) for i in range(20)]
    first = {key: augment(picture, key).tobytes() for key in keys}
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002 -- the global state must play no part
    assert {key: augment(picture, key).tobytes() for key in reversed(keys)} == first
    assert len(set(first.values())) > len(keys) / 2


def test_threads_do_not_disturb_each_other(picture: Picture) -> None:
    keys = [(0, 0, f"id-{i}") for i in range(200)]
    expected = [augment(picture, key).tobytes() for key in keys]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda key: augment(picture, key).tobytes(), keys)) == expected


def test_another_process_gives_the_same(picture: Picture) -> None:
    code = (
        "import hashlib, numpy as np; from pneumo.data.augment import augment; p = np.full((64, 64), 60, np.uint8); "
        "p[:, :32] = 160; print(hashlib.sha256(b''.join(augment(p, (0, 0, f'id-{i}')).tobytes() for i in range(40)))"
        ".hexdigest())"
    )
    found = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
        for env in ({**os.environ, "PYTHONHASHSEED": "1"}, {**os.environ, "PYTHONHASHSEED": "2"})
    }
    assert len(found) == 1


def test_global_random_state_is_left_alone(picture: Picture) -> None:
    augment(picture, (0, 0, "import"))
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]  # noqa: NPY002
    for i in range(20):
        augment(picture, (0, 0, str(i)))
    after = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]  # noqa: NPY002
    assert after == before


def test_steps_are_taken_half_of_the_time_and_independently(picture: Picture) -> None:
    counts = Counter(seen(augment(picture, (0, 0, str(i)))) for i in range(800))
    flipped = sum(count for (flip, _, _), count in counts.items() if flip)
    noisy = sum(count for (_, noise, _), count in counts.items() if noise)
    assert abs(flipped - 400) < 85  # six standard deviations
    assert abs(noisy - 400) < 85
    # Flip and noise in all four combinations, a quarter each; were their streams the same, two would be missing.
    for flip in (False, True):
        for noise in (False, True):
            both = sum(count for key, count in counts.items() if key[:2] == (flip, noise))
            assert abs(both - 200) < 75
    greys = sum(count for (_, _, grey), count in counts.items() if grey)
    assert 520 < greys <= 680  # brightness or gamma: three quarters, less those too slight to see


def test_picture_stays_a_picture_and_its_source_untouched(picture: Picture) -> None:
    before = picture.copy()
    results = [augment(picture, (0, 0, str(i))) for i in range(50)]
    assert all(result.shape == (64, 64) and result.dtype == np.uint8 for result in results)
    assert np.array_equal(picture, before)
    means = [int(result.mean()) for result in results]
    assert min(means) > 50
    assert max(means) < 190


def test_import_does_not_look_for_updates() -> None:
    code = (
        "import sys\n"
        "def hook(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'urllib.Request'): print('network', args)\n"
        "sys.addaudithook(hook)\n"
        "import numpy as np\n"
        "from pneumo.data.augment import augment\n"
        "augment(np.zeros((8, 8), np.uint8), (0, 0, ''))\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "NO_ALBUMENTATIONS_UPDATE"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert result.stdout == ""


SIZE = 160
SITES = np.array(
    [
        (0.3, 0.2, 0.35, 0.45),
        (0.55, 0.5, 0.25, 0.3),
        (0.0, 0.4, 0.06, 0.3),  # at the left edge: a shift may take it out, a flip brings it to the right
        (0.7, 0.93, 0.2, 0.07),  # at the lower edge
        (0.05, 0.05, 0.9, 0.9),  # a larger scale makes it leave the picture on all sides
    ],
    np.float32,
)


def drawn(site: npt.NDArray[np.float32]) -> tuple[Picture, npt.NDArray[np.float32]]:
    """A white rectangle on black, of whole pixels, and its box."""
    x, y, width, height = (round(float(value) * SIZE) for value in site)
    shown = np.zeros((SIZE, SIZE), np.uint8)
    shown[y : y + height, x : x + width] = 255
    return shown, np.array([(x, y, width, height)], np.float32) / np.float32(SIZE)


def white(result: Picture) -> tuple[npt.NDArray[np.float64], int]:
    """The corners (x, y, x, y) of what is white, in pixels, and its area; neither noise nor exposure gets near half."""
    found = np.argwhere(result > 127)
    return np.concatenate([found.min(0)[::-1], found.max(0)[::-1] + 1]).astype(float), len(found)


def in_pixels(box: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """The corners (x, y, x, y) of a box."""
    return np.concatenate([box[:2], box[:2] + box[2:]]).astype(float) * SIZE


@pytest.mark.parametrize("site", SITES)
def test_box_stays_around_what_it_encloses(site: npt.NDArray[np.float32]) -> None:
    shown, box = drawn(site)
    area, edge = float(box[0, 2] * box[0, 3]) * SIZE**2, float(box[0, 2:].sum()) * 2 * SIZE
    for i in range(300):
        result, moved = augment_with_boxes(shown, box, (0, 0, str(i)))
        assert (result.shape, result.dtype) == ((SIZE, SIZE), np.uint8)
        assert moved.dtype == np.float32
        if len(moved) == 0:  # less than 0.3 of it are left, at whatever scale
            assert (result > 127).sum() < LEAST_VISIBLE * 1.21 * area + edge
            continue
        assert moved.shape == (1, 4)
        corners, seen = white(result)
        assert np.abs(in_pixels(moved[0]) - corners).max() <= 1
        assert seen > LEAST_VISIBLE * 0.81 * area - edge
        assert (moved >= 0).all()
        assert (moved[:, 2:] > 0).all()
        assert (moved[:, :2] + moved[:, 2:] <= 1 + 2e-7).all()


def test_boxes_are_flipped_scaled_and_shifted_as_far_as_is_said() -> None:
    shown, box = drawn(SITES[0])
    found = np.array([augment_with_boxes(shown, box, (0, 0, str(i)))[1][0] for i in range(800)], np.float64)
    scales = found[:, 2] / box[0, 2]
    middles = found[:, :2] + found[:, 2:] / 2
    own = box[0, :2] + box[0, 2:] / 2  # left of the middle, at 0.475
    upright = np.abs(middles[:, 0] - 0.5 - (own[0] - 0.5) * scales)
    mirrored = np.abs(middles[:, 0] - 0.5 + (own[0] - 0.5) * scales)
    still = np.abs(scales - 1) < 1e-4
    assert abs(still.sum() - 400) < 85  # six standard deviations
    flipped = mirrored[still] < upright[still]
    assert abs(flipped.sum() - still.sum() / 2) < 60
    assert np.minimum(mirrored, upright)[still].max() < 1e-5
    moving = scales[~still]
    assert 0.9 <= moving.min() < 0.92
    assert 1.08 < moving.max() <= 1.1 + 1e-6
    assert np.allclose(found[:, 3] / box[0, 3], scales, atol=1e-5), "one scale for both directions"
    shifts = middles[~still, 1] - 0.5 - (own[1] - 0.5) * moving
    assert -0.1 <= shifts.min() < -0.085
    assert 0.085 < shifts.max() <= 0.1
    assert 0.085 < np.minimum(mirrored, upright)[~still].max() <= 0.1
    assert abs(np.corrcoef(shifts, moving)[0, 1]) < 0.2


def test_boxes_that_leave_are_dropped_and_the_others_stay_in_their_order() -> None:
    counts, shown = Counter[int](), np.zeros((SIZE, SIZE), np.uint8)
    for i in range(200):
        key = (1, 0, str(i))
        _, together = augment_with_boxes(shown, SITES, key)
        alone = [augment_with_boxes(shown, site[None], key)[1] for site in SITES]
        assert together.tolist() == np.concatenate(alone).tolist()
        counts.update(place for place, one in enumerate(alone) if len(one) == 0)
    assert set(counts) == {2, 3}
    assert all(5 < counts[place] < 60 for place in (2, 3))


def test_what_comes_in_is_black_and_degenerate_boxes_go() -> None:
    shown = np.full((SIZE, SIZE), 200, np.uint8)
    flat, low, thin = (0.2, 0.2, 0, 0.5), (0.2, 0.2, 0.5, 0), (0.2, 0.2, 0.001, 0.5)
    shapes = np.array([flat, low, thin, (0.2, 0.2, 0.5, 0.5)], np.float32)
    results = [augment_with_boxes(shown, shapes, (0, 0, str(i))) for i in range(100)]
    assert {len(left) for _, left in results} == {1}
    plain = [result for result, _ in results if set(np.unique(result[40:-40, 40:-40])) == {200}]  # the patient is still
    assert sum(0 in result for result in plain) > 3, "some are moved, and not exposed otherwise"
    assert all(set(np.unique(result)) <= set(range(201)) for result in plain)


def test_pictures_do_not_depend_on_their_boxes(picture: Picture) -> None:
    none, before = np.zeros((0, 4), np.float32), SITES.copy()
    for i in range(60):
        result, left = augment_with_boxes(picture, none, (0, 0, str(i)))
        assert left.shape == (0, 4)
        assert left.dtype == np.float32
        assert np.array_equal(result, augment_with_boxes(picture, SITES, (0, 0, str(i)))[0])
    assert np.array_equal(SITES, before)


def test_key_decides_with_boxes_whatever_was_called_before(picture: Picture) -> None:
    def both(key: tuple[int, int, str]) -> tuple[bytes, list[list[float]]]:
        result, boxes = augment_with_boxes(picture, SITES, key)
        return result.tobytes(), boxes.tolist()

    keys = [(seed, epoch, f"id-{i}") for seed in (0, 1) for epoch in (0, 1) for i in range(20)]
    first = {key: both(key) for key in keys}
    augment(picture, keys[0])
    with ThreadPoolExecutor(4) as pool:
        assert dict(zip(reversed(keys), pool.map(both, reversed(keys)), strict=True)) == first
    assert len({pixels for pixels, _ in first.values()}) > len(keys) / 2
