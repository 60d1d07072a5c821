"""The tensors in an Ultralytics checkpoint, which is a pickle of whole modules, with nothing of the file executed.

torch's unpickler for weights only makes objects of the classes that it is allowed, and calls them with what the file
says. So it is given none of the real ones (Ultralytics' DetectionModel evaluates text from its arguments): every name
on the list stands for a class of ours that does nothing but keep the state that the file gives to it. What is on no
list ends the reading before anything is made of it.
"""

import io
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import serialization

from pneumo.errors import Refused

ADVICE: Final = "name a YOLOv8n detection checkpoint"
NETWORK: Final = "ultralytics.nn.tasks.DetectionModel"
_LAYERS = (
    *("activation.SiLU", "batchnorm.BatchNorm2d", "container.ModuleList", "container.Sequential", "conv.Conv2d"),
    *("linear.Identity", "loss.BCEWithLogitsLoss", "pooling.MaxPool2d", "upsampling.Upsample"),
)
_BLOCKS = ("block.Bottleneck", "block.C2f", "block.DFL", "block.SPPF", "conv.Concat", "conv.Conv", "head.Detect")
# What a YOLOv8 detection checkpoint names: its modules, in the places where versions 8.0 to 8.4 had them; of the state
# of a training its loss, settings, paths and NumPy's numbers.
ALLOWED: Final = (
    NETWORK,
    *(f"torch.nn.modules.{name}" for name in _LAYERS),
    *(f"ultralytics.nn.modules.{name}" for name in _BLOCKS),
    *(f"ultralytics.nn.modules.{name.split('.')[1]}" for name in _BLOCKS),  # one file until 8.0.90
    *(f"ultralytics.utils.loss.{name}" for name in ("v8DetectionLoss", "BboxLoss", "DFLoss")),
    "ultralytics.utils.tal.TaskAlignedAssigner",
    *(f"ultralytics.{place}utils.IterableSimpleNamespace" for place in ("", "yolo.")),
    *(f"pathlib.{place}{name}" for place in ("", "_local.") for name in ("PosixPath", "WindowsPath")),
    *(f"numpy.{place}.multiarray.scalar" for place in ("core", "_core")),
    "numpy.dtype",
)
MOST_MODULES: Final = 10_000  # of a file that means no harm; YOLOv8n has 225
MOST_NUMBERS: Final = 100_000_000  # YOLOv8x, the largest, has 68 million


class _StandIn:
    """Takes any arguments and does nothing with them; keeps the state that the file gives. It has no __dict__, so a
    file cannot give it a method.
    """

    __slots__ = ("state",)
    state: Any
    kind = ""

    def __new__(cls, *_arguments: Any) -> "_StandIn":
        made = super().__new__(cls)
        made.state = None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


_STAND_INS = [(type(name.split(".")[-1], (_StandIn,), {"__slots__": (), "kind": name}), name) for name in ALLOWED]


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the state of the network in a checkpoint: its averaged weights (`ema`) where it has them, else `model`.

    Names are those of the network's own state_dict, floating-point numbers are float32. Raises Refused, having executed
    nothing, where the file is no such checkpoint.
    """
    loaded = _loaded(path)
    network = next((found for key in ("ema", "model") if (found := _entry(loaded, key)) is not None), None)
    if not isinstance(network, _StandIn) or network.kind != NETWORK:
        raise Refused(f"{path} holds no detection model of Ultralytics; {ADVICE}.")
    try:
        return _float32(_tensors(network))
    except (_UnlikelyError, RuntimeError) as error:
        why = _shown(str(error))
        raise Refused(f"{path} is not built as Ultralytics builds a model ({why}); {ADVICE}.") from None


def read_size(path: Path) -> int | None:
    """Read the edge in pixels of the pictures that a checkpoint was trained with, None where it does not say.

    Raises Refused as `read_tensors`.
    """
    size = _entry(_entry(_loaded(path), "train_args"), "imgsz")
    return size if type(size) is int and size > 0 else None


def _loaded(path: Path) -> Any:
    """What the file's pickle holds, of plain containers, tensors and stand-ins."""
    content = _content(path)
    with _only_stand_ins():
        foreign = _foreign_names(path, content)
        if foreign:
            raise Refused(_why_not(path, foreign))
        return _load(path, content)


