"""What preprocessing took, in words; tests/mpi/test_preprocess.py sees whether it is measured rightly."""

from pneumo.data.effort import sentence
from pneumo.study.schema import Effort


def test_shares_are_those_of_all_ranks_together() -> None:
    efforts = [
        Effort(data_s=2.0, dask_s=1.0, comm_s=0.0, other_s=0.5),
        Effort(data_s=1.0, dask_s=0.5, comm_s=5.0, other_s=0.0),
    ]
    assert sentence(efforts) == (
        "10.0 rank-seconds on 2 rank(s): 30 % images, 15 % Dask around them, 50 % waiting for other ranks, 5 % other"
    )


def test_what_took_no_time_is_not_said() -> None:
    opened = Effort(data_s=0.0, dask_s=0.0, comm_s=0.0, other_s=0.25)
    assert sentence([opened]) == "0.2 rank-seconds on 1 rank(s): 100 % other"
