"""A result on one sheet: validation images with what a run answered of them, and the curves of all runs."""
