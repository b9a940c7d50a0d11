"""End-of-run report: signs of a collapse, pictures, a summary and what to run next."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shared import distributed
from shared.evaluation.knn_monitor import KNNMonitor
from shared.evaluation.neighbours import save_nearest_neighbours
from shared.images.loading import BadImages, EvalDataset, EvalTransform
from shared.multicrop import MultiCropDataset
from shared.pictures.report import Plot, accuracy_plot, pictures_folder, save_curves, save_views, view_tiles
from shared.pictures.sheets import to_pixels
from shared.run.health import HealthRule
from shared.run.run import Run
from shared.run.summary import command, end_of_run

from .hub import MEAN, STD
from .vision_transformer import Trunk, draw_kept_patches
from .visualize_attention import save_attention

CURVES = (
    Plot(
        "Loss",
        "nats",
        {"msn": "cross-entropy of anchors and targets", "me_max": "KL of the mean assignment from the prior"},
    ),
    Plot(
        "Collapse shows as targets that tell nothing",
        "nats",
        {"target_entropy": "entropy of a target", "information": "what targets tell about their image"},
        reference=("ln_k", "ln K: a uniform target"),
    ),
    accuracy_plot("Weighted k-NN of the target encoder"),
)
GREY = 128  # of a patch that is not seen


def health_rules(args: argparse.Namespace, steps_per_epoch: int) -> list[HealthRule]:
    """Signs of a collapse in the lines of the log, and the flags to try.

    Targets have two ways to say nothing about their image: all assigned to one prototype, which mean-entropy
    maximisation prevents, and all spread over every prototype, which sharpening prevents. At its start a healthy run
    may look uniform and flat: the verdicts on these wait for the end of the warm-up.
    """
    patience = min(args.epochs * steps_per_epoch // 4, 2 * steps_per_epoch + 1000)
    after_warmup = patience + round(args.warmup * steps_per_epoch)

    def no_information(line: dict) -> bool:
        return line["information"] < 0.02 * line["ln_k"]

    return [
        HealthRule(
            "uniform",
            lambda line: line["target_entropy"] > 0.8 * line["ln_k"] and no_information(line),
            "COLLAPSE: the targets are spread over all prototypes (entropy {target_entropy:.3f} of ln K = {ln_k:.3f}): "
            "lower --start_sharpen and --final_sharpen, or make the views milder.",
            after_warmup,
        ),
        HealthRule(
            "one assignment",
            no_information,
            "COLLAPSE: all targets have nearly the same assignment ({information:.4f} nats tell images apart): keep "
            "--me_max true, raise --memax_weight (5 without Sinkhorn), or --use_sinkhorn true.",
            patience,
        ),
        HealthRule(
            "features",
            lambda line: line["feature_spread"] < 0.02,
            "COLLAPSE: all images have nearly the same embedding (spread {feature_spread:.4f}): lower --lr, lengthen "
            "--warmup, or keep --use_bn true.",
            patience,
        ),
        HealthRule(
            "flat",
            lambda line: abs(line["msn"] / line["ln_k"] - 1) < 0.005,
            "the cross-entropy is still at ln K = {ln_k:.3f}, the value of anchors that know nothing: raise --lr or "
            "lower --ema for short runs; with few images lower --num_proto.",
            after_warmup,
        ),
    ]


def report(args: argparse.Namespace, run: Run, dataset: MultiCropDataset, trunk: Trunk, knn: KNNMonitor) -> None:
    """Write the pictures of a run and print its summary; every rank must call this.

    Args:
        dataset: The training set.
        trunk: Of the target encoder.
    """
    pictures = save_pictures(run, dataset, trunk, knn, args.rand_size, args.patch_drop) if args.pictures else []
    if distributed.is_main_process():
        problems = list(run.health.warnings.values())
        commands = next_commands(args, run.path, knn)
        print(end_of_run(run.output_dir, run.path, knn, pictures, commands, problems=problems))


def save_pictures(
    run: Run, dataset: MultiCropDataset, trunk: Trunk, knn: KNNMonitor, image_size: int, patch_drop: float
) -> list[Path]:
    """Views of one image with their masks, neighbours of ten queries, curves, the class token's attention.

    Args:
        knn: If it has evaluated, queries are validation images, else training images.
        image_size: Side in pixels at which the encoder is evaluated.
        patch_drop: Share of the patches of the masked anchors that are not seen.
    """
    folder, encoder = pictures_folder(run.output_dir), trunk.encoder
    path = folder / "neighbours.png"
    neighbours = save_nearest_neighbours(trunk, dataset, knn, image_size, MEAN, STD, path, run.device)
    if not distributed.is_main_process():
        return []
    transform = EvalTransform(image_size, image_size, MEAN, STD, dataset.in_chans)
    source = knn.val.source if knn.disabled_reason is None else dataset.source
    image, *_ = EvalDataset(source, transform, BadImages(len(source), max_fraction=1))[0]
    return [
        save_view_sheet(dataset[(0, 0)][0], encoder.patch_embed.patch_size, patch_drop, folder / "views.png"),
        neighbours,
        save_curves(run.output_dir / "metrics.jsonl", folder / "curves.png", "MSN training", CURVES),
        save_attention(encoder, image.to(run.device), folder / "attention")[0],
    ]


def save_view_sheet(views: Sequence[Sequence], patch_size: int, patch_drop: float, path: Path) -> Path:
    """The views of one image, the patches that a mask hides in grey.

    Args:
        views: Images (uint8, (C, H, W)) by size: the target and the random anchors, the focal anchors. The first
            anchors that there are lose patches.
    """
    (target, *random), *focal = views
    focal = [view for group in focal for view in group]
    masked = random or focal
    if patch_drop:
        kept = draw_kept_patches((masked[0].shape[-1] // patch_size) ** 2, patch_drop)
        masked[:] = [mask_patches(to_pixels(view), kept.tolist(), patch_size) for view in masked]
    first = view_tiles([target], "target, {px} px") + view_tiles(random, "random anchor, {px} px")
    heading = "One image as it enters the encoders\nThe target encoder sees the target, the encoder all anchors."
    return save_views([first, view_tiles(focal, "focal anchor, {px} px")], path, heading, per_row=10)


def mask_patches(pixels: np.ndarray, kept: Sequence[int], patch_size: int) -> np.ndarray:
    """The image with all patches grey but those with the numbers ``kept``, row by row; pixels (H, W, 3), uint8."""
    columns = pixels.shape[1] // patch_size
    masked = np.full_like(pixels, GREY)
    for number in kept:
        row, column = divmod(number, columns)
        place = np.s_[row * patch_size : (row + 1) * patch_size, column * patch_size : (column + 1) * patch_size]
        masked[place] = pixels[place]
    return masked


def next_commands(args: argparse.Namespace, weights: Path, knn: KNNMonitor) -> list[str]:
    """Evaluations of the network that was trained, as they can be pasted into a shell."""
    network = {"model_name": args.model_name, "pretrained": weights.parent, "fname": weights.name}
    size = args.rand_size if args.rand_size != 224 else None
    data = {"data_path": args.data_path, "val_path": args.val_path, "image_size": size}
    commands = []
    if not knn.disabled_reason:
        few = len(knn.train.source) < 200  # by default the script asks for 200 neighbours
        commands.append(command("logistic_eval.py", **network, **data, imgs_per_class=5))
        commands.append(command("eval_knn.py", **network, **data, nb_knn=knn.k if few else None))
    image = {"image_path": "YOUR_IMAGE", "image_size": 2 * args.rand_size if size else None}
    commands.append(command("visualize_attention.py", **network, **image))
    return [*commands, "python main.py --data_path YOUR_IMAGES --folder YOUR_RUN"]
