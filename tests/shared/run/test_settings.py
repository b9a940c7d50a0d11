import argparse

import numpy as np
import pytest

from shared.optimisation.schedules import cosine_schedule
from shared.run.settings import Advice, long_freeze, long_warmup, more_than_data, slow_average, tell_settings


def test_a_warmup_of_more_than_a_third_of_the_run_is_named():
    assert long_warmup("--warmup", 10, 30) is None
    assert str(long_warmup("--warmup", 10, 20)) == "--warmup 10 is a warm-up for 50% of the 20 epochs: take --warmup 2"
    assert str(long_warmup("--warmup_steps", 300, 500, "steps")).endswith(
        "60% of the 500 steps: take --warmup_steps 50"
    )


def test_layers_that_are_frozen_for_more_than_a_tenth_of_the_run_are_named():
    assert long_freeze("--freeze", 30, 300) is None
    sentence = "--freeze 313 is more than a tenth of the 300 steps: take --freeze 30"
    assert str(long_freeze("--freeze", 313, 300)) == sentence


def test_an_average_that_keeps_more_than_half_of_its_first_weights_is_named():
    kept = 1.0
    for momentum in (0.9, 0.9, 0.8):
        kept *= momentum
    sentence = "--m 0.9: after 3 steps the teacher still keeps 65% of its initial weights: take --m 0.5"
    assert round(kept, 2) == 0.65 and str(slow_average("--m", np.array([0.9, 0.9, 0.8]))) == sentence
    assert slow_average("--m", np.array([0.9, 0.9, 0.6])) is None
    advice = slow_average("--m", np.full(300, 0.9999), "moving average", last=1.0)
    assert str(advice).endswith("97% of its initial weights: take --m 0.97 1.0") and advice.take == [0.97, 1.0]


def test_more_outputs_than_images_are_named():
    assert more_than_data("--k", 240, 240) is None
    assert str(more_than_data("--k", 241, 240)) == "--k 241 is more than the 240 images: take --k 24"
    assert str(more_than_data("--k", [3000, 20], 240)) == "--k 3000 20 is more than the 240 images: take --k 24 24"
    assert str(more_than_data("--queue", 512, 240, take=64, what="chunks")).endswith("240 chunks: take --queue 64")


@pytest.mark.parametrize("size", [1, 3, 10, 47, 300, 5000])
def test_the_value_to_take_is_no_longer_named(size):
    def advised(sentence):
        return sentence.take

    assert long_warmup("-f", advised(long_warmup("-f", size, size)), size) is None
    assert long_freeze("-f", advised(long_freeze("-f", size, size)), size) is None
    momentum = advised(slow_average("-f", np.ones(size)))
    assert slow_average("-f", np.full(size, momentum)) is None
    assert slow_average("-f", cosine_schedule(momentum, 1.0, size, 1)) is None
    assert more_than_data("-f", advised(more_than_data("-f", size + 2, size + 1)), size + 1) is None


def test_advice_is_told_or_taken_and_a_set_flag_stays(capsys):
    advice = (None, Advice("--k", "--k 9 is much", 2), Advice("--m", "--m 8 is slow", [1, 1.0]))
    args = argparse.Namespace(k=9, m=8, other=3, data_path="pictures")
    tell_settings(args, *advice)
    assert (args.k, args.m) == (9, 8)
    assert capsys.readouterr().out == "NOTE: --k 9 is much: take --k 2\nNOTE: --m 8 is slow: take --m 1 1.0\n"
    args.small_data = False
    tell_settings(args, advice[1])
    assert capsys.readouterr().out == "NOTE: --k 9 is much: take --k 2, or take --small_data\n"
    args.small_data, args.unset = True, {"m": 8, "other": 4}
    tell_settings(args, *advice)
    assert (args.k, args.m) == (9, [1, 1.0])
    told = ["NOTE: --k 9 is much: take --k 2", "--small_data: --m 8 -> 1 1.0", "--small_data: --other 4 -> 3"]
    assert capsys.readouterr().out.splitlines() == told
