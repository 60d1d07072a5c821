"""The table of models; readable without torch."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pneumo.models.task import Task


@dataclass(frozen=True, slots=True)
class Usual:
    """What a study of a model takes where it asks for nothing else.

    `size` is the edge of its pictures in pixels, which has to be a multiple of `multiple`; `batches` are the images of
    a global step, the first one that all numbers of ranks divide and that has `group` images or more for each virtual
    group (batch norm over one image alone is badly conditioned); `epochs` the most, where the budget allows them.
    """

    size: int = 128
    multiple: int = 4
    batches: tuple[int, ...] = (32, 24)
    group: int = 1
    epochs: int = 5
    budget_s: float = 240.0
    learning_rate: float = 1e-3


@dataclass(frozen=True, slots=True)
class Settings:
    """What a study asks of its model; `freeze` is a number of layers."""

    size: int
    learning_rate: float
    batch_norm: Literal["sync", "ghost", "local"] = "ghost"
    weights: Path | None = None
    freeze: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a model's task is implemented, its number of parameters for pictures of an edge, and what is usual.

    `answers` are a probability for each image, or boxes with scores; `maps_evidence` where it can be asked what in an
    image they come from (Grad-CAM).
    """

    place: str
    parameters: Callable[[int], int]
    usual: Usual = Usual()
    answers: str = "probability"
    maps_evidence: bool = False


def _cnn_parameters(size: int) -> int:
    """Weights and a bias for each output: conv 1-32, conv 32-64, fc - 128 - 1."""
    return (9 + 1) * 32 + (32 * 9 + 1) * 64 + (64 * (size // 4) ** 2 + 1) * 128 + (128 + 1)


MODELS = {
    "cnn": Entry("pneumo.models.cnn:CnnTask", _cnn_parameters, maps_evidence=True),
    "yolo": Entry(
        "pneumo.models.yolo:YoloTask",
        lambda _size: 3_011_043,
        Usual(size=416, multiple=32, batches=(8, 12, 16, 24), group=2, epochs=60, budget_s=800.0, learning_rate=2e-3),
        "boxes",
    ),
    "sleep": Entry("pneumo.models.sleep:SleepTask", lambda _size: (32 * 32 + 1) * 24 + (24 + 1)),
}


def load(name: str) -> "type[Task]":
    """Import the class of a model's task; this imports torch."""
    module, attribute = MODELS[name].place.split(":")
    return getattr(import_module(module), attribute)  # type: ignore[no-any-return]
