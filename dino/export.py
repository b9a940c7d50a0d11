"""Write a trained backbone for other programs; a file is kept once it has given the torch network's output.

    python -m dino.export --arch vit_small --patch_size 16 --pretrained_weights checkpoint.pth --output_dir out

Writes ``<arch>.safetensors`` (names of the published checkpoints), ``<arch>_timm.pth`` (a state dict for timm) and
``<arch>.onnx`` (any batch size). Needs the packages of ``pip install -e '.[export]'``.
"""

import argparse
import copy
import functools
import sys
from pathlib import Path

import timm
from torch import nn

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dino.flags import evaluation_parser
from dino.networks import VIT_NAMES, build_backbone
from dino.pretrained import load_pretrained
from shared import distributed
from shared.networks.backbones import input_channels
from shared.networks.export import export_onnx, export_safetensors, export_state_dict
from shared.networks.weights import load_backbone_weights, vit_shape


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add = parser.add_argument_group("export").add_argument
    add("--output_dir", default=".", help="where the files go")
    add("--image_size", type=int, nargs=2, default=None, help="height and width in pixels that the ONNX file takes; by "
        "default those of a ViT's position embeddings, else 224 224")  # fmt: skip
    return parser


def build_options(arch: str, backbone: nn.Module) -> dict:
    """Arguments of :func:`dino.networks.build_backbone` for the same network."""
    options = {"arch": arch, "in_chans": input_channels(backbone)}
    if arch in VIT_NAMES:
        shape = vit_shape(backbone.state_dict())
        options |= {"patch_size": shape.patch_size, "img_size": shape.img_size}
    return options


def rebuild(options: dict, path: Path) -> nn.Module:
    """The network of :func:`build_options`, filled from a file."""
    network, _ = build_backbone(**options)
    load_backbone_weights(network, path)
    return network.eval()


def timm_options(arch: str, backbone: nn.Module) -> dict | None:
    """Arguments of ``timm.create_model`` for the same network; None if timm has none of these names and shapes."""
    options = build_options(arch, backbone)
    name = options.pop("arch")
    if arch in VIT_NAMES:
        name = f"{arch.replace('deit', 'vit')}_patch16_224"
    elif not timm.is_model(name):
        name += "_224"  # XCiT
    if not timm.is_model(name):
        return None
    options = {"model_name": name, "num_classes": 0, **options}
    twin = timm.create_model(**options).state_dict()
    shapes = {name: value.shape for name, value in backbone.state_dict().items()}
    return options if shapes == {name: value.shape for name, value in twin.items()} else None


def frozen_positions(backbone: nn.Module, image_size: list[int]) -> nn.Module:
    """A copy whose position embeddings for this image size, if it has any, are a constant of the ONNX file."""
    network = copy.deepcopy(backbone)
    if hasattr(network, "interpolate_pos_encoding"):
        positions = network.interpolate_pos_encoding(*image_size).detach()
        network.interpolate_pos_encoding = lambda *_: positions
    return network


def export(
    backbone: nn.Module, arch: str, output_dir: str | Path, image_size: list[int] | None = None
) -> dict[str, Path]:
    """Write a backbone in every format.

    Args:
        backbone: In evaluation mode, on the CPU.
        arch: Its name, see :func:`dino.networks.build_backbone`.
        output_dir: Created if missing.
        image_size: Height and width in pixels of the ONNX input; by default those of a ViT's position embeddings, else
            224.

    Returns:
        The files by format: ``safetensors``, ``timm`` (where timm has the network) and ``onnx``.

    Raises:
        shared.networks.export.ExportMismatch: If an exported network computes something else; its file is not kept.
    """
    output_dir = Path(output_dir)
    options = build_options(arch, backbone)
    own_size = [options.get("img_size", 224)] * 2
    files = {"safetensors": output_dir / f"{arch}.safetensors"}
    # the header says how to build the network
    export_safetensors(backbone, files["safetensors"], own_size, options, functools.partial(rebuild, options))
    options = timm_options(arch, backbone)
    if options is None:
        print(f"no file for timm: it has no network with the names and shapes of {arch}")
    else:
        path = files["timm"] = output_dir / f"{arch}_timm.pth"
        export_state_dict(
            backbone, path, own_size, lambda file: timm.create_model(**options, checkpoint_path=str(file)).eval()
        )
        arguments = ", ".join(f"{key}={value!r}" for key, value in options.items())
        print(f"  timm.create_model({arguments}, checkpoint_path={str(path)!r})")
    files["onnx"] = output_dir / f"{arch}.onnx"
    image_size = image_size or own_size
    export_onnx(frozen_positions(backbone, image_size), files["onnx"], backbone, image_size)
    return files


def main() -> None:
    with distributed.clean_exit():
        args = get_args_parser().parse_args()
        backbone, _ = load_pretrained(
            args.arch, args.patch_size, args.pretrained_weights, args.checkpoint_key, args.allow_partial
        )
        export(backbone, args.arch, args.output_dir, args.image_size)


if __name__ == "__main__":
    main()
