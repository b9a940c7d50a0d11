"""Write a trained trunk for other programs; a file is kept once it has given the torch network's output.

    python -m swav.export --arch resnet50 --pretrained checkpoint.pth.tar --output_dir out

Writes ``<arch>.safetensors`` (names of the published checkpoints), ``<arch>_torchvision.pth`` or ``<arch>_timm.pth`` (a
state dict that these libraries load) and ``<arch>.onnx`` (any batch size). Needs the packages of
``pip install -e '.[export]'``.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import timm
import torchvision
from torch import nn

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared import distributed
from shared.networks.backbones import build_library_backbone, input_channels
from shared.networks.export import export_onnx, export_safetensors, export_state_dict
from shared.networks.weights import safe_load, vit_shape
from swav.evaluation import evaluation_parser
from swav.pretrained import load_backbone, trunk_of
from swav.resnet50 import PrototypeNetwork

IMAGE_PX = 224


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add = parser.add_argument_group("export").add_argument
    add("--output_dir", default=".", help="where the files go")
    add("--image_size", type=int, nargs=2, default=(IMAGE_PX, IMAGE_PX), help="height and width in pixels that the "
        "ONNX file takes")  # fmt: skip
    return parser


def torchvision_network(arch: str) -> nn.Module | None:
    """torchvision's network of that name without its classifier; None if it has none."""
    if arch not in torchvision.models.list_models(module=torchvision.models):
        return None
    return build_library_backbone(arch)[0]


def timm_options(arch: str, options: dict) -> dict | None:
    """Arguments of ``timm.create_model`` for the network of that name; None if it has none."""
    name = f"{arch}_224" if arch.startswith("xcit") and not timm.is_model(arch) else arch
    return {"model_name": name, "num_classes": 0, **options} if timm.is_model(name) else None


def same_entries(network: nn.Module | None, other: nn.Module) -> bool:
    """Whether the state dicts of two networks have the same names and shapes."""
    if network is None:
        return False
    shapes = [{name: value.shape for name, value in module.state_dict().items()} for module in (network, other)]
    return shapes[0] == shapes[1]


def export(
    network: PrototypeNetwork, arch: str, output_dir: str | Path, image_size: Sequence[int] = (IMAGE_PX, IMAGE_PX)
) -> dict[str, Path]:
    """Write the trunk of a network in every format.

    Args:
        network: Without heads, in evaluation mode, on the CPU.
        arch: Its name, see :func:`swav.networks.build_network`.
        output_dir: Created if missing.
        image_size: Height and width in pixels of the ONNX input, and of the images that files are compared with.

    Returns:
        The files by format: ``safetensors``, ``torchvision`` and ``timm`` (where these have the network), ``onnx``.

    Raises:
        shared.networks.export.ExportMismatch: If an exported network computes something else; its file is not kept.
    """
    output_dir, image_size = Path(output_dir), list(image_size)
    trunk = trunk_of(network)
    vit = vit_shape(trunk.state_dict())
    own_size = [vit.img_size] * 2 if vit is not None else image_size
    options = {"in_chans": input_channels(network)} | ({"img_size": vit.img_size} if vit is not None else {})
    files = {"safetensors": output_dir / f"{arch}.safetensors"}
    # the header says how to build the network
    export_safetensors(
        trunk, files["safetensors"], own_size, {"arch": arch, **options}, functools.partial(load_backbone, arch)
    )

    twin = torchvision_network(arch)
    if same_entries(twin, trunk):
        path = files["torchvision"] = output_dir / f"{arch}_torchvision.pth"

        def with_torchvision(file: Path) -> nn.Module:
            twin.load_state_dict(safe_load(file))
            return twin.eval()

        export_state_dict(trunk, path, own_size, with_torchvision)
        print(f"  torchvision.models.{arch}().load_state_dict(torch.load({str(path)!r}), strict=False)")

    arguments = timm_options(arch, options)
    if arguments is not None and same_entries(timm.create_model(**arguments), trunk):
        path = files["timm"] = output_dir / f"{arch}_timm.pth"
        export_state_dict(
            trunk, path, own_size, lambda file: timm.create_model(**arguments, checkpoint_path=str(file)).eval()
        )
        text = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        print(f"  timm.create_model({text}, checkpoint_path={str(path)!r})")

    absent = [library for library in ("torchvision", "timm") if library not in files]
    if absent:
        print(f"no file for {' and '.join(absent)}: no network with the names and shapes of this {arch}")
    files["onnx"] = output_dir / f"{arch}.onnx"
    export_onnx(trunk, files["onnx"], trunk, image_size)
    return files


def main() -> None:
    with distributed.clean_exit():
        args = get_args_parser().parse_args()
        network = load_backbone(args.arch, args.pretrained, args.allow_partial)
        export(network, args.arch, args.output_dir, args.image_size)


if __name__ == "__main__":
    main()
