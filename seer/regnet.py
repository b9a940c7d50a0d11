"""RegNetY (Radosavovic et al. 2020) of any size, up to SEER's 10 billion weights, and the head of SwAV.

Tensors have torchvision's names, so that its files fill these networks and the other way round; those of other layouts
are renamed in :mod:`seer.convert_checkpoint`.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}
STEMS = ("simple", "residual", "cifar")


@dataclass(frozen=True)
class Stage:
    """Blocks of one width, the first of which halves the sides of its images."""

    width: int
    depth: int
    groups: int
    inner: int


@dataclass(frozen=True)
class Sizes:
    """A line of the design space: widths of the blocks, rounded to a few stages.

    Attributes:
        depth: Blocks of all stages.
        w_0, w_a, w_m: Width of the first block, its growth from block to block, ratio of the widths of two stages.
        group_width: Channels of a group of the 3x3 convolutions.
        bottleneck: Inner width over outer width.
    """

    depth: int
    w_0: int
    w_a: float
    w_m: float
    group_width: int
    bottleneck: float = 1.0
    stem: str = "simple"

    def stages(self) -> list[Stage]:
        """The stages, often four."""
        if self.w_a < 0 or self.w_0 <= 0 or self.w_m <= 1 or self.w_0 % 8:
            raise ValueError(f"{self}: expected w_a >= 0, w_m > 1 and a positive w_0 that is divisible by 8")
        exponents = [round(math.log(1 + self.w_a * j / self.w_0) / math.log(self.w_m)) for j in range(self.depth)]
        widths = [8 * round(self.w_0 * self.w_m**s / 8) for s in exponents]
        return [self._compatible(width, widths.count(width)) for width in dict.fromkeys(widths)]

    def _compatible(self, width: int, depth: int) -> Stage:
        """The stage whose groups divide its inner width."""
        inner = int(width * self.bottleneck)
        group = min(self.group_width, inner)
        inner = round(inner / group) * group
        return Stage(int(inner / self.bottleneck), depth, inner // group, inner)


SIZES = {  # names as in the published configurations
    "regnet8Gf": Sizes(17, 192, 76.82, 2.19, 56),
    "regnet16Gf": Sizes(18, 200, 106.23, 2.48, 112),
    "regnet32Gf": Sizes(20, 232, 115.89, 2.53, 232),
    "regnet64Gf_3": Sizes(20, 352, 147.48, 2.4, 328),
    "regnet128Gf": Sizes(27, 456, 160.83, 2.52, 264),
    "regnet256Gf_1": Sizes(27, 640, 230.83, 2.53, 373),
    "regnet10B": Sizes(27, 1744, 620.83, 2.52, 1010),
    # for the embedded images and small experiments: three stages, which leave 4 x 4 places of 32 x 32 pixels
    "regnet_pico": Sizes(6, 16, 12.1, 2.3, 8, stem="cifar"),
    "regnet_micro": Sizes(6, 24, 24.5, 2.3, 8, stem="cifar"),
    "regnet_mini": Sizes(6, 48, 49.0, 2.3, 16, stem="cifar"),
}


class SqueezeExcitation(nn.Module):
    """A factor for every channel, computed from the averages of all."""

    def __init__(self, channels: int, squeezed: int, activation: type[nn.Module]):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = activation(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.activation(self.fc1(x.mean(dim=(2, 3), keepdim=True)))).sigmoid()


class ConvNorm(nn.Sequential):
    """A convolution and a batch norm, and what else is behind them; in evaluation the two are one convolution."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, *behind: nn.Module
    ):
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs), *behind)

    def forward(self, x: Tensor) -> Tensor:
        convolution, norm, *behind = self
        if norm.training or torch.is_grad_enabled():
            x = norm(convolution(x))
        else:
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            weight, bias = convolution.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale
            x = F.conv2d(x, weight, bias, convolution.stride, convolution.padding, groups=convolution.groups)
        for module in behind:
            x = module(x)
        return x


