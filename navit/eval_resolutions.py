"""What a NaViT's accuracy costs: one network at several resolutions, and two of them one after the other.

    python eval_resolutions.py                                                # the run on the embedded data
    python eval_resolutions.py --pretrained RUN/checkpoint.pth --data_path /path/to/imagenet --resolutions 64 128 256

Prints a line per effective resolution, and writes ``resolutions.csv``, ``cascade.csv`` and ``resolutions.png``: tokens,
multiplications and additions, images per second on this machine, and accuracy on the validation images in their own
shapes. A cascade looks at all images at one resolution, and again, at the next one, at those it is least sure of.
"""

import argparse
import csv
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from navit.hub import CARD, MEAN, STD, load_navit
from navit.native_resolution_vit import NaViT, Packed
from navit.pack import CutMaterials, EvalPatches, pack, pack_texts
from shared import distributed
from shared.evaluation.features import RankSampler, check_replaced
from shared.evaluation.flags import add_labelled_flags, add_process_flags, parse_evaluation, take_from_run
from shared.images.labelled import open_labelled
from shared.images.loading import BadImages, make_loader
from shared.images.sources import open_source, reading
from shared.optimisation.precision import Precision
from shared.pictures.curves import Curve, Panel, save_panels
from shared.run.files import atomic_file
from shared.run.flags import Parser

COLUMNS = ("resolution", "tokens", "gflops", "images_per_s", "acc1")
SHARES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # of the images that the second stage of a cascade sees


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add_labelled_flags(parser)
    add = parser.add_argument_group("network").add_argument
    add("--pretrained", default=None, help=f"checkpoint of a run; without images: {CARD.embedded_run}")
    sides = "effective resolutions in pixels, 0: the images' own; None: five in the range of the training"
    add("--resolutions", type=float, nargs="+", default=None, help=sides)
    add("--batch_size", type=int, default=32, help="images per process in one pass")
    add("--attention", default="auto", choices=("auto", "mask", "segments", "varlen"), help="all are equal")
    add("--amp", default="fp32", choices=("auto", "bf16", "fp16", "fp32"), help="of the forward passes")
    add("--output_dir", default="resolutions", help="for the tables and the picture")
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    args = parse_evaluation(parser, arguments, pretrained=CARD.embedded_run, output_dir="runs/materials/resolutions")
    if args.pretrained is None:
        parser.error("--pretrained: name the checkpoint of a run")
    return args


def giga_operations(network: NaViT, tokens: Tensor) -> Tensor:
    """Multiplications and additions, counted apart, of images of so many tokens, in units of 1e9."""
    d, hidden = network.width, network.blocks[0].mlp.fc1.out_features
    each = network.patch_embed.weight.numel() + len(network.blocks) * (4 * d * d + 2 * d * hidden)
    once, pairs = d * network.num_classes, 2 * len(network.blocks) * d * tokens**2
    if network.attn_pool is not None:
        each, once = each + 2 * d * d + 2 * d, once + 2 * d * d + 2 * d * hidden
    return 2 * (each * tokens + pairs + once) / 1e9


@torch.no_grad()
def zero_shot(image: NaViT, text: NaViT, names: Sequence[str], precision: Precision) -> Callable[[Packed], Tensor]:
    """A classifier by the texts of captions or classes."""
    names, most = [name.replace("_", " ") for name in names], len(text.pos_embed.x)
    with precision.autocast():
        batches = (pack_texts(names[i : i + 256], most).to(precision.device) for i in range(0, len(names), 256))
        texts = torch.cat([F.normalize(text(batch).float(), dim=1) for batch in batches])
    return lambda packed: F.normalize(image(packed).float(), dim=1) @ texts.T * text.log_temperature.exp()


