"""Write a trained ResMLP for other programs; a file is kept once it has given the torch network's output.

    python -m resmlp.export --pretrained_weights checkpoint.pth --output_dir out

Writes the formats of :func:`shared.networks.export.export_network`, that of timm for the published sizes. Needs the
packages of ``pip install -e '.[export]'``.
"""

import argparse
import functools
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

from resmlp.flags import evaluation_parser
from resmlp.hub import CARD, load_network, sizes, to_timm
from resmlp.resmlp_models import ResMLP
from shared import distributed
from shared.networks.export import export_network

TIMM_MODELS = {  # by width, patch size and depth
    (384, 16, 12): "resmlp_12_224",
    (384, 16, 24): "resmlp_24_224",
    (384, 16, 36): "resmlp_36_224",
    (768, 8, 24): "resmlp_big_24_224",
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add = parser.add_argument_group("export").add_argument
    add("--classifier", action="store_true", help="with the classifier; without it the output is features")
    add("--output_dir", default=".", help="where the files go")
    return parser


def export(network: ResMLP, output_dir: str | Path, origin: str = "") -> dict[str, Path]:
    """:func:`shared.networks.export.export_network` for a network of this folder."""
    shape = sizes("the network", network.state_dict())
    timm_model = TIMM_MODELS.get((shape["embed_dim"], shape["patch_size"], shape["depth"]))
    options = {"num_classes": network.num_classes, "in_chans": network.patch_embed.proj.in_channels}
    return export_network(
        CARD,
        network,
        Path(output_dir) / "resmlp",
        shape | options,
        functools.partial(load_network, classifier=network.num_classes > 0),
        [network.img_size] * 2,
        origin,
        timm_arguments={"model_name": timm_model, "img_size": network.img_size, **options} if timm_model else None,
        to_timm=to_timm,
    )


def main() -> None:
    with distributed.clean_exit():
        parser = get_args_parser()
        args = parser.parse_args()
        if not args.pretrained_weights:
            parser.error("--pretrained_weights is missing: a release (resmlp_24_dist), a file or an address")
        network = load_network(args.pretrained_weights, args.checkpoint_key, args.image_size, args.classifier)
        export(network, args.output_dir, args.pretrained_weights)


if __name__ == "__main__":
    main()
