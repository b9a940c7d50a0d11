"""Label the images that have no label: class and confidence of each as a table, and the most and least certain ones.

    python pseudo_labels.py --data_path pictures --labels labels.csv --model_name resnet50 \\
        --pretrained run/paws-latest.pth.tar --output_dir labelled
    python pseudo_labels.py                          # embedded materials, the run in runs/materials

A training with ``main.py`` writes the same files when it ends. Every unlabelled image gets the class with the largest
vote of all labelled images; the confidence is its share of the vote. Writes into ``--output_dir``:

    pseudo_labels.csv           image, label, confidence (and its class, where that is known)
    unreadable.txt              images that could not be read, with the reason
    pictures/certainty.png      the most and the least certain images
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np

from paws import flags
from paws.evaluation import SoftNearestNeighbours, eval_transform, open_classifier
from paws.heads import Encoder
from paws.labels import PartlyLabelled
from shared import distributed
from shared.evaluation.knn_monitor import AUTOMATIC_UP_TO
from shared.images.cache import CachedSource
from shared.images.loading import LEFT_OUT, BadImages, EvalDataset
from shared.images.sources import FileSource
from shared.images.tables import write_table
from shared.pictures.sheets import AGREE, DIFFER, Tile, save_sheet, thumbnail
from shared.run.flags import add_bad_image_flags, bool_flag

PER_ROW, ROWS = 10, 3  # of a block of the picture
EMBEDDED_DATA_DEFAULTS = flags.ON_EMBEDDED | {"output_dir": "runs/materials"}


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.new_parser(__doc__)
    add_bad_image_flags(flags.add_label_flags(parser, dataset=None), "skip", "error", max_fraction=1.0)
    add = flags.add_evaluation_flags(parser, batch_size=128)
    add("--pictures", type=bool_flag, default=True, help="also draw the most and the least certain images")
    flags.add_output_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    return flags.parse_with_embedded_defaults(get_args_parser(), arguments, EMBEDDED_DATA_DEFAULTS, flags.WEIGHTS)


def label_images(args: argparse.Namespace) -> None:
    """Load the encoder, label the images, write and draw."""
    encoder, classifier = open_classifier(args)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    policy = (args.on_bad_image, args.max_bad_fraction)
    lines, labels = save_pseudo_labels(encoder, classifier, output_dir, None, *policy)
    if labels and args.pictures:
        picture = output_dir / "pictures" / "certainty.png"
        picture.parent.mkdir(exist_ok=True)
        lines.append(f"picture: {save_certainty(classifier.images, *labels, picture)}")
    for line in lines:
        distributed.print_once(line)
    distributed.barrier()


def save_pseudo_labels(
    encoder: Encoder,
    classifier: SoftNearestNeighbours,
    output_dir: Path,
    most_images: int | None = AUTOMATIC_UP_TO,
    on_bad_image: str = "skip",
    max_bad_fraction: float = 1.0,
) -> tuple[list[str], tuple[np.ndarray, np.ndarray, np.ndarray] | None]:
    """Label every unlabelled image and write the files; every process must call this, rank 0 writes.

    Args:
        encoder: With its projection head.
        most_images: With more unlabelled images than this nothing is done.
        on_bad_image, max_bad_fraction: What happens to images that cannot be read, see
            :class:`shared.images.loading.BadImages`.

    Returns:
        Lines about it for a person; on rank 0 the images that have a label now, their labels and confidences.

    Raises:
        ImageError: If no unlabelled image can be read.
    """
    images = classifier.images
    rows = images.unlabelled
    if len(rows) == 0:
        return ["no pseudo-labels: every image has a label"], []
    if most_images is not None and len(rows) > most_images:
        return [f"no pseudo-labels of {len(rows):,} images: python pseudo_labels.py writes them"], None
    policy = (output_dir / "unreadable.txt", on_bad_image, max_bad_fraction)
    bad_images = BadImages.with_new_list(len(images.source), *policy)
    dataset = EvalDataset(images.source, eval_transform(classifier.recipe, encoder), bad_images, rows.tolist())
    probabilities, labels = classifier.classify(encoder, dataset)
    readable = (labels != LEFT_OUT).cpu()
    if not distributed.is_main_process():
        return [], None
    confidences, found = (tensor.numpy() for tensor in probabilities.cpu()[readable].max(dim=1))
    rows = rows[readable.numpy()]
    path = output_dir / "pseudo_labels.csv"
    write_labels(images, rows, found, confidences, path)
    lines = [f"{path}: {len(rows):,} pseudo-labels, mean confidence {confidences.mean():.3f}"]
    if images.truth is not None:
        lines.append(
            f"{100 * (found == images.truth[rows]).mean():.1f} % of them are right (these labels were not used)"
        )
    return lines, (rows, found, confidences)


def write_labels(
    images: PartlyLabelled, rows: np.ndarray, found: np.ndarray, confidences: np.ndarray, path: Path
) -> None:
    """One row per image, in the order of the source; the file can be the ``--labels`` of another training.

    Images are named by their path below the data set's folder, where there is one.
    """
    source, classes = images.source, np.array(images.classes)
    source = source.source if isinstance(source, CachedSource) else source
    names = [source.names[row] if isinstance(source, FileSource) else source.path(row) for row in rows.tolist()]
    columns = {"image": names, "label": classes[found], "confidence": [f"{value:.4f}" for value in confidences]}
    columns |= {} if images.truth is None else {"class": classes[images.truth[rows]]}
    write_table(path, list(columns), zip(*columns.values(), strict=True))


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
    frame = None
    if images.truth is not None:
        frame = AGREE if images.truth[row] == label else DIFFER
    name = images.classes[label]
    name = name if len(name) <= 12 else name[:11] + "…"
    return Tile(thumbnail(images.source, int(row)), caption=f"{name}  {confidence:.2f}", frame=frame)


def main() -> None:
    distributed.run_script(label_images, parse_args)


if __name__ == "__main__":
    main()
