"""What a folder says about its networks: the ``CARD`` and the ``ENTRIES`` of its ``hub.py``.

    CARD = Card("paper", build, RELEASES, address, "bicubic", ...)
    ENTRIES = hub_entries(CARD)

A card is data and two functions; what reads it is in :mod:`shared.networks.pretrained`,
:mod:`shared.networks.export` and :mod:`shared.evaluation.frozen`. What one method alone needs (the heads in its files,
the folder of a run, names in other libraries) stays a function of its ``hub.py`` and is passed where it is used.

``hubconf.py`` reads ``ENTRIES`` only: a dictionary of functions by name. A folder whose entries are no frozen backbones
(classifiers, encoders of text) lists its own, with or without a card for :func:`shared.networks.pretrained.fetch`.
Importing ``hub.py`` must stay cheap: torchvision, timm and OpenCV are imported in functions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from .weights import vit_shape


@dataclass(frozen=True)
class Release:
    """Published weights.

    Attributes:
        arch: A name that the card's ``build`` knows.
        file: Below the card's address.
        doc: Of its entry of torch.hub; without it there is none.
        entry: Name of that entry where it is not the release's.
        options: Arguments of ``build`` that tell networks of one name apart.
        cached_as: What the downloaded file is called where its own name says too little.
    """

    arch: str
    file: str
    doc: str = ""
    entry: str = ""
    options: Mapping[str, int] = field(default_factory=dict)
    cached_as: str = ""


def positions_of(arch: str, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The image size of a ViT's position embeddings; nothing for other networks."""
    shape = vit_shape(tensors)
    return {} if shape is None else {"img_size": shape.img_size}


def as_it_is(contents: object, path: Path) -> object:
    """The contents of a file of weights."""
    return contents


@dataclass(frozen=True)
class Card:
    """The networks of a method: how they are built, found in files and fed.

    Attributes:
        name: The folder's.
        build: ``build(arch, in_chans=3, img_size=224, **options)`` gives the network that maps normalised images
            (B, C, H, W) to the representation (B, D), with random weights and the published names.
        releases: By name; the first one of an architecture is taken where no file is given.
        address: Where the files are; the environment variable ``<NAME>_WEIGHTS_URL`` replaces it.
        interpolation: Of the resizing before a centre crop.
        embedded_run: What ``main`` leaves without images: the checkpoint, or its folder.
        main: The script that trains.
        mean, std: Of the images, per channel, for pixels in [0, 1]; by default those of ImageNet.
        checkpoint_key: The network to take from a training checkpoint.
        head_names: Modules there that are no part of the representation.
        sizes: ``sizes(arch, tensors)`` gives the arguments of ``build`` that a file tells; raises WeightMismatch for
            another architecture's.
        convert: ``convert(contents, path)`` brings a published layout of this method alone, of which a file was read,
            into one that :func:`shared.networks.weights.select_backbone_weights` knows.
        rename: ``rename(tensors)`` gives the backbone's tensors the names that ``build``'s networks have, where other
            libraries or files have their own for them.
        arch_flag, weights_flag: How the scripts call them, for messages.
    """

    name: str
    build: Callable[..., nn.Module]
    releases: Mapping[str, Release]
    address: str
    interpolation: str
    embedded_run: str = "runs/materials/checkpoint.pth"
    main: str = "main.py"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    checkpoint_key: str = "teacher"
    head_names: tuple[str, ...] = ()
    sizes: Callable[[str, Mapping[str, Tensor]], dict[str, int]] = positions_of
    convert: Callable[[object, Path], object] = as_it_is
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    arch_flag: str = "--arch"
    weights_flag: str = "--pretrained"

    @property
    def first_arch(self) -> str | None:
        """That of the first release, if there is one."""
        return next((release.arch for release in self.releases.values()), None)
