"""The images that excite each filter of a layer most (Caron et al. 2018, section 4.1).

    python activ_retrieval.py --conv 3                   # embedded materials, weights of the run in runs/materials
    python activ_retrieval.py --data /path/to/images --model /path/to/checkpoint.pth.tar --conv 5 --exp pictures

The response of a filter to an image is the mean of its map.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
from torch import Tensor, nn

from deepcluster.augmentations import centre_crop
from deepcluster.convnets import ClusterNetwork, check_conv, conv_maps
from deepcluster.flags import IMAGES_HELP, MODEL_HELP
from deepcluster.hub import CARD, load_network
from shared import distributed
from shared.evaluation.features import check_replaced
from shared.evaluation.flags import add_process_flags
from shared.images.loading import LEFT_OUT, BadImages, EvalDataset, make_loader
from shared.images.sources import ImageSource, open_source, reading
from shared.networks.pretrained import flags_of_run
from shared.pictures.sheets import Tile, magnify, save_sheet, to_pixels
from shared.run.flags import Parser, add_bad_image_flags, add_reading_flags

FILTERS_PER_SHEET = 16


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", dest="data_path", default=None, help=f"images: {IMAGES_HELP}")
    add("--model", default=CARD.embedded_run, help=MODEL_HELP)
    add("--conv", type=int, default=1, help="layer, from 1")
    add("--exp", "--output_dir", dest="output_dir", default="", help="folder for the pictures")
    add("--count", type=int, default=9, help="images per filter")
    add("--batch_size", type=int, default=64)
    add_reading_flags(add)
    add_bad_image_flags(add, "skip", "error")
    add_process_flags(parser, launcher=False, num_workers=4)
    return parser


def activ_retrieval(args: argparse.Namespace) -> list[Path]:
    """Find the images and draw them, 16 filters on a sheet; paths of the sheets."""
    device = distributed.init(device=args.device)
    network = load_network(args.model, keep_top_layer=False).requires_grad_(False).to(device)
    check_conv(network, args.conv)
    args.channels = flags_of_run(args.model).get("channels")
    source = open_source(args.data_path, "train", flag="--data", **reading(args))
    if not 1 <= args.count <= len(source):
        raise ValueError(f"--count {args.count}: there are {len(source)} images")
    bad_images = BadImages(len(source), None, args.on_bad_image, args.max_bad_fraction)
    dataset = EvalDataset(source, centre_crop(network.img_size, in_chans=network.in_chans), bad_images)
    loader = make_loader(dataset, batch_size=args.batch_size, num_workers=args.num_workers, device=device)
    responses, labels = zip(
        *[(filter_responses(network, images.to(device), args.conv).cpu(), labels) for images, labels, _ in loader],
        strict=True,
    )
    responses, left_out = torch.cat(responses), torch.cat(labels) == LEFT_OUT
    check_replaced(dataset, left_out.nonzero().flatten().tolist())
    responses[left_out] = -torch.inf
    values, indices = responses.topk(args.count, dim=0)  # (count, filters)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for first in range(0, responses.shape[1], FILTERS_PER_SHEET):
        filters = range(first, min(first + FILTERS_PER_SHEET, responses.shape[1]))
        rows = [_row(source, network, f, indices[:, f].tolist(), values[:, f].tolist()) for f in filters]
        heading = f"Layer {args.conv}: the images with the largest response of each filter, largest first"
        path = output_dir / f"layer{args.conv}-filters{filters[0]}-{filters[-1]}.png"
        paths.append(save_sheet(rows, path, heading, [0.8] * len(rows)))
    print(f"{len(paths)} pictures in {output_dir.absolute()}, the first is {paths[0].name}")
    return paths


@torch.no_grad()
def filter_responses(network: nn.Module, images: Tensor, conv: int) -> Tensor:
    """Mean of the map of every filter, (B, C), for normalised images (B, 3, H, W)."""
    return conv_maps(network, images, conv).mean(dim=(2, 3))


def _row(
    source: ImageSource, network: ClusterNetwork, number: int, images: list[int], values: list[float]
) -> list[Tile]:
    crop = centre_crop(network.img_size, False, network.in_chans)
    tiles = []
    for place, (index, value) in enumerate(zip(images, values, strict=True)):
        pixels = magnify(to_pixels(crop(source.load(index).decode())), 64)
        tiles.append(Tile(pixels, f"filter {number}" if place == 0 else "", f"{value:.2f}"))
    return tiles


def main() -> None:
    distributed.run_script(activ_retrieval, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
