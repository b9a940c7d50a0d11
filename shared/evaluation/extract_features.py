"""Features of your own images, with classes or without, from a network of any folder.

    python -m shared.evaluation.extract_features dino/runs/mine --data_path IMAGES --out features.parquet
    python -m shared.evaluation.extract_features msn dino/runs/mine --layer blocks.11 --token cls ...   # as msn has it

An image's feature is by default the output of the frozen backbone for its centre crop, what k-NN evaluations compare
before they scale it to unit length: the class token after the last norm of a ViT, the mean over all places of a
convnet or an MLP. ``--layer`` takes what another module of the network gives instead, such as ``blocks.10`` (before
the last norm) or ``layer3``, ``--token`` says what becomes of its tokens, ``--normalize`` scales to unit length.

The file appears at the end, in one step; until then what is done lies beside it in ``<out>.parts``, twice a minute, and
the same command goes on from there and writes the same bytes. ``<out>.json`` says which network it was. Images that
cannot be read are left out and listed beside the output. Works under torchrun.
"""

import argparse
import math
import os
import shutil
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import shared.run.passive_threads  # noqa: F401

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import distributed
from shared.evaluation import frozen
from shared.evaluation.feature_files import Features, check_suffix, write_features
from shared.evaluation.features import check_features, check_replaced, feature_batches
from shared.evaluation.flags import add_process_flags, parse_evaluation, take_from_run
from shared.images.loading import LEFT_OUT, BadImages, EvalDataset, EvalTransform
from shared.images.sources import SPLITS, FileSource, open_source, reading
from shared.networks.own_run import fill_run, folder_of, load_hub, open_run
from shared.networks.pretrained import load_pretrained, size_flag
from shared.networks.weights import UnsafeFileError, safe_load, weights_checksum
from shared.run import randomness
from shared.run.checkpoint import save
from shared.run.flags import Parser, add_bad_image_flags, add_reading_flags, bool_flag

PART_S = 30  # between two parts


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    folder = "method as which the network is built: dino, swav, ...; by default the one that trained it"
    parser.add_argument("folder", nargs="?", default=None, help=folder)
    run = "folder of a run, a file of any layout or its address, the name of a release (dino_vits16), or random"
    parser.add_argument("weights", metavar="run", help=run)
    parser.add_argument("--out", required=True, help="features.parquet, .npz, .npy (beside it .paths.txt) or .csv")
    add = parser.add_argument_group("feature").add_argument
    add("--layer", default=None, help="module whose output is taken, such as norm, blocks.10 or layer3; None: the last")
    token = "of a --layer of tokens: the class token, or the mean of the patches; None: cls where there is one"
    add("--token", default=None, choices=("cls", "mean"), help=token)
    add("--normalize", type=bool_flag, default=False, help="scale the features to unit length")
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


def load_frozen(args: argparse.Namespace) -> tuple[nn.Module, EvalTransform]:
    """The network that the flags choose, and the centre crops that it takes.

    What was left open is taken from the run; a folder whose images are not those of its card has an ``eval_transform``
    in its ``hub.py``.
    """
    if args.weights == "random" and args.folder is None:
        raise ValueError("random: say the folder, too")
    args.folder = args.folder or folder_of(args.weights)
    hub = load_hub(args.folder)
    card = hub.CARD
    path, trained_with = (None, {}) if args.weights == "random" else open_run(card, args.weights)
    names = {"arch": card.arch_flag.removeprefix("--"), "image_size": size_flag(trained_with)}
    take_from_run(args, trained_with, names, {"arch": card.first_arch})
    if args.weights == "random":
        randomness.seed_everything(args.seed)  # the same network on every process
        options = next((dict(r.options) for r in card.releases.values() if r.arch == args.arch), {})
        options |= {"patch_size": args.patch_size} if args.patch_size else {}
        network = load_pretrained(card, args.arch, "random", **{"img_size": args.image_size or 224} | options)
    else:
        network = fill_run(card, path, trained_with, args.arch, args.checkpoint_key, args.image_size)
    if hasattr(hub, "eval_transform"):
        return network, hub.eval_transform(args.image_size, network, trained_with)
    return network, frozen.eval_transform(card, args.image_size or getattr(network, "img_size", 224), network)


