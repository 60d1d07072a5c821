"""What is installed, read from files: nothing of it is imported, so it costs nothing and settles nothing."""

import importlib.util
import json
from importlib import metadata
from pathlib import Path
from typing import Any


def version(package: str) -> str | None:
    """The version of an installed distribution, or None; nothing is imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def horovod_facts() -> dict[str, Any] | None:
    """Horovod's version, the torch that it was built against, and what is built in; None without it.

    Nothing of it is imported or started: what it was built with shows in the names that its library asks for.
    """
    installed = version("horovod")
    spec = importlib.util.find_spec("horovod") if installed else None
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    library = next(iter(folder.glob("torch/mpi_lib_v2*.so")), None)
    content = library.read_bytes() if library else b""
    try:
        built_against = json.loads((folder / "metadata.json").read_text()).get("pytorch")
    except (OSError, ValueError):
        built_against = None
    marks = {"mpi": b"libmpi", "nccl": b"ncclAllReduce", "gloo": b"N4gloo"}
    return {
        "version": installed,
        "torch": built_against,
        "built_in": [name for name, mark in marks.items() if mark in content],
    }


def native_library() -> Path | None:
    """The native communication layer's library, None where it is not built."""
    return next(iter(sorted((Path(__file__).parent / "comm").glob("_native.*.so"))), None)


def layers_library() -> Path | None:
    """The library of the detector's kernels, None where it is not built."""
    library = Path(__file__).parent / "models/libpneumo_layers.so"
    return library if library.exists() else None


def native_facts() -> dict[str, Any] | None:
    """What the native communication layer can do, None where it is not built; nothing of it is loaded."""
    library = native_library()
    if library is None:
        return None
    return {"mpi": bool(list(library.parent.glob("_mpi.*.so"))), "layers": layers_library() is not None}


def native_missing() -> str | None:
    """Why the comm pneumo cannot be used, None where it can."""
    return None if native_library() else "the native layer is not built; ./launch/setup.sh builds it"


def horovod_missing(device: str = "cpu") -> str | None:
    """Why Horovod cannot be used for tensors on a kind of device, None where it can."""
    # Looked up in files: importing any of Horovod imports torch, and threads are limited only after planning.
    found = horovod_facts()
    if why := unusable_horovod(found, version("torch")):
        return why
    if device == "cuda" and found is not None and "nccl" not in found["built_in"]:
        return "the installed Horovod was built without NCCL, for CPUs; ./launch/setup.sh builds it for GPUs with nvcc"
    return None


def unusable_horovod(found: dict[str, Any] | None, torch: str | None) -> str | None:
    """Why a Horovod with these `horovod_facts` cannot be used with this version of torch, None where it can.

    Its library is bound to the torch that it was built with: another one does not even load it.
    """
    again = "./launch/setup.sh builds it"
    if found is None:
        return f"Horovod is not installed; {again}"
    if "mpi" not in found["built_in"]:
        return f"the installed Horovod was built without PyTorch or without MPI; {again} anew"
    built_for = str(found["torch"] or "").split("+")[0]
    if built_for and built_for != str(torch).split("+")[0]:
        return f"Horovod was built for torch {found['torch']}, and torch {torch} is installed; {again} anew"
    return None
