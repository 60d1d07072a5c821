"""Train the same pneumonia models serially, with DDP, FSDP and Horovod in one MPI world, and account for the time."""

__version__ = "0.1.0"
