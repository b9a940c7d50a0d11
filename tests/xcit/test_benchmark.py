"""The benchmark of XCiT's claim runs, and finds where two costs cross."""

import json

import pytest

from tests.benchmarks import bench_xcit
from tests.benchmarks.bench_xcit import crossing


def test_crossing_point_of_a_linear_and_a_quadratic_cost():
    sides = [64, 128, 256, 512]
    linear = [3.0 * (side / 100) ** 2 for side in sides]
    quadratic = [(side / 100) ** 4 for side in sides]
    assert crossing(sides, linear, quadratic) == pytest.approx(100 * 3**0.5, rel=1e-6)
    assert crossing(sides[2:], linear[2:], quadratic[2:]) == 256
    assert crossing(sides[:2], linear[:2], quadratic[:2]) is None


def test_tables_and_picture(tmp_path, monkeypatch, small_networks, capsys):
    monkeypatch.setattr(bench_xcit, "in_a_process", bench_xcit.measure)
    files = ["--out", str(tmp_path / "bench.json"), "--picture", str(tmp_path / "bench.png")]
    flags = "--size nano_12 --sides 16 32 --rounds 1 --threads 1 --timm_side 0 --patch_sizes 8"
    bench_xcit.main([*flags.split(), *files])
    report = json.loads((tmp_path / "bench.json").read_text())
    assert len(report["scaling"]) == 8 and all(entry["seconds"] > 0 for entry in report["scaling"])
    assert (tmp_path / "bench.png").exists()
    assert "| training step | 8 | 32 |" in capsys.readouterr().out


@pytest.mark.slow
def test_both_implementations_take_turns(capsys):
    flags = "--size nano_12 --sides 32 --rounds 1 --threads 1 --timm_side 32 --timm_batch_size 2 --timm_rounds 1"
    report = bench_xcit.main([*flags.split(), "--no-compile"])
    assert len(report["beside_timm"]) == 4 and report["beside_timm"][0]["ratio"] > 0
    assert "| xcit_nano_12_p16 | forward | float32 |" in capsys.readouterr().out
