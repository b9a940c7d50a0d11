"""Trained networks as files for other programs; a file is kept once it has given the torch network's output."""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from shared.run.files import atomic_file

from .backbones import build_library_backbone, input_channels, timm_model, torchvision_architectures
from .card import Card
from .model_card import write_model_card
from .names import TO_TRANSFORMERS_VIT, renamed, split_qkv
from .onnx_session import onnx_session
from .pretrained import backbone_of, flags_of_run, image_size_of
from .weights import load_backbone_weights, safe_load, vit_shape

ENDINGS = {"safetensors": ".safetensors", "torchvision": "_torchvision.pth", "timm": "_timm.pth", "onnx": ".onnx"}

TOLERANCE = 1e-4  # of the largest feature; float32 kernels of two libraries differ by about 1e-6


class ExportMismatch(ValueError):
    """An exported network does not compute what the torch network computes."""


def check_equal(name: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Compare the features that an exported network and the torch network give, and print the largest difference.

    Args:
        name: Of the file, for messages.
        pairs: Of both networks, for the same inputs.

    Raises:
        ExportMismatch: If a difference exceeds ``TOLERANCE`` of the largest feature, or is not finite.
    """
    largest = 0.0
    for features, expected in pairs:
        difference = float(abs(features - expected).max() / abs(expected).max())
        if not difference <= TOLERANCE:
            raise ExportMismatch(f"{name} differs from the torch network by {difference:.1e} of the largest feature")
        largest = max(largest, difference)
    print(f"{name}: equal to the torch network up to {largest:.0e} of the largest feature")


@torch.no_grad()
def check_outputs(
    name: str, network: Callable[[Tensor], Tensor], backbone: nn.Module, *image_sizes: Sequence[int]
) -> None:
    """:func:`check_equal` for random images, one and several at once.

    Args:
        network: Maps images (B, C, H, W) to features (B, D), read back from the file.
        backbone: The torch network.
        image_sizes: Heights and widths in pixels.
    """
    generator, channels = torch.Generator().manual_seed(0), input_channels(backbone)
    shapes = [(batch, channels, *image_size) for image_size in image_sizes for batch in (1, 3)]
    batches = [torch.randn(shape, generator=generator) for shape in shapes]
    check_equal(name, ((network(images), backbone(images)) for images in batches))


def write_checked(
    path: Path,
    write: Callable[[Path], object],
    read: Callable[[Path], Callable[[Tensor], Tensor]],
    network: nn.Module,
    *image_sizes: Sequence[int],
) -> Path:
    """Write a file, and keep it if what is read from it computes what the network does.

    Raises:
        ExportMismatch: If it computes something else.
    """
    with atomic_file(path) as temporary:
        write(temporary)
        check_outputs(path.name, read(temporary), network, *image_sizes)
    return path


def as_texts(values: Mapping) -> dict[str, str]:
    """What the headers of files hold: texts as they are, numbers and lists as JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def write_onnx(
    network: nn.Module, image_size: Sequence[int], header: Mapping[str, str], path: Path, any_size: bool = False
) -> None:
    """ONNX file with input ``images`` (batch, C, H, W) and output ``features`` (batch, D).

    Args:
        any_size: H and W are free, too; else they are those of ``image_size``.
    """
    images = torch.zeros(2, input_channels(network), *image_size)
    axes = {0: "batch"} | ({2: "height", 3: "width"} if any_size else {})
    trace_onnx(network, (images,), {"images": axes, "features": {0: "batch"}}, path)
    import onnx  # an optional dependency

    model = onnx.load(path)
    onnx.helper.set_model_props(model, header)
    onnx.save(model, path)


@torch.no_grad()
def other_size(network: nn.Module, image_size: Sequence[int]) -> list[int] | None:
    """A second height and width, in whole patches, if the network takes images of any size; None: it does not."""
    state, shape = network.state_dict(), vit_shape(network.state_dict())
    if "pos_embed" in state and not hasattr(network, "interpolate_pos_encoding"):
        return None  # timm's ViTs smooth positions, which ONNX cannot do
    step = 32 if shape is None else shape.patch_size
    size = [image_size[0] + 2 * step, image_size[1] + step]
    try:
        network(torch.zeros(1, input_channels(network), *size))
    except (RuntimeError, ValueError, AssertionError):
        return None
    return size


def trace_onnx(network: nn.Module, inputs: tuple[Tensor, ...], axes: dict[str, dict[int, str]], path: Path) -> None:
    """ONNX file of a network.

    Args:
        axes: The dimensions of any size by the names of the inputs and, last, of the output.
    """
    if not all(importlib.util.find_spec(package) for package in ("onnx", "onnxruntime")):
        raise ValueError("ONNX files need the packages of `pip install -e '.[export]'`")
    size = sum(parameter.numel() for parameter in network.parameters())
    print(f"ONNX: {size:,} parameters are traced, and compared with the torch network: the longest part", flush=True)
    *names, output = axes
    options = {"input_names": names, "output_names": [output], "dynamic_axes": axes, "opset_version": 17}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever writes a file compares what it computes
        # dynamo=False: the exporter that every supported torch has, in a tenth of the time
        torch.onnx.export(network, inputs, path, **options, dynamo=False)


def read_onnx(path: Path) -> Callable[..., Tensor]:
    """The network of a file, which maps its inputs to its output."""
    session = onnx_session(path)
    names = [given.name for given in session.get_inputs()]

    def network(*inputs: Tensor) -> Tensor:
        arrays = (tensor.numpy() for tensor in inputs)
        return torch.from_numpy(session.run(None, dict(zip(names, arrays, strict=True)))[0])

    return network


def export_transformers(card: Card, network: nn.Module, folder: Path, model: str) -> Path:
    """Write a ViT as a folder that ``from_pretrained`` of transformers opens, with its image processor.

    Args:
        model: ``ViTModel`` or ``ViTMSNModel``; its features are ``last_hidden_state[:, 0]``. They are compared with
            those of the network where transformers is installed.
    """
    state = network.state_dict()
    shape = vit_shape(state)
    config = {
        "architectures": [model],
        "model_type": {"ViTModel": "vit", "ViTMSNModel": "vit_msn"}[model],
        "hidden_size": shape.embed_dim,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": network.blocks[0].attn.num_heads,
        "intermediate_size": network.blocks[0].mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": network.norm.eps,
        "image_size": shape.img_size,
        "patch_size": shape.patch_size,
        "num_channels": shape.in_chans,
        "qkv_bias": network.blocks[0].attn.qkv.bias is not None,
    }
    processor = {  # resize (256 for a crop of 224), crop the centre, normalise
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": round(shape.img_size * 256 / 224)},
        "crop_size": {"height": shape.img_size, "width": shape.img_size},
        "resample": {"bilinear": 2, "bicubic": 3}[card.interpolation],
        "image_mean": card.mean,
        "image_std": card.std,
    }
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        for name, values in (("config.json", config), ("preprocessor_config.json", processor)):
            (Path(temporary) / name).write_text(json.dumps(values, indent=2))
        with atomic_file(Path(temporary) / "model.safetensors") as file:
            tensors = renamed(split_qkv(state), TO_TRANSFORMERS_VIT)
            safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, file, {"format": "pt"})
        try:
            import transformers  # an optional dependency
        except ModuleNotFoundError:
            print(f"{folder.name}: written without a comparison, for which transformers is not installed")
        else:
            options = {"add_pooling_layer": False} if model == "ViTModel" else {}
            twin = getattr(transformers, model).from_pretrained(temporary, **options).eval()
            check_outputs(
                folder.name, lambda images: twin(images).last_hidden_state[:, 0], network, [shape.img_size] * 2
            )
        folder.mkdir(exist_ok=True)
        for file in Path(temporary).iterdir():
            os.replace(file, folder / file.name)
    without_pooler = ", add_pooling_layer=False" if model == "ViTModel" else ""
    print(f"  transformers.{model}.from_pretrained({str(folder)!r}{without_pooler})")
    return folder


