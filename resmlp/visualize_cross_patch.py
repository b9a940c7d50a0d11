"""Pictures of the cross-patch layers: what every patch takes from which other patches (section 3.3 of the paper).

    python visualize_cross_patch.py                                            # the run in runs/materials
    python visualize_cross_patch.py --pretrained_weights resmlp_24_dist --output_dir pictures

Row i of a layer's matrix, laid out as the grid of patches, shows where patch i gets its input from. ``layers.png`` has
all layers side by side, ``layer<number>.png`` one layer with every row at the place of its patch, and ``locality.png``
how the layers change with depth.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import matplotlib
import numpy as np
import torch
from torch import Tensor

from resmlp.hub import CARD, load_network
from resmlp.resmlp_models import ResMLP
from shared import distributed
from shared.pictures.curves import Curve, Panel, save_panels
from shared.pictures.sheets import Tile, magnify, save_sheet
from shared.run.flags import Parser

PER_ROW = 6  # layers
SMALL = 0.05  # of a matrix's largest absolute weight: below it a weight counts as none, as in the paper's analysis
MIN_PX = 180  # of a layer on a sheet


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--pretrained_weights", default=CARD.embedded_run, help="a release (resmlp_24_dist), a file or an address")
    add("--checkpoint_key", default=CARD.checkpoint_key, help="network to take from a training checkpoint")
    add("--output_dir", default="cross_patch", help="where the pictures go")
    return parser


def rows_as_maps(weight: Tensor) -> np.ndarray:
    """A matrix (N, N) of a grid of g x g patches as an image of g x g maps, each g x g, with a line between them.

    Every map is divided by its own largest absolute weight: -1 .. 1; the lines are NaN.
    """
    grid = round(len(weight) ** 0.5)
    maps = weight.detach().cpu().float().numpy().reshape(grid, grid, grid, grid)
    maps = maps / np.maximum(np.abs(maps).max(axis=(2, 3), keepdims=True), 1e-12)
    lined = np.pad(maps, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    return lined.transpose(0, 2, 1, 3).reshape(grid * (grid + 1), -1)[:-1, :-1]


def to_colors(values: np.ndarray) -> np.ndarray:
    """Blue for -1, white for 0, red for 1, grey for NaN: RGB, uint8, (H, W, 3)."""
    pixels = matplotlib.colormaps["bwr"]((np.nan_to_num(values) + 1) / 2, bytes=True)[..., :3].copy()
    pixels[np.isnan(values)] = 200
    return pixels


def locality(weight: Tensor) -> tuple[float, float]:
    """Share of weights below ``SMALL`` of the largest one, and mean distance in patches that information travels.

    The distance is weighted by the absolute weights; without any locality it is about half of the grid's side.
    """
    grid = round(len(weight) ** 0.5)
    places = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).float()
    strength = weight.detach().cpu().float().abs()
    distance = (strength * torch.cdist(places, places)).sum() / strength.sum().clamp_min(1e-12)
    return (strength < SMALL * strength.max()).float().mean().item(), distance.item()


def save_layers(network: ResMLP, folder: Path) -> list[Path]:
    """Write ``layers.png`` and one ``layer<number>.png`` per block; returns their paths."""
    tiles = []
    for i, block in enumerate(network.blocks, start=1):
        sparse, distance = locality(block.attn.weight)
        pixels = magnify(to_colors(rows_as_maps(block.attn.weight)), MIN_PX)
        tiles.append(Tile(pixels, f"layer {i}", f"{100 * sparse:.0f} % small, distance {distance:.1f}"))
    rows = [tiles[start : start + PER_ROW] for start in range(0, len(tiles), PER_ROW)]
    heading = "Every small map shows what one patch takes from all patches: red positive, blue negative"
    paths = [save_sheet(rows, folder / "layers.png", f"Cross-patch layers\n{heading}", [2.2] * len(rows))]
    for i, tile in enumerate(tiles, start=1):
        heading = f"Cross-patch layer {i}\nEvery map is at the place of its patch: {network.grid} x {network.grid}"
        paths.append(save_sheet([[Tile(tile.pixels)]], folder / f"layer{i:02d}.png", heading, [7.0]))
    return paths


def save_locality(network: ResMLP, path: Path) -> Path:
    """Curves of :func:`locality` over the layers."""
    sparse, distance = zip(*(locality(block.attn.weight) for block in network.blocks), strict=True)
    layers, percent = range(1, len(sparse) + 1), [100 * share for share in sparse]
    panels = [
        Panel(f"Weights below {SMALL} of the largest", "layer", "%", [Curve(layers, percent)], 20),
        Panel("Distance between patches", "layer", "patches", [Curve(layers, distance)], 2),
    ]
    return save_panels(panels, path, "Cross-patch layers by depth")


def main() -> None:
    with distributed.clean_exit():
        args = get_args_parser().parse_args()
        network, folder = load_network(args.pretrained_weights, args.checkpoint_key), Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for path in (*save_layers(network, folder), save_locality(network, folder / "locality.png")):
            print(path)


if __name__ == "__main__":
    main()
