"""Hosts by name only: what runs in two UTS namespaces looks like two nodes, and no network has to be made."""

import pytest
from harness import Result


def on_two_nodes(on_first: str) -> list[str]:
    """What to put before a command under mpirun: ranks for which the shell's test holds are on `nodea`, the others on
    `nodeb`.
    """
    script = (
        f"test {on_first} && name=nodea || name=nodeb; "
        'exec unshare --uts sh -c "hostname $name && exec \\"\\$@\\"" sh "$@"'
    )
    return ["sh", "-c", script, "sh"]


def skip_where_refused(done: Result) -> None:
    """Skip the test where the system did not allow such hosts."""
    if "unshare" in done.text and "not permitted" in done.text:
        pytest.skip("names of hosts are not allowed here")
