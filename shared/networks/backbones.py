"""Backbones of torchvision and timm by name, without their classifiers, offline.

Both libraries are imported when they are needed: together they take seconds.
"""

import difflib
import re
import warnings
from collections.abc import Sequence

from torch import Tensor, nn


class Through(nn.Module):
    """A network as the map of images that one of its methods, with some options, is; it shares the weights."""

    def __init__(self, network: nn.Module, method: str = "__call__", **options):
        super().__init__()
        self.network, self.method, self.options = network, method, options

    def forward(self, images: Tensor) -> Tensor:
        return getattr(self.network, self.method)(images, **self.options)


def library_architectures() -> set[str]:
    """Every classification model of torchvision and every model of timm."""
    import timm

    return {*torchvision_architectures(), *timm.list_models()}


def torchvision_architectures() -> list[str]:
    """Every classification model of torchvision."""
    from torchvision import models

    return models.list_models(module=models)


def timm_model(arch: str) -> str | None:
    """What timm calls a model: this name, or this name and the input size, which published names often lack."""
    import timm

    return next((name for name in (arch, f"{arch}_224") if timm.is_model(name)), None)


def build_library_backbone(
    arch: str, drop_path_rate: float = 0.0, img_size: int = 224, in_chans: int = 3, own_names: Sequence[str] = ()
) -> tuple[nn.Module, int]:
    """Build a randomly initialised network that maps images (B, C, H, W) to features (B, D).

    A name known to torchvision and timm alike (``resnet50``) gives torchvision's network. Where timm's name ends in the
    size of the images, ``_224``, that may be left out, as published names do.

    Args:
        arch: A classification model of torchvision, or a model of timm.
        drop_path_rate: Stochastic depth of the deepest block, in [0, 1).
        img_size: Side in pixels of the images for which position embeddings are made.
        in_chans: Channels of the input images.
        own_names: Names that the caller knows besides, for the message.

    Returns:
        The network, whose classifier is ``nn.Identity``, and the embedding dimension D.

    Raises:
        ValueError: If the name is unknown.
    """
    if arch in torchvision_architectures():
        return _build_torchvision(arch, drop_path_rate, img_size, in_chans)
    if (name := timm_model(arch)) is not None:
        return _build_timm(name, drop_path_rate, img_size, in_chans)
    names = [*own_names, *sorted(library_architectures() - set(own_names))]
    close = difflib.get_close_matches(arch, names, n=5) or [name for name in names if arch in name][:5]
    raise ValueError(
        f"--arch {arch} is unknown{'; did you mean ' + ', '.join(close) + '?' if close else '.'} "
        f"Known are {', '.join([*own_names, 'the models of torchvision and timm'])}."
    )


def first_convolution(backbone: nn.Module) -> tuple[str, nn.Conv2d]:
    """The first convolution of a network and its name."""
    return next((name, module) for name, module in backbone.named_modules() if isinstance(module, nn.Conv2d))


def input_channels(backbone: nn.Module) -> int:
    """Channels of the images that a network takes: those of its first convolution."""
    return first_convolution(backbone)[1].in_channels


def _build_torchvision(arch: str, drop_path_rate: float, img_size: int, in_chans: int) -> tuple[nn.Module, int]:
    from torchvision import models
    from torchvision.ops import StochasticDepth

    options = {}
    if arch.startswith("vit_"):
        options["image_size"] = img_size
    if arch.startswith("maxvit"):
        options["input_size"] = (img_size, img_size)
    if arch in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    backbone = models.get_model(arch, weights=None, **options)
    # the classifier is the last linear layer (a 1x1 convolution in SqueezeNet); norms before it stay
    name, classifier = [(n, m) for n, m in backbone.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    backbone.set_submodule(name, nn.Identity())
    if in_chans != 3:
        _replace_first_convolution(backbone, in_chans)

    depths = [m for m in backbone.modules() if isinstance(m, StochasticDepth)]
    deepest = max((m.p for m in depths), default=0.0)
    for module in depths:
        module.p *= drop_path_rate / deepest
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # part of the recipe for classification
    embed_dim = classifier.in_features if isinstance(classifier, nn.Linear) else classifier.in_channels
    return backbone, embed_dim


def _replace_first_convolution(backbone: nn.Module, in_chans: int) -> None:
    name, old = first_convolution(backbone)
    new = nn.Conv2d(in_chans, old.out_channels, old.kernel_size, old.stride, old.padding, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    backbone.set_submodule(name, new)


def _build_timm(arch: str, drop_path_rate: float, img_size: int, in_chans: int) -> tuple[nn.Module, int]:
    import timm

    # images of several sizes and of sides that are no multiple of a patch through a ViT; convnets have none of these
    options = {"img_size": img_size, "dynamic_img_size": True, "dynamic_img_pad": True}
    options["drop_path_rate"] = drop_path_rate
    while True:
        try:
            backbone = timm.create_model(arch, pretrained=False, num_classes=0, in_chans=in_chans, **options)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or unknown[1] not in options:
                raise
            if unknown[1] == "drop_path_rate" and drop_path_rate > 0:
                warnings.warn(f"{arch} has no stochastic depth: --drop_path_rate is not used", stacklevel=3)
            del options[unknown[1]]
        else:
            break
    return backbone, getattr(backbone, "head_hidden_size", backbone.num_features)
