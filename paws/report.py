"""What a run leaves for a person to look at: pictures, and a summary that says what was learned and what to do next."""

import argparse
import shlex
from pathlib import Path

from shared.multicrop import MultiCropDataset
from shared.run.log import read_log
from shared.run.summary import command, end_of_run

from .checkpoints import latest
from .evaluation import SNNMonitor
from .pictures import save_curves, save_views
from .pseudo_labels import Written


def save_pictures(views: MultiCropDataset, output_dir: Path) -> list[Path]:
    """Views of one image, and curves.

    Args:
        views: The unlabelled training images.
        output_dir: Folder of the run; pictures go to ``pictures/`` inside it.
    """
    folder = output_dir / "pictures"
    folder.mkdir(exist_ok=True)
    groups, _, _ = views[(0, 0)]
    return [save_views(groups, folder / "views.png"), save_curves(output_dir / "metrics.jsonl", folder / "curves.png")]


def summary(
    args: argparse.Namespace,
    output_dir: Path,
    evaluation: SNNMonitor,
    written: Written,
    pictures: list[Path],
    problems: list[str],
) -> str:
    """What was learned, where the files are and what to run next, as text for the end of a run.

    Args:
        problems: Sentences of the collapse monitor.
    """
    found = [line for line in read_log(output_dir / "metrics.jsonl") if "snn_top1" in line]
    learned = []
    if found:
        before = f"{found[0]['snn_top1']:.1f} % after {found[0]['step']} steps, " if len(found) > 1 else ""
        classes = len(evaluation.images.classes)
        learned.append(
            f"soft nearest neighbours, {len(evaluation.images.labelled):,} labels, "
            f"{evaluation.validation.describe()}: {before}{found[-1]['snn_top1']:.1f} % after "
            f"{found[-1]['step']} steps (chance {100 / classes:.1f} %)"
        )
    elif evaluation.disabled_reason:
        learned.append(f"accuracy not known: {evaluation.disabled_reason}")
    learned += written.lines
    weights = output_dir / latest(args)
    flags = {
        "model_name": args.model_name,
        "pretrained": weights,
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
    return end_of_run(output_dir, weights, None, pictures, commands, learned, problems)
