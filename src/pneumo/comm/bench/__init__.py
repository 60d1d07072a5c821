"""The benchmark of collectives: every library on the same buffers, in turns, in one MPI world."""
