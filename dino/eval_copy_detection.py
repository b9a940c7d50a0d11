"""Copy detection on Copydays (Caron et al. 2021, section 4.2, table 4).

    python eval_copy_detection.py --data_path /path/to/copydays --whitening_path /path/to/images \\
        --distractors_path /path/to/distractors              # released ViT-B/8 at 320 pixels: 85.5 mAP on "strong"

An image is described by the class token and the generalised mean of the patch tokens. Edited copies (JPEG compression,
crops, strong edits) search for their originals among all originals and distractors. The lists are part of the protocol:
an unreadable image is an error, or with ``--on_bad_image skip`` left out, which the results say.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dino.augmentations import to_input
from dino.flags import evaluation_parser, load_chosen
from dino.vision_transformer import VisionTransformer
from shared import distributed
from shared.evaluation.features import extract_features
from shared.evaluation.flags import add_process_flags
from shared.evaluation.frozen import bad_images_of
from shared.evaluation.knn import nearest_neighbours
from shared.evaluation.ranking import average_precision
from shared.images.loading import LEFT_OUT, EvalDataset
from shared.images.sources import ImageSource, open_source
from shared.networks.backbones import input_channels
from shared.run.flags import add_bad_image_flags, bool_flag

EDITS = (
    "strong",
    *(f"jpegqual/{quality}" for quality in (3, 5, 8, 10, 15, 20, 30, 50, 75)),
    *(f"crops/{percent}" for percent in (10, 15, 20, 30, 40, 50, 60, 70, 80)),
)
NEIGHBOURS = 20  # an original that is not among them counts as not found


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__, arch="vit_base", patch_size=8)
    add = parser.add_argument_group("data").add_argument
    add("--data_path", required=True, help="Copydays: original/, strong/, jpegqual/*/, crops/*/")
    add("--whitening_path", default=None, help="folder of images to learn the whitening from")
    add("--distractors_path", default=None, help="folder of images that are added to the originals")
    add("--imsize", type=int, default=320, help="images are resized to a square of this side in pixels")
    add("--batch_size_per_gpu", type=int, default=16, help="images per process")
    add_bad_image_flags(add, "error", "skip")
    add("--use_cuda", type=bool_flag, default=True, help="keep the features on the GPU")
    add_process_flags(parser)
    return parser


def eval_copy_detection(args: argparse.Namespace) -> dict[str, float]:
    """Mean average precision of each group of copies that is in the folder, as shares."""
    device = distributed.init(args.dist_url, args.device)
    root = Path(args.data_path)
    missing = [name for name in ("original", *EDITS) if not (root / name).is_dir()]
    if "original" in missing or len(missing) == len(EDITS):
        raise ValueError(f"--data_path {root}: expected original/ and some of {', '.join(EDITS)}")
    if missing:
        distributed.print_once(f"not in {root}: {', '.join(missing)}")
    groups = {name: open_flat(root / name, "--data_path") for name in ("original", *EDITS) if name not in missing}
    backbone, _ = load_chosen(args)
    if not isinstance(backbone, VisionTransformer):
        raise ValueError(f"--arch {args.arch}: copy detection needs a ViT")
    model = CopyDescriptor(backbone).to(device)
    transform = partial(resize_and_normalize, imsize=args.imsize, in_chans=input_channels(backbone))

    def describe(source: ImageSource) -> tuple[Tensor, Tensor]:
        distributed.print_once(source.describe())
        features, labels = extract_features(
            model,
            EvalDataset(source, transform, bad_images_of(args, source)),
            device,
            args.batch_size_per_gpu,
            args.num_workers,
            store_on=device if args.use_cuda else "cpu",
        )
        return features, labels != LEFT_OUT

    queries = {name: describe(source) for name, source in groups.items()}
    database, readable = queries["original"]
    database, place = database[readable], readable.cumsum(dim=0).cpu() - 1  # of each original in the database
    if args.distractors_path:
        distractors, is_readable = describe(open_flat(args.distractors_path, "--distractors_path"))
        database, readable = torch.cat([database, distractors[is_readable]]), torch.cat([readable, is_readable])
    whiten = None
    if args.whitening_path:
        features, is_readable = describe(open_flat(args.whitening_path, "--whitening_path"))
        whiten = Whitening(features[is_readable])

    def comparable(features: Tensor) -> Tensor:
        return F.normalize(features if whiten is None else whiten(features), dim=1)

    database = comparable(database)
    result, gone = {}, int((~readable).sum())
    for name, (features, is_readable) in queries.items():
        originals = originals_of(name, groups[name], groups["original"])
        originals = [[int(place[i]) for i in indices if readable[i]] for indices in originals]
        asked = [i for i, indices in enumerate(originals) if indices and is_readable[i]]
        _, found = nearest_neighbours(comparable(features[asked]), database, min(NEIGHBOURS, len(database)))
        result[name] = mean_average_precision(found.cpu().numpy(), [originals[i] for i in asked])
        missing = f"{len(originals) - len(asked)} of {len(originals)} copies and {gone} images of the database"
        note = f" (without {missing})" if gone or len(asked) < len(originals) else ""
        distributed.print_once(f"eval on {name} mAP={result[name]:.3f}{note}")
    return result


def open_flat(folder: str | Path, flag: str) -> ImageSource:
    """All images below a folder in the order of their names."""
    if not Path(folder).is_dir():
        raise ValueError(f"{flag} {folder} is not a folder")
    return open_source(folder, "all", flag=flag)


def resize_and_normalize(pixels: np.ndarray, imsize: int, in_chans: int = 3) -> Tensor:
    """RGB pixels (H, W, 3), uint8, to the network's input (C, imsize, imsize), aspect ratio lost."""
    image = Image.fromarray(pixels).resize((imsize, imsize), Image.Resampling.BICUBIC)
    return to_input(image, in_chans)


