"""A training step of the parts that ``--compile`` compiles in Contriever, DeeperCluster, NaViT, SEER and ViT-22B.

    python tests/benchmarks/bench_compile.py --threads 1 [--networks seer] [--out FILE.json]

As they stand and compiled, alternated in one process; texts and packed images come in batches of two lengths. Beside
the times the difference of the gradients is told, over their largest value. Compiling takes minutes first.
"""

import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from torch import Tensor, nn
from transformers import BertConfig

import shared.run.passive_threads  # noqa: F401
from contriever.encoder import build_encoder
from deepercluster.vgg16 import VGG16
from navit.native_resolution_vit import SIZES as NAVIT_SIZES
from navit.native_resolution_vit import NaViT, Packed
from seer.regnet import RegNet
from shared.networks.compiling import compile_network
from tests.benchmarks.bench_seer import NETWORKS as REGNETS
from tests.benchmarks.harness import alternate, compare, finish, get_args_parser
from vit22b.hub import build as build_scaled_vit


def contriever() -> tuple[nn.Module, list, Callable]:
    """BERT of 6 blocks of 384 channels; 16 texts of up to 64 and of up to 48 tokens."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    texts = []
    for longest in (64, 48):
        mask = torch.arange(longest) < torch.randint(longest // 4, longest + 1, (16, 1))
        texts.append((torch.randint(5, 30_000, mask.shape), mask))
    network = build_encoder(BertConfig(**sizes, **dropout))
    return network, texts, lambda network: compile_network(network, "vectors", dynamic=True)


def deepercluster() -> tuple[nn.Module, list, Callable]:
    """VGG16; 4 images of 96 pixels."""
    network = VGG16(sobel=True, img_size=96)
    network.body.classifier[2].p = 0.0  # dropout, drawn otherwise
    return network, [(torch.randn(4, 3, 96, 96),)], compile_network


def navit() -> tuple[nn.Module, list, Callable]:
    """navit_ti; 16 images of 64 to 144 pixels a side, and 16 others."""
    batches = [[torch.randn(3, *(16 * torch.randint(4, 10, (2,)))) for _ in range(16)] for _ in range(2)]

    def compile_parts(network: nn.Module) -> None:
        for block in network.blocks:
            compile_network(block.attn, "heads", dynamic=True)
            compile_network(block.mlp, dynamic=True)

    return NaViT(*NAVIT_SIZES["ti"]), [(Packed.whole(images, 16),) for images in batches], compile_parts


def seer() -> tuple[nn.Module, list, Callable]:
    """RegNetY-400MF; 8 images of 128 pixels."""

    def compile_parts(network: nn.Module) -> None:
        for block in network.blocks():
            compile_network(block, "compute")

    return RegNet(REGNETS["400MF"][0]), [(torch.randn(8, 3, 128, 128),)], compile_parts


def vit22b() -> tuple[nn.Module, list, Callable]:
    """vit_s without a classifier; 2 images of 224 pixels."""

    def compile_parts(network: nn.Module) -> None:
        for block in network.blocks:
            compile_network(block)

    return build_scaled_vit("vit_s", 3, patch_size=14, img_size=224), [(torch.randn(2, 3, 224, 224),)], compile_parts


CASES = {case.__name__: case for case in (contriever, deepercluster, navit, seer, vit22b)}


def step(network: nn.Module, batches: list, dtype: str) -> list[Tensor]:
    """The gradients of all batches together."""
    network.zero_grad(set_to_none=True)
    for inputs in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            vectors = network(*inputs).float()
        (vectors * torch.linspace(-1, 1, vectors.shape[1])).sin().mean().backward()
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def main() -> None:
    parser = get_args_parser(__doc__, rounds=7)
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=tuple(CASES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for name in args.networks:
        torch.manual_seed(0)
        network, batches, compile_parts = CASES[name]()
        network.train()
        compiled = copy.deepcopy(network)
        compile_parts(compiled)
        for dtype in args.dtypes:
            start = time.perf_counter()
            found = step(compiled, batches, dtype)
            seconds = time.perf_counter() - start
            expected = step(network, batches, dtype)
            largest = max(gradient.abs().max() for gradient in expected)
            error = max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) / largest
            print(f"\n{name}, {dtype}: first step {seconds:.0f} s, gradients differ by {error:.1e}", flush=True)
            ways = {
                "eager": partial(step, network, batches, dtype),
                "compiled": partial(step, compiled, batches, dtype),
            }
            times = compare(alternate(ways, args.rounds), "eager")
            results[f"{name}, {dtype}"] = {"first_step_s": seconds, "error": float(error), "times": times}
    finish(args, {"results": results})


if __name__ == "__main__":
    main()
