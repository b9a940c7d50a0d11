"""What a training takes before it is started: memory of each device, floating-point operations, utilisation.

    python -m shared.plan FOLDER ARCH --batch_size 1024 --mesh 8 1
    python -m shared.plan FOLDER ARCH --mesh 64 16 --recompute --images_per_s 4.5 --peak_tflops 275
    python -m shared.plan FOLDER ARCH --views 2 224 4 96 --moments 1 --device_gib 80

Any network of a folder's card, of any size: it is built on torch's meta device, which has shapes and no numbers.
Weights, gradients and optimiser are divided among the devices of a mesh (data, model), as fully sharded training does
it; the model axis is for networks whose ``build`` takes ``model_parallel``. What a pass keeps for its gradients is
measured: all tensors that autograd saves, with fused attention. Operations are those of products, convolutions and
attention, two for a multiplication with its addition, and three forward passes for a training step; repeated ones do
not count.
"""

import argparse
import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from shared.networks.own_run import load_hub
from shared.run.command_line import Parser, plain_exit
from shared.run.estimate import size_text

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


@dataclass(frozen=True)
class Pass:
    """A forward pass of some images.

    Attributes:
        flops: Of the pass.
        activations: Bytes kept for the gradients, the network's own tensors and its images left out.
        recomputed: The same if only the inputs of the repeated blocks are kept, and one block at a time is computed
            again.
    """

    flops: int
    activations: int
    recomputed: int


def measure_pass(network: nn.Module, images: Tensor | list[Tensor]) -> Pass:
    """What a forward pass of a network on the meta device costs, or one for each of several batches."""
    blocks, batches = repeated_blocks(network), [images] if isinstance(images, Tensor) else images
    own = {t.untyped_storage()._cdata for t in [*batches, *network.parameters(), *network.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again
    bytes_of: dict[int, int] = defaultdict(int)  # by number of the block, -1 outside
    current, inputs = [-1], {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            kept[storage._cdata] = storage
            bytes_of[current[-1]] += storage.nbytes()
        return tensor

    def enter(number: int, module: nn.Module, args: tuple) -> None:
        current.append(number)
        storage = args[0].untyped_storage()
        inputs.setdefault(storage._cdata, (storage, storage._cdata in kept))

    def leave(*_) -> None:
        current.pop()

    hooks = []
    for number, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(lambda module, args, n=number: enter(n, module, args)))
        hooks.append(block.register_forward_hook(leave))
    attention = _FusedAttention()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), FlopCounterMode(display=False) as counter:
            with attention:
                for batch in batches:
                    network(batch)
    finally:
        for hook in hooks:
            hook.remove()
    outside = bytes_of.pop(-1, 0)
    between = sum(storage.nbytes() for storage, counted in inputs.values() if not counted)
    total = outside + sum(bytes_of.values())
    recomputed = outside + between + max(bytes_of.values(), default=0)
    return Pass(counter.get_total_flops() + attention.flops, total, recomputed)


@dataclass(frozen=True)
class Plan:
    """Bytes are those of each device; operations those of one image in a training step of the whole network."""

    mesh: tuple[int, int]
    batch_size: int
    parameters: dict[str, int]
    flops_per_image: int
    weights: int
    gradients: int
    optimiser: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimiser + self.gathered + self.activations

    def utilisation(self, images_per_s: float, peak_flops: float) -> float:
        """Share of a device's peak that the model's operations take, at so many images per second and device."""
        return images_per_s * self.flops_per_image / peak_flops

    def text(self) -> str:
        devices = self.mesh[0] * self.mesh[1]
        counts = [f"{name} {count:,}" for name, count in self.parameters.items()]
        memory = ("weights", "gradients", "optimiser", "gathered", "activations", "total")
        return "\n".join(
            [
                f"parameters: {', '.join(counts)}",
                f"{self.batch_size} images a step on {devices} devices ({self.mesh[0]} x {self.mesh[1]}); of each:",
                *(f"  {name:<12}{size_text(getattr(self, name)):>12}" for name in memory),
                f"training: {self.flops_per_image / 1e9:,.1f} GFLOP per image, "
                f"{self.flops_per_image * self.batch_size / devices / 1e12:,.2f} TFLOP per step and device",
            ]
        )


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
    """Plan a training with weights, gradients and moments in float32, each held once along the data axis.

    Args:
        build: Makes the network on the meta device, or what one of so many processes of the model axis has of it.
        image: Shape (C, H, W).
        batch_size: Images of a step, on all devices.
        mesh: Lengths of the data axis and the model axis.
        activations_in: Numbers of the passes, and of the weights of one block that are gathered at a time.
        moments: Of the optimiser, numbers per weight; AdamW has 2.
        recompute: Keep the inputs of the repeated blocks only.
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
        sharded = sum(-(-p.numel() // data) for p in part.parameters()) * 4
        gathered = max(map(count_parameters, part_blocks), default=0) * activations_in.itemsize if data > 1 else 0
        shapes = [(number, image[0], side, side) for number, side in views] or [(1, *image)]

        def batches(images: int) -> list[Tensor]:
            return [torch.empty(images * number, *shape, dtype=activations_in) for number, *shape in shapes]

        forward = measure_pass(whole.to(activations_in), batches(2)).flops // 2  # batch norm may need two images
        passed = measure_pass(part.to(activations_in), batches(batch_size // data))
    parameters = {"all": count_parameters(whole)}
    if blocks:
        parameters[f"{len(blocks)} x {type(blocks[0]).__name__}"] = sum(map(count_parameters, blocks))
        parameters["their matrices"] = sum(count_parameters(block, matrices_only=True) for block in blocks)
    activations = passed.recomputed if recompute else passed.activations
    memory = (sharded, sharded, sharded * moments, gathered, activations)
    return Plan(tuple(mesh), batch_size, parameters, 3 * forward, *memory)


def fewest_devices(plan_of: Callable[[int], Plan], memory: float, most: int = 1 << 14) -> Plan | None:
    """The plan with the fewest devices (a power of two) of so many bytes in which a training fits; None if none does.

    Args:
        plan_of: Makes the plan for a number of devices.
    """
    plans = (plan_of(1 << exponent) for exponent in range(most.bit_length()))
    return next((plan for plan in plans if plan.total <= memory), None)


def fitting_text(plan_of: Callable[[int], Plan], device_gib: float) -> str:
    """A sentence about :func:`fewest_devices`."""
    found = fewest_devices(plan_of, device_gib * 2**30)
    if found is None:
        return f"it does not fit on devices of {device_gib:g} GiB, however many"
    return f"it fits on {found.mesh[0] * found.mesh[1]} devices of {device_gib:g} GiB: {size_text(found.total)} on each"


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

    def plan_of(data: int) -> Plan:
        batch_size, mesh = args.batch_size // args.mesh[0] * data, (data, args.mesh[1])
        return make_plan(build, image, batch_size, mesh, NUMBERS[args.amp], args.moments, args.recompute, views)

    plan = make_plan(build, image, args.batch_size, args.mesh, NUMBERS[args.amp], args.moments, args.recompute, views)
    print(plan.text())
    if args.device_gib:
        print(fitting_text(plan_of, args.device_gib))
    if args.images_per_s and args.peak_tflops:
        share = plan.utilisation(args.images_per_s, args.peak_tflops * 1e12)
        print(f"{args.images_per_s:g} images/s and device are {share:.1%} of {args.peak_tflops:g} TFLOP/s")
    return plan


if __name__ == "__main__":
    with plain_exit():
        main()
