"""End-of-run report: signs of a collapse, pictures, and what to run next."""

import argparse
from pathlib import Path

import numpy as np
from torch import nn

from shared.evaluation.knn_monitor import KNNMonitor
from shared.multicrop import MultiCropDataset
from shared.pictures.attention import save_attention
from shared.pictures.report import Plot, Report, accuracy_plot, first_image, save_views
from shared.run.health import HealthRule, equal_features, patience, shares_of_ln_k, still_at_ln_k
from shared.run.run import Run
from shared.run.settings import Advice, long_warmup, more_than_data, slow_average, tell_settings

from .attention import class_row, has_class_attention
from .hub import MEAN, STD, VIT_NAMES

FEW_STEPS = 5000  # seen at 480; the paper's trainings have a hundred thousand and more
OUTPUT = {"teacher_entropy": "entropy of the teacher's output", "kl": "KL from teacher to student"}
CURVES = (
    Plot("Loss of the student", "cross-entropy", {"loss": ""}),
    Plot("Collapse shows as a KL of 0", "nats", OUTPUT, reference=("ln_k", "ln K: a uniform output")),
    accuracy_plot("Weighted k-NN of the teacher's features"),
)


def health_rules(args: argparse.Namespace, steps_per_epoch: int) -> list[HealthRule]:
    """Signs of a collapse in the lines of the log, and the flags to try.

    The teacher's output has two ways to collapse (section 5.3): uniform over the K outputs (entropy ln K, KL 0), which
    sharpening prevents, and one output for every image (entropy 0, KL 0), which centring prevents. At the start the
    centre takes away what all images have in common, which is nearly everything, so that a healthy run looks uniform
    and flat: the verdicts on these wait for the end of the warm-up.
    """
    first_step = patience(args.epochs, steps_per_epoch)
    after_warmup = first_step + round(args.warmup_epochs * steps_per_epoch)
    if args.momentum_teacher < 0.5:
        sharpen = center = learn = "the teacher hardly differs from the student: raise --momentum_teacher (0.996)."
    else:
        sharpen = "lower --teacher_temp and --warmup_teacher_temp"
        is_safe = max(args.teacher_temp, args.warmup_teacher_temp) <= 0.04
        sharpen = f"raise --momentum_teacher, or {sharpen} further." if is_safe else f"{sharpen} (0.04 is safe)."
        center = "keep --center_momentum below 1 (0.9), or raise --teacher_temp."
        learn = "raise --lr or lower --momentum_teacher for short runs; with few images lower --out_dim."
    collapsed = {"kl": (-1, 0.005)}
    return [
        HealthRule(
            "uniform",
            shares_of_ln_k(teacher_entropy=(0.995, 2), **collapsed),
            "COLLAPSE: the teacher's output is uniform (entropy {teacher_entropy:.3f} of ln K = {ln_k:.3f}): "
            + sharpen,
            after_warmup,
        ),
        HealthRule(
            "one output",
            shares_of_ln_k(teacher_entropy=(-1, 0.02), **collapsed),
            f"COLLAPSE: the teacher gives every image the same output (entropy {{teacher_entropy:.3f}}): {center}",
            first_step,
        ),
        equal_features("feature", "lower --lr, or lengthen --warmup_epochs and --freeze_last_layer.", first_step),
        still_at_ln_k("loss", "a student that knows nothing", learn, after_warmup),
    ]


def suit_settings(args: argparse.Namespace, num_images: int, momenta: np.ndarray) -> None:
    """Name or change settings that make no sense for so few images and steps; ``momenta`` are those of the teacher."""
    tell_settings(
        args,
        long_warmup("--warmup_epochs", args.warmup_epochs, args.epochs),
        long_warmup("--warmup_teacher_temp_epochs", args.warmup_teacher_temp_epochs, args.epochs),
        slow_average("--momentum_teacher", momenta),
        more_than_data("--out_dim", args.out_dim, num_images, take=num_images),
        soft_teacher("--warmup_teacher_temp", args.warmup_teacher_temp, len(momenta)),
        soft_teacher("--teacher_temp", args.teacher_temp, len(momenta)),
    )


def soft_teacher(flag: str, temperature: float, steps: int) -> Advice | None:
    """A teacher that sharpens too little for a short run, in which its outputs stay nearly equal.

    On the embedded images, 480 steps, k-NN is 61 % with 0.07, 82 % with 0.04 and 90 % with 0.03.
    """
    reason = f"{flag} {temperature:g}: in {steps} steps a teacher above 0.04 hardly tells images apart"
    return Advice(flag, reason, 0.03) if temperature > 0.04 and steps < FEW_STEPS else None


def report(run: Run, dataset: MultiCropDataset, backbone: nn.Module, knn: KNNMonitor) -> None:
    """Draw views, the teacher's neighbours and attention, and curves, and print the text; every rank must call this."""

    def draw_attention(path: Path) -> None:
        image = first_image(dataset.source, knn).to(run.device)
        save_attention(backbone, image, path.parent, MEAN, STD, class_row=class_row)

    ending = Report(run, "dino/main_dino.py")
    ending.draw("views.png", lambda path: save_view_sheet(dataset, path))
    ending.draw_neighbours(backbone, dataset.source, knn)
    ending.draw_curves("DINO training", CURVES)
    # XCiT's patches are part of its name, and may be larger than small images
    if has_class_attention(backbone) and backbone.patch_embed.patch_size <= run.args.global_crop_size:
        ending.draw("attention/attention.png", draw_attention)
    name_evaluations(ending, knn)
    ending.finish(knn=knn, arch="vit_small")


def save_view_sheet(dataset: MultiCropDataset, path: Path) -> Path:
    """The views of the first image."""
    titles = ["global {n}, {px} px"] * 2 + ["local {n}, {px} px"] * (len(dataset.recipes) - 2)
    heading = "One image as it enters the networks\nThe student sees all views, the teacher the global ones only."
    return save_views(dataset[(0, 0)][0], titles, path, heading)


def name_evaluations(ending: Report, knn: KNNMonitor) -> None:
    """Evaluations of the network that was trained, which take its architecture and image size from the checkpoint."""
    args, weights, folder = ending.run.args, {"pretrained_weights": ending.run.path}, ending.run.output_dir
    if knn.sources:
        ending.then("dino/eval_knn.py", **weights, nb_knn=knn.k)
        linear = {"num_labels": len(knn.sources[1].classes), "output_dir": folder / "linear"}
        ending.then("dino/eval_linear.py", **weights, **linear)
    if (args.arch in VIT_NAMES or args.arch.startswith("xcit_")) and args.in_chans in (1, 3):
        image = {"image_path": "YOUR_IMAGE", "image_size": 2 * args.global_crop_size}
        ending.then("dino/visualize_attention.py", **weights, **image, output_dir=folder / "attention")
