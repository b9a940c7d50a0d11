"""The small experiments of flexivit/RESULTS.md: one network for all patch sizes, on generated images.

    make evidence METHOD=flexivit                 # about 50 core-minutes

One FlexiViT beside networks that were trained with one patch size each, and FlexiViTs that learn from one of these,
with its weights at the start and without. Every run uses one thread; --parallel of them run at a time. Numbers are
those of the last epoch; verdicts follow from the differences of each seed.
"""

from pathlib import Path

from tests.evidence.claims import CONFIRMED, Claim
from tests.evidence.runs import Variant, in_parallel, last_values, main, run, run_all, table, write

GRIDS = {16: 2, 10: 3, 8: 4, 6: 5, 4: 8}  # by the side of the patches, of images of 32 pixels
RUN = "--data_path materials --arch flexivit_micro --patch_size 8 --posemb_grid 4 --input_size 32 --num_workers 0"
RUN += " --crop_scale 0.4 1 --aa none --mixup 0 --loss softmax --epochs 12 --batch_size 32 --lr 0.001 --pictures off"
RUN += f" --amp fp32 --test_freq 12 --test_grids {' '.join(map(str, GRIDS.values()))}"
FLEXIBLE = f"{RUN} --grids {' '.join(map(str, GRIDS.values()))}"
FIXED = (4, 8, 16)
VARIANTS = [Variant("FlexiViT", FLEXIBLE)]
VARIANTS += [Variant(f"patches of {size} only", f"{RUN} --grids {GRIDS[size]}") for size in FIXED]

RESULTS, TAUGHT, UNTAUGHT = "flexivit_materials", "distilled, starts as the teacher", "distilled, starts at random"
# fmt: off
CLAIMS = [
    Claim("resizing by the pseudo-inverse loses nothing for larger patches (3.3)", "random patches and kernels",
          numbers="`tests/golden/test_flexivit.py`", found=CONFIRMED),
    *(Claim(f"as good as a network trained for patches of {size}", "materials, within a point", RESULTS, "FlexiViT",
            f"patches of {size} only", f"acc1 {size}", within=1) for size in FIXED),
    *(Claim(f"far better with patches of {size} than one trained for {own}", "materials", RESULTS, "FlexiViT",
            f"patches of {own} only", f"acc1 {size}") for own, size in ((4, 16), (16, 4))),
    *(Claim(f"a teacher's weights are the best start (3.4): patches of {size}", "materials", RESULTS, TAUGHT, UNTAUGHT,
            f"acc1 {size}") for size in FIXED),
    Claim("transfer: classification, detection, segmentation, retrieval"),
]
# fmt: on


def accuracies(output_dir: Path) -> dict:
    last = last_values(output_dir)
    return {f"acc1 {size}": last[f"test_acc1_grid{grid}"] for size, grid in GRIDS.items()} | {"loss": last["loss"]}


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    results = run_all("flexivit", VARIANTS, out, parallel, seeds, accuracies)
    teachers = {r["seed"]: r["run"] / "checkpoint.pth" for r in results if r["variant"] == "patches of 4 only"}

    def distill(job: tuple[str, int]) -> dict:
        init, seed = job
        flags = f"{FLEXIBLE} --teacher {teachers[seed]} --init {init}"
        variant = Variant(TAUGHT if init == "teacher" else UNTAUGHT, flags)
        return run("flexivit", variant, seed, out / f"distilled_{init}" / str(seed), accuracies)

    results += in_parallel(distill, [(init, seed) for init in ("teacher", "random") for seed in seeds], parallel)
    write(out, RESULTS, results, table(results, {f"acc1 {size}": f"top-1, patches of {size}" for size in GRIDS}))


if __name__ == "__main__":
    main(__doc__, "flexivit", claims, lambda *_: None)
