"""What a representation is worth for every group of images: accuracy, retrieval and labels by group.

    python eval_groups.py                                                 # embedded materials, generated groups
    python eval_groups.py seer_128gf --data_path /path/to/imagenet/train --groups groups.csv --attribute kind \\
        --associations labels.csv --output_dir /path/to/groups            # groups.csv: image,label,kind,region,...
    python eval_groups.py /path/to/dino/run --folder dino --data_path /path/to/train --groups images_v2.csv \\
        --layout dollar_street --output_dir /path/to/groups

The indicators of Goyal et al. 2022 (section 5.3) for any network of this repository, whichever folder trained it.
Images are classified by their nearest labelled images (``--data_path``), or as ``--predictions`` says. Of every group
of every column of the table:

- *accuracy*: whether the likeliest label, and one of the five likeliest, is that of the image;
- *retrieval* (``--attribute``): share of the k nearest images of the table's other images with the same attribute;
- *association* (``--associations``, a table of label and set): share of the images of which one of the five likeliest
  labels belongs to a set.

A table of groups says nothing about anybody by itself: what its columns mean is for those who made it to know. Without
images and table the groups are generated: a colour cast, a frame, a mark and blur.
"""

import argparse
import bisect
import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import cv2
import numpy as np
import torch.nn.functional as F
from torch import Tensor

from shared import distributed
from shared.evaluation.extract_features import load_frozen
from shared.evaluation.features import extract_features
from shared.evaluation.flags import add_process_flags
from shared.evaluation.knn import count_votes, nearest_neighbours
from shared.images.loading import EvalDataset
from shared.images.sources import ArraySource, FileSource, ImageSource, open_source
from shared.images.tables import read_cells, write_table
from shared.networks.own_run import load_hub
from shared.run.command_line import Parser
from shared.run.randomness import seed_everything
from shared.run.summary import margin

BEST = 5  # labels of an image that count as predicted
CONFIDENCE = 0.2  # of a label that a table of associations lists
AT = (1, 5, 10, 50)  # of retrieval


@dataclass
class Image:
    """A line of a table of groups.

    Attributes:
        path: Below the folder of the table.
        labels: Any of which is right; empty where none is known.
        groups: By the name of the column.
    """

    path: str
    labels: tuple[str, ...] = ()
    groups: dict[str, str] = field(default_factory=dict)


# --- Layouts of tables ------------------------------------------------------------------------------------------------


def read_csv(path: Path, flag: str = "--groups") -> list[Image]:
    """``image``, ``label`` (several behind semicolons; may be missing) and any other columns, which are groups."""
    found = []
    for row in _rows(path, flag, ("image",)):
        image, labels = row.pop("image"), row.pop("label", "").split(";")
        found.append(Image(image, tuple(filter(None, labels)), {name: value for name, value in row.items() if value}))
    return found


def read_dollar_street(path: Path) -> list[Image]:
    """The table of images of Dollar Street: places, monthly income, ImageNet's names of what is seen.

    Income groups are thirds of the range of its logarithm.
    """
    needed = ("imageRelPath", "imagenet_synonyms", "income", "region.id", "country.name")
    rows = list(_rows(path, "--groups", needed))
    try:
        logs = [math.log(float(row["income"])) for row in rows]
    except ValueError as error:
        raise ValueError(f"--groups {path}: an income is no positive number: {error}") from error
    low, width = min(logs), (max(logs) - min(logs)) / 3 or 1.0
    found = []
    for row, log in zip(rows, logs, strict=True):
        names = [name.strip(" []'\"") for name in row["imagenet_synonyms"].split(",")]
        income = ("low", "medium", "high")[min(2, int((log - low) / width))]
        groups = {"income": income, "region": row["region.id"], "country": row["country.name"]}
        found.append(Image(row["imageRelPath"], tuple(filter(None, names)), groups))
    return found


