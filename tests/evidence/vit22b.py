"""The small experiments of vit22b/RESULTS.md: normalised queries and keys, and parallel blocks, on generated images.

    make evidence METHOD=vit22b                   # 25 minutes of a core that other work shares

Blocks with and without normalised queries and keys at a high learning rate, and parallel beside sequential blocks of as
many parameters at a moderate one. Top-1 is that of 1,200 further images. Every run uses one thread; --parallel of them
run at a time. Numbers are those of the last epoch; verdicts follow from the differences of each seed.
"""

from pathlib import Path

from shared.pictures.curves import Curve, Panel, save_panels
from shared.run.log import read_log
from tests.evidence.claims import CANNOT_TELL, CONFIRMED, Claim
from tests.evidence.runs import Variant, further_materials, last_values, main, run_all, table, write

RUN = "--num_workers 0 --amp bf16 --epochs 4 --cooldown_steps 80 --test_freq 4 --pictures off --max_skipped_steps 0"
RUN += " --log_freq 5"
MODERATE, HIGH = "--lr 0.001", "--lr 0.03"
VARIANTS = [
    Variant("QK norm", f"{RUN} {MODERATE}"),
    Variant("QK norm, high rate", f"{RUN} {HIGH}"),
    Variant("no QK norm, high rate", f"{RUN} {HIGH} --qk_norm false"),
    Variant("sequential, QK norm", f"{RUN} {MODERATE} --block sequential"),
]
RESULTS, HIGH_RATE = "vit22b_materials", ("QK norm, high rate", "no QK norm, high rate")
# fmt: off
CLAIMS = [
    Claim("attention of queries and keys that are not normalised ends at one token (2.1)", "materials, rate of 0.03, "
          "least entropy of a block, nats; of normalised ones", RESULTS, *HIGH_RATE, "min_entropy"),
    Claim("training with normalised queries and keys is stable where it diverges without (2.1)", "the same, top-1",
          RESULTS, *HIGH_RATE, "acc1", flaw="neither diverged"),
    Claim("parallel blocks are no worse than sequential ones of as many parameters (2.1)",
          "materials, rate of 0.001, top-1, to a point", RESULTS, "QK norm", "sequential, QK norm", "acc1", by=-1),
    Claim("fused products compute the same", "values and gradients", numbers="`tests/vit22b/test_network.py`",
          found=CONFIRMED),
    Claim("fused products are faster (2.1)", "timm's block, width 384, 4 x 256 tokens, one thread of a busy machine",
          numbers="forward 1.05, step 1.01 times (timm's outputs fused: 1.02, 0.98)", found=CANNOT_TELL),
    Claim("the asynchronous ring is the whole product (2.2)", "values and gradients, 4 processes",
          numbers="`tests/vit22b/test_mesh.py`", found=CONFIRMED),
    Claim("norms without bias and centring cost no quality (2.1)"),
    Claim("frozen features, fairness, shape bias, calibration improve with scale (4)"),
]
# fmt: on


def measures(output_dir: Path) -> dict:
    """Last numbers of a run, and the largest logit and the least entropy of all of it."""
    last, lines = last_values(output_dir), read_log(output_dir / "metrics.jsonl")
    logits, entropies = ([line[k] for line in lines if line.get(k) is not None] for k in ("max_logit", "min_entropy"))
    found = {"acc1": last["test_acc1"], "loss": last["loss"] if last["loss"] is not None else float("inf")}
    return found | {"max_logit": max(logits), "min_entropy": min(entropies)}


def picture(results: list[dict], path: Path) -> None:
    """Loss, least entropy and largest logit over the steps of the first seed at the high rate."""
    runs = {name: next(r["run"] for r in results if r["variant"] == name) for name in HIGH_RATE}
    panels = []
    for key, label in (("loss", "loss"), ("min_entropy", "least entropy of a block"), ("max_logit", "largest |logit|")):
        curves = []
        for name, run in runs.items():
            lines = [line for line in read_log(run / "metrics.jsonl") if line.get(key) is not None and "lr" in line]
            curves.append(Curve([line["step"] for line in lines], [line[key] for line in lines], name))
        panels.append(Panel(label.capitalize(), "step", label, curves, 0.1))
    save_panels(panels, path, "A high learning rate, with and without normalised queries and keys")


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    images = further_materials(out, 1200)
    variants = [Variant(v.name, f"{v.flags} --val_path {images}") for v in VARIANTS]
    results = run_all("vit22b", variants, out, parallel, seeds, measures)
    columns = {"acc1": "top-1", "loss": "loss", "max_logit": "largest logit", "min_entropy": "least entropy"}
    picture(results, out / "high_rate.png")
    write(out, RESULTS, results, table(results, columns))


if __name__ == "__main__":
    main(__doc__, "vit22b", claims, lambda *_: None)