@torch.no_grad()
def classify(
    classifier: Callable[[Packed], Tensor],
    images: EvalPatches,
    precision: Precision,
    batch_size: int,
    num_workers: int = 0,
    between_batches: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """Classify every image once, shared out over the processes.

    Args:
        between_batches: Called after every batch, equally often on every process; may raise to stop.

    Returns:
        Of each image, in order, on every process: ``loss``, ``hit`` (0 or 1), ``confidence`` (the largest probability)
        and ``tokens``.
    """
    loader = make_loader(images, batch_size=batch_size, sampler=RankSampler(len(images)), num_workers=num_workers)
    rows, replaced = [], []
    for examples in loader:
        examples = sorted(examples, key=lambda example: len(example.patches))
        with precision.autocast():
            packed = pack(examples, MEAN[: images.in_chans], STD[: images.in_chans])
            logits = classifier(packed.to(precision.device)).float().cpu()
        labels = torch.tensor([example.label for example in examples])
        loss, hit = F.cross_entropy(logits, labels, reduction="none"), logits.argmax(dim=1) == labels
        values = loss, hit, logits.softmax(dim=1).amax(dim=1), torch.tensor(packed.lengths)
        rows.append((torch.tensor([e.number for e in examples]), torch.stack([v.double() for v in values])))
        replaced += [images.rows[e.number] for e in examples if images.rows[e.number] != e.index]
        if between_batches is not None:
            between_batches()
    check_replaced(images, [index for part in distributed.all_gather_object(replaced) for index in part])
    found = torch.empty(4, len(images), dtype=torch.double)
    for numbers, values in itertools.chain(*distributed.all_gather_object(rows)):
        found[:, numbers] = values
    return dict(zip(("loss", "hit", "confidence", "tokens"), found, strict=True))


def measure(
    network: NaViT, resolutions: Sequence[float], look: Callable[[float], dict[str, Tensor]]
) -> tuple[list[dict], list[dict]]:
    """Rows of ``COLUMNS`` for each resolution, and of the cascades of each with the next.

    Args:
        look: Maps a resolution to what :func:`classify` returns.
    """
    rows, cascades, found = [], [], []
    for resolution in sorted(resolutions, key=lambda side: side or float("inf")):
        start = time.perf_counter()
        seen = look(resolution)
        rate = len(seen["hit"]) / (time.perf_counter() - start)
        seen["gflops"] = giga_operations(network, seen["tokens"])
        tokens, cost, hit = (seen[name].mean().item() for name in ("tokens", "gflops", "hit"))
        rows.append(dict(zip(COLUMNS, (resolution, tokens, cost, rate, 100 * hit), strict=True)))
        found.append((resolution, seen))
    for (low, first), (high, second) in itertools.pairwise(found):
        for share in SHARES:
            again = torch.zeros(len(first["hit"]), dtype=torch.bool)
            again[first["confidence"].argsort()[: round(share * len(again))]] = True
            acc1 = 100 * torch.where(again, second["hit"], first["hit"]).mean().item()
            cost = (first["gflops"] + again * second["gflops"]).mean().item()
            cascades.append({"first": low, "second": high, "share": share, "gflops": cost, "acc1": acc1})
    return rows, cascades


def save_cost(rows: Sequence[dict], cascades: Sequence[dict], path: Path, heading: str) -> Path:
    """The accuracy over the tokens of an image, and over the cost of a forward pass with the cascade of the middle."""
    acc1 = [row["acc1"] for row in rows]
    tokens = Curve([row["tokens"] for row in rows], acc1, "", "points")
    curves = [Curve([row["gflops"] for row in rows], acc1, "one resolution", "points")]
    if cascades:
        middle = cascades[len(cascades) // 2]
        mine = [c for c in cascades if c["first"] == middle["first"]]
        label = f"{middle['first']:g} px, then {middle['second']:g} px for the least sure"
        curves.append(Curve([c["gflops"] for c in mine], [c["acc1"] for c in mine], label))
    sides = ", ".join(f"{row['resolution']:g}" if row["resolution"] else "own" for row in rows)
    panels = [Panel(f"At {sides} px", "tokens per image", "top-1 in %", [tokens], 10.0)]
    return save_panels([*panels, Panel("", "GFLOP per image", "top-1 in %", curves, 10.0)], path, heading)


def write_tables(folder: Path, **tables: Sequence[dict]) -> None:
    for name, rows in tables.items():
        with atomic_file(folder / f"{name}.csv") as temporary, open(temporary, "w", newline="") as file:
            lines = csv.DictWriter(file, list(rows[0]))
            lines.writeheader()
            lines.writerows(rows)


def eval_resolutions(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Print the table, write it, the cascades and their picture, and return the rows of both."""
    precision = Precision(args.amp, distributed.init(args.dist_url, args.device))
    (network, *texts), trained_with = load_navit(args.pretrained)
    take_from_run(args, trained_with, {}, {})  # how images of other channels are read
    network.attention = args.attention
    network.to(precision.device)
    if args.data_path:
        paths, shared_only = (args.data_path, args.val_path), args.shared_classes_only
        _, val = open_labelled(*paths, shared_classes_only=shared_only, **reading(args))
    elif args.val_path:  # captions to choose from need no training images with the same ones
        val = open_source(args.val_path, "all", flag="--val_path", **reading(args))
    else:
        val = CutMaterials("val")
    if not texts and network.num_classes != (classes := len(val.classes or ())):
        raise ValueError(f"--pretrained {args.pretrained} has no classifier of the {classes} classes of {val.name}")
    classifier = zero_shot(network, texts[0].to(precision.device), val.classes, precision) if texts else network
    low, high = trained_with.get("resolution", (64, 256))
    bad_images = BadImages(len(val), None, args.on_bad_image, args.max_bad_fraction)

    def look(resolution: float) -> dict[str, Tensor]:
        images = EvalPatches(val, resolution, network.patch_size, network.patch_embed.in_channels, bad_images)
        return classify(classifier, images, precision, args.batch_size, args.num_workers)

    rows, cascades = measure(network, args.resolutions or evenly(low, high), look)
    if distributed.is_main_process():
        print(f"{val.describe()}\n" + "".join(f"{name:>14}" for name in COLUMNS))
        for row in rows:
            print("".join(f"{row[name]:14.2f}" for name in COLUMNS))
        out = Path(args.output_dir)
        write_tables(out, resolutions=rows, **({"cascade": cascades} if cascades else {}))
        print(save_cost(rows, cascades, out / "resolutions.png", "Accuracy and cost of one NaViT"))
    distributed.barrier()
    return rows, cascades


def evenly(low: float, high: float) -> list[int]:
    """Five resolutions of a range."""
    return sorted({round(low + i / 4 * (high - low)) for i in range(5)})


def main() -> None:
    with distributed.clean_exit():
        eval_resolutions(parse_args())


if __name__ == "__main__":
    main()
