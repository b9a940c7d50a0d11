"""What a FlexiViT's accuracy costs: one network at several patch sizes.

    python eval_flexivit.py                                                      # the run on the embedded data
    python eval_flexivit.py --pretrained flexivit_b_i1k --data_path /path/to/imagenet --sizes 8 12 16 24 32 48

Prints a line per size, and writes ``cost.csv`` and ``cost.png``: patch size, tokens, multiplications and additions of a
forward pass, images per second on this machine, and the accuracy on the validation images.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flexivit.checkpoints import load_flexible
from flexivit.flexible_vit import AtPatchSize, FlexiViT
from flexivit.hub import CARD, MEAN, STD
from shared import distributed
from shared.evaluation.flags import add_labelled_flags, add_process_flags, parse_evaluation, take_from_run
from shared.images.labelled import match_classifier, open_labelled
from shared.images.loading import BadImages, EvalDataset
from shared.images.sources import reading
from shared.images.tables import write_table
from shared.networks.pretrained import flags_of_run
from shared.optimisation.precision import Precision
from shared.pictures.curves import Curve, Panel, save_panels
from shared.run.flags import Parser
from shared.supervised.evaluation import evaluate_classifier
from shared.supervised.transforms import eval_transform

COLUMNS = ("patch_size", "tokens", "gflops", "images_per_s", "acc1")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add_labelled_flags(parser)
    add = parser.add_argument_group("network").add_argument
    add("--pretrained", default=None, help=f"checkpoint, .npz file or release; without images: {CARD.embedded_run}")
    add("--image_size", type=int, default=None, help="side of the images in pixels; None: that of the run, else 240")
    sizes = "sides of the patches in pixels; None: those that the run was trained with, else the published ten"
    add("--sizes", type=int, nargs="+", default=None, help=sizes)
    add("--crop_ratio", type=float, default=240 / 272, help="of the resized short side; small images are seen whole")
    add("--batch_size", type=int, default=64, help="images per process")
    add("--amp", default="fp32", choices=("auto", "bf16", "fp16", "fp32"), help="of the forward passes")
    add("--output_dir", default="cost", help="for cost.csv and cost.png")
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    args = parse_evaluation(parser, arguments, pretrained=CARD.embedded_run, output_dir="runs/materials/cost")
    if args.pretrained is None:
        parser.error("--pretrained: name a checkpoint, a .npz file or a release")
    return args


def giga_operations(network: FlexiViT, image_size: int, patch_size: int) -> float:
    """Multiplications and additions of a forward pass, counted apart, in units of 1e9 for each image.

    What a call does once, such as the resize of the patch embedding, does not count.
    """
    projection, counts = network.patch_embed.proj, []
    for num_images in (1, 2):
        images = projection.weight.new_zeros(num_images, projection.in_channels, image_size, image_size)
        # the counter does not know the fused attention of CPUs
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            network(images, patch_size=patch_size)
        counts.append(counter.get_total_flops())
    return (counts[1] - counts[0]) / 1e9


def measure(
    network: FlexiViT, image_size: int, sizes: Sequence[int], evaluate: Callable[..., dict], num_images: int
) -> list[dict]:
    """A row of ``COLUMNS`` for each patch size; ``evaluate`` maps a network to its accuracy."""
    rows = []
    for size in sizes:
        network.patches_for((image_size, image_size), size)  # before anything is computed
        start = time.perf_counter()
        accuracy = evaluate(AtPatchSize(network, patch_size=size))["acc1"]
        rate = num_images / (time.perf_counter() - start)
        tokens = (image_size // size) ** 2
        values = (size, tokens, giga_operations(network, image_size, size), rate, accuracy)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def save_cost(rows: Sequence[dict], path: Path, heading: str) -> Path:
    """The accuracy over the cost of a forward pass."""
    costs, accuracies = ([row[name] for row in rows] for name in ("gflops", "acc1"))
    labels = ", ".join(str(row["patch_size"]) for row in sorted(rows, key=lambda row: -row["patch_size"]))
    order = sorted(range(len(rows)), key=lambda i: costs[i])
    curve = Curve([costs[i] for i in order], [accuracies[i] for i in order], f"patches of {labels} px", "points")
    return save_panels([Panel("", "GFLOP per image", "top-1 in %", [curve], 10.0)], path, heading)


def eval_flexivit(args: argparse.Namespace) -> list[dict]:
    """Print the table, write it and its picture, and return the rows."""
    device = distributed.init(args.dist_url, args.device)
    trained_with = flags_of_run(args.pretrained)
    take_from_run(args, trained_with, {"image_size": "input_size"}, {"image_size": 240})
    grids = trained_with.get("grids", (5, 6, 8, 10, 12, 15, 16, 20, 24, 30))
    sizes = args.sizes or sorted({args.image_size // grid for grid in grids})
    _, val = open_labelled(args.data_path, args.val_path, shared_classes_only=args.shared_classes_only, **reading(args))
    val = match_classifier(val, args.classes, args.shared_classes_only)
    network = load_flexible(args.pretrained).to(device)
    if getattr(network.head, "out_features", 0) != len(val.classes):
        classes = f"{len(val.classes)} classes of {val.name}"
        raise ValueError(f"--pretrained {args.pretrained} has no classifier of the {classes}")
    in_chans = network.patch_embed.proj.in_channels
    transform = eval_transform(args.image_size, MEAN, STD, args.crop_ratio, in_chans, CARD.interpolation)
    dataset = EvalDataset(val, transform, BadImages(len(val), None, args.on_bad_image, args.max_bad_fraction))

    def evaluate(classifier: torch.nn.Module) -> dict:
        return evaluate_classifier(classifier, dataset, Precision(args.amp, device), args.batch_size, args.num_workers)

    rows = measure(network, args.image_size, sizes, evaluate, len(val))
    if distributed.is_main_process():
        print(f"{val.describe()}, {args.image_size} pixels\n" + "".join(f"{name:>14}" for name in COLUMNS))
        for row in rows:
            print(
                "".join(f"{row[name]:14.2f}" if isinstance(row[name], float) else f"{row[name]:14}" for name in COLUMNS)
            )
        out = Path(args.output_dir)
        table = write_table(out / "cost.csv", COLUMNS, [row.values() for row in rows])
        print(f"{table}, {save_cost(rows, out / 'cost.png', 'Accuracy and cost of one FlexiViT')}")
    distributed.barrier()
    return rows


def main() -> None:
    with distributed.clean_exit():
        eval_flexivit(parse_args())


if __name__ == "__main__":
    main()
