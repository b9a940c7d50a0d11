"""Thresholded attention of DINO against arrays measured on the reference."""

import math

import numpy as np
import pytest

from shared.pictures.attention import attended_patches
from tests.golden.golden_file import GoldenFile

GOLDEN = GoldenFile("dino")
MASKS = [case for case in GOLDEN.cases("attn_th/") if case.startswith("mask_")]


@pytest.mark.parametrize("case", MASKS)
def test_attended_patches(case):
    threshold = float(case.removeprefix("mask_"))
    attention, expected = GOLDEN.tensor("attn_th/in"), GOLDEN[f"attn_th/{case}"]
    scale = math.isqrt(expected[0].size // attention.shape[1])
    rows, columns = expected.shape[1] // scale, expected.shape[2] // scale
    mask = attended_patches(attention.unflatten(1, (rows, columns)), threshold).numpy()
    enlarged = mask.repeat(scale, axis=1).repeat(scale, axis=2)
    flipped = (enlarged != expected.astype(bool)).sum() / scale**2  # ties may fall either way
    assert flipped <= len(attention)
    np.testing.assert_array_equal(enlarged.any(axis=(1, 2)), expected.any(axis=(1, 2)))


def test_every_array_was_compared():
    """Runs last: fails when an array of the group was never read."""
    assert MASKS
    assert GOLDEN.unread("attn_th/") == []
