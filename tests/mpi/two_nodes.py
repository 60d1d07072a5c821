"""Hosts by name only: what runs in two UTS namespaces looks like two nodes, and no network has to be made."""


def on_two_nodes(on_first: str) -> list[str]:
    """What to put before a command under mpirun: ranks for which the shell's test holds are on `nodea`, the others on
    `nodeb`.
    """
    script = (
        f"test {on_first} && name=nodea || name=nodeb; "
        'exec unshare --uts sh -c "hostname $name && exec \\"\\$@\\"" sh "$@"'
    )
    return ["sh", "-c", script, "sh"]
