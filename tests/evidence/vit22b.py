"""The small experiments of vit22b/RESULTS.md: normalised queries and keys, and parallel blocks, on generated images.

    make evidence METHOD=vit22b                   # about 25 core-minutes

Blocks with and without normalised queries and keys at a moderate and at a high learning rate, and parallel beside
sequential blocks of as many parameters. Every run uses one thread; --parallel of them run at a time. Numbers are those
of the last epoch; verdicts follow from the differences of each seed.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from shared.pictures.curves import Curve, Panel, save_panels
from shared.run.log import read_log
from tests.evidence.runs import Variant, last_values, main, run_all, table, write

RUN = "--num_workers 0 --amp fp32 --epochs 6 --cooldown_steps 120 --test_freq 6 --pictures off --max_skipped_steps 0"
RUN += " --log_freq 5"
MODERATE, HIGH = "--lr 0.001", "--lr 0.01"
VARIANTS = [
    Variant("QK norm", f"{RUN} {MODERATE}"),
    Variant("no QK norm", f"{RUN} {MODERATE} --qk_norm false"),
    Variant("QK norm, high rate", f"{RUN} {HIGH}"),
    Variant("no QK norm, high rate", f"{RUN} {HIGH} --qk_norm false"),
    Variant("sequential, QK norm", f"{RUN} {MODERATE} --block sequential"),
]
PAIRS = {  # the first is claimed to have more
    "QK norm trains at the high rate": ("QK norm, high rate", "no QK norm, high rate"),
    "parallel against sequential": ("QK norm", "sequential, QK norm"),
}


def measures(output_dir: Path) -> dict:
    """Last numbers of a run, and the largest logit and the least entropy of all of it."""
    last, lines = last_values(output_dir), read_log(output_dir / "metrics.jsonl")
    logits, entropies = ([line[k] for line in lines if line.get(k) is not None] for k in ("max_logit", "min_entropy"))
    found = {"acc1": last["test_acc1"], "loss": last["loss"] if last["loss"] is not None else float("inf")}
    return found | {"max_logit": max(logits), "min_entropy": min(entropies)}


def picture(results: list[dict], path: Path) -> None:
    """Loss, least entropy and largest logit over the steps of the first seed at the high rate."""
    runs = {name: next(r["run"] for r in results if r["variant"] == name) for name in PAIRS[next(iter(PAIRS))]}
    panels = []
    for key, label in (("loss", "loss"), ("min_entropy", "least entropy of a block"), ("max_logit", "largest |logit|")):
        curves = []
        for name, run in runs.items():
            lines = [line for line in read_log(run / "metrics.jsonl") if line.get(key) is not None and "lr" in line]
            curves.append(Curve([line["step"] for line in lines], [line[key] for line in lines], name))
        panels.append(Panel(label.capitalize(), "step", label, curves, 0.1))
    save_panels(panels, path, "A high learning rate, with and without normalised queries and keys")


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    results = run_all("vit22b", VARIANTS, out, parallel, seeds, measures)
    columns = {"acc1": "top-1", "loss": "loss", "max_logit": "largest logit", "min_entropy": "least entropy"}
    text = [table(results, columns), "", "| difference of top-1 | each seed |", "|---|---|"]
    for claim, names in PAIRS.items():
        ours, theirs = ({r["seed"]: r["acc1"] for r in results if r["variant"] == name} for name in names)
        text.append(f"| {claim} | {', '.join(f'{ours[seed] - theirs[seed]:+.1f}' for seed in seeds)} |")
    picture(results, out / "high_rate.png")
    write(out, "materials", results, "\n".join(text))


if __name__ == "__main__":
    main(__doc__, "vit22b", claims, lambda *_: None)
