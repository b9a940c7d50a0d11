"""Write a trained XCiT for other programs; a file is kept once it has given the torch network's output.

    python -m xcit.export --model xcit_small_12_p16 --pretrained checkpoint.pth --output_dir out

Writes the formats of :func:`shared.networks.export.export_network`. Needs the packages of
``pip install -e '.[export]'``.
"""

import sys
from argparse import Namespace
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

from shared import distributed
from shared.networks.backbones import input_channels
from shared.networks.export import add_export_flags, export_network
from shared.run.flags import Parser
from xcit.cross_covariance_transformer import ARCHITECTURES
from xcit.hub import CARD, load_network, to_timm


def get_args_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", default="xcit_small_12_p16", choices=ARCHITECTURES, metavar="XCIT", help="name of the network")
    add("--pretrained", default="", help="a release, a file or an address; by default the release at 224 pixels")
    add("--checkpoint_key", default="model", help="network to take from a training checkpoint")
    return add_export_flags(parser)


def export(args: Namespace) -> dict[str, Path]:
    """The files by format."""
    model, network = args.model, load_network(args.model, args.pretrained, args.checkpoint_key)
    options = {"num_classes": network.num_classes, "in_chans": input_channels(network)}
    return export_network(
        CARD,
        network,
        Path(args.output_dir) / model,
        {"model": model, **options},
        lambda path: load_network(model, path),
        args.image_size,
        args.pretrained,
        timm_arguments={"model_name": f"{model}_224", **options},
        to_timm=to_timm,
    )


def main() -> None:
    distributed.run_script(export, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
