"""Lets idle OpenMP threads sleep soon, if it is imported before torch: for scripts alone, since it sets variables.

Threads that spin while they wait keep the core from whoever has the rest of the work; those that sleep at once have to
be woken for each of the many small operations of a step. So they spin for 3,000 turns of libgomp's waiting loop first
(docs/demos.md has what each costs on a busy and on a free machine).
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
