"""The detector's weights: read from files that may be anybody's, fitted to one class, written for everybody."""

import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from pneumo.errors import PneumoError, Refused
from pneumo.models import MODELS
from pneumo.models.pickles import ADVICE, read_size, read_tensors
from pneumo.study.results import write_atomic

State = Mapping[str, torch.Tensor]

_CLASS_BRANCH = ".cv3."  # the head's part whose widths, not only its ends, depend on the number of classes


@dataclass(frozen=True, slots=True)
class Misfit:
    """A tensor of the network that stays as it was initialised; `theirs` is None where the weights lack it."""

    name: str
    ours: tuple[int, ...]
    theirs: tuple[int, ...] | None

    @property
    def layer(self) -> str:
        """The part of the head's class branch that it belongs to, such as model.22.cv3.0.2."""
        return ".".join(self.name.split(".")[:5])

    @property
    def shapes(self) -> str:
        """Both shapes, for a user."""
        found = "absent" if self.theirs is None else _shape(self.theirs)
        return f"{_shape(self.ours)} here, {found} there"


@dataclass(frozen=True, slots=True)
class Fitted:
    """What `fit` did: the names of what was taken, what stays initialised, and names that the network has not."""

    taken: tuple[str, ...]
    initialised: tuple[Misfit, ...]
    unknown: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """What a user is told."""
        count = len(self.taken) + len(self.initialised)
        if not self.initialised:
            return f"All {count} tensors of the detector were taken from the weights."
        layers: dict[str, str] = {}
        for misfit in self.initialised:
            layers.setdefault(misfit.layer, f"{misfit.layer} ({misfit.shapes})")
        return (
            f"{len(self.taken)} of the detector's {count} tensors were taken from the weights; these layers do not fit "
            f"one class and are initialised: {', '.join(layers.values())}."
        )


