"""Verdicts follow from the differences of the seeds, and the pages say what the stored results give."""

import pytest

from tests.evidence import claims


@pytest.mark.parametrize(
    ("differences", "within", "expected"),
    [
        ([1.0, 2.0, 3.0], None, claims.CONFIRMED),
        ([-1.0, -2.0, -3.0], None, claims.CONTRADICTED),
        ([-0.1, 8.0, 9.0], None, claims.CANNOT_TELL),  # a seed disagrees
        ([0.0, 2.0, 2.0], None, claims.CANNOT_TELL),
        ([4.0], None, claims.CANNOT_TELL),  # one seed
        ([0.2, -0.4, 0.6], 1, claims.CONFIRMED),
        ([-2.0, -2.5, -3.0], 1, claims.CONTRADICTED),
        ([-2.0, -2.5, 3.0], 1, claims.CANNOT_TELL),
        ([0.9, 0.9, 1.2], 1, claims.CANNOT_TELL),
    ],
)
def test_a_verdict_needs_all_seeds_and_more_than_the_standard_error(differences, within, expected):
    assert claims.verdict(differences, within=within) == expected


def test_a_claim_by_how_much_one_is_above_is_judged_by_what_is_beyond_that():
    assert claims.verdict([11.0, 12.0, 14.0], by=10) == claims.CONFIRMED
    assert claims.verdict([9.0, 12.0, 14.0], by=10) == claims.CANNOT_TELL
    assert claims.verdict([1.0, 2.0, 3.0], by=10) == claims.CONTRADICTED


def test_every_comparison_has_its_own_measure(monkeypatch):
    of_seeds = [
        {"variant": "ours", "acc1 4": 5.0, "acc1 16": 3.0},
        {"variant": "theirs", "acc1 4": 4.0, "acc1 16": 4.0},
    ]
    rows = [row | {"seed": seed} for row in of_seeds for seed in (0, 1)]
    monkeypatch.setattr(claims, "stored", lambda name: rows)
    claim = claims.Claim("both", results="dino_digits", ours="ours", theirs="theirs", metric=("acc1 4", "acc1 16"))
    assert [row.split(" | ")[2:4] for row in claim.seed_rows()] == [
        ["`acc1 4`", "+1.0, +1.0"],
        ["`acc1 16`", "-1.0, -1.0"],
    ]
    assert claim.verdict() == claims.CONTRADICTED  # by one of them


def test_a_flaw_of_the_comparison_leaves_no_verdict_but_that_the_test_cannot_tell():
    pair = {"results": "paws_digits", "ours": "4 labels", "theirs": "supervised, 4 labels", "metric": "knn_last"}
    assert claims.Claim("above", **pair, beside="top1").verdict() == claims.CONFIRMED
    assert claims.Claim("above", **pair, beside="top1", flaw="unequal").verdict() == claims.CANNOT_TELL
    assert claims.Claim("above", **pair | {"results": "not_run"}).verdict() == claims.NOT_TESTED
    assert claims.Claim("above", **pair | {"ours": "not run"}).verdict() == claims.NOT_TESTED


@pytest.mark.parametrize("method", claims.METHODS)
def test_the_pages_say_what_the_stored_results_give(method):
    for page, table in claims.pages(method).items():
        assert f"\n\n{table}\n" in page.read_text(), f"{page} differs: run make claims"


@pytest.mark.parametrize("name", sorted(path.stem for path in claims.RESULTS.glob("*.json")))
def test_stored_rows_tell_command_machine_and_versions(name):
    for row in claims.stored(name):
        assert row["command"] and {"torch", "python", "precision"} <= row["machine"].keys()