def read_casual_conversations(path: Path) -> list[Image]:
    """The annotations of Casual Conversations: of every subject its files and what it said, or annotators, of itself.

    A file stands for the frame beside it, ``<file>.jpg``. Groups are those of the paper: gender x skin type (1 to 3 and
    4 to 6 of Fitzpatrick's), and age.
    """
    found = []
    try:
        for entry in json.loads(path.read_text()).values():
            label = entry["label"]
            tone = "lighter" if int(label["skin-type"]) <= 3 else "darker"
            groups = {"gender": label["gender"], "gender x skin type": f"{label['gender']}, {tone}"}
            if str(label["age"]).replace(".", "").isdigit():
                groups["age"] = age_group(float(label["age"]))
            found += [Image(f"{file}.jpg", (), groups) for file in entry["files"]]
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"--groups {path} has another layout than Casual Conversations: {error!r}") from error
    return found


def age_group(age: float) -> str:
    return ("<18", "18-30", "30-45", "45-70", "70+")[bisect.bisect((18, 30, 45, 70), age)]


LAYOUTS = {"csv": read_csv, "dollar_street": read_dollar_street, "casual_conversations": read_casual_conversations}


def _rows(path: Path, flag: str, needed: Sequence[str]) -> Iterator[dict[str, str]]:
    """Lines of a table by the names of its columns."""
    (_, heading), *lines = read_cells(path, f"{flag} {path}") or [(0, [])]
    if missing := [name for name in needed if name not in heading]:
        raise ValueError(f"{flag} {path}: no column {', '.join(missing)}; it has {', '.join(heading) or 'none'}")
    if not lines:
        raise ValueError(f"{flag} {path} has no lines")
    for number, cells in lines:
        if len(cells) != len(heading):
            raise ValueError(f"{flag} {path}, line {number}: {len(cells)} cells instead of {len(heading)}")
        yield dict(zip(heading, cells, strict=True))


# --- Generated groups -------------------------------------------------------------------------------------------------


def reddened(pixels: np.ndarray) -> np.ndarray:
    return (pixels * np.array([1.0, 0.65, 0.55])).astype(np.uint8)


