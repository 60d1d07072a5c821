"""What a result says of where it comes from."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pneumo import provenance
from pneumo.data.split import Split


def test_a_path_in_the_environment_is_mentioned_and_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_MCA_somewhere", "/home/somebody/file")
    monkeypatch.setenv("OMPI_MCA_btl", "self,sm")
    monkeypatch.setenv("NOT_OURS", "x")
    found = provenance.collect("an MPI")["environment"]
    assert found["OMPI_MCA_somewhere"] == "(a path)"
    assert found["OMPI_MCA_btl"] == "self,sm"
    assert "NOT_OURS" not in found


def test_the_weights_are_known_by_their_hash(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    file.write_bytes(b"abc")
    found = provenance.collect("an MPI", file)["weights_sha256"]
    assert found == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2's example
    assert provenance.collect("an MPI")["weights_sha256"] is None


def test_patients_are_persons_where_a_mapping_tells_them() -> None:
    """Of five images a and b are of one person, c of another; d and e are not in the mapping, and their own."""
    index = pd.DataFrame({"patient": list("abcde"), "label": [0, 1, 0, 1, 0], "detailed": ["x"] * 5})
    store: Any = SimpleNamespace(index=index, quarantine=[], fingerprint="f")
    split = Split(np.array([0, 1]), np.array([2]), np.array([3, 4]))
    found = provenance.data_facts(store, split, {"a": "p", "b": "p", "c": "q"})
    assert (found.images, found.patients, found.split_by) == (5, 4, "person")
    found = provenance.data_facts(store, split, None)
    assert (found.images, found.patients, found.split_by) == (5, 5, "image")
