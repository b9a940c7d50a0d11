"""What a training takes before it is started: memory of each device, floating-point operations, utilisation.

    python -m shared.plan FOLDER ARCH --batch_size 1024 --mesh 8 1
    python -m shared.plan FOLDER ARCH --mesh 64 16 --recompute --images_per_s 4.5 --peak_tflops 275
    python -m shared.plan FOLDER ARCH --views 2 224 4 96 --moments 1 --device_gib 80

Any network of a folder's card, of any size: it is built on torch's meta device, which has shapes and no numbers.
Weights, gradients and optimiser are divided among the devices of a mesh (data, model), as fully sharded training does
it; the model axis is for networks whose ``build`` takes ``model_parallel``. The memory of a pass is the most that is
there at a time while it and its backward pass are followed tensor by tensor, with fused attention. Operations are those
of products, convolutions and attention, two for a multiplication with its addition, and three forward passes for a
training step; repeated ones do not count.
"""

import argparse
import inspect
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from shared import distributed
from shared.networks.own_run import load_hub
from shared.run.command_line import Parser, plain_exit
from shared.run.estimate import size_text
from shared.run.memory import memory_of

NUMBERS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def count_parameters(module: nn.Module, matrices_only: bool = False) -> int:
    """Trainable ones; with ``matrices_only`` those of more than one dimension."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad and (p.dim() > 1 or not matrices_only))


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The modules a network repeats: of all classes with several of them, the one with most parameters.

    Of classes that have them within a hundredth, such as stages and their blocks, the most frequent one. Containers
    (``nn.Sequential``, ``nn.ModuleList``) are none.
    """
    by_class: dict[type, list[nn.Module]] = defaultdict(list)
    for module in network.modules():
        if next(module.children(), None) is not None and not isinstance(module, nn.Sequential | nn.ModuleList):
            by_class[type(module)].append(module)
    totals = {kind: sum(map(count_parameters, found)) for kind, found in by_class.items() if len(found) > 1}
    largest = [kind for kind, total in totals.items() if total >= 0.99 * max(totals.values())]
    return max((by_class[kind] for kind in largest), key=len, default=[])


class _FusedAttention(TorchFunctionMode):
    """Attention on the meta device as fused kernels do it, which keep no weights of it; counts its operations."""

    flops = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        q, k, v = args[:3]
        self.flops += 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