def read(path: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a YOLOv8 detector: a checkpoint of Ultralytics, or a .safetensors file of ours.

    Returns them by the names of the network's state_dict, floating-point ones as float32. Nothing in the file is
    executed. Raises Refused where it is neither, with what it is where that can be told.
    """
    return _read_safetensors(path) if path.suffix == ".safetensors" else read_tensors(path)


def described(path: Path) -> tuple[str | None, int | None]:
    """Return what a file of weights says of itself: its model's name, and the edge of the model's pictures in pixels.

    None is what it does not say. Raises Refused as `read`.
    """
    if path.suffix != ".safetensors":
        size, multiple = read_size(path), MODELS["yolo"].usual.multiple
        return "yolo", size and -(-size // multiple) * multiple  # as Ultralytics rounds it when it predicts
    try:
        with safe_open(path, "np") as file:
            said = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None
    written = said.get("size", "")
    return said.get("model"), int(written) if re.fullmatch("[1-9][0-9]{0,8}", written) else None


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        found: dict[str, torch.Tensor] = safetensors.torch.load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None
    return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}


def _unreadable(path: Path, error: Exception) -> Refused:
    if isinstance(error, OSError):
        return Refused(f"{path} cannot be read ({error.strerror or error}); {ADVICE}.")
    return Refused(f"{path} is no safetensors file, or only a part of one; {ADVICE}.")


def fit(network: nn.Module, weights: State) -> Fitted:
    """Load into a network of `yolov8.build` the weights that have its names and shapes.

    What depends on the number of classes may differ and then stays initialised. Raises Refused where anything else
    does: such weights are of another network.
    """
    ours = network.state_dict()
    fits = {name: value for name, value in weights.items() if name in ours and value.shape == ours[name].shape}
    misfits = [
        Misfit(name, tuple(value.shape), tuple(weights[name].shape) if name in weights else None)
        for name, value in ours.items()
        if name not in fits
    ]
    wrong = [misfit for misfit in misfits if _CLASS_BRANCH not in misfit.name]
    if wrong:
        first = f"{wrong[0].name} ({wrong[0].shapes})"
        raise Refused(f"The weights are not YOLOv8n's: {first} and {len(wrong) - 1} more do not fit; {ADVICE}.")
    network.load_state_dict(fits, strict=False)
    return Fitted(tuple(fits), tuple(misfits), tuple(name for name in weights if name not in ours))


def write_safetensors(weights: State, path: Path, *, model: str, size: int) -> None:
    """Write tensors, contiguous and on the CPU, with what `described` finds; atomically."""
    write_atomic(path, safetensors.torch.save(dict(weights), metadata={"model": model, "size": str(size)}))


def write_pt(weights: State, path: Path, *, size: int, now: datetime | None = None) -> None:
    """Write the whole state of a network of `yolov8.build` as a checkpoint that `ultralytics.YOLO(path)` loads.

    It is in float32, of Ultralytics' and torch's own classes alone, and predicts at `size` pixels unless told
    otherwise. Written atomically. Raises Refused where the state is not whole, PneumoError where the file cannot be
    written.
    """
    from pneumo.models.yolov8 import VERSION

    network = _plain(weights).requires_grad_(False)
    unused = dict.fromkeys(("best_fitness", "ema", "updates", "optimizer", "scaler"))
    checkpoint = {
        "epoch": -1,  # finished, not one to go on from
        "model": network,
        **unused,
        "train_args": {"task": "detect", "imgsz": size},
        "date": (now or datetime.now(UTC)).isoformat(),
        "version": VERSION,
        "license": "AGPL-3.0 License (https://ultralytics.com/license)",
        "docs": "https://docs.ultralytics.com",
    }
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomic(path, buffer.getvalue())


def write_onnx(weights: State, path: Path, *, size: int) -> None:
    """Write the whole state of a network of `yolov8.build` as ONNX: images (b, 3, size, size) in [0, 1] to (b, 5, a).

    The answer is that of evaluation mode, before the suppression. Its metadata are Ultralytics': `YOLO(path)` has the
    size and the class from them. Raises Refused where the package `onnx`, which nothing else of ours needs, is not
    installed, PneumoError where torch cannot export the network with it, and otherwise as `write_pt`.
    """
    from pneumo.models.yolov8 import CHANNELS, CLASSES, STRIDES

    try:
        import onnx  # which torch needs, and says so less clearly
    except ImportError:
        raise Refused("Writing ONNX needs the package onnx; install it with pip install onnx.") from None
    network: Any = _plain(weights)
    network.model[-1].export = True  # the answer alone, without the maps
    try:
        model = onnx.load_model_from_string(_exported(network, size))
    except Exception as error:  # of many kinds: torch and onnx have to fit each other
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise PneumoError(f"torch {torch.__version__} cannot write the detector as ONNX: {reason}") from error
    facts = {"task": "detect", "stride": STRIDES[-1], "imgsz": [size, size], "names": CLASSES, "batch": 1}
    facts |= {"channels": CHANNELS, "args": {"dynamic": False}}
    onnx.helper.set_model_props(model, {name: str(value) for name, value in facts.items()})
    # Where an answer's first dimension has a name, Ultralytics takes the pictures' size for free as well, and not ours.
    model.graph.output[0].type.tensor_type.shape.dim[0].Clear()
    write_atomic(path, model.SerializeToString())


def _exported(network: nn.Module, size: int) -> bytes:
    from pneumo.models.yolov8 import CHANNELS

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter, and about sizes that are constants here
        torch.onnx.export(
            network,
            (torch.zeros(1, CHANNELS, size, size, dtype=torch.float32),),
            buffer,  # type: ignore[arg-type]  # which takes it, whatever it says
            input_names=["images"],
            output_names=["boxes"],
            dynamic_axes={"images": {0: "batch"}, "boxes": {0: "batch"}},
            dynamo=False,  # the other one needs yet another package
        )
    return buffer.getvalue()


def _plain(weights: State) -> nn.Module:
    """Ultralytics' own network with this state, in float32 and evaluation mode."""
    from pneumo.models.yolov8 import plain

    with torch.random.fork_rng(devices=[]):  # what it is initialised with is overwritten
        network = plain().float().eval()
    fitted = fit(network, weights)
    if fitted.initialised:
        raise Refused(f"The weights are not a whole detector's: {fitted.initialised[0].name} does not fit; {ADVICE}.")
    return network


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"
