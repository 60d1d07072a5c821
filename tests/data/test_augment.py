"""Augmentation: decided by its key alone, its four steps independent of each other, and never a word to the network."""

import os
import random
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest

from pneumo.data.augment import augment

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
