"""End-of-run report: signs of a collapse, pictures, a summary and what to run next."""

import argparse
from pathlib import Path

from torch import nn

from shared import distributed
from shared.evaluation.knn_monitor import KNNMonitor
from shared.evaluation.neighbours import save_nearest_neighbours
from shared.images.loading import BadImages, EvalDataset, EvalTransform
from shared.multicrop import MultiCropDataset
from shared.pictures.report import Plot, accuracy_plot, pictures_folder, save_curves, save_views, view_tiles
from shared.run.health import HealthRule
from shared.run.run import Run
from shared.run.summary import command, end_of_run

from .attention import has_class_attention, save_attention
from .augmentations import MEAN, STD
from .hub import VIT_NAMES

CURVES = (
    Plot("Loss of the student", "cross-entropy", {"loss": ""}),
    Plot(
        "Collapse shows as a KL of 0",
        "nats",
        {"teacher_entropy": "entropy of the teacher's output", "kl": "KL from teacher to student"},
        reference=("ln_k", "ln K: a uniform output"),
    ),
    accuracy_plot("Weighted k-NN of the teacher's features"),
)


def health_rules(args: argparse.Namespace, steps_per_epoch: int) -> list[HealthRule]:
    """Signs of a collapse in the lines of the log, and the flags to try.

    The teacher's output has two ways to collapse (section 5.3): uniform over the K outputs (entropy ln K, KL 0), which
    sharpening prevents, and one output for every image (entropy 0, KL 0), which centring prevents. At the start the
    centre takes away what all images have in common, which is nearly everything, so that a healthy run looks uniform
    and flat: the verdicts on these wait for the end of the warm-up.
    """
    patience = min(args.epochs * steps_per_epoch // 4, 2 * steps_per_epoch + 1000)
    after_warmup = patience + round(args.warmup_epochs * steps_per_epoch)
    if args.momentum_teacher < 0.5:
        sharpen = center = learn = "the teacher hardly differs from the student: raise --momentum_teacher (0.996)."
    else:
        sharpen = "lower --teacher_temp and --warmup_teacher_temp"
        is_safe = max(args.teacher_temp, args.warmup_teacher_temp) <= 0.04
        sharpen = f"raise --momentum_teacher, or {sharpen} further." if is_safe else f"{sharpen} (0.04 is safe)."
        center = "keep --center_momentum below 1 (0.9), or raise --teacher_temp."
        learn = "raise --lr or lower --momentum_teacher for short runs; with few images lower --out_dim."

    def nothing_to_learn(line: dict) -> bool:
        return line["kl"] < 0.005 * line["ln_k"]

    return [
        HealthRule(
            "uniform",
            lambda line: line["teacher_entropy"] > 0.995 * line["ln_k"] and nothing_to_learn(line),
            "COLLAPSE: the teacher's output is uniform (entropy {teacher_entropy:.3f} of ln K = {ln_k:.3f}): "
            + sharpen,
            after_warmup,
        ),
        HealthRule(
            "one output",
            lambda line: line["teacher_entropy"] < 0.02 * line["ln_k"] and nothing_to_learn(line),
            f"COLLAPSE: the teacher gives every image the same output (entropy {{teacher_entropy:.3f}}): {center}",
            patience,
        ),
        HealthRule(
            "features",
            lambda line: line["feature_spread"] < 0.02,
            "COLLAPSE: all images have nearly the same feature (spread {feature_spread:.4f}): lower --lr, or lengthen "
            "--warmup_epochs and --freeze_last_layer.",
            patience,
        ),
        HealthRule(
            "flat",
            lambda line: abs(line["loss"] / line["ln_k"] - 1) < 0.005,
            f"the loss is still at ln K = {{ln_k:.3f}}, the value of a student that knows nothing: {learn}",
            after_warmup,
        ),
    ]


def report(args: argparse.Namespace, run: Run, dataset: MultiCropDataset, backbone: nn.Module, knn: KNNMonitor) -> None:
    """Write the pictures of a run and print its summary; every rank must call this.

    Args:
        dataset: The training set.
        backbone: The teacher's.
    """
    pictures = save_pictures(run, dataset, backbone, knn, args.global_crop_size) if args.pictures else []
    if distributed.is_main_process():
        commands = next_commands(args, run.output_dir, knn)
        problems = list(run.health.warnings.values())
        print(end_of_run(run.output_dir, run.path, knn, pictures, commands, problems=problems))


def save_pictures(
    run: Run, dataset: MultiCropDataset, backbone: nn.Module, knn: KNNMonitor, image_size: int
) -> list[Path]:
    """Views of one image, neighbours of ten queries, curves, the class token's attention.

    Args:
        knn: If it has evaluated, queries are validation images, else training images.
        image_size: Side in pixels at which the backbone is evaluated.
    """
    folder, device = pictures_folder(run.output_dir), run.device
    path = folder / "neighbours.png"
    neighbours = save_nearest_neighbours(backbone, dataset, knn, image_size, MEAN, STD, path, device)
    if not distributed.is_main_process():
        return []
    paths = [
        save_view_sheet(dataset, folder / "views.png"),
        neighbours,
        save_curves(run.output_dir / "metrics.jsonl", folder / "curves.png", "DINO training", CURVES),
    ]
    # XCiT's patches are part of its name, and may be larger than small images
    if has_class_attention(backbone) and backbone.patch_embed.patch_size <= image_size:
        transform = EvalTransform(image_size, image_size, MEAN, STD, dataset.in_chans)
        source = knn.val.source if knn.disabled_reason is None else dataset.source
        image, *_ = EvalDataset(source, transform, BadImages(len(source), max_fraction=1))[0]
        paths.append(save_attention(backbone, image.to(device), folder / "attention")[0])
    return paths


def save_view_sheet(dataset: MultiCropDataset, path: Path) -> Path:
    """The views of the first image."""
    views = [view for group in dataset[(0, 0)][0] for view in group]
    groups = [view_tiles(views[:2], "global {n}, {px} px"), view_tiles(views[2:], "local {n}, {px} px")]
    heading = "One image as it enters the networks\nThe student sees all views, the teacher the global ones only."
    return save_views(groups, path, heading)


def next_commands(args: argparse.Namespace, output_dir: Path, knn: KNNMonitor) -> list[str]:
    """Evaluations of the network that was trained, as they can be pasted into a shell."""
    image_size = args.global_crop_size
    flags = {"arch": args.arch, "patch_size": args.patch_size if args.arch in VIT_NAMES else None}
    flags["pretrained_weights"] = output_dir / "checkpoint.pth"
    evaluation, linear = flags | {"data_path": args.data_path, "val_path": args.val_path}, {}
    if args.data_path and not knn.disabled_reason:  # the scripts have defaults for the embedded data
        evaluation["image_size"] = image_size if image_size != 224 else None
        linear = {"num_labels": len(knn.val.source.classes), "output_dir": output_dir / "linear"}
    attention = {"image_path": "YOUR_IMAGE", "data_path": args.data_path, "output_dir": output_dir / "attention"}
    attention["image_size"] = 2 * image_size if image_size != 224 else None
    commands = []
    if not knn.disabled_reason:
        few = len(knn.train.source) < 200  # by default the script asks for 200 neighbours
        commands.append(command("eval_knn.py", **evaluation, nb_knn=knn.k if few else None))
        commands.append(command("eval_linear.py", **evaluation, **linear))
    if args.arch in VIT_NAMES or args.arch.startswith("xcit_"):
        commands.append(command("visualize_attention.py", **flags, **attention))
    return [*commands, "python main_dino.py --arch vit_small --data_path YOUR_IMAGES --output_dir YOUR_RUN"]
