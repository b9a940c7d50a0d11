"""Forward and backward pass of networks on images that are channels-last in memory, beside images that are not.

    python tests/benchmarks/bench_layout.py [--threads 1] [--rounds 5] [--out FILE.json]

Trainings lay images out channels-last (``normalize_views``); weights stay as they are. Time is that of the processor.
"""

import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import timm
import torch
import torchvision
from torch import Tensor, nn

import shared.run.passive_threads  # noqa: F401
from dino.hub import build_backbone
from shared.multicrop import channels_last
from shared.optimisation.precision import fast_bf16
from tests.benchmarks.harness import as_text, finish, get_args_parser, spread
from xcit.hub import CARD as XCIT

NETWORKS = {  # what makes it, and (images, side in pixels)
    "ResNet-50": (torchvision.models.resnet50, ((4, 224), (12, 96))),
    "ResNet-10-T": (partial(timm.create_model, "resnet10t"), ((128, 32), (256, 16))),
    "test_resnet": (partial(timm.create_model, "test_resnet"), ((128, 32), (128, 16))),
    "VGG-16 with batch norm": (lambda: torchvision.models.vgg16_bn().features, ((4, 224),)),
    "AlexNet": (torchvision.models.alexnet, ((32, 224),)),
    "XCiT-S12/16": (partial(XCIT.build, "xcit_small_12_p16", img_size=224, num_classes=1000), ((4, 224),)),
    "ViT-S/16": (lambda: build_backbone("vit_small", 16, 0.1)[0], ((4, 224),)),
}


def seconds(network: nn.Module, views: list[Tensor], bf16: bool) -> float:
    """Of the processor, for one pass."""
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = sum(network(view).float().square().mean() for view in views)
    out.backward()
    network.zero_grad(set_to_none=True)
    return time.process_time() - start


def main() -> None:
    parser = get_args_parser(__doc__, rounds=5)
    parser.set_defaults(threads=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name, (make, sizes) in NETWORKS.items():
        network, views = make().train(), [torch.randn(n, 3, side, side) for n, side in sizes]
        last = [channels_last(view) for view in views]
        for bf16 in (False, True)[: 1 + fast_bf16(torch.device("cpu"))]:
            ratios = []
            for turn in range(1 + args.rounds):
                contiguous, ours = seconds(network, views, bf16), seconds(network, last, bf16)
                if turn:
                    ratios.append(contiguous / ours)
            row = {"network": name, "dtype": "bfloat16" if bf16 else "float32", "times_as_fast": spread(ratios)}
            print(f"{name:24}{row['dtype']:10}{as_text(row['times_as_fast'])} times as fast channels-last", flush=True)
            rows.append(row)
    finish(args, {"rows": rows}, packages=(torch, torchvision, timm))


if __name__ == "__main__":
    main()
