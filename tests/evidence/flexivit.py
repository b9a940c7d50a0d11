"""The small experiments of flexivit/RESULTS.md: one network for all patch sizes, on generated images.

    make evidence METHOD=flexivit                 # about 50 core-minutes

One FlexiViT beside networks that were trained with one patch size each, and FlexiViTs that learn from one of these,
with its weights at the start and without. Every run uses one thread; --parallel of them run at a time. Numbers are
those of the last epoch; verdicts follow from the differences of each seed.
"""

import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.evidence.runs import Variant, in_parallel, last_values, main, run, run_all, table, write

GRIDS = {16: 2, 10: 3, 8: 4, 6: 5, 4: 8}  # by the side of the patches, of images of 32 pixels
RUN = "--data_path materials --arch flexivit_micro --patch_size 8 --posemb_grid 4 --input_size 32 --num_workers 0"
RUN += " --crop_scale 0.4 1 --aa none --mixup 0 --loss softmax --epochs 12 --batch_size 32 --lr 0.001 --pictures off"
RUN += f" --amp fp32 --test_freq 12 --test_grids {' '.join(map(str, GRIDS.values()))}"
FLEXIBLE = f"{RUN} --grids {' '.join(map(str, GRIDS.values()))}"
FIXED = (4, 8, 16)
VARIANTS = [Variant("FlexiViT", FLEXIBLE)]
VARIANTS += [Variant(f"patches of {size} only", f"{RUN} --grids {GRIDS[size]}") for size in FIXED]


def accuracies(output_dir: Path) -> dict:
    last = last_values(output_dir)
    return {f"acc1 {size}": last[f"test_acc1_grid{grid}"] for size, grid in GRIDS.items()} | {"loss": last["loss"]}


def compare(results: list[dict], ours: str, theirs: str, size: int) -> str:
    """The difference of two variants at a patch size for each seed, and what follows: it needs all signs to agree."""
    of = {name: {r["seed"]: r[f"acc1 {size}"] for r in results if r["variant"] == name} for name in (ours, theirs)}
    differences = [of[ours][seed] - of[theirs][seed] for seed in sorted(of[ours])]
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("inf")
    agree = len({difference > 0 for difference in differences}) == 1 and 0 not in differences
    verdict = ("above" if mean > 0 else "below") if agree and abs(mean) > error else "the test cannot tell"
    each = ", ".join(f"{difference:+.1f}" for difference in differences)
    return f"| {ours} - {theirs} | {size} | {each} | {mean:+.1f} ± {error:.1f} | {verdict} |"


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    results = run_all("flexivit", VARIANTS, out, parallel, seeds, accuracies)
    teachers = {r["seed"]: r["run"] / "checkpoint.pth" for r in results if r["variant"] == "patches of 4 only"}

    def distill(job: tuple[str, int]) -> dict:
        init, seed = job
        flags = f"{FLEXIBLE} --teacher {teachers[seed]} --init {init}"
        variant = Variant(f"distilled, starts {'as the teacher' if init == 'teacher' else 'at random'}", flags)
        return run("flexivit", variant, seed, out / f"distilled_{init}" / str(seed), accuracies)

    results += in_parallel(distill, [(init, seed) for init in ("teacher", "random") for seed in seeds], parallel)
    text = [table(results, {f"acc1 {size}": f"top-1, patches of {size}" for size in GRIDS}), ""]
    text += ["| difference | patches | each seed | mean ± standard error | verdict |", "|---|---|---|---|---|"]
    text += [compare(results, "FlexiViT", f"patches of {own} only", size) for own in FIXED for size in FIXED]
    starts = ("distilled, starts as the teacher", "distilled, starts at random")
    text += [compare(results, *starts, size) for size in GRIDS]
    text += [compare(results, starts[0], "FlexiViT", size) for size in GRIDS]
    write(out, "materials", results, "\n".join(text))


if __name__ == "__main__":
    main(__doc__, "flexivit", claims, lambda *_: None)
