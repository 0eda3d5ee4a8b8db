"""One thread for each process of the tests, which run on all cores already."""

import os

# Before anything imports torch, and for the processes that tests start.
os.environ.setdefault('OMP_NUM_THREADS', '1')
