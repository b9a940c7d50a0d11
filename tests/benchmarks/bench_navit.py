"""Images per second of NaViT on 200 images of mixed shapes, beside padding them and beside other networks.

    python tests/benchmarks/bench_navit.py [--out FILE.json]
    python tests/benchmarks/bench_navit.py --images /path/to/photographs --arch navit_s --threads 1

Every network classifies all images, alternated in one process. Packed and padded passes and timm's NaFlexViT have the
same weights and give the same logits, which is checked first; vit-pytorch's NaViT, where it is installed, has the same
sizes. Padding is to the largest height and width of all images, and, as NaFlexViT does, to the longest sequence.
"""

import argparse
import importlib.util
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import timm
import torch
from torch import Tensor, nn

import shared.run.passive_threads  # noqa: F401
from navit.hub import sizes
from navit.native_resolution_vit import SIZES, NaViT, Packed, checkpoint_filter_fn, coordinates_of, patchify
from navit.pack import first_fit
from navit.sampling import nearest_grid
from shared.images.sources import open_source
from tests.benchmarks.harness import alternate, compare, finish, get_args_parser

SHAPES = ((3, 4), (4, 3), (2, 3), (3, 2), (1, 1), (9, 16), (16, 9), (1, 2))  # of generated images


def draw_images(args: argparse.Namespace) -> list[Tensor]:
    """Images (3, height, width) of effective resolutions between --low and --high, of photographs' or other shapes."""
    rng = np.random.default_rng(0)
    if args.images is None:
        shapes = [SHAPES[i] for i in rng.integers(0, len(SHAPES), args.number)]
    else:
        source = open_source(args.images, "all", no_labels=True)
        photographs = (source.load(int(i)) for i in rng.permutation(len(source))[: args.number])
        shapes = [(photograph.height, photograph.width) for photograph in photographs]
    sides = rng.uniform(args.low, args.high, len(shapes))
    grids = [nearest_grid(shape, side, 16) for shape, side in zip(shapes, sides, strict=True)]
    return [torch.randn(3, 16 * rows, 16 * columns) for rows, columns in grids]