class CopyDescriptor(nn.Module):
    """Class token and generalised mean (power 4) of the patch tokens of the last block, both after the norm."""

    def __init__(self, backbone: VisionTransformer):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to descriptors (B, 2 D)."""
        tokens = self.backbone.get_intermediate_layers(images, n=1)[0]
        patches = tokens[:, 1:].clamp(min=1e-6).pow(4).mean(dim=1).pow(1 / 4)
        return torch.cat([tokens[:, 0], patches], dim=1)


class Whitening:
    """Subtracts the mean, and decorrelates and scales by the second moments about zero.

    Args:
        features: Shape (N, D). Directions with less than 1e-5 of the largest second moment are scaled as if they had
            that much.
    """

    def __init__(self, features: Tensor):
        features = features.double()
        self.mean = features.mean(dim=0)
        moments, directions = torch.linalg.eigh(features.t() @ features / len(features))
        self.projection = directions / moments.clamp(min=1e-5 * moments.max()).sqrt()  # (D, D), a column per direction

    def __call__(self, features: Tensor) -> Tensor:
        """Shape (M, D) to (M, D), float32."""
        return ((features.double() - self.mean) @ self.projection).float()


def originals_of(edit: str, copies: ImageSource, originals: ImageSource) -> list[list[int]]:
    """Indices of the originals of each copy.

    Strong edits share the first four characters of the file name with their originals; all other copies come in the
    same order as the originals.
    """
    if edit == "strong":
        prefixes = [Path(originals.path(i)).name[:4] for i in range(len(originals))]
        of_prefix = {p: [i for i, other in enumerate(prefixes) if other == p] for p in prefixes}
        found = [of_prefix.get(Path(copies.path(i)).name[:4], []) for i in range(len(copies))]
        lost = next((copies.path(i) for i, indices in enumerate(found) if not indices), None)
        if lost is not None:
            raise ValueError(f"{lost}: no original has the same first four characters")
        return found
    if len(copies) != len(originals):
        raise ValueError(f"{copies.name} has {len(copies)} images, {originals.name} has {len(originals)}")
    return [[i] for i in range(len(originals))]


def mean_average_precision(neighbours: np.ndarray, positives: list[list[int]]) -> float:
    """Over queries.

    Args:
        neighbours: Database indices by descending similarity, shape (Q, k).
        positives: Database indices that should come first, per query.
    """
    return float(
        np.mean(
            [
                average_precision(np.flatnonzero(np.isin(row, wanted)), len(wanted))
                for row, wanted in zip(neighbours, positives, strict=True)
            ]
        )
    )


def main() -> None:
    distributed.run_script(eval_copy_detection, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
