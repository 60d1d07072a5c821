"""Where a result comes from: commit, versions, machine, and what data it saw."""

import hashlib
import os
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pneumo import doctor
from pneumo.data.rsna import count_reasons
from pneumo.study.schema import DataFacts, Part

if TYPE_CHECKING:
    from pneumo.data.split import Split
    from pneumo.data.store import Store

_LIBRARIES = ("OMP_", "MKL_", "OPENBLAS_", "GLOO_", "NCCL_", "HOROVOD_", "OMPI_MCA_", "PRTE_MCA_", "MALLOC_")
_ENVIRONMENT = (*_LIBRARIES, "PNEUMO_")


def collect(mpi: str, weights: Path | None = None) -> dict[str, Any]:
    """Return the commit, what the doctor says of this machine, and the environment that matters, as JSON values; and
    the hash of the file of weights that the detector began with.
    """
    return {
        "commit": _commit(),
        "mpi": mpi,
        "weights_sha256": None if weights is None else _sha256(weights),
        **doctor.facts(),
        # No path of this machine goes into a result: that there was one may still explain it.
        "environment": {
            name: "(a path)" if "/" in value else value
            for name, value in sorted(os.environ.items())
            if name.startswith(_ENVIRONMENT)
        },
    }


def data_facts(store: "Store", split: "Split", mapping: Mapping[str, str] | None) -> DataFacts:
    """Return the counts of a store and of its split; `mapping` gives the person of an image, where it is known."""
    labels = store.index["label"].to_numpy()
    parts = {
        name: Part(images=len(where), positives=int(np.sum(labels[where])))
        for name, where in (("train", split.train), ("calibrate", split.calibrate), ("validate", split.validate))
    }
    return DataFacts(
        images=len(labels),
        patients=len({(mapping or {}).get(patient, patient) for patient in store.index["patient"]}),
        classes={str(k): int(v) for k, v in store.index["detailed"].value_counts().items()},
        parts=parts,
        quarantine=count_reasons(store.quarantine),
        fingerprint=store.fingerprint,
        natural_prevalence=float(np.mean(labels)) if len(labels) else 0.0,
        split_by="image" if mapping is None else "person",
    )


@cache
def _sha256(file: Path) -> str:
    """The hash of a file as it was when it was first asked for: a study says it once more at its end."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _commit() -> str | None:
    """The checkout's commit, with + where files differ from it; None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
