"""The table of models; readable without torch."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pneumo.models.task import Task


def _cnn_parameters(size: int) -> int:
    """Weights and a bias for each output: conv 1-32, conv 32-64, fc - 128 - 1."""
    return (9 + 1) * 32 + (32 * 9 + 1) * 64 + (64 * (size // 4) ** 2 + 1) * 128 + (128 + 1)


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a model's task is implemented, and its number of parameters for an input of size x size pixels."""

    place: str
    parameters: Callable[[int], int]


MODELS = {
    "cnn": Entry("pneumo.models.cnn:CnnTask", _cnn_parameters),
    "sleep": Entry("pneumo.models.sleep:SleepTask", lambda _size: (32 * 32 + 1) * 24 + (24 + 1)),
}
# Names that belong to the project's vocabulary and are refused with a sentence of their own.
PLANNED = {"yolo": "the detector is not part of this version"}


def load(name: str) -> "type[Task]":
    """Import the class of a model's task; this imports torch."""
    module, attribute = MODELS[name].place.split(":")
    return getattr(import_module(module), attribute)  # type: ignore[no-any-return]
