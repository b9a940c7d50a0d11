"""Write a trained ResMLP for other programs; a file is kept once it has given the torch network's output.

    python -m resmlp.export --pretrained_weights checkpoint.pth --output_dir out

Writes ``resmlp.safetensors`` (names of the published checkpoints), ``resmlp_timm.pth`` (a state dict for timm, for the
published sizes) and ``resmlp.onnx`` (any batch size). Needs the packages of ``pip install -e '.[export]'``.
"""

import argparse
import functools
import sys
from pathlib import Path

import torch

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from resmlp.flags import evaluation_parser
from resmlp.hub import load_network, to_timm
from resmlp.resmlp_models import ARCHITECTURES, ResMLP
from shared import distributed
from shared.networks.export import export_with_timm_names

TIMM_MODELS = {name: f"{name}_224" for name in ARCHITECTURES} | {"resmlpB_24": "resmlp_big_24_224"}


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add = parser.add_argument_group("export").add_argument
    add("--classifier", action="store_true", help="with the classifier; without it the output is features")
    add("--output_dir", default=".", help="where the files go")
    return parser


def timm_options(network: ResMLP) -> dict | None:
    """Arguments of ``timm.create_model`` for the same network; None if timm has none of that size."""
    for name, build in ARCHITECTURES.items():
        with torch.device("meta"):
            published = build(num_classes=0)
        if all(getattr(published, size) == getattr(network, size) for size in ("embed_dim", "patch_size")) and len(
            published.blocks
        ) == len(network.blocks):
            options = {"num_classes": network.num_classes, "in_chans": network.patch_embed.proj.in_channels}
            return {"model_name": TIMM_MODELS[name], "img_size": network.img_size, **options}
    return None


def export(network: ResMLP, output_dir: str | Path) -> dict[str, Path]:
    """Write a network in every format, see :func:`shared.networks.export.export_with_timm_names`."""
    return export_with_timm_names(
        network,
        Path(output_dir) / "resmlp",
        [network.img_size] * 2,
        {"img_size": network.img_size, "patch_size": network.patch_size, "depth": len(network.blocks)},
        functools.partial(load_network, classifier=network.num_classes > 0),
        timm_options(network),
        to_timm,
    )


def main() -> None:
    with distributed.clean_exit():
        parser = get_args_parser()
        args = parser.parse_args()
        if not args.pretrained_weights:
            parser.error("--pretrained_weights is missing: a release (resmlp_24_dist), a file or an address")
        network = load_network(args.pretrained_weights, args.checkpoint_key, args.image_size, args.classifier)
        export(network, args.output_dir)


if __name__ == "__main__":
    main()