def _content(path: Path) -> bytes:
    """The file's bytes, if they are an archive as torch writes it: nothing compressed, so nothing grows."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}); {ADVICE}.") from None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        raise Refused(f"{path} is no checkpoint of PyTorch, or only a part of one; {ADVICE}.") from None
    pickled = [entry for entry in entries if entry.filename.split("/")[-1] == "data.pkl"]
    if not pickled or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise Refused(f"{path} is a zip file, and no checkpoint of PyTorch; {ADVICE}.")
    return content


@contextmanager
def _only_stand_ins() -> Iterator[None]:
    """torch's list of what a file may name is for the process: others' entries are put aside meanwhile."""
    before = serialization.get_safe_globals()
    serialization.clear_safe_globals()
    try:
        with serialization.safe_globals(list(_STAND_INS)):
            yield
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(before)


def _foreign_names(path: Path, content: bytes) -> list[str]:
    """What the pickle names beside what is allowed, found without running it; the loading itself also looks."""
    try:
        return sorted(serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content)))
    except Exception as error:  # whatever torch raises at a file that may hold anything
        raise _damaged(path) from error


def _load(path: Path, content: bytes) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # as above
        raise _damaged(path) from error


def _damaged(path: Path) -> Refused:
    return Refused(f"{path} is damaged, or holds more than weights, of which nothing was executed; {ADVICE}.")


def _why_not(path: Path, foreign: list[str]) -> str:
    """What kind of file it is that names these."""
    if any(name.startswith("models.") for name in foreign):
        return f"{path} is a YOLOv5 model, which is built otherwise; {ADVICE}."
    for place, what in (("tasks", "holds a {}, and no DetectionModel"), ("modules", "has layers of another model: {}")):
        found = [name.split(".")[-1] for name in foreign if name.startswith(f"ultralytics.nn.{place}.")]
        if found:
            return f"{path} {what.format(_shown(', '.join(found[:5])))}; {ADVICE}."
    return (
        f"{path} asks for {_shown(', '.join(foreign[:3]))}, which no weights need: nothing of it was executed, "
        f"and the file is not to be trusted; {ADVICE}."
    )


def _shown(text: str) -> str:
    """A file's own words, short and without what would steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:120])


class _UnlikelyError(Exception):
    """The file is not as Ultralytics writes it."""


def _entry(value: Any, key: str) -> Any:
    """An entry of a plain dict, by dict's own methods: what the file made of them is not asked."""
    return dict.get(value, key) if type(value) in (dict, OrderedDict) else None


def _tensors(network: _StandIn) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a network under the names of its state_dict."""
    found: dict[str, torch.Tensor] = {}
    waiting: list[tuple[str, Any]] = [("", network)]
    for _ in range(MOST_MODULES):
        if not waiting:
            return found
        prefix, module = waiting.pop()
        if not isinstance(module, _StandIn) or type(module.state) is not dict:
            raise _UnlikelyError(f"{prefix or 'the model'} is no module")
        noted = _entry(module.state, "_non_persistent_buffers_set")
        unsaved = noted if type(noted) is set else set()
        for kind in ("_parameters", "_buffers"):
            kept = {name: value for name, value in _named(module.state, kind) if name not in unsaved}
            found |= {f"{prefix}{name}": _plain(f"{prefix}{name}", value) for name, value in kept.items()}
        waiting += [(f"{prefix}{name}.", child) for name, child in _named(module.state, "_modules")]
    raise _UnlikelyError("it has modules without end")


def _named(state: Any, kind: str) -> Iterator[tuple[str, Any]]:
    """The entries of one of a module's dicts that are not None."""
    entries = _entry(state, kind)
    if type(entries) not in (dict, OrderedDict):
        raise _UnlikelyError(f"a module has no {kind}")
    for name, value in dict.items(entries):
        if type(name) is not str:
            raise _UnlikelyError(f"a name in {kind} is no text")
        if value is not None:
            yield name, value


def _plain(name: str, value: Any) -> torch.Tensor:
    """A tensor without what a file may hang on it; nothing is copied."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise _UnlikelyError(f"{name} is no tensor")
    tensor = torch.Tensor.detach(value)
    usual = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not usual or tensor.is_complex():
        raise _UnlikelyError(f"{name} is no plain tensor")
    return tensor


def _float32(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of their own; a tensor can claim more numbers than the file holds."""
    if sum(tensor.numel() for tensor in tensors.values()) > MOST_NUMBERS:
        raise _UnlikelyError("it has more numbers than any YOLOv8")
    kinds = {name: torch.float32 if tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
    return {
        name: tensor.to(kinds[name]).clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
