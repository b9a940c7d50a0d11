"""Write a trained backbone for other programs; a file is kept once it has given the torch network's output.

    python -m paws.export --model_name resnet50 --pretrained run/paws-latest.pth.tar --output_dir out

Writes ``<name>.safetensors`` (names of the published checkpoints, without the heads), ``<name>_torchvision.pth`` and
``<name>_timm.pth`` (state dicts that these libraries load, where they have the network) and ``<name>.onnx`` (any batch
size). Needs the packages of ``pip install -e '.[export]'``.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torchvision
from torch import nn

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paws.heads import Encoder
from paws.networks import bare_backbone
from paws.pretrained import load_encoder
from shared import distributed
from shared.networks.backbones import build_library_backbone, input_channels
from shared.networks.export import export_onnx, export_safetensors, export_state_dict
from shared.networks.weights import safe_load

IMAGE_PX = 224


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model_name", "--model-name", default="resnet50", help="as for main.py")
    add("--pretrained", required=True, help="a file of any layout, or the name of a release")
    add("--allow_partial", action="store_true", help="go on when the file does not fill the network")
    add("--output_dir", default=".", help="where the files go")
    add("--image_size", type=int, nargs=2, default=(IMAGE_PX, IMAGE_PX), help="height and width in pixels that the "
        "ONNX file takes")  # fmt: skip
    return parser


def export(
    encoder: Encoder, model_name: str, output_dir: str | Path, image_size: Sequence[int] = (IMAGE_PX, IMAGE_PX)
) -> dict[str, Path]:
    """Write the backbone of an encoder in every format.

    Args:
        encoder: In evaluation mode, on the CPU.
        model_name: Its name, see :func:`paws.networks.build_encoder`.
        output_dir: Created if missing.
        image_size: Height and width in pixels of the ONNX input, and of the images that files are compared with.

    Returns:
        The files by format: ``safetensors``, ``torchvision`` and ``timm`` (where these have the network), ``onnx``.

    Raises:
        shared.networks.export.ExportMismatch: If an exported network computes something else; its file is not kept.
    """
    output_dir, size = Path(output_dir), list(image_size)
    backbone = bare_backbone(encoder, model_name)
    files = {"safetensors": output_dir / f"{model_name}.safetensors"}
    metadata = {"model_name": model_name, "in_chans": input_channels(backbone)}

    def from_safetensors(file: Path) -> nn.Module:
        return bare_backbone(load_encoder(model_name, file, heads=False), model_name)

    export_safetensors(backbone, files["safetensors"], size, metadata, from_safetensors)
    for library, build in library_twins(model_name, input_channels(backbone)).items():
        if shapes_of(build()) != shapes_of(backbone):
            continue
        files[library] = output_dir / f"{model_name}_{library}.pth"

        def with_library(file: Path, build: Callable[[], nn.Module] = build) -> nn.Module:
            network = build()
            network.load_state_dict(safe_load(file))
            return network.eval()

        export_state_dict(backbone, files[library], size, with_library)
    if absent := [library for library in ("torchvision", "timm") if library not in files]:
        print(f"no file for {' and '.join(absent)}: no network with the names and shapes of this {model_name}")
    files["onnx"] = output_dir / f"{model_name}.onnx"
    export_onnx(backbone, files["onnx"], backbone, size)
    return files


def library_twins(model_name: str, in_chans: int) -> dict[str, Callable[[], nn.Module]]:
    """How torchvision and timm build the network of that name without its classifier, where they have it."""
    twins = {}
    if model_name in torchvision.models.list_models(module=torchvision.models):
        twins["torchvision"] = lambda: build_library_backbone(model_name, in_chans=in_chans)[0]
    if timm.is_model(model_name):
        twins["timm"] = lambda: timm.create_model(model_name, num_classes=0, in_chans=in_chans)
    return twins


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def main() -> None:
    with distributed.clean_exit():
        args = get_args_parser().parse_args()
        encoder = load_encoder(args.model_name, args.pretrained, heads=False, allow_partial=args.allow_partial)
        export(encoder, args.model_name, args.output_dir, args.image_size)


if __name__ == "__main__":
    main()
