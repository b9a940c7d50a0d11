"""Where the class token looks: self-attention of the last block, head by head (Caron et al. 2021, figure 1).

    python visualize_attention.py                            # an embedded image, weights of the run in runs/materials
    python visualize_attention.py --image_path photo.jpg     # released ViT-S/8
    python visualize_attention.py --pretrained_weights run/checkpoint.pth --patch_size 16 --threshold 0.6 \\
        --data_path /path/to/imagenet/val                    # also the nearest neighbours of ten of these images

Without --image_path, given weights look at a photograph that comes with scikit-learn. ``attention.png`` shows
everything on one sheet; each map is also a file of its own. Beside it are ``views.png``, the image as it would enter
the networks in training, ``neighbours.png`` and, for weights in the folder of a run, its ``curves.png``.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
from torch import nn

from dino.attention import class_row, has_class_attention
from dino.augmentations import dino_views
from dino.flags import choose_network, evaluation_parser, load_chosen
from dino.hub import CARD, MEAN, STD, VITS8_300_EPOCHS, fetch
from dino.report import CURVES, save_view_sheet
from shared import distributed
from shared.evaluation.neighbours import sample_gallery, save_nearest
from shared.images.loading import EvalTransform
from shared.images.sources import ArraySource, open_source, reading
from shared.multicrop import MultiCropDataset, ViewRecipe
from shared.networks.backbones import input_channels
from shared.networks.pretrained import flags_of_run
from shared.pictures.attention import add_image_flags, chosen_image, parse_image_flags, prepare_image, save_attention
from shared.pictures.report import save_curves
from shared.run.flags import add_reading_flags


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__, patch_size=8)
    add = add_image_flags(parser)
    add("--data_path", default=None, help="images, of which at most 2,000 are searched for the neighbours of ten")
    add_reading_flags(add)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; with neither image nor weights the defaults are those of the embedded images."""
    embedded = {"pretrained_weights": CARD.embedded_run}
    return parse_image_flags(get_args_parser(), arguments, ("pretrained_weights",), embedded)


def load_attentive(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The network that the flags name; released ViT-S/8 weights are those of 300 epochs, as in the official scripts.

    Raises:
        ValueError: If it has no class token whose attention could be shown.
    """
    weights = args.pretrained_weights
    if not weights:
        choose_network(args)
        if (args.arch, args.patch_size) == ("vit_small", 8):
            weights = fetch(VITS8_300_EPOCHS)
    model, _ = load_chosen(args, weights)
    if not has_class_attention(model):
        raise ValueError(f"--arch {args.arch}: attention maps need vit_tiny, vit_small, vit_base or an XCiT")
    return model.to(device)


def training_views(pretrained_weights: str) -> list[ViewRecipe]:
    """The views that the run of a training checkpoint drew; for other weights those of the released networks."""
    recipe = {"global_crops_scale": (0.4, 1.0), "local_crops_scale": (0.05, 0.4), "local_crops_number": 8}
    flags = flags_of_run(pretrained_weights)
    names = [*recipe, "global_crop_size", "local_crop_size", "blur_radius"]  # the official code has but one size
    return dino_views(**(recipe | {name: flags[name] for name in names if name in flags}))


def visualize_attention(args: argparse.Namespace) -> list[Path]:
    """Write the pictures that the flags ask for."""
    device = distributed.init(device=args.device)
    model = load_attentive(args, device)
    pixels = chosen_image(args)
    in_chans, output_dir = input_channels(model), Path(args.output_dir)
    image = prepare_image(pixels, args.image_size, MEAN, STD, in_chans).to(device)
    sheet, *maps = save_attention(model, image, output_dir, MEAN, STD, args.threshold, class_row)

    recipes = training_views(args.pretrained_weights)
    views = MultiCropDataset(ArraySource("image", pixels[None]), recipes, in_chans=in_chans)
    sheets = [sheet, save_view_sheet(views, output_dir / "views.png")]
    if args.data_path is not None or args.embedded:
        size = recipes[0].size_px
        transform = EvalTransform(round(size * 256 / 224), size, MEAN, STD, in_chans)
        source = open_source(args.data_path, "train", **reading(args))
        gallery = sample_gallery(model, source, transform, device)
        sheets.append(save_nearest(gallery, gallery, output_dir / "neighbours.png"))
    log = Path(args.pretrained_weights).parent / "metrics.jsonl"
    if args.pretrained_weights and log.is_file():
        sheets.append(save_curves(log, output_dir / "curves.png", "DINO training", CURVES))
    print(f"{', '.join(map(str, sheets))}, and {len(maps)} pictures of single maps beside them")
    return sheets + maps


def main() -> None:
    distributed.run_script(visualize_attention, parse_args)


if __name__ == "__main__":
    main()