def as_trained(card: Card, origin: str | Path, in_chans: int) -> tuple[Card, dict[str, list[float]]]:
    """The card with the mean and std of a run whose images are no RGB, and the range of values that becomes [0, 1]."""
    channels = flags_of_run(origin).get("channels")
    if not channels and in_chans == 1:  # the luminance, which takes the averages over the colours
        mean, std = ([sum(values) / len(values)] for values in (card.mean, card.std))
        return dataclasses.replace(card, mean=mean, std=std), {}
    if not channels:
        return card, {}
    value_range = {"low": channels["low"], "high": channels["high"]}
    return dataclasses.replace(card, mean=channels["mean"], std=channels["std"]), value_range


def size_of_run(origin: str | Path) -> list[int] | None:
    """The side of the images of a training; None where the file does not say."""
    size = image_size_of(flags_of_run(origin))
    return None if size is None else [size]


def export_network(
    card: Card,
    network: nn.Module,
    stem: Path,
    header: Mapping,
    read: Callable[[Path], nn.Module],
    image_size: Sequence[int] | None,
    origin: str | Path,
    own_size: Sequence[int] | None = None,
    torchvision: nn.Module | None = None,
    timm_arguments: Mapping | None = None,
    to_timm: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
) -> dict[str, Path]:
    """Write a network in every format.

    ``<stem>.safetensors`` has timm's names, where it has the network, and in its header how to build and feed it;
    ``<stem>_torchvision.pth`` and ``<stem>_timm.pth`` are state dicts that these libraries load; ``<stem>.onnx`` takes
    any batch size, and any height and width where the network does; ``<stem>_card.md`` is a model card.

    Args:
        network: In evaluation mode, on the CPU.
        header: How the network is built.
        read: Builds the network anew from the safetensors file, in evaluation mode.
        image_size: One side or height and width in pixels of the ONNX input, where it is not free; by default that of
            the training, else 224.
        origin: Where the weights come from, for the model card.
        own_size: Of the images that the other files are compared with; by default ``image_size``.
        torchvision: That library's network of these names and shapes, if it has one.
        timm_arguments: Of ``timm.create_model``; None: timm has no such network.
        to_timm: Gives a state dict timm's names.

    Returns:
        The files by format: ``safetensors``, ``torchvision``, ``timm``, ``onnx``, ``card``.

    Raises:
        ExportMismatch: If an exported network computes something else; its file is not kept.
    """
    image_size = image_size or size_of_run(origin) or [224]
    if len(image_size) > 2:
        raise ValueError(f"--image_size {' '.join(map(str, image_size))}: one side, or height and width")
    image_size = [image_size[0], image_size[-1]]
    state, own_size = network.state_dict(), own_size or image_size
    timm_state = {name: value.contiguous() for name, value in to_timm(state).items()}
    card, value_range = as_trained(card, origin, input_channels(network))
    header = {**header, **value_range, "mean": card.mean, "std": card.std, "image_size": image_size}
    described = as_texts(header)
    files = {name: Path(f"{stem}{ending}") for name, ending in ENDINGS.items()}

    save = functools.partial(safetensors.torch.save_file, timm_state, metadata=described)
    write_checked(files["safetensors"], save, read, network, own_size)
    if torchvision is None:
        del files["torchvision"]
    else:
        path = files["torchvision"]
        write_checked(
            path, functools.partial(torch.save, state), functools.partial(_filled, torchvision), network, own_size
        )
        print(f"  torchvision.models.{stem.name}().load_state_dict(torch.load({str(path)!r}), strict=False)")
    if timm_arguments is None:
        del files["timm"]
    else:
        path, create = files["timm"], functools.partial(timm.create_model, **timm_arguments)
        write_checked(
            path,
            functools.partial(torch.save, timm_state),
            lambda file: create(checkpoint_path=str(file)).eval(),
            network,
            own_size,
        )
        text = ", ".join(f"{key}={value!r}" for key, value in timm_arguments.items())
        print(f"  timm.create_model({text}, checkpoint_path={str(path)!r})")
    if absent := [library for library in ("torchvision", "timm") if library not in files]:
        print(f"no file for {' and '.join(absent)}: no network with the names and shapes of this {stem.name}")
    sizes = [size for size in (other_size(network, image_size), image_size) if size is not None]
    save = functools.partial(write_onnx, network, sizes[0], described, any_size=len(sizes) > 1)
    write_checked(files["onnx"], save, read_onnx, network, *sizes)
    print(f"  its height and width are {'free' if len(sizes) > 1 else 'fixed: the network takes no others'}")
    return files | {"card": write_model_card(Path(f"{stem}_card.md"), card, stem.name, network, header, files, origin)}


