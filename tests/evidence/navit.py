"""The small experiments of navit/README.md: NaViT on generated images of many shapes.

    make evidence METHOD=navit                 # more than an hour of one core

Networks of resolutions that are drawn for every image beside those of one resolution, at equal tokens; positions at
sides larger than any of the training; and token dropping, at equal tokens too. Every run uses one thread; --parallel of
them run at a time. Numbers are those of the last epoch; verdicts follow from the differences of each seed.
"""

import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.evidence.runs import Variant, last_values, main, run_all, table, write

SIDES = {14: 33, 20: 16, 26: 10, 32: 6}  # epochs of as many tokens as 12 of 14 to 32 px have
RUN = "--num_workers 0 --pictures off --amp fp32 --test_freq 100"
RUN += f" --test_resolutions {' '.join(map(str, SIDES))} --resolution"
VARIANTS = [Variant("14 to 32 px", f"{RUN} 14 32 --epochs 12")]
VARIANTS += [Variant(f"{side} px only", f"{RUN} {side} {side} --epochs {epochs}") for side, epochs in SIDES.items()]
POSITIONS = {
    "sum": "--positions sum",
    "sum, fractional": "--positions sum --coordinates fractional",
    "Fourier": "--positions fourier --coordinates fractional",
    "one table": "--positions table --max_side 5",
}
VARIANTS += [Variant(f"14 to 20 px, {name}", f"{RUN} 14 20 --epochs 12 {flags}") for name, flags in POSITIONS.items()]
DROPS = {"a constant half": "constant", "half, by resolution": "resolution --drop_range 0.2 0.8"}
VARIANTS += [Variant(f"drops {name}", f"{RUN} 14 32 --epochs 24 --drop {flags}") for name, flags in DROPS.items()]
CLAIMS = [  # which is better, than which, at which side
    *(("14 to 32 px", f"{side} px only", at) for side in SIDES for at in SIDES),
    *((f"14 to 20 px, {name}", "14 to 20 px, one table", 32) for name in list(POSITIONS)[:3]),
    ("drops half, by resolution", "drops a constant half", 32),
    ("drops a constant half", "14 to 32 px", 32),
]


def accuracies(output_dir: Path) -> dict:
    last = last_values(output_dir)
    return {f"acc1 {side}": last[f"test_acc1_{side}"] for side in SIDES} | {
        "loss": last["loss"],
        "padding": last["padding"],
    }


def compare(results: list[dict], ours: str, theirs: str, side: int) -> str:
    """The difference of two variants at a side for each seed, and what follows: it needs all signs to agree."""
    of = {name: {r["seed"]: r[f"acc1 {side}"] for r in results if r["variant"] == name} for name in (ours, theirs)}
    differences = [of[ours][seed] - of[theirs][seed] for seed in sorted(of[ours])]
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("inf")
    agree = len({difference > 0 for difference in differences}) == 1 and 0 not in differences
    verdict = ("above" if mean > 0 else "below") if agree and abs(mean) > error else "the test cannot tell"
    each = ", ".join(f"{difference:+.1f}" for difference in differences)
    return f"| {ours} - {theirs} | {side} | {each} | {mean:+.1f} ± {error:.1f} | {verdict} |"


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    results = run_all("navit", VARIANTS, out, parallel, seeds, accuracies)
    text = [table(results, {f"acc1 {side}": f"top-1 at {side} px" for side in SIDES} | {"padding": "padding"}), ""]
    text += ["| difference | px | each seed | mean ± standard error | verdict |", "|---|---|---|---|---|"]
    write(out, "materials", results, "\n".join([*text, *(compare(results, *claim) for claim in CLAIMS)]))


if __name__ == "__main__":
    main(__doc__, "navit", claims, lambda *_: None)
