"""Trained networks as files for other programs; a file is kept once it has given the torch network's output."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from .backbones import input_channels

TOLERANCE = 1e-4  # of the largest feature; float32 kernels of two libraries differ by about 1e-6


class ExportMismatch(ValueError):
    """An exported network does not compute what the torch network computes."""


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
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its name if the block succeeds, and disappears if it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def export_safetensors(
    backbone: nn.Module, path: Path, image_size: list[int], metadata: dict, read: Callable[[Path], nn.Module]
) -> None:
    """Write the state dict.

    Args:
        metadata: What the file's header says about the network.
        read: Builds the network anew from such a file, in evaluation mode.
    """
    tensors = {name: value.contiguous() for name, value in backbone.state_dict().items()}
    with atomic_file(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={k: str(v) for k, v in metadata.items()})
        check_outputs(path.name, read(temporary), backbone, image_size)


def export_state_dict(
    backbone: nn.Module, path: Path, image_size: list[int], read: Callable[[Path], nn.Module]
) -> None:
    """Write the state dict with ``torch.save``; ``read`` builds another library's network from it."""
    with atomic_file(path) as temporary:
        torch.save(backbone.state_dict(), temporary)
        check_outputs(path.name, read(temporary), backbone, image_size)


def export_onnx(network: nn.Module, path: Path, backbone: nn.Module, image_size: list[int]) -> None:
    """ONNX file with input ``images`` (batch, C, H, W) and output ``features`` (batch, D); H and W are fixed.

    Args:
        network: What is written; computes what ``backbone`` does at this image size.
        backbone: What the file's output is compared with.
    """
    try:
        import onnxruntime  # an optional dependency
    except ModuleNotFoundError as error:
        raise ValueError("ONNX files need the packages of `pip install -e '.[export]'`") from error

    with atomic_file(path) as temporary:
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
