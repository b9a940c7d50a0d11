"""Label the images that have no label: class and confidence of each as a table, and the most and least certain ones.

    python pseudo_labels.py --data_path pictures --labels labels.csv --model_name resnet50 \\
        --pretrained run/paws-latest.pth.tar --output_dir labelled
    python pseudo_labels.py                          # embedded digits, the run in runs/digits

A training with ``main.py`` writes the same files when it ends. Every unlabelled image gets the class with the largest
vote of all labelled images; the confidence is its share of the vote. Writes into ``--output_dir``:

    pseudo_labels.csv           image, label, confidence (and its class, where that is known)
    unreadable.txt              images that could not be read, with the reason
    pictures/certainty.png      the most and the least certain images
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paws import training_flags
from paws.augmentations import Recipe, choose_recipe
from paws.evaluation import AUTOMATIC_UP_TO, add_process_flags, classify, eval_transform, representations
from paws.heads import Encoder
from paws.labels import PartlyLabelled
from paws.networks import Representation
from paws.pictures import save_certainty
from paws.pretrained import RUN_ON_DIGITS, load_encoder
from paws.training_data import open_images
from shared import distributed
from shared.evaluation.features import extract_features
from shared.images.decode import ImageError
from shared.images.loading import EvalDataset, default_num_workers
from shared.images.sources import FileSource, ImageSource
from shared.run.flags import bool_flag

UNREADABLE = -2  # in place of a label
# Without images: the digits and the network that main.py trains on them.
EMBEDDED_DATA_DEFAULTS = {
    "dataset": "digits",
    "labels_per_class": 4,
    "model_name": "wide_resnet10w1",
    "pretrained": RUN_ON_DIGITS,
    "output_dir": "runs/digits",
}


@dataclass
class Written:
    """What was found and written.

    Attributes:
        path: The table, or None if there is none.
        lines: About it, for a person.
    """

    path: Path | None
    lines: list[str]
    pictures: list[Path] = field(default_factory=list)


def get_args_parser() -> argparse.ArgumentParser:
    parser = training_flags.new_parser(__doc__)
    training_flags.add_label_flags(parser)
    add = parser.add_argument_group("criterion").add_argument
    add("--temperature", type=float, default=0.1, help="of the softmax over similarities")
    add = parser.add_argument_group("meta").add_argument
    add("--model_name", "--model-name", default="resnet50", help="as for main.py")
    add("--pretrained", default=None, help="checkpoint of a training, or the name of a release")
    add("--use_pred", "--use-pred", action="store_true", help="compare the outputs of the prediction head")
    add("--batch_size", type=int, default=128, help="images per process")
    add("--pictures", type=bool_flag, default=True, help="also draw the most and the least certain images")
    training_flags.add_device_flag(parser)
    training_flags.add_output_flags(parser)
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    args = training_flags.parse_with_embedded_defaults(parser, arguments, EMBEDDED_DATA_DEFAULTS)
    if args.pretrained is None:
        parser.error("--pretrained is missing: a checkpoint of main.py, or the name of a release")
    return args


def label_images(args: argparse.Namespace) -> Written:
    """Load the encoder, label the images, write and draw."""
    device = distributed.init(args.dist_url, args.device)
    images = open_images(args)
    recipe = choose_recipe(args.dataset, args.normalize, args.image_size)
    encoder = load_encoder(args.model_name, args.pretrained, args.use_pred).to(device)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    num_workers = default_num_workers() if args.num_workers is None else args.num_workers
    written = save_pseudo_labels(
        encoder,
        images,
        recipe,
        args.temperature,
        output_dir,
        device,
        args.pictures,
        use_pred=args.use_pred,
        batch_size=args.batch_size,
        num_workers=num_workers,
        most_images=None,
    )
    for line in [*written.lines, *(f"picture: {path}" for path in written.pictures)]:
        distributed.print_once(line)
    return written


def save_pseudo_labels(
    encoder: Encoder,
    images: PartlyLabelled,
    recipe: Recipe,
    temperature: float,
    output_dir: Path,
    device: torch.device,
    pictures: bool = True,
    *,
    use_pred: bool = False,
    batch_size: int = 128,
    num_workers: int = 0,
    most_images: int | None = AUTOMATIC_UP_TO,
) -> Written:
    """Label every unlabelled image and write the files; every process must call this, rank 0 writes.

    Args:
        encoder: With its projection head.
        use_pred: Compare the outputs of the prediction head.
        most_images: With more unlabelled images than this nothing is done.
    """
    rows = images.unlabelled
    if len(rows) == 0:
        return Written(None, ["no pseudo-labels: every image has a label"])
    if most_images is not None and len(rows) > most_images:
        return Written(None, [f"no pseudo-labels of {len(rows):,} images: python pseudo_labels.py writes them"])
    options = {"use_pred": use_pred, "batch_size": batch_size, "num_workers": num_workers}
    supports = representations(encoder, images.source, images.labelled, recipe, device, **options)
    queries, readable = readable_representations(encoder, images.source, rows, recipe, device, **options)
    if not distributed.is_main_process():
        return Written(None, [])
    write_unreadable(images.source, rows[~readable], output_dir / "unreadable.txt")
    labels = torch.from_numpy(images.labels[images.labelled]).to(device)
    probabilities = classify(queries, supports, labels, len(images.classes), temperature)
    confidences, found = (tensor.cpu().numpy() for tensor in probabilities.max(dim=1))
    rows = rows[readable]
    path = output_dir / "pseudo_labels.csv"
    write_table(images, rows, found, confidences, path)
    lines = [f"{path}: {len(rows):,} pseudo-labels, mean confidence {confidences.mean():.3f}"]
    if images.truth is not None:
        lines.append(
            f"{100 * (found == images.truth[rows]).mean():.1f} % of them are right (these labels were not used)"
        )
    drawn = []
    if pictures:
        (output_dir / "pictures").mkdir(exist_ok=True)
        drawn = [save_certainty(images, rows, found, confidences, output_dir / "pictures/certainty.png")]
    return Written(path, lines, drawn)


class ReadableImages(EvalDataset):
    """Images that cannot be read are black and have the label ``UNREADABLE``."""

    def __getitem__(self, position: int) -> tuple[Tensor, int, int]:
        index = self.rows[position]
        try:
            return self._read(index)
        except ImageError:
            side = self.transform.crop_px
            return torch.zeros(self.transform.in_chans, side, side), UNREADABLE, index


def readable_representations(
    encoder: Encoder,
    source: ImageSource,
    rows: np.ndarray,
    recipe: Recipe,
    device: torch.device,
    *,
    use_pred: bool,
    batch_size: int,
    num_workers: int,
) -> tuple[Tensor, np.ndarray]:
    """Representations of the images that can be read, and which of ``rows`` these are (bool)."""
    dataset = ReadableImages(source, eval_transform(recipe, encoder), rows=rows.tolist())
    module = Representation(encoder, use_pred).train(encoder.training)
    features, labels = extract_features(module, dataset, device, batch_size, num_workers)
    readable = labels != UNREADABLE
    if not readable.any():
        raise ImageError(f"none of the {len(rows)} unlabelled images of {source.name} can be read")
    return features[readable], readable.cpu().numpy()


def write_unreadable(source: ImageSource, indices: Sequence[int], path: Path) -> None:
    """List the images that got no label, with the reasons; an old list goes if there are none."""
    path.unlink(missing_ok=True)
    if len(indices) == 0:
        return
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        for index in indices:
            try:
                source.load(index).decode()
            except ImageError as error:
                file.write(f"{source.path(index)}\t{str(error).removeprefix(source.path(index) + ': ')}\n")
    distributed.print_once(f"{len(indices)} images cannot be read and have no pseudo-label: {path}")


def write_table(
    images: PartlyLabelled, rows: np.ndarray, found: np.ndarray, confidences: np.ndarray, path: Path
) -> None:
    """One row per image, in the order of the source; the file can be the ``--labels`` of another training.

    Images are named by their path below the data set's folder, where there is one.
    """
    source = images.source
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "confidence", *(["class"] if images.truth is not None else [])])
        for row, label, confidence in zip(rows.tolist(), found.tolist(), confidences.tolist(), strict=True):
            name = source.names[row] if isinstance(source, FileSource) else source.path(row)
            line = [name, images.classes[label], f"{confidence:.4f}"]
            writer.writerow([*line, images.classes[images.truth[row]]] if images.truth is not None else line)


def main() -> None:
    with distributed.clean_exit():
        label_images(parse_args())
        distributed.barrier()


if __name__ == "__main__":
    main()
