"""The small experiments of flexivit/RESULTS.md: one network for all patch sizes, on generated images and on CIFAR-10.

    make evidence METHOD=flexivit                 # about 25 minutes of a core
    make evidence METHOD=flexivit EVIDENCE_FLAGS="--cifar10 /path/to/cifar10"     # about an hour more

One FlexiViT beside networks that were trained with one patch size each, and FlexiViTs that learn from one of these,
with its weights at the start and without. Top-1 is that of 1,200 further images, or of the test images of CIFAR-10.
Every run uses one thread; --parallel of them run at a time. Numbers are those of the last epoch; verdicts follow from
the differences of each seed.
"""

from pathlib import Path

from tests.evidence.claims import CONFIRMED, Claim
from tests.evidence.runs import Variant, further_materials, in_parallel, last_values, main, run, run_all, table, write

GRIDS = {16: 2, 10: 3, 8: 4, 6: 5, 4: 8}  # by the side of the patches, of images of 32 pixels
RUN = "--data_path materials --arch flexivit_micro --patch_size 8 --posemb_grid 4 --input_size 32 --num_workers 0"
RUN += " --crop_scale 0.4 1 --aa none --mixup 0 --loss softmax --epochs 5 --batch_size 32 --lr 0.001 --pictures off"
RUN += f" --amp bf16 --test_freq 5 --test_grids {' '.join(map(str, GRIDS.values()))}"
FLEXIBLE = f"{RUN} --grids {' '.join(map(str, GRIDS.values()))}"
FIXED = (4, 16)
ONLY = {size: f"patches of {size} only" for size in FIXED}
VARIANTS = [Variant("FlexiViT", FLEXIBLE), *(Variant(ONLY[size], f"{RUN} --grids {GRIDS[size]}") for size in FIXED)]
LONGER = [Variant(v.name, f"{v.flags} --epochs 12 --test_freq 12") for v in VARIANTS[:2]]
OWN = tuple(f"acc1 {size}" for size in FIXED)
ELSEWHERE = [(own, at) for own in FIXED for at in FIXED if own != at]

ON_CIFAR10 = "--epochs 6 --test_freq 6 --batch_size 64"  # 1,500 steps of 16,000 images
LONG = "flexivit_materials_12_epochs"
CIFAR10 = "flexivit_cifar10"
RESULTS, TAUGHT, UNTAUGHT = "flexivit_materials", "distilled, starts as the teacher", "distilled, starts at random"
COLUMNS = {f"acc1 {size}": f"top-1, patches of {size}" for size in GRIDS}
# fmt: off
CLAIMS = [
    Claim("resizing by the pseudo-inverse loses nothing for larger patches (3.3)", "random patches and kernels",
          numbers="`tests/golden/test_flexivit.py`", found=CONFIRMED),
    Claim("as good as networks of one patch size at their own (3.2)", "materials, patches of 4, 16, within 2 points",
          RESULTS, "FlexiViT", tuple(ONLY.values()), OWN, within=2),
    Claim("as good as networks of one patch size after 12 epochs instead of 5", "patches of 4", LONG, "FlexiViT",
          ONLY[4], "acc1 4", within=2),
    Claim("more than ten points above them elsewhere", "materials, trained for 4 at 16; for 16 at 4",
          RESULTS, "FlexiViT", tuple(ONLY[own] for own, _ in ELSEWHERE), tuple(f"acc1 {at}" for _, at in ELSEWHERE),
          by=10),
    Claim("as good as networks of one patch size at their own (3.2)", "CIFAR-10, patches of 4, 16, within 2 points",
          CIFAR10, "FlexiViT", tuple(ONLY.values()), OWN, within=2),
    Claim("more than ten points above them elsewhere", "CIFAR-10, trained for 4 at 16; for 16 at 4", CIFAR10,
          "FlexiViT", tuple(ONLY[own] for own, _ in ELSEWHERE), tuple(f"acc1 {at}" for _, at in ELSEWHERE), by=10),
    Claim("a teacher's weights are the best start (3.4)", "materials, patches of " + ", ".join(map(str, sorted(GRIDS))),
          RESULTS, TAUGHT, UNTAUGHT, tuple(f"acc1 {size}" for size in sorted(GRIDS))),
    Claim("distillation from a network of small patches helps (3.4)", "the same, beside FlexiViT with labels", RESULTS,
          TAUGHT, "FlexiViT", tuple(f"acc1 {size}" for size in sorted(GRIDS)), flaw="more epochs"),
    Claim("flexible pre-training before fine-tuning at one size; ensembles of sizes"),
    Claim("transfer: classification, detection, segmentation, retrieval"),
]
# fmt: on


def accuracies(output_dir: Path) -> dict:
    last = last_values(output_dir)
    return {f"acc1 {size}": last[f"test_acc1_grid{grid}"] for size, grid in GRIDS.items()} | {"loss": last["loss"]}


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    images = f"--val_path {further_materials(out, 1200)}"
    variants = [Variant(v.name, f"{v.flags} {images}") for v in VARIANTS]
    results = run_all("flexivit", variants, out, parallel, seeds, accuracies)
    longer(out, parallel, seeds, images)
    teachers = {r["seed"]: r["run"] / "checkpoint.pth" for r in results if r["variant"] == "patches of 4 only"}

    def distill(job: tuple[str, int]) -> dict:
        init, seed = job
        flags = f"{FLEXIBLE} {images} --teacher {teachers[seed]} --init {init}"
        variant = Variant(TAUGHT if init == "teacher" else UNTAUGHT, flags)
        return run("flexivit", variant, seed, out / f"distilled_{init}" / str(seed), accuracies)

    results += in_parallel(distill, [(init, seed) for init in ("teacher", "random") for seed in seeds], parallel)
    write(out, RESULTS, results, table(results, COLUMNS))


def longer(out: Path, parallel: int, seeds: tuple[int, ...], images: str) -> None:
    """Of what takes long to learn: every patch size, beside the smallest alone."""
    variants = [Variant(v.name, f"{v.flags} {images}") for v in LONGER]
    results = run_all("flexivit", variants, out / "longer", parallel, seeds, accuracies)
    write(out, LONG, results, table(results, COLUMNS))


def cifar10(out: Path, parallel: int, seeds: tuple[int, ...], train: Path, test: Path) -> None:
    """Every patch size and one alone, on photographs."""
    flags = f"{ON_CIFAR10} --data_path {train} --val_path {test}"
    variants = [Variant(v.name, f"{v.flags} {flags}") for v in VARIANTS]
    results = run_all("flexivit", variants, out / "cifar10_runs", parallel, seeds, accuracies)
    write(out, CIFAR10, results, table(results, COLUMNS))


if __name__ == "__main__":
    main(__doc__, "flexivit", claims, cifar10)
