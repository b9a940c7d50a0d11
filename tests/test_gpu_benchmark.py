import argparse
import itertools
from collections.abc import Callable

from tests.benchmarks import gpu, steps

SIZE = argparse.Namespace(threads=1, device="cpu", launches=False, no_float32=False)


def make_step(kind: str, size: argparse.Namespace) -> Callable[[], float]:
    return lambda: 3.0


def test_every_kind_takes_its_turns():
    found = steps.take_turns(make_step, ["plain", "ours"], SIZE, rounds=3)
    assert found.losses == {kind: [3.0] * (steps.WARM_UP + 3) for kind in ("plain", "ours")}
    assert {kind: len(seconds) for kind, seconds in found.times.items()} == {"plain": 3, "ours": 3}


def test_seconds_and_product_rate_are_measured_beside_the_work(monkeypatch):
    """Not from another process, whose answer takes longer than a product on a GPU."""
    turns = {kind: steps.make_turn(make_step, kind, SIZE) for kind in ("ours", "products")}
    clock = itertools.count(step=0.5)
    monkeypatch.setattr(steps.time, "perf_counter", lambda: next(clock))
    assert turns["ours"]() == (0.5, 3.0)
    rows, times = steps.PRODUCTS["cpu"]
    assert turns["products"]() == (1.5, 2 * rows**3 * times / 0.5)


def test_the_loader_is_compared_with_the_fastest_step_of_ours():
    step = {"steps": {"plain": {"images_per_s": 900.0}, "ours": {"images_per_s": 300.0}}}
    results = {"DINO ViT-S/16, 64 images": {"result": step}}
    assert "not measured" in gpu.loader_beside_step(results)
    for rate, verdict in ((200.0, "does not keep up: 200"), (400.0, "keeps up: 400")):
        results["loader"] = {"result": {"loader_images_per_s": {"0": 100.0, "8": rate}}}
        assert gpu.loader_beside_step(results) == f"the loader {verdict} images/s with 8 workers, the step takes 300"


def test_jobs_share_the_time_and_each_tells_how_it_ended(monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_S", 0.5)
    monkeypatch.setattr(gpu, "MOST_S", 1000)
    jobs = {
        "works": "-c print(6*7)",
        "fails": "-c raise(SystemExit(3))",
        "hangs": "-c __import__('time').sleep(600)",
        "is late": "-c 1",
    }
    results = gpu.run_jobs(jobs, limit_s=5)
    states = {name: result["state"] for name, result in results.items()}
    assert states == {"works": "done", "fails": "failed", "hangs": "stopped", "is late": "no time left"}
    assert results["works"]["output"] == "42\n"
