"""Cases of failure of the backend `pneumo`, a module for each kind; comm_faults_job.py runs them."""
