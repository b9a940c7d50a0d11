"""Collapse diagnostics, pictures and the end-of-run report."""

import argparse
import math
import shlex
from pathlib import Path

import numpy as np

from shared.images.loading import EvalTransform
from shared.multicrop import MultiCropDataset
from shared.pictures.report import Plot, accuracy_plot, pictures_folder, save_curves, save_views, view_tiles
from shared.pictures.sheets import AGREE, DIFFER, Tile, magnify, save_sheet, to_pixels
from shared.run.health import HealthMonitor, HealthRule
from shared.run.log import read_log
from shared.run.run import Run
from shared.run.summary import accuracy, command, end_of_run

from .evaluation import SNNMonitor
from .labels import PartlyLabelled

THUMBNAIL_PX = 96
PER_ROW, ROWS = 10, 3


# --- Collapse diagnostics ---------------------------------------------------------------------------------------------


def collapse_monitor(num_classes: int, total_steps: int) -> HealthMonitor:
    """What the lines of the log say about a collapse of the pseudo-labels.

    The first verdict comes after a quarter of the run: random networks look flat.

    Args:
        num_classes: K, classes of the supports of all processes.
    """
    failures = {
        "features": (
            lambda line: line["feature_spread"] < 0.02,
            "all images have nearly the same representation (spread {feature_spread:.4f}): lower --lr or lengthen "
            "--warmup",
        ),
        "few": (
            lambda line: math.exp(line["mean_entropy"]) < 0.3 * num_classes,
            f"the pseudo-labels use few of the {num_classes} classes (entropy of their mean {{mean_entropy:.2f}}, of "
            "all classes {ln_k:.2f}): use --me_max true, lower --lr, or take more supports "
            "(--supervised_imgs_per_class, --supervised_views)",
        ),
        "uncertain": (
            lambda line: line["certainty"] < 1.5 / num_classes,
            "the pseudo-labels are nearly uniform (largest probability {certainty:.3f}): lower --sharpen or "
            "--temperature, or lengthen --warmup",
        ),
    }
    first_step = total_steps // 4
    return HealthMonitor(
        [
            HealthRule(name, condition, f"COLLAPSE: {sentence}", first_step)
            for name, (condition, sentence) in failures.items()
        ]
    )


# --- Pictures ---------------------------------------------------------------------------------------------------------

PLOTS = [
    Plot(
        "Pseudo-labels",
        "nats",
        {"ploss": "cross-entropy of two views", "mean_entropy": "entropy of the mean prediction"},
        reference=("ln_k", "ln K: all classes alike"),
    ),
    Plot("Certainty", "largest probability", {"certainty": "mean, sharpened"}, least_range=0.2),
    accuracy_plot("Soft nearest neighbours", "snn_top1"),
]


def save_pictures(views: MultiCropDataset, output_dir: Path) -> list[Path]:
    """Views of one image, and curves.

    Args:
        views: The unlabelled training images.
        output_dir: Folder of the run.
    """
    folder = pictures_folder(output_dir)
    groups, _, _ = views[(0, 0)]
    pixels = [view for group in groups for view in group]
    tiles = [view_tiles(pixels[:2], "large view {n}"), view_tiles(pixels[2:], "small view {n}")]
    heading = "One image as it enters the network\nAll views have to get the same pseudo-label."
    return [
        save_views(tiles, folder / "views.png", heading),
        save_curves(output_dir / "metrics.jsonl", folder / "curves.png", "PAWS training", PLOTS),
    ]


def save_certainty(
    images: PartlyLabelled, rows: np.ndarray, found: np.ndarray, confidences: np.ndarray, path: Path
) -> Path:
    """The most certain images of every class in turn, then the least certain ones, with label and confidence.

    Args:
        rows: Their indices.
        found: The pseudo-label of each.
        confidences: Its probability.
    """
    order = np.argsort(-confidences, kind="stable")
    place_in_class = np.zeros(len(order), dtype=np.int64)
    for label in np.unique(found):
        mine = order[found[order] == label]
        place_in_class[mine] = np.arange(len(mine))
    in_turn = np.lexsort((-confidences, place_in_class))  # the surest of each class, then the second of each, ...
    few = min(PER_ROW * ROWS, len(order) // 2 or 1)
    blocks = (("most certain", in_turn[:few]), ("least certain", order[::-1][:few]))
    sheet = []
    for title, chosen in blocks:
        tiles = [_tile(images, rows[i], found[i], confidences[i]) for i in chosen]
        tiles[0].title = title
        sheet += [tiles[start : start + PER_ROW] for start in range(0, len(tiles), PER_ROW)]
    heading = (
        f"Pseudo-labels of {len(rows):,} images\nThe most certain of each label in turn, then the least certain of all."
    )
    heading += "\nBelow each: the label and its probability."
    if images.truth is not None:
        heading += "\nFrame: green where the label is right, red where it is wrong."
    return save_sheet(sheet, path, heading)


def _tile(images: PartlyLabelled, row: int, label: int, confidence: float) -> Tile:
    pixels = images.source.load(int(row)).decode()
    pixels = to_pixels(EvalTransform(THUMBNAIL_PX, THUMBNAIL_PX)(magnify(pixels, THUMBNAIL_PX)))
    frame = None
    if images.truth is not None:
        frame = AGREE if images.truth[row] == label else DIFFER
    name = images.classes[label]
    name = name if len(name) <= 12 else name[:11] + "…"
    return Tile(pixels, caption=f"{name}  {confidence:.2f}", frame=frame)


# --- Summary ----------------------------------------------------------------------------------------------------------


def summary(
    args: argparse.Namespace, run: Run, evaluation: SNNMonitor, pseudo_labels: list[str], pictures: list[Path]
) -> str:
    """What was learned, where the files are and what to run next, as text for the end of a run.

    Args:
        pseudo_labels: Lines about the pseudo-labels.
    """
    if evaluation.disabled_reason:
        learned = [f"accuracy not known: {evaluation.disabled_reason}"]
    else:
        images = evaluation.classifier.images
        what = f"soft nearest neighbours, {len(images.labelled):,} labels, {evaluation.validation.describe()}"
        learned = accuracy(read_log(run.output_dir / "metrics.jsonl"), "snn_top1", what, len(images.classes))
    flags = {
        "model_name": args.model_name,
        "pretrained": run.path,
        "data_path": args.data_path,
        "min_confidence": args.min_confidence,
        "labels_per_class": args.labels_per_class,
        "subset_path": args.subset_path,
        "unlabeled_frac": args.unlabeled_frac if args.data_path else None,
        "data_seed": args.data_seed,
        "dataset": args.dataset if args.data_path else None,
        "image_size": args.image_size,
        "normalize": None if args.normalize else "false",
        "val_path": args.val_path,
    }
    tables = f" --labels {shlex.join(args.labels)}" if args.labels else ""
    scripts = ("snn_eval.py", "fine_tune.py") if evaluation.disabled_reason is None else ()
    commands = [command(script, **flags) + tables for script in scripts]
    commands.append(
        "python main.py --data_path YOUR_IMAGES --labels YOUR_LABELS.csv --fname configs/paws/own_images.yaml "
        "--output_dir YOUR_RUN"
    )
    problems = list(run.health.warnings.values())
    return end_of_run(run.output_dir, run.path, None, pictures, commands, [*learned, *pseudo_labels], problems)