class _LiveMemory(TorchDispatchMode):
    """Follows the bytes of all tensors from where they are made to where they are let go.

    Gradients of weights are counted apart, and freed at once, since a mesh divides them.

    Attributes:
        now: Bytes that are there.
        weight_gradients: Those of the weights so far.
        highest: (bytes of gradients of weights, most other bytes while there were so many), in their order.
    """

    def __init__(self, own: Iterable[Tensor]):
        super().__init__()
        self.now = self.weight_gradients = 0
        self.highest = [(0, 0)]
        self.known = weakref.WeakSet(t.untyped_storage() for t in own)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, nbytes: int) -> None:
        self.now += nbytes
        gradients, most = self.highest[-1]
        self.highest[-1] = (gradients, max(most, self.now))

    def take_gradient(self, weight: Tensor) -> None:
        """What autograd calls with a weight whose gradient is complete."""
        weight.grad = None
        self.weight_gradients += 4 * weight.numel()
        self.highest.append((self.weight_gradients, self.now))


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass of some images.

    Attributes:
        kept: Bytes that are there after the forward pass, the network's own tensors and its images left out.
        highest: (bytes of gradients of weights, most other bytes while there were so many), in their order.
    """

    kept: int
    highest: tuple[tuple[int, int], ...]

    @property
    def activations(self) -> int:
        """Most bytes of activations and their gradients."""
        return max(most for _, most in self.highest)

    def peak(self, shards: int = 1) -> int:
        """Most bytes together with gradients of weights, which so many devices share."""
        return max(most + gradients // shards for gradients, most in self.highest)


def count_operations(network: nn.Module, batches: list[Tensor]) -> int:
    """Of the forward passes of these batches on the meta device."""
    with _FusedAttention() as attention, FlopCounterMode(display=False) as counter:
        for batch in batches:
            network(batch)
    return counter.get_total_flops() + attention.flops


def measure_pass(network: nn.Module, images: Tensor | list[Tensor], recompute: bool = False) -> Pass:
    """What a pass of a network on the meta device costs, or one for each of several batches and a common backward pass.

    Args:
        recompute: Keep the inputs of the repeated blocks only, and compute the rest again.
    """
    blocks, batches = repeated_blocks(network) if recompute else [], [images] if isinstance(images, Tensor) else images
    memory = _LiveMemory([*batches, *network.parameters(), *network.buffers()])
    for block in blocks:
        again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _FusedAttention())}
        block.forward = partial(checkpoint, block.forward, **again)
    hooks = [
        p.register_post_accumulate_grad_hook(memory.take_gradient) for p in network.parameters() if p.requires_grad
    ]
    try:
        with _FusedAttention(), memory:
            loss = sum(t.sum() for batch in batches for t in tree_iter(network(batch)) if isinstance(t, Tensor))
            kept = memory.now
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for block in blocks:
            del block.forward
    return Pass(kept, tuple(memory.highest))


@dataclass(frozen=True)
class Plan:
    """What each device of a mesh (data, model) holds, in bytes, with weights, gradients and moments in float32.

    Attributes:
        images: Of a step, on each part of the data axis.
        parameters: Counts, by what they are of.
        flops_per_image: Operations of one image in a training step of the whole network.
        elements: Numbers in each weight, of a process of the model axis.
        gathered: Numbers of a repeated block, and of the weights outside of these, which several devices gather.
        cast: Bytes of the weights that autograd keeps in the numbers of the passes, on one device and on several, where
            it is those of a block if they are computed again.
        moments: Numbers of the optimiser per weight.
        passed: The passes of the images of one device.
    """

    mesh: tuple[int, int]
    images: int
    parameters: dict[str, int]
    flops_per_image: int
    elements: tuple[int, ...]
    gathered: tuple[int, int]
    cast: tuple[int, int]
    moments: int
    passed: Pass

    @property
    def weights(self) -> int:
        return 4 * sum(-(-number // self.mesh[0]) for number in self.elements)

    @property
    def gradients(self) -> int:
        return self.weights

    @property
    def optimiser(self) -> int:
        return self.moments * self.weights

    @property
    def copies(self) -> int:
        """Weights in the numbers of the passes, and on several devices the whole ones in float32: a block, the next one
        that is gathered meanwhile, and all that is in no block.
        """
        block, rest = self.gathered if self.mesh[0] > 1 else (0, 0)
        return self.cast[self.mesh[0] > 1] + 4 * (2 * block + rest)

    @property
    def activations(self) -> int:
        return self.passed.activations

    @property
    def peak(self) -> int:
        """Not the sum: gradients of weights come while activations go, on several devices those of a whole block."""
        passes = max(self.passed.peak(self.mesh[0]), self.gradients)
        passes += 4 * max(self.gathered) if self.mesh[0] > 1 else 0
        return self.weights + self.optimiser + self.copies + passes

    def on(self, devices: int) -> "Plan":
        """The same with another length of the data axis, and as many images on each part of it."""
        return replace(self, mesh=(devices, self.mesh[1]))

    def utilisation(self, images_per_s: float, peak_flops: float) -> float:
        """Share of a device's peak that the model's operations take, at so many images per second and device."""
        return images_per_s * self.flops_per_image / peak_flops

    def text(self) -> str:
        devices = self.mesh[0] * self.mesh[1]
        counts = [f"{name} {count:,}" for name, count in self.parameters.items()]
        memory = ("weights", "gradients", "optimiser", "copies", "activations", "peak")
        return "\n".join(
            [
                f"parameters: {', '.join(counts)}",
                f"{self.images * self.mesh[0]} images a step on {devices} devices ({self.mesh[0]} x {self.mesh[1]}); "
                "of each:",
                *(f"  {name:<12}{size_text(getattr(self, name)):>12}" for name in memory),
                f"training: {self.flops_per_image / 1e9:,.1f} GFLOP per image, "
                f"{self.flops_per_image * self.images / self.mesh[1] / 1e12:,.2f} TFLOP per step and device",
            ]
        )

    def fitting_text(self, device_gib: float, most: int = 1 << 14) -> str:
        """A sentence about the fewest devices (a power of two, at most ``most``) on which this fits."""
        for exponent in range(most.bit_length()):
            found = self.on(1 << exponent)
            if found.peak <= device_gib * 2**30:
                number = found.mesh[0] * found.mesh[1]
                return f"it fits on {number} devices of {device_gib:g} GiB: {size_text(found.peak)} on each"
        return f"it does not fit on devices of {device_gib:g} GiB, however many"


def make_plan(
    build: Callable[[int], nn.Module],
    image: Sequence[int],
    batch_size: int,
    mesh: tuple[int, int] = (1, 1),
    activations_in: torch.dtype = torch.bfloat16,
    moments: int = 2,
    recompute: bool = False,
    views: Sequence[tuple[int, int]] = (),
) -> Plan:
    """Plan a training.

    Args:
        build: Makes the network on the meta device, or what one of so many processes of the model axis has of it.
        image: Shape (C, H, W).
        batch_size: Images of a step, on all devices.
        mesh: Lengths of the data axis and the model axis.
        activations_in: Numbers of the passes, and of the weights in them.
        moments: Of the optimiser, numbers per weight; AdamW has 2.
        recompute: Keep the inputs of the repeated blocks only; for networks that do not do so by themselves.
        views: (number, side in pixels) of an image's square views of each size; by default it is seen once, whole.

    Raises:
        ValueError: If the data axis does not divide the batch, or the model axis not the network.
    """
    data, model = mesh
    if batch_size % data:
        raise ValueError(
            f"--batch_size {batch_size} cannot be divided among the {data} groups of --mesh {data} {model}"
        )
    with torch.device("meta"):
        whole, part = build(1), build(model)
        blocks, part_blocks = repeated_blocks(whole), repeated_blocks(part)
        shapes = [(number, image[0], side, side) for number, side in views] or [(1, *image)]

        def batches(images: int) -> list[Tensor]:
            return [torch.empty(images * number, *shape, dtype=activations_in) for number, *shape in shapes]

        forward = count_operations(whole.to(activations_in), batches(2)) // 2  # batch norm may need two images
        passed = measure_pass(part.to(activations_in), batches(batch_size // data), recompute)
    parameters = {"all": count_parameters(whole)}
    if blocks:
        parameters[f"{len(blocks)} x {type(blocks[0]).__name__}"] = sum(map(count_parameters, blocks))
        parameters["their matrices"] = sum(count_parameters(block, matrices_only=True) for block in blocks)
    block = max(map(count_parameters, part_blocks), default=0)
    recompute = recompute or any(getattr(module, "recompute", False) for module in part.modules())
    matrices = count_parameters(part, matrices_only=True)
    cast_bytes = 0 if activations_in == torch.float32 else activations_in.itemsize
    return Plan(
        mesh=tuple(mesh),
        images=batch_size // data,
        parameters=parameters,
        flops_per_image=3 * forward,
        elements=tuple(p.numel() for p in part.parameters()),
        gathered=(block, count_parameters(part) - sum(map(count_parameters, part_blocks))),
        cast=(matrices * cast_bytes, (block if recompute else matrices) * cast_bytes),
        moments=moments,
        passed=passed,
    )


def tell_large(build: Callable[[], nn.Module], device: torch.device, devices: int, moments: int, flag: str) -> None:
    """Say what a network takes that is about to be built for a training, if that is a gigabyte or more.

    Args:
        devices: That share weights, gradients and moments.
        moments: Of the optimiser, numbers per weight.
        flag: That shares them out.

    Raises:
        ValueError: If these alone are more than the memory of a device.
    """
    with torch.device("meta"):
        number = count_parameters(build())
    needed, memory = (2 + moments) * 4 * number // devices, memory_of(device)
    parts = f"{number:,} weights with their gradients and moments: {size_text(needed)}"
    if needed > memory:
        raise ValueError(
            f"{parts} on each of {devices} device(s) of {size_text(memory)}, without activations; take a smaller "
            f"--arch, or {flag} with more devices; python -m shared.plan tells how many"
        )
    if needed > 1e9:
        distributed.print_once(f"{parts} of {size_text(memory)}, before activations; building it takes a while")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", help="of a method, whose hub.py has the networks")
    add("arch", help="as its training script calls it")
    add("--img_size", type=int, default=224, help="side of the images in pixels")
    add("--in_chans", type=int, default=3, help="channels of the images")
    add("--batch_size", type=int, default=1024, help="images of a step, on all devices")
    add("--mesh", type=int, nargs=2, default=(1, 1), metavar=("DATA", "MODEL"), help="devices of the two axes")
    add("--amp", default="bf16", choices=tuple(NUMBERS), help="numbers of the passes")
    add("--moments", type=int, default=2, help="numbers of the optimiser per weight: 2 for AdamW, 1 for SGD")
    add("--recompute", action="store_true", help="keep the inputs of the blocks only, and compute them again")
    many = "views of an image instead of it: their number and side in pixels, of each size"
    add("--views", type=int, nargs="+", default=[], metavar="N", help=many)
    fits = "memory of a device: tell the fewest of them on which it fits, with the images of a device as they are"
    add("--device_gib", type=float, default=None, help=fits)
    add("--images_per_s", type=float, default=None, help="of each device, for its utilisation")
    add("--peak_tflops", type=float, default=None, help="of each device, for its utilisation")
    return parser


def main(arguments: list[str] | None = None) -> Plan:
    args = get_args_parser().parse_args(arguments)
    card = load_hub(args.folder).CARD

    def build(model_parallel: int) -> nn.Module:
        options = {}
        if model_parallel > 1:
            if "model_parallel" not in inspect.signature(card.build).parameters:
                raise ValueError(f"--mesh {args.mesh[0]} {model_parallel}: {args.folder} has no model axis, take 1")
            options["model_parallel"] = model_parallel
        return card.build(args.arch, in_chans=args.in_chans, img_size=args.img_size, **options)

    image = (args.in_chans, args.img_size, args.img_size)
    if len(args.views) % 2:
        raise ValueError(f"--views {' '.join(map(str, args.views))}: expected pairs of a number and a side")
    views = list(zip(args.views[::2], args.views[1::2], strict=True))

    plan = make_plan(build, image, args.batch_size, args.mesh, NUMBERS[args.amp], args.moments, args.recompute, views)
    print(plan.text())
    if args.device_gib:
        print(plan.fitting_text(args.device_gib))
    if args.images_per_s and args.peak_tflops:
        share = plan.utilisation(args.images_per_s, args.peak_tflops * 1e12)
        print(f"{args.images_per_s:g} images/s and device are {share:.1%} of {args.peak_tflops:g} TFLOP/s")
    return plan


if __name__ == "__main__":
    with plain_exit():
        main()
