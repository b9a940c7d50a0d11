"""Networks filled with released weights or a file of any layout, for every folder that has a card."""

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from shared import distributed

from .backbones import first_convolution
from .card import Card
from .weights import (
    ARCH_FLAGS,
    BackboneWeights,
    download,
    evaluated_network,
    fetch_file,
    flags_of_training,
    is_address,
    load_backbone_weights,
    run_file,
    safe_load,
    select_backbone_weights,
    vit_shape,
)

# what trainings call the side of the images that their networks see
SIZE_FLAGS = ("global_crop_size", "size_crops", "rand_size", "crop_size", "image_size", "input_size")


def fetch(card: Card, file: str, cached_as: str = "") -> Path:
    """Download a released file, unless it is there already, into torch hub's folder of checkpoints.

    Args:
        file: Path below the card's address, which the environment variable ``<NAME>_WEIGHTS_URL`` replaces.
        cached_as: Name of the downloaded file; by default its own.

    Raises:
        shared.networks.weights.DownloadError: If it cannot be had.
    """
    url = os.environ.get(f"{card.name.upper()}_WEIGHTS_URL", card.address).rstrip("/") + "/" + file
    path = Path(torch.hub.get_dir()) / "checkpoints" / (cached_as or Path(file).name)
    if not path.exists():
        distributed.print_once(f"downloading {url} to {path}")
        download(url, path)
    return path


def fetch_release(card: Card, name: str) -> Path:
    """The weights of a release."""
    return fetch(card, card.releases[name].file, card.releases[name].cached_as)


def find_release(card: Card, arch: str, **options: int) -> str | None:
    """Name of the first release of an architecture, with these options where there are several; None without one."""
    for name, release in card.releases.items():
        if release.arch == arch and release.options.items() <= (release.options | options).items():
            return name
    return None


def find_file(card: Card, arch: str, pretrained: str | Path = "", **options: int) -> Path:
    """The file that the flags mean: as of :func:`locate`, or ``""`` for the first release of the architecture.

    Raises:
        ValueError: If there is none, or the release is of another network.
    """
    flag = card.weights_flag
    if pretrained == "":
        pretrained = find_release(card, arch, **options)
        if pretrained is None:
            given = "".join(f" --{name} {value}" for name, value in options.items())
            raise ValueError(
                f"no weights are released for {card.arch_flag} {arch}{given}; give a file, or random, as {flag}"
            )
    release = card.releases.get(str(pretrained))
    if release is not None and release.arch != arch:
        raise ValueError(f"{flag} {pretrained} is a {release.arch}, not a {arch}: change {card.arch_flag}")
    return locate(card, pretrained)


def locate(card: Card, pretrained: str | Path, flag: str = "") -> Path:
    """A file: its path, the folder of a run of any method, the name of a release, or an address.

    Args:
        flag: Where it was given, for messages.

    Raises:
        ValueError: If there is no such file.
    """
    name, flag = str(pretrained), flag or card.weights_flag
    if name in card.releases:
        return fetch_release(card, name)
    if is_address(name) or Path(name).is_file():
        return fetch_file(name, flag)
    if Path(name).is_dir():
        return run_file(name)
    if name == card.embedded_run:
        raise ValueError(f"{flag} {name} is not there: run python {card.main} first")
    known = [*list(card.releases)[:15], "..."][: len(card.releases)]
    raise ValueError(f"{flag} {name} is neither a file nor a release ({', '.join(known)})")


def read_weights(card: Card, path: str | Path, checkpoint_key: str | None = None) -> BackboneWeights:
    """Backbone and heads of a file.

    Args:
        checkpoint_key: The network to take from a training checkpoint; one that is not the card's has to be there.
    """
    key = checkpoint_key or card.checkpoint_key
    contents, required = card.convert(safe_load(path), Path(path)), key != card.checkpoint_key
    weights = select_backbone_weights(contents, key, str(path), card.head_names, required)
    weights.tensors = card.rename(weights.tensors)
    return weights


def read_tensors(card: Card, pretrained: str | Path, key: str | None = None, flag: str = "") -> dict[str, Tensor]:
    """Those of the network in what :func:`locate` finds."""
    return read_weights(card, locate(card, pretrained, flag), key).tensors


def known_arch(card: Card, arch: str, tensors: Mapping[str, Tensor]) -> str:
    """What the card calls an architecture to which the run of another method has given this name."""
    shape = vit_shape(tensors)
    for name in [arch, *(shape.names() if shape else [])]:
        with contextlib.suppress(ValueError), torch.device("meta"):
            found = vit_shape(backbone_of(build_for(card, name, tensors)).state_dict())
            if found == shape:
                return name
    return arch


def flags_of_run(weights: str | Path, card: Card | None = None) -> Mapping:
    """The flags that a training checkpoint, or that in a folder, was written with; {} for what is no such file.

    Args:
        card: Of the folder that evaluates: of another one's run, the flags say the architecture, and the patch size of
            a ViT, in its words.
    """
    path = run_file(weights) if weights else None
    if path is None or not path.is_file():
        return {}
    checkpoint = safe_load(path)
    trained_with = flags_of_training(checkpoint)
    if card is None:
        return trained_with
    flag = card.arch_flag.removeprefix("--")
    arch = arch_of(trained_with, flag)
    if arch is None or (flag in trained_with and evaluated_network(checkpoint) == card.checkpoint_key):
        return trained_with  # its own
    tensors = select_backbone_weights(checkpoint, card.checkpoint_key, head_names=card.head_names).tensors
    shape = vit_shape(tensors)
    sizes = {} if shape is None else {"patch_size": shape.patch_size}
    return {**trained_with, flag: known_arch(card, arch, tensors), **sizes}


