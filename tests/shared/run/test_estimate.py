from types import SimpleNamespace

from shared.run import estimate
from shared.run.estimate import progress


def test_a_long_pass_says_what_is_left_and_a_short_one_nothing(capsys, monkeypatch):
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: now.s)

    def batches(number, seconds):
        for i in range(number):
            yield i
            now.s += seconds

    assert list(progress(batches(4, 1), "features", 4, 400)) == [0, 1, 2, 3]
    assert capsys.readouterr().out == ""
    assert len(list(progress(batches(40, 4), "features", 40, 4000))) == 40
    assert capsys.readouterr().out.splitlines() == [
        "features: 8% of 4,000 images, about 2 min left",
        "features: 48% of 4,000 images, about 84 s left",
        "features: 88% of 4,000 images, about 20 s left",
    ]
