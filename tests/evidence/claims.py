"""Verdicts on the papers' claims: what the differences of the stored results allow, seed by seed.

    python -m tests.evidence.claims             # one table of all papers
    make claims                                 # the same, and into README.md and RESULTS.md of every folder

A claim is *confirmed* if all seeds agree with it and the mean difference exceeds its standard error, *contradicted* if
all seeds agree on the opposite; else, with a single seed, or where the comparison itself has a flaw, *the test cannot
tell*. Where a claim says by how much one is above another, these are the differences less so much. Claims without
results are *not tested*.
"""

import argparse
import functools
import importlib
import json
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
METHODS = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if (ROOT / path.stem / "hub.py").exists())
RESULTS = ROOT / "tests/evidence/results"
CONFIRMED, CONTRADICTED, CANNOT_TELL, NOT_TESTED = "confirmed", "contradicted", "the test cannot tell", "not tested"
HEADER = "| claim | test | numbers | verdict |\n|---|---|---|---|"
SEEDS_HEADER = (
    "| claim | difference of | measure | each seed | mean ± standard error | it allows |\n|---|---|---|---|---|---|"
)


def decimals(metric: str) -> int:
    """One for per cent and what is as large, three for the rest."""
    per_cent = ("knn", "linear", "rank_me", "acc1", "bleu", "top1", "NDCG", "Recall", "MRR")
    per_cent += ("mass", "jaccard", "kept")
    return 1 if metric.startswith(per_cent) else 3


def standard_error(differences: Sequence[float]) -> float:
    """Of their mean; infinite for a single one."""
    return statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("inf")


def verdict(differences: Sequence[float], within: float | None = None, by: float = 0.0) -> str:
    """What the differences of the seeds, ours - theirs, allow to say of the claim that ours is above.

    Args:
        within: The claim is that there is no difference beyond this one, in either direction.
        by: The claim is that ours is above by more than this.
    """
    differences = [difference - by for difference in differences]
    mean, error = statistics.mean(differences), standard_error(differences)
    least, most = min(differences), max(differences)
    agree = least > 0 or most < 0
    if within is not None:
        if max(-least, most) <= within and abs(mean) + error <= within:
            return CONFIRMED
        return CONTRADICTED if agree and abs(mean) - error > within else CANNOT_TELL
    if not agree or abs(mean) <= error:  # of several differences that agree the mean always exceeds the error
        return CANNOT_TELL
    return CONFIRMED if mean > 0 else CONTRADICTED


