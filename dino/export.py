"""Write a trained backbone for other programs; a file is kept once it has given the torch network's output.

    python -m dino.export --arch vit_small --patch_size 16 --pretrained_weights checkpoint.pth --output_dir out

Writes ``<arch>.safetensors`` (names of the published checkpoints), ``<arch>_timm.pth`` (a state dict for timm) and
``<arch>.onnx`` (any batch size). Needs the packages of ``pip install -e '.[export]'``.
"""

import argparse
import contextlib
import copy
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dino.flags import evaluation_parser
from dino.networks import VIT_NAMES, build_backbone, input_channels
from dino.pretrained import load_pretrained
from shared import distributed
from shared.weights import load_backbone_weights, vit_shape

TOLERANCE = 1e-4  # of the largest feature; float32 kernels of two libraries differ by about 1e-6


class ExportMismatch(ValueError):
    """An exported network does not compute what the torch network computes."""


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add = parser.add_argument_group("export").add_argument
    add("--output_dir", default=".", help="where the files go")
    add("--image_size", type=int, nargs=2, default=None, help="height and width in pixels that the ONNX file takes; by "
        "default those of a ViT's position embeddings, else 224 224")  # fmt: skip
    return parser


# --- The check --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_outputs(name: str, network: Callable[[Tensor], Tensor], backbone: nn.Module, image_size: list[int]) -> None:
    """Compare the features of random images, one and several at once, and print the largest difference.

    Args:
        name: File name, for messages.
        network: Maps images (B, C, H, W) to features (B, D), read back from the file.
        backbone: The torch network.
        image_size: Height and width in pixels.

    Raises:
        ExportMismatch: If a difference exceeds ``TOLERANCE`` of the largest feature, or is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch_size in (1, 3):
        images = torch.randn(batch_size, input_channels(backbone), *image_size, generator=generator)
        expected = backbone(images)
        difference = ((network(images) - expected).abs().max() / expected.abs().max()).item()
        if not difference <= TOLERANCE:
            raise ExportMismatch(f"{name} differs from the torch network by {difference:.1e} of the largest feature")
        largest = max(largest, difference)
    print(f"{name}: equal to the torch network up to {largest:.0e} of the largest feature")


@contextlib.contextmanager
def appearing_when_checked(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its name if the block succeeds, and disappears if it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def build_options(arch: str, backbone: nn.Module) -> dict:
    """Arguments of :func:`dino.networks.build_backbone` for the same network."""
    options = {"arch": arch, "in_chans": input_channels(backbone)}
    if arch in VIT_NAMES:
        shape = vit_shape(backbone.state_dict())
        options |= {"patch_size": shape.patch_size, "img_size": shape.img_size}
    return options


# --- The formats ------------------------------------------------------------------------------------------------------


def export_safetensors(backbone: nn.Module, arch: str, path: Path, image_size: list[int]) -> None:
    """State dict under the published names; the header says how to build the network."""
    options = build_options(arch, backbone)
    tensors = {name: value.contiguous() for name, value in backbone.state_dict().items()}
    with appearing_when_checked(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={k: str(v) for k, v in options.items()})
        network, _ = build_backbone(**options)
        load_backbone_weights(network, temporary)
        check_outputs(path.name, network.eval(), backbone, image_size)


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


def export_timm(backbone: nn.Module, options: dict, path: Path, image_size: list[int]) -> None:
    """State dict that ``timm.create_model(**options, checkpoint_path=path)`` loads."""
    with appearing_when_checked(path) as temporary:
        torch.save(backbone.state_dict(), temporary)
        network = timm.create_model(**options, checkpoint_path=str(temporary))
        check_outputs(path.name, network.eval(), backbone, image_size)
    arguments = ", ".join(f"{key}={value!r}" for key, value in options.items())
    print(f"  timm.create_model({arguments}, checkpoint_path={str(path)!r})")


def export_onnx(backbone: nn.Module, path: Path, image_size: list[int]) -> None:
    """ONNX file with input ``images`` (batch, C, H, W) and output ``features`` (batch, D); H and W are fixed."""
    try:
        import onnxruntime  # an optional dependency
    except ModuleNotFoundError as error:
        raise ValueError("ONNX files need the packages of `pip install -e '.[export]'`") from error

    network = copy.deepcopy(backbone)
    if hasattr(network, "interpolate_pos_encoding"):
        positions = network.interpolate_pos_encoding(*image_size).detach()
        network.interpolate_pos_encoding = lambda *_: positions  # a constant of the file
    with appearing_when_checked(path) as temporary:
        with torch.no_grad(), warnings.catch_warnings():
            # dynamo=False: the exporter that every supported torch has, in a tenth of the time
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # checks of the image size, which is fixed here
            torch.onnx.export(
                network,
                (torch.zeros(2, input_channels(backbone), *image_size),),
                temporary,
                input_names=["images"],
                output_names=["features"],
                dynamic_axes={"images": {0: "batch"}, "features": {0: "batch"}},
                opset_version=17,
                dynamo=False,
            )
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

        check_outputs(path.name, run, backbone, image_size)


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
        ExportMismatch: If an exported network computes something else; its file is not kept.
    """
    output_dir = Path(output_dir)
    own_size = [build_options(arch, backbone).get("img_size", 224)] * 2
    files = {"safetensors": output_dir / f"{arch}.safetensors"}
    export_safetensors(backbone, arch, files["safetensors"], own_size)
    options = timm_options(arch, backbone)
    if options is None:
        print(f"no file for timm: it has no network with the names and shapes of {arch}")
    else:
        files["timm"] = output_dir / f"{arch}_timm.pth"
        export_timm(backbone, options, files["timm"], own_size)
    files["onnx"] = output_dir / f"{arch}.onnx"
    export_onnx(backbone, files["onnx"], image_size or own_size)
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
