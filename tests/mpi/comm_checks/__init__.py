"""What tests/mpi/test_comm_collectives.py checks, on every rank of a world that comm_collectives_job.py starts.

A check is a function `check_*` of a module here. All ranks call it together, and it raises on any of them.
"""
