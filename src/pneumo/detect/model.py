"""A trained model, read from its weights, that answers pictures as it did when it was evaluated."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from pneumo import models
from pneumo.data.loader import scale
from pneumo.errors import Refused
from pneumo.models import MODELS, Settings

if TYPE_CHECKING:
    from torch import nn

    from pneumo.detect.files import Picture
    from pneumo.models.task import Answers, Task

NO_THRESHOLD = 0.5  # where no calibration part has given one


class About(msgspec.Struct, frozen=True):
    """What is known of a trained model, from the JSON file beside it or from its own; `assumed`: its size is not.

    The rest identifies its row in the result's summary.
    """

    model: str
    size: int
    backend: str | None = None
    comm: str | None = None
    ranks: int | None = None
    threads: int | None = None
    assumed: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """A network in evaluation mode and the task that reads its answers."""

    task: "Task"
    network: "nn.Module"

    @property
    def size(self) -> int:
        """The edge of its pictures in pixels."""
        return self.task.size

    def answer(self, pictures: Sequence["Picture"]) -> "Answers":
        """Return the answers to uint8 pictures (size, size) each; several threads may ask at once."""
        import torch

        images = torch.from_numpy(scale(np.stack(pictures))[:, None])
        with torch.inference_mode():
            return self.task.answers(self.network, images)

    def evidence(self, pictures: Sequence["Picture"]) -> NDArray[np.float32]:
        """Return where in uint8 pictures (size, size) the evidence for pneumonia lies: (b, size, size), at least 0.

        Only of models that can be asked (`MODELS`).
        """
        import torch

        images = torch.from_numpy(scale(np.stack(pictures))[:, None])
        return np.asarray(self.task.evidence(self.network, images).numpy(), np.float32)


def about(weights: Path, size: int | None) -> About:
    """Say what the weights are; `size` is what the user asks for. Raises Refused.

    The JSON file beside them says it, or where there is none their own file. Where that is silent too they are a
    detector's, and its usual size is assumed.
    """
    try:
        found = msgspec.json.decode(weights.with_suffix(".json").read_bytes(), type=About)
    except OSError:
        found = _within(weights)
    except msgspec.MsgspecError:
        raise Refused(f"{weights.with_suffix('.json')} does not say which model {weights} is, and its size.") from None
    if found.model not in MODELS:
        raise Refused(f"{weights} is said to be of a model that this version does not know; name another file.")
    boxes = MODELS[found.model].answers == "boxes"
    if size is not None and size != found.size and not boxes:
        raise Refused(f"--size {size}: {weights} was trained with {found.size}, and answers no other; leave it out.")
    wanted, multiple = size or found.size, MODELS[found.model].usual.multiple
    if wanted % multiple or not multiple <= wanted <= 4096:
        whose = f"--size {wanted}" if size else f"{weights} says that its size is {wanted}"
        raise Refused(f"{whose}: pictures have an edge of {multiple} to 4096 pixels, a multiple of {multiple}.")
    return msgspec.structs.replace(found, size=wanted, assumed=found.assumed and size is None)


def _within(weights: Path) -> About:
    from pneumo.models.weights import described

    model, size = described(weights)
    return About(model or "yolo", size or MODELS["yolo"].usual.size, assumed=size is None)


def threshold(weights: Path, known: About) -> float:
    """The score from which on to keep boxes, as the calibration part of the result gave it in which the weights lie.

    NO_THRESHOLD where they lie in none, or its summary does not tell.
    """
    from pneumo.study.results import load_summary

    try:
        rows = load_summary(weights.parent.parent).rows if weights.parent.name == "checkpoints" else []
    except Refused:
        rows = []
    identity = (known.backend, known.comm, known.ranks, known.threads)
    found = [row.metrics.get("rsna_threshold") for row in rows]
    ours = [f for f, r in zip(found, rows, strict=True) if (r.backend, r.comm, r.ranks, r.threads) == identity]
    return next((float(value) for value in ours if value is not None), NO_THRESHOLD)


def load(weights: Path, known: About) -> Model:
    """Read the weights into their network. Raises Refused where they are not whole, or another network's."""
    task = models.load(known.model)(Settings(known.size, MODELS[known.model].usual.learning_rate))
    network = _detector(weights) if MODELS[known.model].answers == "boxes" else _classifier(weights, task)
    return Model(task, network.eval())


def _detector(path: Path) -> "nn.Module":
    from pneumo.models import weights, yolov8

    network = yolov8.build()
    fitted = weights.fit(network, weights.read(path))
    if fitted.initialised:
        raise Refused(f"{path} holds no whole detector of one class, so its answers would be random: {fitted.sentence}")
    return network


def _classifier(path: Path, task: "Task") -> "nn.Module":
    from pneumo.models import weights

    network = task.build()
    state: dict[str, Any] = weights.read(path)
    ours = {name: value.shape for name, value in network.state_dict().items()}
    if {name: value.shape for name, value in state.items()} != ours:
        raise Refused(f"{path} does not have the tensors of the model that it is said to be.")
    network.load_state_dict(state)
    return network
