"""Lets idle OpenMP threads sleep, if it is imported before torch: for scripts alone, since it sets a variable.

Threads that spin while they wait keep the core from whoever has the rest of the work: beside two other processes on two
cores a step of DINO's demonstration took 2.2 s, with threads that sleep 0.8 s, with one thread 0.8 s.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
