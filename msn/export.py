"""Write a trained encoder for other programs; a file is kept once it has given the torch network's output.

    python -m msn.export --model_name deit_small --pretrained /path/to/run --fname msn-latest.pth.tar --output_dir out

Writes the formats of :func:`shared.networks.export.export_network` and ``<model>_transformers`` (a folder for
``transformers.ViTMSNModel``). Needs the packages of ``pip install -e '.[export]'``.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

from msn.flags import load_chosen_encoder, network_parser
from msn.hub import CARD
from msn.vision_transformer import ARCHITECTURES
from shared import distributed
from shared.networks.export import add_export_flags, export_backbone


def get_args_parser() -> argparse.ArgumentParser:
    return add_export_flags(network_parser(__doc__))


def timm_name(model_name: str) -> str:
    """What timm calls a network of this width and depth, if it has it."""
    return f"vit_{model_name.removeprefix('deit_').split('_')[0]}_patch16_224"


def export(args: argparse.Namespace) -> dict[str, Path]:
    """The files by format."""
    encoder, name = load_chosen_encoder(args), args.model_name
    origin = Path(args.pretrained, args.fname)
    ours = (timm_name(name), "" if "conv_stem" in ARCHITECTURES[name] else "ViTMSNModel", "name")
    return export_backbone(CARD, encoder, name, args.output_dir, args.image_size, origin, *ours)


def main() -> None:
    distributed.run_script(export, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