class Block(nn.Module):
    """A residual bottleneck: 1x1, grouped 3x3, squeeze-and-excitation, 1x1.

    With ``recompute`` its inner activations are computed again in the backward pass, and only its input is kept.
    """

    recompute = False

    def __init__(self, inputs: int, stage: Stage, stride: int, activation: type[nn.Module], use_se: bool = True):
        super().__init__()
        is_changed = stride != 1 or inputs != stage.width
        self.proj = ConvNorm(inputs, stage.width, 1, stride) if is_changed else None
        self.f = nn.Sequential()
        self.f.a = ConvNorm(inputs, stage.inner, 1, 1, 1, activation(inplace=True))
        self.f.b = ConvNorm(stage.inner, stage.inner, 3, stride, stage.groups, activation(inplace=True))
        if use_se:  # a quarter of what enters the block: half as many in the first one of a stage
            self.f.se = SqueezeExcitation(stage.inner, round(0.25 * inputs), activation)
        self.f.c = ConvNorm(stage.inner, stage.width)
        self.activation = activation(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return self.compute(x)

        def contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
            return contextlib.nullcontext(), _without_statistics(self)  # of the pass, and of its repetition

        return checkpoint(self.compute, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    def compute(self, x: Tensor) -> Tensor:
        skip = x if self.proj is None else self.proj(x)
        return self.activation(self.f(x).add_(skip))


@contextlib.contextmanager
def _without_statistics(module: nn.Module) -> Iterator[None]:
    """Passes do not count in the running statistics; other tensors take their places, for which no code is compiled."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, kept, strict=True):
        norm._buffers.update({name: torch.empty_like(buffer) for name, buffer in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


class RegNet(nn.Module):
    """Maps images (B, C, H, W) to the average of the last map (B, D), or to logits with ``num_classes``.

    Args:
        sizes: Of the stages.
        in_chans: Channels of the images.
        num_classes: 0: no classifier.
        stem: ``simple`` (3x3 of stride 2), ``residual`` (7x7 of stride 2 and pooling) or ``cifar`` (3x3); None: that of
            the sizes.
        recompute: Of all blocks, see :class:`Block`.
    """

    def __init__(
        self,
        sizes: Sizes,
        in_chans: int = 3,
        num_classes: int = 0,
        stem: str | None = None,
        stem_width: int = 32,
        activation: str = "relu",
        use_se: bool = True,
        recompute: bool = False,
    ):
        super().__init__()
        stem = stem or sizes.stem
        if stem not in STEMS:
            raise ValueError(f"stem {stem!r} is none of {', '.join(STEMS)}")
        act, (kernel, stride) = ACTIVATIONS[activation], {"simple": (3, 2), "residual": (7, 2), "cifar": (3, 1)}[stem]
        behind = [nn.MaxPool2d(3, 2, 1)] if stem == "residual" else []
        self.stem = ConvNorm(in_chans, stem_width, kernel, stride, 1, act(inplace=True), *behind)
        self.trunk_output = nn.Sequential()
        inputs = stem_width
        for s, stage in enumerate(sizes.stages(), start=1):
            blocks = nn.Sequential()
            for i in range(stage.depth):
                blocks.add_module(f"block{s}-{i}", Block(inputs, stage, 1 if i else 2, act, use_se))
                inputs = stage.width
            self.trunk_output.add_module(f"block{s}", blocks)
        self.embed_dim = inputs
        self.fc = nn.Linear(inputs, num_classes) if num_classes else nn.Identity()
        for block in self.blocks():
            block.recompute = recompute

    def blocks(self) -> list[Block]:
        return [block for stage in self.trunk_output for block in stage]

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """What the stem and every stage give: ``conv1``, ``res2``, ``res3``, ..., as the papers call them."""
        found = {"conv1": self.stem(images.contiguous(memory_format=torch.channels_last))}
        for number, stage in enumerate(self.trunk_output, start=2):
            found[f"res{number}"] = stage(found["conv1" if number == 2 else f"res{number - 1}"])
        return found

    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)  # in which grouped convolutions are faster
        return self.fc(self.trunk_output(self.stem(images)).mean(dim=(2, 3)))


class Head(nn.Module):
    """SwAV's projection and its prototypes: features (B, D) to embeddings (B, E) and one score matrix for each set.

    Args:
        dims: D, hidden widths, E.
        prototypes: Number of prototypes of each set; none: embeddings alone.
        use_bn: Batch norm behind the layers, before ReLU.
        skip_last_bn: Neither of them behind the last layer.
        normalize: Put embeddings on the unit sphere.
    """

    def __init__(
        self,
        dims: Sequence[int],
        prototypes: Sequence[int] = (),
        use_bn: bool = False,
        skip_last_bn: bool = True,
        normalize: bool = True,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(itertools.pairwise(dims), start=2):
            is_last = number == len(dims)
            layers.append(nn.Linear(inputs, outputs))
            if not (is_last and skip_last_bn):
                layers += [nn.BatchNorm1d(outputs)] if use_bn else []
                layers.append(nn.ReLU(inplace=True))
        self.projection_head = nn.Sequential(*layers)
        self.sets = len(prototypes)
        for i, count in enumerate(prototypes):
            self.add_module(f"prototypes{i}", nn.Linear(dims[-1], count, bias=False))
        self.normalize = normalize

    def prototypes(self) -> list[nn.Linear]:
        return [getattr(self, f"prototypes{i}") for i in range(self.sets)]

    def forward(self, features: Tensor) -> tuple[Tensor, list[Tensor]]:
        embeddings = self.projection_head(features)
        if self.normalize:
            embeddings = F.normalize(embeddings, dim=1)
        return embeddings, [scores(embeddings) for scores in self.prototypes()]


@torch.no_grad()
def initial_values(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The initial value of every parameter, one at a time, as (its module, its name there, value).

    Convolutions are normal with the variance 2 / (k * k * outputs), whatever their groups; the classifier normal with
    0.01; norms are 1 and 0; all else has torch's defaults. Values are drawn on the CPU in the order of the modules, so
    that they do not depend on who holds which part of the network.
    """
    classifier = getattr(module, "fc", None)
    for part in module.modules():
        own = dict(part.named_parameters(recurse=False))
        drawn = {name: torch.empty(p.shape, dtype=p.dtype, device="cpu") for name, p in own.items()}
        fan_in = math.prod(own["weight"].shape[1:]) if isinstance(part, nn.Conv2d | nn.Linear) else 0
        for name, value in drawn.items():
            if not fan_in:
                value.fill_(float(name == "weight"))
            elif name == "weight" and isinstance(part, nn.Conv2d):
                value.normal_(std=math.sqrt(2 / (value.shape[2] * value.shape[3] * len(value))))
            elif part is classifier:
                value.normal_(std=0.01) if name == "weight" else value.zero_()
            else:  # both of torch's defaults for layers of this kind
                value.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
            yield part, name, value


@torch.no_grad()
def initialise_(module: nn.Module, fill: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> nn.Module:
    """Give all parameters their :func:`initial_values` by ``fill(parameter, value)``, and reset running statistics."""
    for part, name, value in initial_values(module):
        fill(getattr(part, name), value)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.reset_running_stats()
    return module
