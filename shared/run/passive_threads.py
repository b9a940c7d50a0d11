"""Lets idle OpenMP threads sleep soon, if it is imported before torch: for scripts alone, since it sets variables.

Threads that spin while they wait keep the core from whoever has the rest of the work: beside two other processes on
two cores a step of DINO's demonstration took 2.2 s, with threads that sleep 0.8 s, with one thread 0.8 s. Threads that
sleep at once are woken for each of the many small operations of such a step, which costs a free machine more than a
quarter of its speed; so they spin for tens of microseconds first (libgomp's ``GOMP_SPINCOUNT``, its unit a turn of its
waiting loop).
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
