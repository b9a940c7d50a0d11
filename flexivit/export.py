"""Write a FlexiViT with patches of one size for other programs; a file is kept once it has given the same output.

    python -m flexivit.export --pretrained flexivit_s_i1k --patch_size 16 --output_dir out

Writes the formats of :func:`shared.networks.export.export_network`, of a plain ViT for images in [-1, 1] of one size,
with the classifier if there is one. Needs the packages of ``pip install -e '.[export]'``.
"""

import sys
from argparse import Namespace
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

from flexivit.checkpoints import described, load_flexible, network_of
from flexivit.hub import CARD
from flexivit.resize_patch import with_patches_of
from shared import distributed
from shared.networks.export import add_export_flags, export_network, size_of_run
from shared.run.flags import Parser

POOLS = {"tok": {}, "gap": {"global_pool": "avg", "fc_norm": False}, "map": {"global_pool": "map"}}  # in timm


def get_args_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--pretrained", default=CARD.embedded_run, help="a release, a file or the folder of a run")
    add("--patch_size", type=int, default=None, help="side in pixels; None: that of the underlying patch embedding")
    return add_export_flags(parser, otherwise=240)


def export(args: Namespace) -> dict[str, Path]:
    """The files by format."""
    network, size = load_flexible(args.pretrained), args.image_size or size_of_run(args.pretrained) or [240]
    patch, _ = network.patches_for((min(size), min(size)), args.patch_size)
    if size[0] != size[-1]:
        raise ValueError(f"--image_size {' '.join(map(str, size))}: positions in files are those of a square")
    tensors, said = with_patches_of(network, patch, (size[0] // patch,) * 2), described(network)
    mlp, in_chans = network.blocks[0].mlp.fc1, network.patch_embed.proj.in_channels
    options = {"patch_size": patch, "img_size": size[0], "in_chans": in_chans, "num_heads": said["num_heads"]}
    options |= {"num_classes": getattr(network.head, "out_features", 0), "embed_dim": network.width}
    options |= {"depth": len(network.blocks), "mlp_ratio": mlp.out_features / mlp.in_features}
    of_timm = {"act_layer": "gelu_tanh" if said["gelu"] == "tanh" else "gelu", "class_token": network.pool == "tok"}
    return export_network(
        CARD,
        network_of(tensors, said, args.pretrained),
        Path(args.output_dir) / f"flexivit_patch{patch}",
        said | options,
        load_flexible,
        size,
        args.pretrained,
        timm_arguments={"model_name": "vit_base_patch16_224", **options, **of_timm, **POOLS[network.pool]},
        to_timm=lambda _: tensors,
    )


def main() -> None:
    distributed.run_script(export, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