def export_backbone(
    card: Card,
    network: nn.Module,
    arch: str,
    output_dir: str | Path,
    image_size: Sequence[int] | None = None,
    origin: str | Path = "",
    timm_name: str = "",
    transformers_model: str = "",
    arch_key: str = "arch",
) -> dict[str, Path]:
    """:func:`export_network` for a network that ``card.build`` made.

    Args:
        arch: Its name, and that of the files.
        output_dir: Created if missing.
        image_size: Of the ONNX input; by default that of the training, else of position embeddings, else 224.
        origin: Where the weights come from, for the model card.
        timm_name: What timm calls the architecture; by default ``arch``.
        transformers_model: For a ViT that transformers has, see :func:`export_transformers`; the folder is
            ``<arch>_transformers``.
        arch_key: Of ``arch`` in the header.

    Returns:
        Those files by format, and the folder ``transformers``.
    """
    network, stem = backbone_of(network), Path(output_dir) / arch
    sizes = card.sizes(arch, network.state_dict())
    options = {"in_chans": input_channels(network), **sizes}

    def rebuilt(file: Path) -> nn.Module:
        twin = backbone_of(card.build(arch, **options))
        load_backbone_weights(twin, file)
        return twin.eval()

    torchvision = build_library_backbone(arch)[0] if arch in torchvision_architectures() else None
    files = export_network(
        card,
        network,
        stem,
        {arch_key: arch, **options},
        rebuilt,
        image_size or size_of_run(origin) or [sizes.get("img_size", 224)],
        origin,
        # networks with positions are compared at their own size, where libraries do not interpolate
        [sizes["img_size"]] * 2 if "img_size" in sizes else None,
        torchvision if torchvision is not None and _shapes(torchvision) == _shapes(network) else None,
        timm_arguments(timm_name or arch, network, options),
    )
    if transformers_model:
        folder = stem.with_name(f"{arch}_transformers")
        card, _ = as_trained(card, origin, input_channels(network))
        files["transformers"] = export_transformers(card, network, folder, transformers_model)
    return files


def add_export_flags(parser: argparse.ArgumentParser, otherwise: int = 224) -> argparse.ArgumentParser:
    """Where the files go, and the size of the ONNX file's images; returns the parser."""
    add = parser.add_argument_group("export").add_argument
    add("--output_dir", default=".", help="where the files go")
    sizes = f"side, or height and width, in pixels that the ONNX file takes; None: as in the training, else {otherwise}"
    add("--image_size", type=int, nargs="+", default=None, help=sizes)
    return parser


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