@functools.cache
def stored(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, and how it is tested: by differences of two variants, otherwise, or not at all.

    Args:
        test: Data and measure, in words.
        results: Name of the stored results.
        ours: Variant that the claim says is above another one, or several of which it says the same.
        theirs: What it is compared with, or several: for each of ``ours`` its own, or all for a single one. By default
            the same variant.
        metric, beside: Keys of the results, ``metric`` a single one or that of each comparison; ``beside`` is that of
            ``theirs`` where it is another one.
        within: The claim is that the two differ by no more than this.
        by: The claim is that the first is above by more than this.
        flaw: Why the comparison cannot tell, whatever the differences are.
        numbers, found: Numbers and verdict of a test that has no seeds.
    """

    text: str
    test: str = ""
    results: str = ""
    ours: str | tuple[str, ...] = ""
    theirs: str | tuple[str, ...] = ()
    metric: str | tuple[str, ...] = ""
    beside: str = ""
    within: float | None = None
    by: float = 0.0
    flaw: str = ""
    numbers: str = ""
    found: str = NOT_TESTED

    def differences(self) -> list[tuple[str, str, str, list[tuple[float, float]]]]:
        """Both variants, what is measured, and (value of ours, value of theirs) of every seed, for each comparison.

        Nothing if a variant has not been run.
        """
        if not (self.results and (RESULTS / f"{self.results}.json").exists()):
            return []
        rows = stored(self.results)
        values = {(row["variant"], row.get("seed"), key): value for row in rows for key, value in row.items()}
        found = []
        sides = [as_tuple(names) for names in (self.ours, self.theirs or self.ours, self.metric)]
        if not {*sides[0], *sides[1]} <= {row["variant"] for row in rows}:
            return []
        longest = max(len(side) for side in sides)
        for ours, theirs, metric in zip(*(side * (longest // len(side)) for side in sides), strict=True):
            beside = self.beside or metric
            seeds = [seed for variant, seed, key in values if (variant, key) == (ours, metric)]
            of_theirs = [seed if (theirs, seed, beside) in values else None for seed in seeds]  # None: one for all
            pairs = [
                (values[ours, seed, metric], values[theirs, other, beside])
                for seed, other in zip(seeds, of_theirs, strict=True)
            ]
            found.append((ours, theirs, metric, pairs))
        return found

    def allows(self, differences: list[float]) -> str:
        return CANNOT_TELL if self.flaw else verdict(differences, self.within, self.by)

    def verdict(self) -> str:
        """Confirmed if every pair of variants confirms it, contradicted if one contradicts it."""
        verdicts = {self.allows([a - b for a, b in pairs]) for *_, pairs in self.differences()} or {self.found}
        return CONTRADICTED if CONTRADICTED in verdicts else verdicts.pop() if len(verdicts) == 1 else CANNOT_TELL

    def row(self) -> str:
        """Of the table of a README: both means (of a single pair), mean and standard error of the differences."""
        compared, text = self.differences(), []
        for *_, metric, pairs in compared:
            means = ", ".join(f"{statistics.mean(side):.{decimals(metric)}f}" for side in zip(*pairs, strict=True))
            difference = spread([a - b for a, b in pairs], decimals(metric))
            text.append(f"{means}: {difference}" if len(compared) == 1 else difference)
        flaw = f": {self.flaw}" if self.flaw else ""
        return f"| {self.text} | {self.test} | {'; '.join(text) or self.numbers} | {self.verdict()}{flaw} |"

    def seed_rows(self) -> Iterator[str]:
        """Of the table of RESULTS.md: the difference of every seed."""
        for ours, theirs, metric, pairs in self.differences():
            differences, digits = [a - b for a, b in pairs], decimals(metric)
            sides = f"{ours} - {theirs}" if theirs != ours else ours
            keys = f"`{metric}` - `{self.beside}`" if self.beside else f"`{metric}`"
            each = ", ".join(f"{difference:+.{digits}f}" for difference in differences)
            test = f"{sides} (`{self.results}`) | {keys}"
            yield f"| {self.text} | {test} | {each} | {spread(differences, digits)} | {self.allows(differences)} |"


def spread(differences: list[float], digits: int) -> str:
    """Their mean and its standard error, as text."""
    error = f" ± {standard_error(differences):.{digits}f}" if len(differences) > 1 else ""
    return f"{statistics.mean(differences):+.{digits}f}{error}"


def as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return names if isinstance(names, tuple) else (names,)


def declared(method: str) -> list[Claim]:
    return importlib.import_module(f"tests.evidence.{method}").CLAIMS


def readme_table(method: str) -> str:
    """Markdown: a row per claim that is tested, and a line per claim that is not."""
    claims = declared(method)
    rows = [claim.row() for claim in claims if claim.verdict() != NOT_TESTED]
    untested = [f"- {claim.text}" for claim in claims if claim.verdict() == NOT_TESTED]
    return "\n".join([HEADER, *rows, "", "Not tested:", "", *untested])


def seeds_table(method: str) -> str:
    """Markdown: a row per difference of two variants."""
    rows = [row for claim in declared(method) for row in claim.seed_rows()]
    return "\n".join([SEEDS_HEADER, *rows]) if rows else ""


def pages(method: str) -> dict[Path, str]:
    """What the folder's pages must say of its claims: README.md, and RESULTS.md where there are results."""
    found = {ROOT / method / "README.md": readme_table(method)}
    return found | ({ROOT / method / "RESULTS.md": table} if (table := seeds_table(method)) else {})


def write(page: Path, table: str) -> None:
    """Put a table in the place of the one with the same header, up to the next heading."""
    header = re.escape(table.splitlines()[0])
    text, places = re.subn(rf"{header}\n.*?(?=\n+## |\n*\Z)", lambda _: table, page.read_text(), flags=re.S)
    if places != 1:
        raise ValueError(f"{page} has {places} tables that begin with {table.splitlines()[0]}")
    page.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="also into the pages of the folders")
    args = parser.parse_args()
    print("| paper " + HEADER.replace("\n", "\n|---"))
    for method in METHODS:
        for claim in declared(method):
            print(f"| {method} {claim.row()}")
        if args.write:
            for page, table in pages(method).items():
                write(page, table)


if __name__ == "__main__":
    main()
