"""Trainings over the backend `pneumo`, a module for each kind; comm_training_job.py runs them."""
