"""Where a result comes from: commit, versions, machine, and what data it saw."""

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pneumo import doctor
from pneumo.data.rsna import count_reasons
from pneumo.study.schema import DataFacts, Part

if TYPE_CHECKING:
    from pneumo.data.split import Split
    from pneumo.data.store import Store

_ENVIRONMENT = ("OMP_", "MKL_", "GLOO_", "NCCL_", "HOROVOD_", "MALLOC_", "OMPI_MCA_", "PRTE_MCA_", "OPENBLAS_")


def collect(mpi: str) -> dict[str, Any]:
    """Return the commit, what the doctor says of this machine, and the environment that matters, as JSON values."""
    return {
        "commit": _commit(),
        "mpi": mpi,
        **doctor.facts(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_ENVIRONMENT) and "/" not in v},
    }


def data_facts(store: "Store", split: "Split", *, by_person: bool) -> DataFacts:
    """Return the counts of a store and of its split."""
    labels = store.index["label"].to_numpy()
    parts = {
        name: Part(images=len(where), positives=int(np.sum(labels[where])))
        for name, where in (("train", split.train), ("calibrate", split.calibrate), ("validate", split.validate))
    }
    return DataFacts(
        images=len(labels),
        patients=len(labels),
        classes={str(k): int(v) for k, v in store.index["detailed"].value_counts().items()},
        parts=parts,
        quarantine=count_reasons(store.quarantine),
        fingerprint=store.fingerprint,
        natural_prevalence=float(np.mean(labels)) if len(labels) else 0.0,
        split_by="person" if by_person else "image",
    )


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
