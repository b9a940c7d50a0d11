"""Write a trained backbone for other programs; a file is kept once it has given the torch network's output.

    python -m paws.export --model_name resnet50 --pretrained run/paws-latest.pth.tar --output_dir out

Writes the formats of :func:`shared.networks.export.export_network`, without the heads. Needs the packages of
``pip install -e '.[export]'``.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paws.hub import CARD
from shared import distributed
from shared.networks.export import add_export_flags, export_backbone
from shared.networks.pretrained import load_pretrained
from shared.run.flags import AnyDashParser


def get_args_parser() -> argparse.ArgumentParser:
    parser = AnyDashParser(__doc__)
    add = parser.add_argument
    add("--model_name", default="resnet50", help="as for main.py")
    add("--pretrained", required=True, help="a file of any layout, or the name of a release")
    add("--allow_partial", action="store_true", help="go on when the file does not fill the network")
    return add_export_flags(parser, image_size=(224, 224))


def main() -> None:
    with distributed.clean_exit():
        args = get_args_parser().parse_args()
        backbone = load_pretrained(CARD, args.model_name, args.pretrained, allow_partial=args.allow_partial)
        export_backbone(CARD, backbone, args.model_name, args.output_dir, args.image_size, arch_key="model_name")


if __name__ == "__main__":
    main()
