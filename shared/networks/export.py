"""Trained networks as files for other programs; a file is kept once it has given the torch network's output."""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from .backbones import build_library_backbone, input_channels, timm_model, torchvision_architectures
from .card import Card
from .weights import load_backbone_weights, safe_load

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


def export_backbone(
    card: Card,
    network: nn.Module,
    arch: str,
    output_dir: str | Path,
    image_size: Sequence[int] | None = None,
    timm_name: str = "",
    at_size: Callable[[nn.Module, Sequence[int]], nn.Module] = lambda network, image_size: network,
    arch_key: str = "arch",
) -> dict[str, Path]:
    """Write a network that ``card.build`` made in every format.

    ``<arch>.safetensors`` has the published names, and how to build the network in its header;
    ``<arch>_torchvision.pth`` and ``<arch>_timm.pth`` are state dicts that these libraries load, written where they
    have the network; ``<arch>.onnx`` takes any batch size.

    Args:
        network: In evaluation mode, on the CPU.
        arch: Its name.
        output_dir: Created if missing.
        image_size: Height and width in pixels of the ONNX input; by default those of position embeddings, else 224.
        timm_name: What timm calls the architecture; by default ``arch``.
        at_size: A copy without interpolation of positions for an image size, which the ONNX file gets.
        arch_key: Of ``arch`` in the header.

    Returns:
        The files by format: ``safetensors``, ``torchvision``, ``timm``, ``onnx``.

    Raises:
        ExportMismatch: If an exported network computes something else; its file is not kept.
    """
    output_dir, sizes = Path(output_dir), card.sizes(arch, network.state_dict())
    image_size = list(image_size or [sizes.get("img_size", 224)] * 2)
    # networks with positions are compared at their own size, where libraries do not interpolate
    own_size = [sizes["img_size"]] * 2 if "img_size" in sizes else image_size
    options = {"in_chans": input_channels(network), **sizes}

    def rebuilt(file: Path) -> nn.Module:
        twin = card.build(arch, **options)
        load_backbone_weights(twin, file)
        return twin.eval()

    files = {"safetensors": output_dir / f"{arch}.safetensors"}
    export_safetensors(network, files["safetensors"], own_size, {arch_key: arch, **options}, rebuilt)
    if arch in torchvision_architectures():
        twin, _ = build_library_backbone(arch)
        if _shapes(twin) == _shapes(network):
            path = files["torchvision"] = output_dir / f"{arch}_torchvision.pth"
            export_state_dict(network, path, own_size, functools.partial(_filled, twin))
            print(f"  torchvision.models.{arch}().load_state_dict(torch.load({str(path)!r}), strict=False)")
    arguments = timm_arguments(timm_name or arch, network, options)
    if arguments is not None:
        path = files["timm"] = output_dir / f"{arch}_timm.pth"
        export_state_dict(
            network, path, own_size, lambda file: timm.create_model(**arguments, checkpoint_path=str(file)).eval()
        )
        text = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        print(f"  timm.create_model({text}, checkpoint_path={str(path)!r})")
    if absent := [library for library in ("torchvision", "timm") if library not in files]:
        print(f"no file for {' and '.join(absent)}: no network with the names and shapes of this {arch}")
    files["onnx"] = output_dir / f"{arch}.onnx"
    export_onnx(at_size(network, image_size), files["onnx"], network, image_size)
    return files


def export_with_timm_names(
    network: nn.Module,
    stem: Path,
    image_size: Sequence[int],
    metadata: dict,
    read: Callable[[Path], nn.Module],
    arguments: dict | None,
    to_timm: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Path]:
    """Write a network of which timm has a copy under other names, in every format.

    Args:
        network: In evaluation mode, on the CPU.
        stem: Path of the files without ``.safetensors``, ``_timm.pth`` and ``.onnx``.
        image_size: Height and width in pixels of the ONNX input, and of the images that files are compared with.
        metadata, read: See :func:`export_safetensors`.
        arguments: Of ``timm.create_model``; None: timm has no such network.
        to_timm: Gives a state dict timm's names.

    Returns:
        The files by format: ``safetensors``, ``timm``, ``onnx``.

    Raises:
        ExportMismatch: If an exported network computes something else; its file is not kept.
    """
    endings = {"safetensors": ".safetensors", "timm": "_timm.pth", "onnx": ".onnx"}
    files, size = {name: Path(f"{stem}{ending}") for name, ending in endings.items()}, list(image_size)
    export_safetensors(network, files["safetensors"], size, metadata, read)
    if arguments is None:
        print("no file for timm: it has no network of these sizes")
        del files["timm"]
    else:
        with atomic_file(files["timm"]) as temporary:
            torch.save(to_timm(network.state_dict()), temporary)
            twin = timm.create_model(**arguments, checkpoint_path=str(temporary)).eval()
            check_outputs(files["timm"].name, twin, network, size)
        text = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        print(f"  timm.create_model({text}, checkpoint_path={str(files['timm'])!r})")
    export_onnx(network, files["onnx"], network, size)
    return files


def timm_arguments(name: str, network: nn.Module, options: dict[str, int]) -> dict | None:
    """Arguments of ``timm.create_model`` for the same network; None if timm has none of these names and shapes."""
    name = timm_model(name)
    if name is None:
        return None
    arguments = {"model_name": name, "num_classes": 0, **options}
    return arguments if _shapes(timm.create_model(**arguments)) == _shapes(network) else None


def _filled(network: nn.Module, file: Path) -> nn.Module:
    network.load_state_dict(safe_load(file))
    return network.eval()


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in network.state_dict().items()}
