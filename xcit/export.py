"""Write a trained XCiT for other programs; a file is kept once it has given the torch network's output.

    python -m xcit.export --model xcit_small_12_p16 --pretrained checkpoint.pth --output_dir out

Writes ``<model>.safetensors`` (published names), ``<model>_timm.pth`` (a state dict with timm's names) and
``<model>.onnx`` (any batch size). Needs the packages of ``pip install -e '.[export]'``.
"""

import argparse
import sys
from pathlib import Path

import timm
import torch
from torch import nn

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared import distributed
from shared.networks.backbones import input_channels
from shared.networks.export import atomic_file, check_outputs, export_onnx, export_safetensors
from xcit.cross_covariance_transformer import ARCHITECTURES, XCiT
from xcit.hub import load_network, to_timm


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="xcit_small_12_p16", choices=ARCHITECTURES, metavar="XCIT", help="name of the network")
    add("--pretrained", default="", help="a release, a file of any layout or an address; by default the release at 224 "
        "pixels without distillation")  # fmt: skip
    add("--checkpoint_key", default="model", help="network to take from a training checkpoint")
    add("--image_size", type=int, nargs=2, default=(224, 224), help="height and width of the ONNX file's images")
    add("--output_dir", default=".", help="where the files go")
    return parser


def export(
    network: XCiT, model: str, output_dir: str | Path, image_size: tuple[int, int] = (224, 224)
) -> dict[str, Path]:
    """Write a network in every format.

    Args:
        network: In evaluation mode, on the CPU.
        model: Its name.
        output_dir: Created if missing.
        image_size: Height and width in pixels of the ONNX input, and of the images that files are compared with.

    Returns:
        The files by format: ``safetensors``, ``timm`` and ``onnx``.

    Raises:
        shared.networks.export.ExportMismatch: If an exported network computes something else; its file is not kept.
    """
    output_dir, image_size = Path(output_dir), list(image_size)
    files = {
        "safetensors": output_dir / f"{model}.safetensors",
        "timm": output_dir / f"{model}_timm.pth",
        "onnx": output_dir / f"{model}.onnx",
    }
    options = {"num_classes": network.num_classes, "in_chans": input_channels(network)}

    def read(path: Path) -> XCiT:
        return load_network(model, path)

    export_safetensors(network, files["safetensors"], image_size, {"model": model, **options}, read)

    def read_with_timm(path: Path) -> nn.Module:
        return timm.create_model(f"{model}_224", checkpoint_path=str(path), **options).eval()

    with atomic_file(files["timm"]) as temporary:
        torch.save(to_timm(network.state_dict()), temporary)
        check_outputs(files["timm"].name, read_with_timm(temporary), network, image_size)
    arguments = ", ".join(f"{key}={value!r}" for key, value in options.items())
    print(f"  timm.create_model('{model}_224', {arguments}, checkpoint_path={str(files['timm'])!r})")
    export_onnx(network, files["onnx"], network, image_size)
    return files


def main() -> None:
    with distributed.clean_exit():
        args = get_args_parser().parse_args()
        network = load_network(args.model, args.pretrained, args.checkpoint_key)
        export(network, args.model, args.output_dir, args.image_size)


if __name__ == "__main__":
    main()