class InnerFeatures(nn.Module):
    """One vector of each image from what a module inside a network gives.

    Args:
        layer: Name of the module.
        token: ``cls``, ``mean`` (over the patches), or None: the class token where there is one. Maps (B, D, H, W) are
            averaged, vectors (B, D) stay as they are.

    Raises:
        ValueError: If there is no such module.
    """

    def __init__(self, network: nn.Module, layer: str, token: str | None):
        super().__init__()
        modules = dict(network.named_modules())
        if layer not in modules or not layer:
            names = [name for name in modules if name and name.count(".") <= name[-1].isdigit()]
            raise ValueError(f"--layer {layer}: the network has no such module, but {', '.join(names)}")
        self.network, self.layer, self.token = network, layer, token
        modules[layer].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        self.output = output[0] if isinstance(output, tuple | list) else output

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D); H = W."""
        self.output = None
        if hasattr(self.network, "prepare_tokens"):  # a ViT that computes no more of its last block than it needs
            self.network.get_intermediate_layers(images)
        else:
            self.network(images)
        found = self.output
        if found is None or not 2 <= found.dim() <= 4 or (self.token and found.dim() != 3):
            shape = None if found is None else tuple(found.shape)
            raise ValueError(f"--layer {self.layer} --token {self.token}: what it gives has the shape {shape}")
        if found.dim() != 3:
            return found.mean(dim=(2, 3)) if found.dim() == 4 else found
        # the patches of a square image are a square number, and with a class token they are none
        patches_alone = math.isqrt(found.shape[1]) ** 2 == found.shape[1]
        others = 0 if patches_alone else getattr(self.network, "num_prefix_tokens", 1)
        if self.token == "cls" and not others:
            raise ValueError(f"--token cls: the {found.shape[1]} tokens of --layer {self.layer} are patches alone")
        return found[:, others:].mean(dim=1) if self.token == "mean" or not others else found[:, 0]


# --- Features ---------------------------------------------------------------------------------------------------------


class Parts:
    """What is done of an extraction, in files in a folder, each called by its first row; rank 0 writes them.

    Args:
        made_with: All that the features depend on: parts of another extraction are replaced, which is said.
    """

    def __init__(self, folder: Path, made_with: dict):
        self.folder, self.made_with, self.last = folder, made_with, time.monotonic()
        self.features, self.labels, self.rows, self.saved = [], [], 0, 0
        while (file := folder / f"{self.rows:09}.pth").is_file():
            try:
                part = safe_load(file)
            except UnsafeFileError:  # after a power cut
                break
            if part["made_with"] != made_with:
                distributed.print_once(f"{folder} holds parts of another extraction: they are replaced")
                break
            self.add(part["features"], part["labels"])
        self.saved = len(self.features)
        distributed.check_same_on_all_processes(self.rows, f"rows in {folder}")

    def add(self, features: Tensor, labels: Tensor) -> None:
        """The next batch (B, D) and its labels (B,)."""
        self.features.append(features)
        self.labels.append(labels)
        self.rows += len(features)

    def save(self) -> None:
        """Write what has been added since the last file, if that is long ago."""
        if distributed.is_main_process() and time.monotonic() - self.last >= PART_S:
            features, labels = (torch.cat(new[self.saved :]) for new in (self.features, self.labels))
            check_features(features)
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / f"{self.rows - len(features):09}.pth"
            save(file, {"features": features, "labels": labels, "made_with": self.made_with})
            self.saved, self.last = len(self.features), time.monotonic()


def extract(args: argparse.Namespace) -> Features:
    """Write the features of all images that can be read, and return them; the file is written by rank 0."""
    out = Path(args.out)
    check_suffix(out, "--out")
    if args.token and not args.layer:
        raise ValueError(f"--token {args.token}: --layer says of which module, such as norm")
    device = distributed.init(args.dist_url, args.device)
    network, transform = load_frozen(args)  # first: the run says how its images are read
    source = open_source(args.data_path, args.split, **reading(args))
    distributed.print_once(source.describe())
    made_by = {"folder": args.folder, "run": args.weights, "arch": args.arch, "image_size": transform.crop_px}
    made_by |= {"layer": args.layer, "token": args.token, "weights_crc32": weights_checksum(network)}
    network = network.to(device)
    if args.layer:
        network = InnerFeatures(network, args.layer, args.token).eval()

    how = [
        len(source),
        source.checksum(),
        args.batch_size,
        distributed.get_world_size(),
        str(vars(transform)),
        args.channels,
    ]
    parts = Parts(out.with_name(f"{out.name}.parts"), made_by | {"how": how})
    policy = (out.with_suffix(".bad_images.txt"), args.on_bad_image, args.max_bad_fraction)
    if parts.rows:
        distributed.print_once(f"{parts.rows:,} of {len(source):,} images are done already: going on with the others")
        bad_images = BadImages(len(source), *policy)
    else:
        bad_images = BadImages.with_new_list(len(source), *policy)
    images = EvalDataset(source, transform, bad_images)
    if parts.rows < len(source):
        for _, features, labels, _ in feature_batches(
            network, images, device, args.batch_size, args.num_workers, parts.rows
        ):
            parts.add(features.cpu(), labels.cpu())
            parts.save()
    vectors, labels = torch.cat(parts.features), torch.cat(parts.labels)
    check_replaced(images, (labels == LEFT_OUT).nonzero().flatten().tolist())
    check_features(vectors)

    rows = (labels != LEFT_OUT).nonzero().flatten().tolist()
    vectors = (F.normalize(vectors, dim=1) if args.normalize else vectors)[rows]
    paths = [source.path(row) for row in rows]
    if isinstance(source, FileSource):
        paths = [os.path.abspath(path) for path in paths]
    names = None if source.classes is None else [source.classes[source.label(row)] for row in rows]
    features = Features(paths, names, vectors.numpy(), made_by)
    if distributed.is_main_process():
        write_features(out, features)
        shutil.rmtree(parts.folder, ignore_errors=True)
        print(f"{len(rows):,} features of {vectors.shape[1]} dimensions: {out}", flush=True)
    distributed.barrier()
    return features


def main() -> None:
    distributed.run_script(extract, parse_args)


if __name__ == "__main__":
    main()
