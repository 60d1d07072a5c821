"""The table of models; readable without torch."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pneumo.models.task import Task

MODELS = {"cnn": "pneumo.models.cnn:CnnTask"}
# Names that belong to the project's vocabulary and are refused with a sentence of their own.
PLANNED = {"yolo": "the detector is not part of this version"}


def load(name: str) -> "type[Task]":
    """Import the class of a model's task; this imports torch."""
    module, attribute = MODELS[name].split(":")
    return getattr(import_module(module), attribute)  # type: ignore[no-any-return]
