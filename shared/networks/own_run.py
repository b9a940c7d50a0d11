"""The network of anybody's own run, whichever folder trained it, in one line of Python.

    from shared.networks.own_run import load_run

    network = load_run("dino/runs/mine")  # images (B, C, H, W) to features (B, D)

``torch.hub.load("/path/to/this/repository", "run", "dino/runs/mine", source="local")`` is the same.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from .card import Card
from .pretrained import (
    arch_of,
    backbone_of,
    build_for,
    fetch_release,
    flags_of_run,
    image_size_of,
    locate,
    read_weights,
)
from .weights import evaluated_network, flags_of_training, load_backbone_weights, run_file, safe_load

ROOT = Path(__file__).resolve().parents[2]


def folders() -> list[str]:
    """Those that have a card, found by existence."""
    return [file.parent.name for file in sorted(ROOT.glob("*/hub.py")) if "CARD = " in file.read_text()]


def load_hub(folder: str) -> ModuleType:
    """The ``hub.py`` of a folder.

    Raises:
        ValueError: If there is none with a card.
    """
    name = folder.strip("/")
    if name not in folders():
        raise ValueError(f"{folder} is none of {', '.join(folders())}")
    return importlib.import_module(f"{__name__.removesuffix('shared.networks.own_run')}{name}.hub")


def folder_of(run: str | Path) -> str:
    """The folder that has released weights of this name, or trained this run.

    Raises:
        ValueError: If it cannot be told.
    """
    for name in folders():
        card = load_hub(name).CARD
        if str(run) in {*card.releases, *(release.entry for release in card.releases.values())} - {""}:
            return name
    path, names = run_file(run), []
    if not path.is_file():
        raise ValueError(f"{run} is no run or file below {Path.cwd()}, nor the name of a release")
    checkpoint = safe_load(path)
    said, key = flags_of_training(checkpoint), evaluated_network(checkpoint)
    for name in folders():
        card = load_hub(name).CARD
        if card.checkpoint_key == key and card.arch_flag.removeprefix("--") in said:
            names.append(name)
    inside = [name for name in names if ROOT / name in path.resolve().parents]
    arch = arch_of(said)
    released = [name for name in names if arch in {release.arch for release in load_hub(name).CARD.releases.values()}]
    built = [name for name in names if arch and _knows(load_hub(name).CARD, arch)]
    for found in (inside, released, names, built):
        if len(found) == 1:
            return found[0]
    raise ValueError(f"{run} can be of {' or '.join(built or names or folders())}: say the folder")


def _knows(card: Card, arch: str) -> bool:
    try:
        with torch.device("meta"):
            card.build(arch)
    except ValueError:
        return False
    return True


def open_run(card: Card, run: str | Path) -> tuple[Path, Mapping]:
    """The file that a path, an address, or a name of a release or of its entry means, and the flags of its training.

    Of a release they state the architecture.

    Raises:
        ValueError: If there is none.
    """
    names = {release.entry or name: name for name, release in card.releases.items()} | {n: n for n in card.releases}
    if str(run) not in names:
        path = locate(card, run, "the run")
        return path, flags_of_run(path, card)
    path, release = fetch_release(card, names[str(run)]), card.releases[names[str(run)]]
    return path, {**flags_of_run(path, card), card.arch_flag.removeprefix("--"): release.arch}


def fill_run(
    card: Card,
    path: Path,
    trained_with: Mapping,
    arch: str | None = None,
    checkpoint_key: str | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """The network of what :func:`open_run` found; other arguments as of :func:`load_run`."""
    arch = arch or trained_with.get(card.arch_flag.removeprefix("--")) or card.first_arch
    weights = read_weights(card, path, checkpoint_key)
    size = image_size or image_size_of(trained_with) or 224
    network = build_for(card, arch, weights.tensors, **{"img_size": size} | card.sizes(arch, weights.tensors))
    load_backbone_weights(backbone_of(network), weights)
    return network.eval().requires_grad_(False)


def load_run(
    run: str | Path,
    folder: str | None = None,
    arch: str | None = None,
    checkpoint_key: str | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """The filled backbone of a run, in evaluation mode and without gradients; what matched is printed.

    Args:
        run: Folder of a run of any method, a file of any layout or its address, or the name of a release.
        folder: Method as which the network is built; by default the one that trained it.
        arch: By default that of the run, else that of the folder's first release.
        checkpoint_key: The network to take from a training checkpoint; by default the one that is evaluated.
        image_size: Side in pixels for which networks are made that depend on it; by default that of the weights.

    Raises:
        ValueError: If there is no such run, or its weights do not fill the network.
    """
    card = load_hub(folder or folder_of(run)).CARD
    return fill_run(card, *open_run(card, run), arch, checkpoint_key, image_size)
