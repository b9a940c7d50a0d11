"""The small experiments of navit/README.md: NaViT on generated images of many shapes.

    make evidence METHOD=navit                 # more than an hour of one core

Networks of resolutions that are drawn for every image beside those of one resolution, at equal tokens; positions at
sides larger than any of the training; and token dropping, at equal tokens too. Every run uses one thread; --parallel of
them run at a time. Numbers are those of the last epoch; verdicts follow from the differences of each seed.
"""

from pathlib import Path

from tests.evidence.claims import CONFIRMED, Claim
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
RESULTS, MANY = "navit_materials", "14 to 32 px"
# fmt: off
CLAIMS = [
    Claim("packing changes no image's result", "any packing and padding; 200 photographs of 20 to 7,500 tokens",
          numbers="largest difference 6e-7 of the largest logit", found=CONFIRMED),
    Claim("less than 2 % padding (A.3)", "sequences of 1,024 tokens, images of 64 to 256 px",
          numbers="1.2 % (128 tokens: 3.5 %)", found=CONFIRMED),
    *(Claim(f"variable resolution is better than {side} px at equal compute (3.2), at {at} px", "materials", RESULTS,
            MANY, f"{side} px only", f"acc1 {at}") for side in (14, 32) for at in (14, 32)),
    Claim("factorised positions extrapolate to sides never trained (3.4)", "materials, 32 px after 14 to 20", RESULTS,
          tuple(f"14 to 20 px, {name}" for name in list(POSITIONS)[:3]), "14 to 20 px, one table", "acc1 32"),
    Claim("token dropping by resolution is better than a constant rate (A.5)", "materials", RESULTS,
          "drops half, by resolution", "drops a constant half", "acc1 32"),
    Claim("four times less compute than a ViT"),
    Claim("detection, segmentation, calibration, fairness, video"),
]
# fmt: on


def accuracies(output_dir: Path) -> dict:
    last = last_values(output_dir)
    return {f"acc1 {side}": last[f"test_acc1_{side}"] for side in SIDES} | {
        "loss": last["loss"],
        "padding": last["padding"],
    }


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    results = run_all("navit", VARIANTS, out, parallel, seeds, accuracies)
    write(out, RESULTS, results, table(results, {f"acc1 {side}": f"top-1 at {side} px" for side in SIDES}))


if __name__ == "__main__":
    main(__doc__, "navit", claims, lambda *_: None)
