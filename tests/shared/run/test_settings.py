import argparse

import numpy as np
import pytest

from shared.optimisation.schedules import cosine_schedule
from shared.run.settings import Advice, long_freeze, long_warmup, more_than_data, slow_average, tell_settings


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
