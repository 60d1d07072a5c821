"""How cores are given to ranks; what needs ranks is in tests/mpi/test_world.py."""

import pytest

from pneumo.world import World


def member(local_rank: int, local_size: int, cores: tuple[int, ...]) -> World:
    """A rank of a node, without MPI."""
    made = World.__new__(World)
    made.local_rank, made.local_size, made.cores = local_rank, local_size, cores
    return made


@pytest.mark.parametrize(
    ("ranks", "threads", "expected", "words"),
    [
        (2, 1, [{0}, {2}, {0, 2, 1, 3}], "1 core a rank"),
        (2, 2, [{0, 2}, {1, 3}, {0, 2, 1, 3}], "2 cores a rank"),
        (3, 2, [{0, 2, 1, 3}] * 3, "all 4 cores"),
    ],
)
def test_cores_are_given_out_in_their_order(ranks: int, threads: int, expected: list[set[int]], words: str) -> None:
    """One of each physical core first, where the world has them in that order: here 0 and 2, then 1 and 3."""
    members = [member(rank, 3, (0, 2, 1, 3)) for rank in range(3)]
    assert [m.cores_for(ranks, threads) for m in members] == expected
    assert {m.binding(ranks, threads) for m in members} == {words}
