"""Augmentation with albumentations: flip, brightness, gamma and noise, the same for a sample wherever it is done."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from typing import Any, Final

import numpy as np
import numpy.typing as npt

PROBABILITY: Final = 0.5
"""Each of the four steps is taken with this probability, independently of the others."""

_BRIGHTNESS, _GAMMA_PERCENT, _NOISE = (-0.15, 0.15), (75, 130), (0.01, 0.04)

_thread = threading.local()


def augment(picture: npt.NDArray[np.uint8], key: tuple[int, int, str]) -> npt.NDArray[np.uint8]:
    """Return an augmented copy of a picture, uint8 (size, size); `key` is (seed, epoch, patient) and decides it all.

    The result depends on the picture and the key, and on no rank, order of calls, thread or global random state.
    """
    from pneumo.data.opencv import cv2

    digest = hashlib.blake2b(repr(key).encode(), digest_size=36).digest()
    pipeline = _pipeline()
    # Not set_random_seed: it gives every step the same stream, so that all four are taken or none (albumentations
    # 2.0.8). The steps draw from both generators of a shared state, and the noise from OpenCV's, one for each thread.
    pipeline.set_random_state(
        np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little"))),
        random.Random(digest[16:32]),
    )
    cv2.setRNGSeed(int.from_bytes(digest[32:], "little", signed=True))
    result: npt.NDArray[np.uint8] = pipeline(image=picture)["image"]
    return result


def _pipeline() -> Any:
    """Return this thread's steps; they hold the random state while they run, so threads cannot share them."""
    if not hasattr(_thread, "pipeline"):
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # importing it would ask a registry for a newer version
        import albumentations as steps

        _thread.pipeline = steps.Compose(
            [
                steps.HorizontalFlip(p=PROBABILITY),
                steps.RandomBrightnessContrast(brightness_limit=_BRIGHTNESS, contrast_limit=(0, 0), p=PROBABILITY),
                steps.RandomGamma(gamma_limit=_GAMMA_PERCENT, p=PROBABILITY),
                steps.GaussNoise(std_range=_NOISE, p=PROBABILITY),
            ]
        )
    return _thread.pipeline
