"""Pictures that excite the filters of a layer most, by gradient ascent on the input (Caron et al. 2018, section 4.1).

    python gradient_ascent.py --model /path/to/checkpoint.pth.tar --conv 1 --lr 3 --niter 30000 --exp /path/to/pictures
    python gradient_ascent.py --model /path/to/checkpoint.pth.tar --conv 5 --lr 30 --niter 3000 --exp /path/to/pictures

Starts from noise; every few steps the picture is blurred, which keeps high frequencies out.
"""

import argparse
import math
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from deepcluster.convnets import ClusterNetwork, check_conv, conv_maps
from deepcluster.flags import MODEL_HELP
from deepcluster.hub import CARD, load_network
from shared import distributed
from shared.pictures.sheets import Tile, magnify, save_sheet, write_png
from shared.run.flags import Parser, add_device_flag
from shared.run.randomness import derive_seed

COLUMNS = 12


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", default=CARD.embedded_run, help=MODEL_HELP)
    add("--arch", default=None, choices=("alexnet", "vgg16"), help="accepted; the checkpoint says what it is")
    add("--conv", type=int, default=1, help="layer, from 1")
    add("--exp", "--output_dir", dest="output_dir", default="", help="folder for the pictures")
    add("--lr", type=float, default=3, help="length of a step")
    add("--wd", type=float, default=1e-5, help="weight decay of the picture")
    add("--sig", type=float, default=0.3, help="standard deviation of the blur in pixels; 0: no blur")
    add("--step", type=int, default=5, help="steps between two blurs")
    add("--niter", type=int, default=1000, help="steps")
    add("--idim", type=int, default=224, help="side of the pictures in pixels")
    add("--filters", type=int, default=0, help="draw the first so many filters; 0: all")
    add("--batch", type=int, default=16, help="filters at a time")
    add("--seed", type=int, default=31)
    add_device_flag(add)
    return parser


def draw_filters(args: argparse.Namespace) -> Path:
    """One picture per filter, and a sheet of all of them, whose path is returned."""
    device = distributed.init(device=args.device)
    network = load_network(args.model, keep_top_layer=False).requires_grad_(False).to(device)
    check_conv(network, args.conv)
    if network.in_chans != 3:
        raise ValueError(f"--model {args.model} takes {network.in_chans} channels: filters are drawn of colours only")
    channels = conv_maps(network, torch.zeros(1, 3, args.idim, args.idim, device=device), args.conv).shape[1]
    filters = list(range(min(args.filters or channels, channels)))
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    tiles = []
    for start in tqdm(range(0, len(filters), args.batch), disable=not sys.stderr.isatty()):
        some = filters[start : start + args.batch]
        noise = torch.stack([starting_noise(args.seed, f, args.idim) for f in some]).to(device)
        images = ascend(network, args.conv, noise, some, args.lr, args.wd, args.sig, args.step, args.niter)
        for number, image in zip(some, images, strict=True):
            pixels = deprocess(image[None].cpu().numpy())
            write_png(output_dir / f"layer{args.conv}-channel{number}.png", pixels)
            tiles.append(Tile(magnify(pixels, 64), f"filter {number}"))
    rows = [tiles[i : i + COLUMNS] for i in range(0, len(tiles), COLUMNS)]
    heading = f"What the filters of layer {args.conv} respond to most"
    path = save_sheet(rows, output_dir / f"layer{args.conv}.png", heading)
    print(f"{len(tiles)} pictures in {output_dir.absolute()}; all of them: {path}")
    return path


def starting_noise(seed: int, number: int, size_px: int) -> Tensor:
    """Gaussian noise (3, size, size) that belongs to one filter."""
    generator = torch.Generator().manual_seed(derive_seed(seed, number) % 2**63)
    return torch.randn(3, size_px, size_px, generator=generator)


def ascend(
    network: ClusterNetwork,
    conv: int,
    images: Tensor,
    filters: list[int],
    lr: float,
    wd: float,
    sig: float,
    blur_every: int,
    steps: int,
) -> Tensor:
    """Change each image so that the mean output of its filter grows.

    Args:
        conv: Layer, from 1; its output is taken before the ReLU, whose gradient would be 0 where it does not respond.
        images: Normalised, (B, 3, H, W).
        filters: One per image.
        lr: Root mean square of a step, over an image.
        wd: Share of ``lr`` by which an image shrinks in each step.
        sig: Standard deviation of the blur in pixels.
        blur_every: Steps between two blurs.
        steps: Number of steps.
    """
    channels = torch.tensor(filters, device=images.device)[:, None, None, None]
    kernel_px = 2 * math.ceil(3 * sig) + 1
    for i in range(steps):
        images = images.detach().requires_grad_(True)
        maps = conv_maps(network, images, conv, before_relu=True)
        responses = maps.gather(1, channels.expand(-1, 1, *maps.shape[2:])).mean(dim=(1, 2, 3))
        (gradient,) = torch.autograd.grad(responses.sum(), images)
        with torch.no_grad():
            scale = gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
            images = images + lr * (gradient / (scale + 1e-12) - wd * images)
            if sig > 0 and i % blur_every == 0:
                images = gaussian_blur(images, kernel_px, sig)
    return images.detach()


def deprocess(image: np.ndarray) -> np.ndarray:
    """Pixels (H, W, 3), uint8, of an array (1, 3, H, W): the mean becomes grey, a deviation 0.1 of the range."""
    scaled = (image - image.mean()) / (image.std() + 1e-5) * 0.1 + 0.5
    return (scaled[0].clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)


def main() -> None:
    distributed.run_script(draw_filters, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
