"""The benchmark of XCiT's claim finds where two costs cross."""

import pytest

from tests.benchmarks.bench_xcit import crossing


def test_crossing_point_of_a_linear_and_a_quadratic_cost():
    sides = [64, 128, 256, 512]
    linear = [3.0 * (side / 100) ** 2 for side in sides]
    quadratic = [(side / 100) ** 4 for side in sides]
    assert crossing(sides, linear, quadratic) == pytest.approx(100 * 3**0.5, rel=1e-6)
    assert crossing(sides[2:], linear[2:], quadratic[2:]) == 256
    assert crossing(sides[:2], linear[:2], quadratic[:2]) is None
