"""What a few labels are worth: PAWS beside the same network trained on those labels alone, and k-NN on pixels.

    python few_labels.py                             # embedded materials: 1, 4 and 10 labels of each, minutes on a CPU
    python few_labels.py --data_path cifar10 --dataset cifar10 --model_name wide_resnet28w2 --output_dir run ...

All three see the same labels. The supervised network gets the views of PAWS's supports and as many steps; a linear
layer replaces the soft nearest neighbours. Writes ``few_labels.json`` and ``few_labels.png``, and a PAWS run for every
number of labels. Running the same command again goes on where it stopped.
"""

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
from torch import nn

from paws import fine_tune, flags, paws_train
from paws.augmentations import Recipe, choose_recipe
from paws.evaluation import Validation, validation_of
from paws.labels import PartlyLabelled, open_partly_labelled
from shared import distributed
from shared.evaluation.features import extract_features
from shared.evaluation.knn import knn_classify
from shared.images.loading import EvalDataset, EvalTransform
from shared.images.sources import reading
from shared.pictures.curves import Curve, Panel, save_panels
from shared.run.log import read_log

EMBEDDED_DATA_DEFAULTS = {
    name: value for name, value in paws_train.EMBEDDED_DATA_DEFAULTS.items() if name != "labels_per_class"
} | {"output_dir": "runs/materials-few-labels"}
METHODS = {"paws": "PAWS", "supervised": "the same network, labels alone", "pixels": "1-NN on pixels"}


def get_args_parser() -> argparse.ArgumentParser:
    parser = paws_train.get_args_parser()
    parser.description = __doc__.split("\n\n")[0]
    parser.add_argument_group("data").add_argument(
        "--labels_per_class", type=int, nargs="+", default=[1, 4, 10], help="numbers of labels to compare"
    )
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line; without images the defaults are those of the embedded materials."""
    return flags.parse_with_embedded_defaults(parser or get_args_parser(), arguments, EMBEDDED_DATA_DEFAULTS)


def compare(args: argparse.Namespace) -> list[dict[str, float]]:
    """Top-1 in percent of every method, one row per number of labels; prints and draws them."""
    if args.labels is not None or args.subset_path is not None:
        raise ValueError("--labels and --subset_path: the labels are drawn here, --labels_per_class says how many")
    output_dir = Path(args.output_dir)
    rows = []
    for count in args.labels_per_class:
        how = {"data_seed": args.data_seed, **reading(args)}
        images = open_partly_labelled(args.data_path, labels_per_class=count, **how)
        validation = validation_of(args, images)
        recipe = choose_recipe(args.dataset, args.normalize, args.image_size)
        distributed.print_once(f"--- {count} label(s) of each of {len(images.classes)} classes")
        run = output_dir / f"{count}-labels"
        rows.append(
            {
                "labels_per_class": count,
                "pixels": pixel_accuracy(images, validation, recipe),
                "paws": paws_accuracy(args, count, run),
                "supervised": supervised_accuracy(args, count, len(images.labelled), run),
            }
        )
    if distributed.is_main_process():
        (output_dir / "few_labels.json").write_text(json.dumps(rows, indent=1) + "\n")
        print(f"\nTop-1 (%) on {validation.describe()}, last epoch\n{table(rows)}")
        print(f"picture: {save_comparison(rows, output_dir / 'few_labels.png')}", flush=True)
    return rows


def paws_accuracy(args: argparse.Namespace, count: int, run: Path) -> float:
    """Train PAWS with ``count`` labels of each class."""
    training = argparse.Namespace(**vars(args) | {"labels_per_class": count, "output_dir": str(run)})
    if training.supervised_imgs_per_class is not None:
        training.supervised_imgs_per_class = min(training.supervised_imgs_per_class, count)
    paws_train.train_paws(training)
    return [line["snn_top1"] for line in read_log(run / "metrics.jsonl") if "snn_top1" in line][-1]


def supervised_accuracy(args: argparse.Namespace, count: int, num_labels: int, run: Path) -> float:
    """Train the same network from random weights on ``count`` labels of each class, for as many steps as PAWS."""
    steps = [line["step"] for line in read_log(run / "metrics.jsonl") if "loss" in line][-1]
    names = "data_path val_path dataset model_name image_size data_seed num_workers seed device in_chans".split()
    names += ["color_jitter_strength", "amp", "normalize"]
    words = [f"--{name}={getattr(args, name)}" for name in names if getattr(args, name) is not None]
    batch_size = min(256, num_labels)
    repeat = max(1, round(steps / args.epochs * batch_size / num_labels))
    words += ["--pretrained=random", "--views=strong", "--lr=0.03", "--zero_init=false", "--pictures=false"]
    words += ["--value_range", *args.value_range] if args.value_range else []
    words += [f"--labels_per_class={count}", f"--batch_size={batch_size}", f"--repeat={repeat}"]
    words += [f"--epochs={args.epochs}", f"--output_dir={run / 'supervised'}"]
    return fine_tune.fine_tune(fine_tune.parse_args(words))["acc1"]


def pixel_accuracy(images: PartlyLabelled, validation: Validation, recipe: Recipe) -> float:
    """Nearest labelled image by the cosine of the normalised pixels."""
    transform = EvalTransform(recipe.eval_resize_px, recipe.large[0], recipe.mean, recipe.std, 3, "bilinear")
    labelled = EvalDataset(images.source, transform, rows=images.labelled.tolist())
    datasets, cpu = (labelled, validation.dataset(transform)), torch.device("cpu")
    (supports, _), (others, truth) = (extract_features(nn.Flatten(), dataset, cpu) for dataset in datasets)
    return knn_classify(supports, torch.from_numpy(images.labels[images.labelled]), others, truth, k=1)[0]


def table(rows: list[dict[str, float]]) -> str:
    """The rows as lines of text."""
    lines = [f"{'labels per class':>18s}" + "".join(f"{title:>34s}" for title in METHODS.values())]
    for row in rows:
        lines.append(f"{row['labels_per_class']:18d}" + "".join(f"{row[name]:34.1f}" for name in METHODS))
    return "\n".join(lines)


def save_comparison(rows: list[dict[str, float]], path: Path) -> Path:
    """Accuracy against the number of labels, one curve per method."""
    x = [row["labels_per_class"] for row in rows]
    curves = [Curve(x, [row[name] for row in rows], title, "points") for name, title in METHODS.items()]
    panel = Panel("Accuracy with few labels", "labels per class", "top-1 (%)", curves, least_range=10)
    return save_panels([panel], path, "What a few labels are worth")


def main() -> None:
    distributed.run_script(compare, parse_args)


if __name__ == "__main__":
    main()