def arch_of(trained_with: Mapping, *flags: str) -> str | None:
    """The architecture that a training states under one of ``flags`` or of ``ARCH_FLAGS``."""
    names = (trained_with.get(flag) for flag in (*flags, *ARCH_FLAGS))
    return next((name for name in names if isinstance(name, str)), None)


def size_flag(trained_with: Mapping) -> str:
    """The one of ``SIZE_FLAGS`` that a run has given a value."""
    return next((flag for flag in SIZE_FLAGS if trained_with.get(flag)), "image_size")


def image_size_of(trained_with: Mapping) -> int | None:
    """The side of the images of a training; None where its flags do not say."""
    size = trained_with.get(size_flag(trained_with))
    return size[0] if isinstance(size, list | tuple) else size


def backbone_of(network: nn.Module) -> nn.Module:
    """The module whose names are those of a bare backbone: the network, or the ``backbone`` that it is built around."""
    return getattr(network, "backbone", network)


def build_for(
    card: Card,
    arch: str,
    tensors: Mapping[str, Tensor],
    build: Callable[..., nn.Module] | None = None,
    **options: int,
) -> nn.Module:
    """A network with the channels and sizes of a file's tensors.

    ``options`` win over the file; where they contradict it, it says nothing about the other sizes either.

    Args:
        build: Instead of the card's, for a network with heads.
    """
    build, sizes = build or card.build, card.sizes(arch, tensors)
    if all(options.get(name, size) == size for name, size in sizes.items()):
        options = sizes | options
    network = build(arch, **options)
    first, convolution = first_convolution(backbone_of(network))
    in_chans = tensors.get(f"{first}.weight", convolution.weight).shape[1]
    return network if in_chans == convolution.in_channels else build(arch, in_chans=in_chans, **options)


def fill_with_heads(network: nn.Module, weights: BackboneWeights, allow_partial: bool = False) -> nn.Module:
    """Fill a backbone and its heads, which a file names as the network does, and freeze them."""
    prefix = "" if backbone_of(network) is network else "backbone."
    tensors = {prefix + name: value for name, value in weights.tensors.items()} | weights.head
    load_backbone_weights(network, BackboneWeights(tensors, {}, weights.origin), allow_partial=allow_partial)
    return network.eval().requires_grad_(False)


def load_pretrained(
    card: Card,
    arch: str,
    pretrained: str | Path = "",
    checkpoint_key: str | None = None,
    allow_partial: bool = False,
    **options: int,
) -> nn.Module:
    """Build a backbone and fill it, as the evaluation scripts do with their flags.

    Channels and, for networks that have them, the sizes of images and patches are taken from the file.

    Args:
        arch: A name that ``card.build`` knows.
        pretrained: A file of any layout; the name of a release; ``""`` for the first release of the architecture;
            ``"random"`` for none.
        checkpoint_key: The network to take from a training checkpoint; by default the card's.
        allow_partial: Load what matches when it is not everything.
        options: Arguments of ``card.build`` that are not left to the file.

    Returns:
        The network in evaluation mode, without gradients; maps images (B, C, H, W) to features (B, D).

    Raises:
        ValueError: If there are no released weights, no such file, or the file does not fill the network.
    """
    if pretrained == "random":
        return card.build(arch, **options).eval().requires_grad_(False)
    weights = read_weights(card, find_file(card, arch, pretrained, **options), checkpoint_key)
    network = build_for(card, arch, weights.tensors, **options)
    load_backbone_weights(backbone_of(network), weights, allow_partial=allow_partial)
    return network.eval().requires_grad_(False)


def hub_entries(card: Card, load: Callable[..., nn.Module] | None = None) -> dict[str, Callable[..., nn.Module]]:
    """Functions for torch.hub, one for each release that has a description.

    Args:
        load: ``load(weights, **options)`` gives the filled network of a release, a run or a file, where the card alone
            does not do.
    """
    entries = [_entry(card, name, load) for name, release in card.releases.items() if release.doc]
    return {entry.__name__: entry for entry in entries}


def _entry(card: Card, name: str, load: Callable[..., nn.Module] | None) -> Callable[..., nn.Module]:
    def entry(pretrained: bool | str = True, **options) -> nn.Module:
        release = card.releases[name]
        if load is not None and pretrained:
            return load(name if pretrained is True else pretrained, **options)
        if isinstance(pretrained, str | os.PathLike):  # a run or a file of one's own
            return load_pretrained(card, release.arch, pretrained, **options)
        weights = read_weights(card, fetch_release(card, name)) if pretrained else None
        network = card.build(release.arch, **{**release.options, **options})
        if weights is not None:
            load_backbone_weights(backbone_of(network), weights)
        return network

    entry.__name__ = entry.__qualname__ = card.releases[name].entry or name
    entry.__doc__ = card.releases[name].doc
    return entry
