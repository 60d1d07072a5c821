"""When an installed Horovod cannot be used."""

import pytest

from pneumo import installed


def horovod(torch: str | None = "2.14.1+cu130", built_in: tuple[str, ...] = ("mpi",)) -> dict[str, object]:
    return {"version": "0.28.1", "torch": torch, "built_in": list(built_in)}


@pytest.mark.parametrize(
    ("found", "torch", "words"),
    [
        (None, "2.14.1", ["not installed", "setup.sh"]),
        (horovod(built_in=()), "2.14.1", ["without MPI"]),
        (horovod(), "2.15.0+cpu", ["2.14.1+cu130", "2.15.0+cpu", "setup.sh"]),
        (horovod(), None, ["2.14.1+cu130"]),
    ],
)
def test_an_unusable_horovod_is_explained(found: dict[str, object] | None, torch: str | None, words: list[str]) -> None:
    why = installed.unusable_horovod(found, torch)
    assert why is not None
    assert all(word in why for word in words)


@pytest.mark.parametrize("built_for", ["2.14.1", "2.14.1+cpu", "2.14.1+cu130", None])
def test_a_horovod_for_this_torch_can_be_used(built_for: str | None) -> None:
    """What stands behind the + is the build, which the metadata of the installed torch may leave out."""
    assert installed.unusable_horovod(horovod(built_for), "2.14.1") is None


def test_what_the_installation_says_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "horovod_facts", horovod)
    monkeypatch.setattr(installed, "version", lambda _package: "2.14.1")
    assert installed.horovod_missing() is None
    monkeypatch.setattr(installed, "version", lambda _package: "2.13.0")
    assert "2.13.0" in str(installed.horovod_missing())
