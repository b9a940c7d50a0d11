"""Features of your own images, with classes or without, from a network of any folder.

    python -m shared.evaluation.extract_features dino dino/runs/mine --data_path IMAGES --out features.parquet

An image's feature is the output of the frozen backbone for its centre crop, what k-NN evaluations compare before they
scale it to unit length. Files are written at the end, in one step: an interrupted command has written nothing and
starts again. Images that cannot be read are left out and listed beside the output. Works under torchrun.
"""

import argparse
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch.nn.functional as F
from torch import nn

from shared import distributed
from shared.images.loading import LEFT_OUT, BadImages, EvalDataset, EvalTransform
from shared.images.sources import SPLITS, FileSource, open_source, reading
from shared.networks.card import Card, Release
from shared.networks.pretrained import backbone_of, build_for, fetch_release, locate
from shared.networks.weights import (
    flags_of_training,
    load_backbone_weights,
    safe_load,
    select_backbone_weights,
)
from shared.run import randomness
from shared.run.flags import Parser, add_bad_image_flags, add_reading_flags, bool_flag

from . import frozen
from .feature_files import Features, check_suffix, write_features
from .features import extract_features
from .flags import add_process_flags, parse_evaluation, size_flag, take_from_run

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = ("checkpoint.pth", "checkpoint.pth.tar", "*-latest.pth.tar")  # what runs leave in their folders


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("folder", help="method whose network it is: dino, swav, ...")
    run = "folder of a run, a file of any layout or its address, the name of a release (dino_vits16), or random"
    parser.add_argument("weights", metavar="run", help=run)
    parser.add_argument("--out", required=True, help="features.parquet, .npz, .npy (beside it .paths.txt) or .csv")
    parser.add_argument("--normalize", type=bool_flag, default=False, help="scale the features to unit length")
    add = parser.add_argument_group("network").add_argument
    add("--arch", default=None, help="None: that of the run, else that of the folder's first release")
    add("--patch_size", type=int, default=None, help="of a random ViT; that of weights is read from them")
    add("--checkpoint_key", default=None, help="network to take from a training checkpoint; None: the evaluations'")
    add("--seed", type=int, default=0, help="of random weights")
    add = parser.add_argument_group("data").add_argument
    add("--data_path", default=None, help="folder of images, list or torchvision name; None: the embedded ones")
    add("--split", default="all", choices=SPLITS, help="part of a folder with train/ and val/, or of a named data set")
    add_reading_flags(add)
    add("--image_size", type=int, default=None, help="side of the centre crops in pixels; None: that of the run")
    add("--batch_size", type=int, default=128, help="images per process")
    add_bad_image_flags(add, "skip", "error")
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    return parse_evaluation(get_args_parser(), arguments)


# --- Network ----------------------------------------------------------------------------------------------------------


def load_hub(folder: str) -> ModuleType:
    """The ``hub.py`` with the card of a folder, found by existence.

    Raises:
        ValueError: If there is none.
    """
    folders = [file.parent.name for file in sorted(ROOT.glob("*/hub.py")) if "CARD = " in file.read_text()]
    name = folder.strip("/")
    if name not in folders:
        raise ValueError(f"{folder} is none of {', '.join(folders)}")
    return importlib.import_module(f"{name}.hub")


def find_weights(card: Card, run: str) -> tuple[Path, Release | None]:
    """The file that ``run`` means, and its release.

    Raises:
        ValueError: If there is none.
    """
    names = {release.entry or name: name for name, release in card.releases.items()} | {n: n for n in card.releases}
    if run in names:
        return fetch_release(card, names[run]), card.releases[names[run]]
    if Path(run).is_dir():
        found = [file for pattern in CHECKPOINTS for file in sorted(Path(run).glob(pattern))]
        if len(found) != 1:
            raise ValueError(f"{run} holds {len(found) or 'no'} checkpoints ({', '.join(CHECKPOINTS)}); name a file")
        return found[0], None
    return locate(card, run, "the run"), None


def load_frozen(args: argparse.Namespace, hub: ModuleType) -> tuple[nn.Module, EvalTransform]:
    """The network that the flags choose, and the centre crops that it takes.

    What was left open is taken from the run; a folder whose images are not those of its card has an ``eval_transform``
    in its ``hub.py``.
    """
    card, arch_flag = hub.CARD, hub.CARD.arch_flag.removeprefix("--")
    checkpoint, trained_with = {}, {}
    if args.weights != "random":
        path, release = find_weights(card, args.weights)
        checkpoint = safe_load(path)
        trained_with = dict(flags_of_training(checkpoint))
        known = release.arch if release else checkpoint.get("arch") if isinstance(checkpoint, Mapping) else None
        trained_with |= {arch_flag: known} if isinstance(known, str) else {}
    default = next((release.arch for release in card.releases.values()), None)
    take_from_run(args, trained_with, {"arch": arch_flag, "image_size": size_flag(trained_with)}, {"arch": default})
    options = {"img_size": args.image_size or 224}
    if args.weights == "random":
        randomness.seed_everything(args.seed)  # the same network on every process
        options |= next((dict(r.options) for r in card.releases.values() if r.arch == args.arch), {})
        options |= {"patch_size": args.patch_size} if args.patch_size else {}
        network = card.build(args.arch, **options)
    else:
        key = args.checkpoint_key or card.checkpoint_key
        if args.checkpoint_key is None and key not in checkpoint and "teacher" in checkpoint:
            key = "teacher"  # of a network that another folder has trained
        required = key != card.checkpoint_key
        weights = select_backbone_weights(checkpoint, key, str(path), card.head_names, required)
        network = build_for(card, args.arch, weights.tensors, **options | card.sizes(args.arch, weights.tensors))
        load_backbone_weights(backbone_of(network), weights)
    network.eval().requires_grad_(False)
    if hasattr(hub, "eval_transform"):
        return network, hub.eval_transform(args.image_size, network, trained_with)
    return network, frozen.eval_transform(card, args.image_size or getattr(network, "img_size", 224), network)


# --- Features ---------------------------------------------------------------------------------------------------------


def extract(args: argparse.Namespace) -> Features:
    """Write the features of all images that can be read, and return them; the file is written by rank 0."""
    out = Path(args.out)
    check_suffix(out, "--out")
    hub = load_hub(args.folder)
    device = distributed.init(args.dist_url, args.device)
    source = open_source(args.data_path, args.split, **reading(args))
    distributed.print_once(source.describe())
    network, transform = load_frozen(args, hub)
    policy = (out.with_suffix(".bad_images.txt"), args.on_bad_image, args.max_bad_fraction)
    images = EvalDataset(source, transform, BadImages.with_new_list(len(source), *policy))
    vectors, labels = extract_features(network.to(device), images, device, args.batch_size, args.num_workers, "cpu")
    rows = [row for row, label in enumerate(labels.tolist()) if label != LEFT_OUT]
    vectors = (F.normalize(vectors, dim=1) if args.normalize else vectors)[rows]
    paths = [source.path(row) for row in rows]
    if isinstance(source, FileSource):
        paths = [os.path.abspath(path) for path in paths]
    labels = None if source.classes is None else [source.classes[source.label(row)] for row in rows]
    features = Features(paths, labels, vectors.numpy())
    if distributed.is_main_process():
        write_features(out, features)
        print(f"{len(rows):,} features of {vectors.shape[1]} dimensions: {out}", flush=True)
    distributed.barrier()
    return features


def main() -> None:
    distributed.run_script(extract, parse_args)


if __name__ == "__main__":
    main()
