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
