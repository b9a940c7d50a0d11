"""What a NaViT's accuracy costs: one network at several resolutions, and two of them one after the other.

    python eval_resolutions.py                                                # the run on the embedded data
    python eval_resolutions.py --pretrained RUN/checkpoint.pth --data_path /path/to/imagenet --resolutions 64 128 256

Prints a line per effective resolution, and writes ``resolutions.csv``, ``cascade.csv`` and ``resolutions.png``: tokens,
multiplications and additions, images per second on this machine, and accuracy on the validation images in their own
shapes. A cascade looks at all images at one resolution, and again, at the next one, at those it is least sure of.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from navit.hub import CARD, load_navit
from navit.native_resolution_vit import NaViT, Packed
from navit.pack import CutMaterials, EvalPatches, pack_texts
from shared import distributed
from shared.evaluation.features import extract_features
from shared.evaluation.flags import add_labelled_flags, add_process_flags, parse_evaluation, take_from_run
from shared.images.labelled import match_classifier, open_labelled, open_val
from shared.images.loading import LEFT_OUT, BadImages
from shared.images.sources import ImageSource, open_source, reading
from shared.images.tables import write_table
from shared.optimisation.precision import Precision
from shared.pictures.curves import Curve, Panel, save_panels
from shared.run.flags import Parser

COLUMNS = ("resolution", "tokens", "gflops", "images_per_s", "acc1", "loss", "shrunk")
SHARES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # of the images that the second stage of a cascade sees


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add_labelled_flags(parser)
    add = parser.add_argument_group("network").add_argument
    add("--pretrained", default=None, help=f"checkpoint of a run; without images: {CARD.embedded_run}")
    sides = "effective resolutions in pixels, 0: the images' own; None: five in the range of the training"
    add("--resolutions", type=float, nargs="+", default=None, help=sides)
    add("--batch_size", type=int, default=32, help="images per process in one pass")
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


class Classifier(nn.Module):
    """Log-probabilities of K classes, or of K texts that stand for them, tokens, whether shrunk: (E, K + 2).

    Args:
        text: The network of the texts.
        names: These texts.
    """

    def __init__(self, image: NaViT, precision: Precision, text: NaViT | None = None, names: Sequence[str] = ()):
        super().__init__()
        self.image, self.precision, self.texts = image, precision, None
        if text is not None:
            batches = (pack_texts(names[i : i + 256], len(text.pos_embed.x)) for i in range(0, len(names), 256))
            with torch.no_grad(), precision.autocast():
                texts = torch.cat([text(batch.to(precision.device)).float() for batch in batches])
            self.texts = text.log_temperature.detach().exp() * F.normalize(texts, dim=1)

    def forward(self, images: Packed) -> Tensor:
        with self.precision.autocast():
            logits = self.image(images).float()
        if self.texts is not None:
            logits = F.normalize(logits, dim=1) @ self.texts.T
        tokens = images.as_given(torch.tensor(images.lengths, device=logits.device))
        shrunk = torch.tensor(images.shrunk, device=logits.device)
        return torch.cat([logits.log_softmax(dim=1), tokens[:, None], shrunk[:, None]], dim=1)


def classify(
    classifier: Classifier, val: ImageSource, bad_images: BadImages, resolution: float, *how
) -> dict[str, Tensor]:
    """Classify every image once at an effective resolution, shared out over the processes.

    Args:
        how: Size of the batches and further arguments of :func:`shared.evaluation.features.extract_features`.

    Returns:
        Of each image that can be read, in order, on every process: ``loss``, ``hit`` (0 or 1), ``confidence`` (the
        largest probability), ``tokens``, ``gflops`` and ``shrunk`` (1: to fit into the position tables).
    """
    images = EvalPatches(val, resolution, classifier.image, bad_images)
    rows, labels = extract_features(classifier, images, classifier.precision.device, *how)
    rows, labels = (x[labels != LEFT_OUT].cpu() for x in (rows, labels))
    scores, (tokens, shrunk) = rows[:, :-2], rows[:, -2:].T
    if shrunk.any():
        side = f"{resolution:g} px" if resolution else "their own size"
        distributed.print_once(
            f"{int(shrunk.sum())} of {len(rows)} images have more than {images.longest[1]} patches a side (--max_side) "
            f"at {side}: they were made smaller"
        )
    confidence, guess = scores.exp().max(dim=1)
    found = {"loss": F.nll_loss(scores, labels, reduction="none"), "hit": (guess == labels).float()}
    found |= {"confidence": confidence, "tokens": tokens, "shrunk": shrunk}
    return found | {"gflops": giga_operations(classifier.image, tokens)}


def measure(
    resolutions: Sequence[float], look: Callable[[float], dict[str, Tensor]]
) -> Iterator[tuple[dict, list[dict]]]:
    """A row of ``COLUMNS`` for each resolution, as soon as it is there, and those of its cascades after the one before.

    Args:
        look: Maps a resolution to what :func:`classify` returns.
    """
    low, first = {}, None
    for resolution in sorted(resolutions, key=lambda side: side or math.inf):
        start = time.perf_counter()
        found = look(resolution)
        rate = len(found["hit"]) / (time.perf_counter() - start)
        tokens, cost, hit, loss = (found[name].mean().item() for name in ("tokens", "gflops", "hit", "loss"))
        values = (resolution, tokens, cost, rate, 100 * hit, loss, int(found["shrunk"].sum()))
        row, cascades = dict(zip(COLUMNS, values, strict=True)), []
        for share in SHARES if first else ():
            least_sure_first = first["confidence"].argsort().argsort()
            again = least_sure_first < round(share * len(least_sure_first))
            acc1 = 100 * torch.where(again, found["hit"], first["hit"]).mean().item()
            cost = (first["gflops"] + again * found["gflops"]).mean().item()
            pair = {"first": low["resolution"], "second": resolution}
            cascades.append(pair | {"share": share, "gflops": cost, "acc1": acc1})
        yield row, cascades
        low, first = row, found


def save_cost(rows: Sequence[dict], cascades: Sequence[dict], path: Path, heading: str) -> Path:
    """The accuracy over the tokens of an image, and over the cost of a forward pass with the cascade of the middle."""

    def curve(x: str, label: str, style: str, rows: Sequence[dict]) -> Curve:
        return Curve([row[x] for row in rows], [row["acc1"] for row in rows], label, style)

    costs = [curve("gflops", "one resolution", "points", rows)]
    if cascades:
        low, high = (cascades[len(cascades) // 2][name] for name in ("first", "second"))
        label = f"{low:g} px, then {high:g} px for the least sure"
        costs.append(curve("gflops", label, "line", [row for row in cascades if row["first"] == low]))
    sides = ", ".join(f"{row['resolution']:g}" if row["resolution"] else "own" for row in rows)
    tokens = Panel(f"At {sides} px", "tokens per image", "top-1 in %", [curve("tokens", "", "points", rows)], 10.0)
    return save_panels([tokens, Panel("", "GFLOP per image", "top-1 in %", costs, 10.0)], path, heading)


def evenly(low: float, high: float) -> list[int]:
    """Five resolutions of a range."""
    return sorted({round(low + i / 4 * (high - low)) for i in range(5)})


def open_images(args: argparse.Namespace, captions: bool) -> tuple[ImageSource | None, ImageSource | None]:
    """Images to learn from, if they are named, and to classify; captions are classes, and others in each part."""
    if not args.data_path and not args.val_path:
        return CutMaterials("train"), CutMaterials("val")
    if args.data_path and not captions:
        only_shared = args.shared_classes_only
        return open_labelled(args.data_path, args.val_path, shared_classes_only=only_shared, **reading(args))
    train = open_source(args.data_path, "train", **reading(args)) if args.data_path else None
    return train, open_val(args.data_path, args.val_path, **reading(args))


def eval_resolutions(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Print the table, write it, the cascades and their picture, and return the rows of both."""
    precision = Precision(args.amp, distributed.init(args.dist_url, args.device))
    networks, trained_with = load_navit(args.pretrained)
    take_from_run(args, trained_with, {}, {})  # how images of other channels are read
    _, val = open_images(args, captions=len(networks) == 2)
    val = match_classifier(val, args.classes, args.shared_classes_only)
    classes = len(getattr(val, "classes", None) or ())
    if not classes or (len(networks) == 1 and networks[0].num_classes != classes):
        where = args.val_path or args.data_path or val.name
        raise ValueError(f"--pretrained {args.pretrained} has no classifier of the {classes} classes of {where}")
    image, *texts = (network.to(precision.device) for network in networks)
    bad_images = BadImages(len(val), None, args.on_bad_image, args.max_bad_fraction)
    classifier = Classifier(image, precision, *texts, names=val.classes)

    def look(resolution: float) -> dict[str, Tensor]:
        return classify(classifier, val, bad_images, resolution, args.batch_size, args.num_workers)

    distributed.print_once(f"{val.describe()}\n" + "".join(f"{name:>14}" for name in COLUMNS))
    rows, cascades, out = [], [], Path(args.output_dir)
    for row, pairs in measure(args.resolutions or evenly(*trained_with.get("resolution", (64, 256))), look):
        rows, cascades = [*rows, row], [*cascades, *pairs]
        distributed.print_once("".join(f"{row[name]:14.2f}" for name in COLUMNS))
        if distributed.is_main_process():  # as far as it has come: a later resolution may take hours, or fail
            for name, table in (("resolutions", rows), ("cascade", cascades)):
                write_table(out / f"{name}.csv", [*table[0]] if table else [], [line.values() for line in table])
    if distributed.is_main_process():
        print(save_cost(rows, cascades, out / "resolutions.png", "Accuracy and cost of one NaViT"))
    distributed.barrier()
    return rows, cascades


def main() -> None:
    with distributed.clean_exit():
        eval_resolutions(parse_args())


if __name__ == "__main__":
    main()