def framed(pixels: np.ndarray) -> np.ndarray:
    width = max(1, min(pixels.shape[:2]) // 8)
    inside = pixels[width:-width, width:-width]
    return cv2.copyMakeBorder(inside, width, width, width, width, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def marked(pixels: np.ndarray) -> np.ndarray:
    found, (height, width) = pixels.copy(), pixels.shape[:2]
    cv2.line(found, (0, height - 1), (width - 1, 0), (255, 255, 255), max(1, min(height, width) // 12))
    return found


def blurred(pixels: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(pixels, (0, 0), min(pixels.shape[:2]) / 24)


GENERATED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as it is": lambda pixels: pixels,
    "red cast": reddened,
    "frame": framed,
    "mark": marked,
    "blur": blurred,
}


def generated_groups(source: ImageSource) -> tuple[ArraySource, list[Image]]:
    """The images of a source, in turn as they are and changed in one of four ways, of equal size all of them."""
    names, pixels, images = list(GENERATED), [], []
    for i in range(len(source)):
        name = names[i % len(names)]
        pixels.append(GENERATED[name](source.load(i).decode()))
        images.append(Image(str(i), (source.classes[source.label(i)],), {"generated": name}))
    return ArraySource(f"{source.name}, generated groups", np.stack(pixels), source.labels, source.classes), images


# --- Measures ---------------------------------------------------------------------------------------------------------


def groups_of(images: Sequence[Image]) -> dict[tuple[str, str], np.ndarray]:
    """Indices of the images of every group, by (column, group), those of all of them first."""
    found = defaultdict(list, {("all", "all"): list(range(len(images)))})
    for i, image in enumerate(images):
        for column, group in sorted(image.groups.items()):
            found[column, group].append(i)
    return {key: np.array(found[key]) for key in sorted(found, key=lambda key: (key[0] != "all", key))}


def measures(
    images: Sequence[Image],
    predicted: Sequence[Sequence[tuple[str, float]]],
    features: Tensor | None = None,
    attribute: str | None = None,
    sets: dict[str, set[str]] | None = None,
) -> list[dict]:
    """A row for each group: percentages, and in ``n_*`` of how many images.

    Args:
        predicted: For each image its likeliest labels, the likeliest first, and the confidence in each.
        features: (N, D), for retrieval.
        attribute: Column whose groups are retrieved; images without it are neither queries nor found.
        sets: Labels of every set.
    """
    values: dict[str, np.ndarray] = {}  # NaN where an image has no value
    known = [bool(image.labels) for image in images]
    pairs = list(zip(images, predicted, strict=True))
    for name, most in (("top1", 1), (f"top{BEST}", BEST)):
        hits = [any(label in image.labels for label, _ in labels[:most]) for image, labels in pairs]
        values[name] = np.where(known, hits, np.nan)
    if attribute is not None:
        values |= retrieval(features, [image.groups.get(attribute) for image in images])
    for name, members in (sets or {}).items():
        found = [any(label in members for label, _ in labels[:BEST]) for labels in predicted]
        sure = [any(label in members and p >= CONFIDENCE for label, p in labels[:BEST]) for labels in predicted]
        values |= {f"in {name}": np.array(found, float), f"in {name}, confident": np.array(sure, float)}
    rows = []
    for (column, group), indices in groups_of(images).items():
        row: dict = {"column": column, "group": group, "n": len(indices)}
        for name, of_images in values.items():
            of_group = of_images[indices]
            of_group = of_group[~np.isnan(of_group)]
            if len(of_group):
                row |= {name: 100 * float(of_group.mean()), f"n_{name}": len(of_group)}
        rows.append(row)
    return rows


def retrieval(features: Tensor, attributes: Sequence[str | None]) -> dict[str, np.ndarray]:
    """Precision among the k nearest other images, by cosine similarity, for every k that there are images for."""
    rows = np.array([i for i, value in enumerate(attributes) if value is not None])
    if len(rows) < 2:
        raise ValueError("--attribute: fewer than two images have it")
    most = min(max(AT), len(rows) - 1)
    vectors = F.normalize(features[rows].float(), dim=1)
    _, found = nearest_neighbours(vectors, vectors, most + 1)
    values = np.array([attributes[i] for i in rows])
    same = []
    for i, neighbours in enumerate(found.cpu().numpy()):
        others = neighbours[neighbours != i][:most]
        same.append(values[others] == values[i])
    precision = {f"precision@{k}": np.full(len(attributes), np.nan) for k in AT if k <= most}
    for k, values in zip(AT, precision.values(), strict=False):
        values[rows] = np.array(same)[:, :k].mean(axis=1)
    return precision


def nearest_labels(
    features: Tensor, train: Tensor, labels: Tensor, classes: Sequence[str], k: int
) -> list[list[tuple[str, float]]]:
    """The likeliest labels of every image by the votes of its k nearest labelled images, and their shares."""
    queries, bank = F.normalize(features, dim=1), F.normalize(train, dim=1)
    similarities, found = nearest_neighbours(queries, bank, min(k, len(train)))
    votes = count_votes(similarities, labels[found], len(classes))
    shares, best = (votes / votes.sum(dim=1, keepdim=True)).topk(min(BEST, len(classes)), dim=1)
    return [
        [(classes[c], float(p)) for c, p in zip(row, of_row, strict=True) if p > 0]
        for row, of_row in zip(best.tolist(), shares.tolist(), strict=True)
    ]


def read_predictions(path: Path, images: Sequence[Image]) -> list[list[tuple[str, float]]]:
    """A table of ``image``, ``label`` and ``confidence``, in any order, several lines an image."""
    found = defaultdict(list)
    for row in _rows(path, "--predictions", ("image", "label", "confidence")):
        try:
            found[row["image"]].append((row["label"], float(row["confidence"])))
        except ValueError as error:
            raise ValueError(f"--predictions {path}, {row['image']}: a confidence is no number: {error}") from error
    if missing := [image.path for image in images if image.path not in found]:
        raise ValueError(f"--predictions {path} lacks {len(missing)} images of --groups, the first is {missing[0]}")
    return [sorted(found[image.path], key=lambda pair: -pair[1]) for image in images]


def read_sets(path: Path) -> dict[str, set[str]]:
    """A table of ``label`` and ``set``."""
    found = defaultdict(set)
    for row in _rows(path, "--associations", ("label", "set")):
        found[row["set"]].add(row["label"])
    return dict(found)


# --- Command line -----------------------------------------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    run = "run of any folder, a file or a release; without it the run in runs/materials"
    add("weights", metavar="run", nargs="?", default="", help=run)
    add("--folder", default=None, help="of the run; None: the one that trained it")
    add("--arch", default=None, help="None: that of the run")
    add("--image_size", type=int, default=None, help="side in pixels; None: that of the training, else 224")
    add("--data_path", default=None, help="labelled images, whose labels are predicted; None: the embedded ones")
    add("--groups", type=Path, default=None, help="table of images, named from its folder on, and their groups")
    add("--layout", default="csv", choices=tuple(LAYOUTS), help="of the table")
    add("--attribute", default=None, help="column of the table: tell how well its groups are retrieved")
    add("--associations", type=Path, default=None, help="table of labels and the set of each")
    add("--predictions", type=Path, default=None, help="table of labels of another classifier, instead of neighbours")
    add("--nb_knn", type=int, default=20, help="labelled neighbours that vote")
    add("--batch_size", type=int, default=64, help="images in one pass")
    add("--output_dir", type=Path, default=Path("runs/materials/groups"), help="for groups.csv")
    add("--seed", type=int, default=0, help="of random weights")
    add_process_flags(parser, launcher=False)
    parser.set_defaults(checkpoint_key=None, patch_size=None)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    args = parser.parse_args(arguments)
    if args.groups is not None and not args.data_path and args.predictions is None:
        parser.error(f"--groups {args.groups}: name labelled images as --data_path, or --predictions")
    return args


def open_groups(args: argparse.Namespace) -> tuple[ImageSource, list[Image]]:
    """The images of the table, or those of the embedded val part with generated groups."""
    if args.groups is None:
        return generated_groups(open_source(args.data_path, "val"))
    images = LAYOUTS[args.layout](args.groups)
    root = args.groups.resolve().parent
    if missing := [image.path for image in images if not (root / image.path).is_file()]:
        raise ValueError(
            f"--groups {args.groups}: {len(missing)} images are not there, the first is {root / missing[0]}; names are "
            "those below the folder of the table"
        )
    return FileSource(str(args.groups), root, [image.path for image in images]), images


def eval_groups(args: argparse.Namespace) -> list[dict]:
    """Rows of :func:`measures`, also written to ``--output_dir``."""
    seed_everything(args.seed)
    device = distributed.init(device=args.device)
    source, images = open_groups(args)
    features = None
    if args.predictions is None or args.attribute is not None:
        args.folder = args.folder or (None if args.weights else "seer")
        args.weights = args.weights or load_hub(args.folder).CARD.embedded_run
        network, transform = load_frozen(args)

        def represent(of: ImageSource) -> tuple[Tensor, Tensor]:
            images = EvalDataset(of, transform)
            return extract_features(network.to(device), images, device, args.batch_size, args.num_workers)

        features, _ = represent(source)
    if args.predictions is not None:
        predicted = read_predictions(args.predictions, images)
    else:
        train = open_source(args.data_path, "train")
        if train.classes is None:
            raise ValueError(f"--data_path {args.data_path} has no classes to predict")
        paths = [{os.path.abspath(of.path(i)) for i in range(len(of))} for of in (source, train)]
        if args.groups is not None and (both := len(paths[0] & paths[1])):
            raise ValueError(
                f"--groups {args.groups}: {both} images are in --data_path too and would be their own neighbours"
            )
        predicted = nearest_labels(features, *represent(train), train.classes, args.nb_knn)
    if args.attribute is not None and not any(args.attribute in image.groups for image in images):
        raise ValueError(f"--attribute {args.attribute} is no column of the groups")
    sets = read_sets(args.associations) if args.associations else None
    rows = measures(images, predicted, features, args.attribute, sets)
    write(rows, args.output_dir)
    return rows


def write(rows: list[dict], output_dir: Path) -> None:
    """groups.csv and a table with two standard errors."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    shown = [name for name in names if name not in ("column", "group", "n") and not name.startswith("n_")]
    path = write_table(output_dir / "groups.csv", names, ([row.get(name, "") for name in names] for row in rows))
    for row in rows:
        cells = [f"{n} {row[n]:.1f} +- {margin(row[n], row[f'n_{n}']):.1f}" for n in shown if n in row]
        print(f"{row['column']}: {row['group']}, {row['n']} images: {', '.join(cells)}", flush=True)
    print(path, flush=True)


def main() -> None:
    distributed.run_script(eval_groups, parse_args)


if __name__ == "__main__":
    main()
