from tests.benchmarks import gpu


def test_jobs_share_the_time_and_each_tells_how_it_ended(monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_S", 0.5)
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
