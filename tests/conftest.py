"""One thread per process: the tests' processes share the cores already, and threads that wait for others cost more."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch; child processes take it over
