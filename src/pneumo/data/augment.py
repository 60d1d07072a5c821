"""Augmentation with albumentations, with or without boxes: the same for a sample wherever it is done."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from typing import Any, Final

import numpy as np
import numpy.typing as npt

PROBABILITY: Final = 0.5
"""Each step is taken with this probability, independently of the others."""

LEAST_VISIBLE: Final = 0.3
"""A box of which a smaller share of the area is still in the picture is dropped."""

_BRIGHTNESS, _GAMMA_PERCENT, _NOISE = (-0.15, 0.15), (75, 130), (0.01, 0.04)
_SCALE, _SHIFT = (0.9, 1.1), (-0.1, 0.1)  # more would lead lungs out of the picture, which fill a radiograph

_thread = threading.local()

Key = tuple[int, int, str]


def augment(picture: npt.NDArray[np.uint8], key: Key) -> npt.NDArray[np.uint8]:
    """Return a picture, uint8 (size, size), flipped, with another brightness and gamma, and with noise.

    `key` is (seed, epoch, patient). The result depends on the picture and the key, and on no rank, order of calls,
    thread or global random state.
    """
    result: npt.NDArray[np.uint8] = _keyed("plain", key)(image=picture)["image"]
    return result


def augment_with_boxes(
    picture: npt.NDArray[np.uint8], boxes: npt.NDArray[np.float32], key: Key
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Return a picture augmented like by `augment`, also scaled and shifted on black, and its boxes, float32 (k, 4).

    Boxes are x, y, width, height in fractions of the edge, k from 0. They move with what they enclose, and are clipped
    to the picture; one of less than a pixel in width or height, or less than LEAST_VISIBLE of its area, is dropped.
    Their order stays, and the picture does not depend on them.
    """
    corners = boxes.astype(np.float64)
    corners[:, 2:] += corners[:, :2]
    done = _keyed("boxes", key)(image=picture, bboxes=corners)
    moved = done["bboxes"]
    return done["image"], np.concatenate([moved[:, :2], moved[:, 2:] - moved[:, :2]], axis=1).astype(np.float32)


def _keyed(kind: str, key: Key) -> Any:
    """Return this thread's steps of a kind, about to draw what the key decides."""
    from pneumo.data.opencv import cv2

    digest = hashlib.blake2b(repr(key).encode(), digest_size=36).digest()
    pipeline = _pipeline(kind)
    # Not set_random_seed: it gives every step the same stream, so that all are taken or none (albumentations 2.0.8).
    # The steps draw from both generators of a shared state, and the noise from OpenCV's, one for each thread.
    pipeline.set_random_state(
        np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little"))),
        random.Random(digest[16:32]),
    )
    cv2.setRNGSeed(int.from_bytes(digest[32:], "little", signed=True))
    return pipeline


def _pipeline(kind: str) -> Any:
    """Return this thread's steps; they hold the random state while they run, so threads cannot share them."""
    if not hasattr(_thread, kind):
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # importing it would ask a registry for a newer version
        setattr(_thread, kind, _PIPELINES[kind]())
    return getattr(_thread, kind)


def _plain() -> Any:
    import albumentations as steps

    return steps.Compose([steps.HorizontalFlip(p=PROBABILITY), *_exposure()])


def _with_boxes() -> Any:
    import albumentations as steps

    # The patient is moved before the exposure, so that the noise is not smoothed with the picture.
    move = steps.Affine(
        scale=_SCALE, keep_ratio=True, translate_percent={"x": _SHIFT, "y": _SHIFT}, fill=0, p=PROBABILITY
    )
    # "albumentations" are corners in fractions. Only one step cuts anything off, so that boxes are judged at the end.
    boxes = steps.BboxParams(
        format="albumentations",
        min_visibility=LEAST_VISIBLE,
        min_width=1,
        min_height=1,
        clip=True,
        filter_invalid_bboxes=True,
        check_each_transform=False,
    )
    return steps.Compose([steps.HorizontalFlip(p=PROBABILITY), move, *_exposure()], bbox_params=boxes)


def _exposure() -> list[Any]:
    import albumentations as steps

    return [
        steps.RandomBrightnessContrast(brightness_limit=_BRIGHTNESS, contrast_limit=(0, 0), p=PROBABILITY),
        steps.RandomGamma(gamma_limit=_GAMMA_PERCENT, p=PROBABILITY),
        steps.GaussNoise(std_range=_NOISE, p=PROBABILITY),
    ]


_PIPELINES: Final = {"plain": _plain, "boxes": _with_boxes}
