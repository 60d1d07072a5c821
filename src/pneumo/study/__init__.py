"""From the files of a result to figures and tables; knows neither torch nor MPI."""
