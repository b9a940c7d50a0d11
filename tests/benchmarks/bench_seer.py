"""RegNetY beside torchvision's and timm's with the same weights; recomputation; the plan beside measured memory.

    python tests/benchmarks/bench_seer.py [--out FILE.json]

Networks, alternated in one process, after their outputs were found equal; the median of the ratios of neighbouring
rounds counts. Training steps of SEER with and without recomputation run in processes of their own, so that their peaks
of memory (of the tensors, as torch allocates them) are told apart, and are compared with what `shared.plan` says.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import timm
import torch
import torchvision
from torch import nn

import shared.run.passive_threads  # noqa: F401
from seer.convert_checkpoint import to_timm
from seer.losses import SwappedAssignments, normalize_prototypes_
from seer.main_seer import PrototypeNetwork
from seer.regnet import SIZES, Head, RegNet, Sizes, initialise_
from shared.optimisation.larc import LARC
from shared.plan import make_plan
from tests.benchmarks.beside_timm import add_flags, compare, table
from tests.benchmarks.harness import InProcess, allocated_bytes, finish, get_args_parser

NETWORKS = {  # sizes, names in torchvision and timm
    "400MF": (Sizes(16, 48, 27.89, 2.09, 8), "regnet_y_400mf", "regnety_004"),
    "8GF": (SIZES["regnet8Gf"], "regnet_y_8gf", "regnety_080"),
}
VIEWS = [(2, 160), (4, 96)]


def build(name: str, whose: str, device: str) -> tuple[nn.Module, nn.Module]:
    """Ours and that of a library with the same weights, batch norms with statistics."""
    sizes, torchvision_name, timm_name = NETWORKS[name]
    torch.manual_seed(0)
    ours = initialise_(RegNet(sizes, num_classes=1000))
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.constant_(module.weight, 0.7)  # logits stay in a range in which they can be compared
    if whose == "torchvision":
        theirs = torchvision.models.get_model(torchvision_name)
        theirs.load_state_dict(ours.state_dict())
    else:
        theirs = timm.create_model(timm_name)
        theirs.load_state_dict({to_timm(key): value for key, value in ours.state_dict().items()})
    return ours.to(device), theirs.to(device)


def network_of(recompute: bool) -> PrototypeNetwork:
    trunk = RegNet(NETWORKS["400MF"][0], recompute=recompute)
    return PrototypeNetwork(trunk, Head([trunk.embed_dim, 512, 512, 128], [1000]))


def make_step(recompute: bool, batch_size: int, device: str, threads: int):
    """A training step of SEER; the work returns its seconds, ``step.kept`` the bytes that are there before it."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = initialise_(network_of(recompute)).to(device).train()
    optimizer, criterion = LARC(network.parameters(), lr=0.1), SwappedAssignments()
    views = [torch.randn(number * batch_size, 3, side, side, device=device) for number, side in VIEWS]

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        normalize_prototypes_(network.head.prototypes())
        scores = network(views)[1][0].unflatten(0, (-1, batch_size))
        criterion(scores, [criterion.assign(scores[crop]) for crop in (0, 1)]).backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def kept() -> int:
        moments = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        tensors = [*network.state_dict().values(), *moments, *views]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    step.kept = kept
    return step


def make_memory(recompute: bool, batch_size: int, device: str, threads: int):
    """A training step; the work returns the bytes that it takes at its peak."""
    step = make_step(recompute, batch_size, device, threads)

    def measure() -> int:
        step()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            return torch.cuda.max_memory_allocated()
        return step.kept() + allocated_bytes(step)

    return measure


def recomputation(args: argparse.Namespace) -> dict:
    """Time, measured and planned memory of both kinds of steps."""
    kinds = {name: name == "recomputed" for name in ("plain", "recomputed")}
    steps = {
        name: InProcess(make_step, flag, args.batch_size, args.device, args.threads, device=args.device)
        for name, flag in kinds.items()
    }
    seconds = {name: [] for name in kinds}
    for turn in range(args.rounds + 1):
        for name, step in steps.items():
            taken = step()
            if turn:
                seconds[name].append(taken)
    found = {"time_ratio": statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))}
    for name, step in steps.items():
        step.stop()
        memory = InProcess(make_memory, kinds[name], args.batch_size, args.device, args.threads, device=args.device)
        measured = memory()
        memory.stop()
        planned = make_plan(
            lambda _, flag=kinds[name]: network_of(flag),
            (3, VIEWS[0][1], VIEWS[0][1]),
            args.batch_size,
            activations_in=torch.float32,
            moments=1,
            views=VIEWS,
        )
        images = sum(number * side * side for number, side in VIEWS) * 3 * 4 * args.batch_size
        found[name] = {
            "seconds": statistics.median(seconds[name]),
            "measured_mib": measured / 2**20,
            "planned_mib": (planned.peak + images) / 2**20,
            "planned_activations_mib": planned.activations / 2**20,
        }
    return found


def main() -> None:
    parser = get_args_parser(__doc__, rounds=7)
    add = parser.add_argument
    add("--networks", nargs="+", default=["400MF"], choices=tuple(NETWORKS))
    add("--image_size", type=int, default=160)
    add_flags(parser, bf16=False)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for name in args.networks:
        images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
        for whose in ("torchvision", "timm"):
            ours, theirs = build(name, whose, args.device)
            beside = f"{name} beside {whose}'s"
            results += compare(beside, ours, theirs, images, args.dtypes, args.compile, args.rounds)
    print(table(results), flush=True)
    memory = recomputation(args)
    for name in ("plain", "recomputed"):
        row = memory[name]
        print(
            f"{name}: {row['seconds']:.2f} s, {row['measured_mib']:.0f} MiB measured, {row['planned_mib']:.0f} "
            f"planned, of these {row['planned_activations_mib']:.0f} of activations"
        )
    print(f"recomputation takes {memory['time_ratio']:.2f} of the time", flush=True)
    share = memory["recomputed"]["planned_activations_mib"] / memory["plain"]["planned_activations_mib"]
    error = max(abs(row["planned_mib"] / row["measured_mib"] - 1) for row in (memory["plain"], memory["recomputed"]))
    targets = {
        "not slower": min(result["ratio"] for result in results) >= 1,
        "half of the activations for 1.35 of the time": share <= 0.5 and memory["time_ratio"] <= 1.35,
        "the plan within a tenth of the measured peak": error <= 0.1,
    }
    finish(args, {"results": results, "memory": memory}, targets, (torch, torchvision, timm))


if __name__ == "__main__":
    main()
