"""What is set for OpenMP's threads, beside what the caller has set."""

import os
import subprocess
import sys

import pytest

POLICY, SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["passive", "3000"]),
        ({POLICY: "active"}, ["active", "None"]),
        ({POLICY: ""}, ["", "None"]),
        ({SPINS: "7"}, ["passive", "7"]),
    ],
)
def test_threads_sleep_unless_the_caller_says_otherwise(given: dict[str, str], expected: list[str]) -> None:
    code = f"import os, shared.run.passive_threads; print(os.environ[{POLICY!r}], os.environ.get({SPINS!r}), sep=',')"
    environment = {name: value for name, value in os.environ.items() if name not in (POLICY, SPINS)} | given
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert printed.stdout.strip().split(",") == expected
