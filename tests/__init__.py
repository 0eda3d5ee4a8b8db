"""One thread for each process of the tests: they run on all cores already, and more would only stand in each other's way."""

import os

# Before anything imports torch, and for the processes that tests start.
os.environ.setdefault('OMP_NUM_THREADS', '1')