def ours(network: NaViT, images: list[Tensor], length: int, batch: int) -> Tensor:
    """Logits by sequences of ``length`` tokens into which the images are packed, ``batch`` of them at a time."""
    grids = [(image.shape[1] // 16, image.shape[2] // 16) for image in images]
    places = first_fit([rows * columns for rows, columns in grids], length)
    logits = torch.empty(len(images), network.num_classes)
    for first in range(0, places.shape[0], batch):
        mine = np.flatnonzero((places.sequence >= first) & (places.sequence < first + batch))
        patches = [patchify(images[i], 16) for i in mine]
        coords = [coordinates_of(*grids[i]) for i in mine]
        logits[mine] = network(Packed.of(patches, coords, [grids[i] for i in mine])).float()
    return logits


class PaddedNaFlex(nn.Module):
    """timm's NaFlexViT on images padded to the longest sequence, or to the largest height and width, of all."""

    def __init__(self, network: nn.Module, images: list[Tensor], whole: bool, batch: int):
        super().__init__()
        self.network, self.batch = network, batch
        rows, columns = (max(image.shape[axis] for image in images) // 16 for axis in (1, 2))
        self.grid, self.whole = (rows, columns), whole
        self.longest = rows * columns if whole else max(i.shape[1] * i.shape[2] for i in images) // 256

    def forward(self, images: list[Tensor]) -> Tensor:
        logits = []
        for first in range(0, len(images), self.batch):
            mine = images[first : first + self.batch]
            patches, valid = (
                torch.zeros(len(mine), self.longest, 768),
                torch.zeros(len(mine), self.longest, dtype=torch.bool),
            )
            coords = torch.zeros(len(mine), self.longest, 2, dtype=torch.long)
            for i, image in enumerate(mine):
                n = image.shape[1] * image.shape[2] // 256
                patches[i, :n], valid[i, :n] = patchify(image, 16), True
                coords[i, :n] = coordinates_of(image.shape[1] // 16, image.shape[2] // 16)
            logits.append(self.network(patches, patch_coord=coords, patch_valid=valid))
        return torch.cat(logits)


def of_vit_pytorch(width: int, depth: int, heads: int, args: argparse.Namespace, images: list[Tensor]) -> nn.Module:
    from vit_pytorch.na_vit import NaViT as Theirs

    side = max(max(image.shape[1:]) for image in images)
    sizes_of = {"dim": width, "depth": depth, "heads": heads, "mlp_dim": 4 * width, "dim_head": width // heads}
    return Theirs(image_size=side, patch_size=16, num_classes=args.classes, **sizes_of).eval()


def by_groups(network: nn.Module, images: list[Tensor], at_once: int, length: int) -> list[Tensor]:
    groups = (images[i : i + at_once] for i in range(0, len(images), at_once))
    return [network(group, group_images=True, group_max_seq_len=length) for group in groups]


@torch.no_grad()
def main() -> None:
    parser = get_args_parser(__doc__, rounds=3)  # 0: only the padding, and that packed images are those alone
    add = parser.add_argument
    add("--images", default=None, help="folder of photographs, whose shapes are taken; None: common shapes")
    add("--number", type=int, default=200, help="of images")
    add("--low", type=float, default=64, help="least effective resolution in pixels; 0 and 0: the images' own")
    add("--high", type=float, default=256, help="largest effective resolution")
    add("--arch", default="navit_ti", choices=[f"navit_{name}" for name in SIZES])
    add("--classes", type=int, default=1000)
    add("--length", type=int, default=1024, help="tokens of a sequence")
    add("--batch", type=int, default=4, help="sequences at a time; padded images: as many as fit into these tokens")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images = draw_images(args)
    tokens = [image.shape[1] * image.shape[2] // 256 for image in images]
    width, depth, heads = SIZES[args.arch.removeprefix("navit_")]
    options = {"embed_dim": width, "depth": depth, "num_heads": heads, "num_classes": args.classes}
    theirs = timm.create_model("naflexvit_base_patch16_siglip", pos_embed_interp_mode="bilinear", **options).eval()
    tensors = checkpoint_filter_fn(theirs.state_dict())
    network = NaViT(width, depth, heads, num_classes=args.classes, **sizes("timm", tensors)).eval()
    network.load_state_dict(tensors | {"choices": network.choices})

    places, mean = first_fit(tokens, args.length), sum(tokens) / len(tokens)
    padding = {"packed": 1 - sum(tokens) / np.prod(places.shape)}
    print(f"{len(images)} images of {min(tokens)} to {max(tokens)} tokens, {padding['packed']:.1%} padding", flush=True)
    expected = ours(network, images, args.length, args.batch)
    alone = torch.cat([network([image]) for image in images])
    print(
        f"largest difference to one image at a time: {(alone - expected).abs().max() / alone.abs().max():.0e}",
        flush=True,
    )
    torch.testing.assert_close(expected, alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))
    if args.rounds == 0:
        return
    longest = PaddedNaFlex(theirs, images, False, max(1, args.batch * args.length // max(tokens)))
    largest = PaddedNaFlex(theirs, images, True, 1)
    largest.batch = max(1, args.batch * args.length // largest.longest)
    padding |= {"longest": 1 - mean / longest.longest, "largest": 1 - mean / largest.longest}
    for padded in (longest, largest):
        torch.testing.assert_close(padded(images), expected, rtol=1e-3, atol=1e-4)
    network.attention = "mask"
    torch.testing.assert_close(ours(network, images, args.length, args.batch), expected, rtol=1e-3, atol=1e-4)
    network.attention = "auto"
    ways = {
        "packed": lambda: ours(network, images, args.length, args.batch),
        "NaFlexViT, longest sequence": lambda: longest(images),
        "padded to the largest": lambda: largest(images),
    }
    if importlib.util.find_spec("vit_pytorch"):
        other = of_vit_pytorch(width, depth, heads, args, images)
        as_many = max(1, int(args.batch * args.length / mean))
        for name, at_once in (("vit-pytorch's NaViT", as_many), ("the same, two images at a time", 2)):
            ways[name] = partial(by_groups, other, images, at_once, args.length)
    else:
        print("vit-pytorch is not installed: its NaViT, and the target beside it, are left out")
    print(f"padding: {padding}")
    rows = compare(alternate(ways, args.rounds), "packed")
    rates = {name: len(images) / min(row["seconds"]) for name, row in rows.items()}
    print("images/s: " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()))
    targets = {"three times padding to the largest": rates["packed"] >= 3 * rates["padded to the largest"]}
    targets["not behind NaFlexViT"] = rates["packed"] >= rates["NaFlexViT, longest sequence"]
    if "vit-pytorch's NaViT" in rates:
        targets["three times vit-pytorch's NaViT"] = rates["packed"] >= 3 * rates["vit-pytorch's NaViT"]
    finish(args, {"rows": rows, "padding": padding, "images_per_s": rates}, targets, (torch, timm))


if __name__ == "__main__":
    main()
