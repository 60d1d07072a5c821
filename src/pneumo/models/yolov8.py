"""Ultralytics' yolov8n for one class, and its loss as a plain sum: our one import of `ultralytics`.

The network is Ultralytics' own, built from the description in its package. Its checkpoints have three input channels,
so ours has three as well, and sees pictures as Ultralytics feeds them: grey repeated over the channels, in [0, 1].
"""

from collections.abc import Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pneumo.models.isolation import isolated_import

with isolated_import():
    from ultralytics import __version__ as VERSION  # noqa: N812 -- a constant here, whatever it is called there
    from ultralytics.nn.modules.conv import Conv
    from ultralytics.nn.modules.head import Detect
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils import DEFAULT_CFG_DICT, ROOT, YAML
    from ultralytics.utils.loss import v8DetectionLoss

__all__ = ["CLASS", "CLASSES", "STRIDES", "VERSION", "Loss", "build", "give_activations", "pictures", "plain"]

CLASS: Final = "opacity"  # what RSNA's boxes surround
CLASSES: Final = {0: CLASS}
CHANNELS: Final = 3
STRIDES: Final = (8, 16, 32)  # pixels of the picture a cell of each map; a picture's edge is a multiple of the last
BINS: Final = 16  # of the distribution of a box's edge
GAINS: Final = {name: float(DEFAULT_CFG_DICT[name]) for name in ("box", "cls", "dfl")}

Raw = Mapping[str, Any]


class _Head(Detect):  # type: ignore[misc]
    """Ultralytics' head, which also takes the empty share of a batch; it could not infer a size from no elements."""

    def forward_head(self, x: list[torch.Tensor], box_head: Any = None, cls_head: Any = None) -> dict[str, Any]:
        """Return the maps of all levels side by side, as Ultralytics does."""

        def flat(head: Any) -> torch.Tensor:
            return torch.cat([part(level).flatten(2) for part, level in zip(head, x, strict=True)], dim=-1)

        shapes = [level.detach() for level in x]  # all that is looked at; FSDP2 warns of views with gradients
        return {"boxes": flat(box_head), "scores": flat(cls_head), "feats": shapes}


def plain() -> nn.Module:
    """Make the network of Ultralytics' own classes alone, which a checkpoint for others may hold; prints nothing."""
    description = YAML.load(ROOT / "cfg/models/v8/yolov8.yaml")
    description |= {"scale": "n", "yaml_file": "yolov8n.yaml", "nc": len(CLASSES)}
    network: Any = DetectionModel(description, ch=CHANNELS, verbose=False)
    network.names, network.task = dict(CLASSES), "detect"
    made: nn.Module = network
    return made


def build() -> nn.Module:
    """Make yolov8n for one class, of torch's default type, its parameters drawn from torch's global generator.

    Of images (b, 3, size, size) in [0, 1], size a multiple of 32, and `a` cells on the three maps together, it returns
    in training mode {"boxes": (b, 64, a) logits, "scores": (b, 1, a) logits, "feats": the maps}; in evaluation mode
    a pair of (b, 5, a), centre x, centre y, width, height in pixels and score, and the same dict. b may be 0.
    """
    network = plain()
    head: Any = network.model[-1]  # type: ignore[index]
    head.__class__ = _Head
    return network


def give_activations(network: nn.Module) -> list[nn.Module]:
    """Take the SiLU behind each batch norm out of the network; returns the batch norms, which have to apply it.

    The names and shapes of parameters and buffers stay as they are.
    """
    found = [one for one in network.modules() if isinstance(one, Conv) and type(one.act) is nn.SiLU]
    for one in found:
        one.act = nn.Identity()
    return [one.bn for one in found]


def pictures(images: torch.Tensor) -> torch.Tensor:
    """Return what the network sees of the loader's images (b, 1, s, s), black -2 and white 2: (b, 3, s, s) in [0, 1].

    The channels share their memory.
    """
    return (images * 0.25 + 0.5).expand(-1, CHANNELS, -1, -1)


class _Remembering:
    """Ultralytics' assigner of boxes to cells; `total` is the sum of the target scores that it gave last."""

    def __init__(self, assigner: Any) -> None:
        self._assigner = assigner
        self.total = torch.zeros(())

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        assigned = self._assigner(*arguments, **named)
        self.total = assigned[2].sum()
        return assigned


class Loss:
    """Ultralytics' v8DetectionLoss with its default gains, summed and not normalised, so that shares add up."""

    def __call__(self, raw: Raw | tuple[Any, Raw], boxes: Sequence[NDArray[Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss of a batch and its weight, both 0-d tensors; nothing waits for the device.

        `raw` is what the network returned, in either mode. `boxes` holds for each image an array (k, 4), k from 0: x, y
        of the upper left corner, width and height as fractions of the picture's edge. The weight is the sum S of the
        target scores, 0 without boxes. Ultralytics' own loss of this batch is (total / max(S, 1)) * len(boxes). The
        gradient reaches every parameter that is trained, also without boxes, and is 0 for a batch without images.
        """
        predictions = raw[1] if isinstance(raw, tuple) else raw
        scores = predictions["scores"]
        criterion = _criterion(scores.device, torch.get_default_dtype())
        parts = criterion.get_assigned_targets_and_loss(predictions, _batch(boxes))[1]
        weight = criterion.assigner.total
        return parts.sum() * weight.clamp(min=1), weight


@cache
def _criterion(device: torch.device, dtype: torch.dtype) -> Any:
    """Ultralytics' loss on a device; it is told of the network only what it reads there at its making."""
    head = SimpleNamespace(stride=torch.tensor(STRIDES, dtype=dtype, device=device), nc=len(CLASSES), reg_max=BINS)
    network = SimpleNamespace(
        parameters=lambda: iter([torch.empty(0, device=device)]), args=SimpleNamespace(**GAINS), model=[head]
    )
    criterion = v8DetectionLoss(network)
    criterion.assigner = _Remembering(criterion.assigner)
    return criterion


def _batch(boxes: Sequence[NDArray[Any]]) -> dict[str, torch.Tensor]:
    """Boxes as Ultralytics' batches have them: one row a box, with the number of its image, around its centre."""
    counts = [len(found) for found in boxes]
    rows = np.concatenate([np.zeros((0, 4)), *(np.reshape(found, (-1, 4)) for found in boxes)])
    rows = np.concatenate([rows[:, :2] + rows[:, 2:] / 2, rows[:, 2:]], axis=1)
    dtype = torch.get_default_dtype()  # that of the table into which Ultralytics copies them
    return {
        "batch_idx": torch.tensor(np.repeat(np.arange(len(boxes)), counts), dtype=dtype),
        "cls": torch.zeros(len(rows), dtype=dtype),
        "bboxes": torch.tensor(rows, dtype=dtype),
    }
