"""Contriever beside sentence-transformers: tokens per second of training and of embedding, with equal vectors.

    python tests/benchmarks/bench_contriever.py [--rounds 5] [--texts 512] [--batch_size 16] [--out FILE]
    python tests/benchmarks/bench_contriever.py --model FOLDER            # another encoder

Implementations, alternated in one process on the same encoder (by default the packaged one) and the same texts
(documentation of packages):

- ``train/ours``: a step of in-batch training as ``train.py`` does it;
- ``train/sentence_transformers``: the same pairs and optimiser with MultipleNegativesRankingLoss;
- ``train/moco``: our step with a queue of 4,096 keys, whose key encoder has no backward pass;
- ``embed/ours``: ``Retriever.encode``, float32;
- ``embed/ours_bf16``: the same in bfloat16, where the device is fast in it;
- ``embed/sentence_transformers``: ``SentenceTransformer.encode`` with the same batch size.

Tokens are those of the texts, padding is not counted. Without the package sentence-transformers its ways are left out.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import MultipleNegativesRankingLoss
except ModuleNotFoundError:  # not one of the project's packages: pip install sentence-transformers
    SentenceTransformer = None

from contriever.augmentations import Recipe, SpecialTokens
from contriever.encoder import Retriever, find_model, load_retriever
from contriever.losses import InBatch, MoCo, inbatch_logits, moco_logits
from contriever.text.documentation import documentation
from contriever.text.tokens import ChunkedText, Shard
from contriever.training.pairs import PretrainingPairs
from shared.optimisation.precision import fast_bf16

TEMPERATURE = 0.05


def pairs_of(retriever: Retriever, texts: list[str]) -> PretrainingPairs:
    """Crops of the texts, as training draws them."""
    ids = retriever.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = np.concatenate([np.array(document, dtype=np.int32) for document in ids])
    dataset = ChunkedText([Shard(Path("documentation"), tokens, None)], 256)
    recipe = Recipe(0.1, 0.5, "delete", 0.1)
    return PretrainingPairs({"documentation": dataset}, recipe, SpecialTokens.of(retriever.tokenizer), 0.0, 0, seed=0)


def adamw(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)


def inbatch_step(retriever: Retriever) -> Callable[[dict], None]:
    model = InBatch(retriever.model).train()
    optimizer = adamw(model)

    def step(batch: dict) -> None:
        optimizer.zero_grad(set_to_none=True)
        q, k = model(batch["q_tokens"], batch["q_mask"], batch["k_tokens"], batch["k_mask"], True, True)
        F.cross_entropy(*inbatch_logits(q, k, TEMPERATURE, 0, 1)).backward()
        optimizer.step()

    return step


def moco_step(retriever: Retriever) -> Callable[[dict], None]:
    model = MoCo(retriever.model, 4096).to(retriever.device)
    model.train()
    optimizer = adamw(model)

    def step(batch: dict) -> None:
        optimizer.zero_grad(set_to_none=True)
        model.update_key_encoder()
        q = model.encoder_q(batch["q_tokens"], batch["q_mask"], normalize=True)
        with torch.no_grad():
            k = model.encoder_k(batch["k_tokens"], batch["k_mask"], normalize=True)
        F.cross_entropy(*moco_logits(q, k, model.queue, TEMPERATURE)).backward()
        optimizer.step()
        model.enqueue(k)

    return step


def sentence_transformers_step(model_folder: str | None, device: torch.device) -> Callable[[dict], None]:
    model = SentenceTransformer(str(find_model(model_folder)), device=str(device))
    loss = MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE).train()
    optimizer = adamw(model)

    def step(batch: dict) -> None:
        optimizer.zero_grad(set_to_none=True)
        features = [
            {"input_ids": batch[f"{side}_tokens"], "attention_mask": batch[f"{side}_mask"].long()} for side in "qk"
        ]
        loss(features, None).backward()
        optimizer.step()

    return step


def take_turns(ways: dict[str, Callable[[], int]], rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Tokens per second of each way: median, least and most over the rounds; a first round is not counted."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            tokens = way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                speeds[name].append(tokens / (time.perf_counter() - start))
    return {n: {"tokens_per_s": statistics.median(s), "least": min(s), "most": max(s)} for n, s in speeds.items()}


def training(texts: list[str], batch_size: int, rounds: int, model_folder: str | None, device: torch.device) -> dict:
    """One step per round; every way gets the same batches, which are made before."""
    pairs = pairs_of(load_retriever(model_folder), texts)
    numbers = [[(0, r * batch_size + i) for i in range(batch_size)] for r in range(rounds + 1)]
    batches = [{name: value.to(device) for name, value in pairs.__getitems__(keys).items()} for keys in numbers]
    steps = {
        "train/ours": inbatch_step(load_retriever(model_folder, device=device)),
        "train/moco": moco_step(load_retriever(model_folder, device=device)),
    }
    if SentenceTransformer is not None:
        steps["train/sentence_transformers"] = sentence_transformers_step(model_folder, device)
    counts = [int(batch["q_mask"].sum() + batch["k_mask"].sum()) for batch in batches]

    def way(step: Callable[[dict], None]) -> Callable[[], int]:
        mine = iter(zip(batches, counts, strict=True))

        def run() -> int:
            batch, tokens = next(mine)
            step(batch)
            return tokens

        return run

    return take_turns({name: way(step) for name, step in steps.items()}, rounds, device)


def embedding(texts: list[str], batch_size: int, rounds: int, model_folder: str | None, device: torch.device) -> dict:
    """All texts per round."""
    retriever = load_retriever(model_folder, device=device)
    tokens = sum(map(len, retriever.tokenize(texts, 256)))
    vectors: dict[str, np.ndarray] = {}

    def ours(name: str, amp: str) -> Callable[[], int]:
        def run() -> int:
            vectors[name] = retriever.encode(texts, batch_size, 256, normalize=True, amp=amp)
            return tokens

        return run

    ways = {"embed/ours": ours("embed/ours", "fp32")}
    if fast_bf16(device):
        ways["embed/ours_bf16"] = ours("embed/ours_bf16", "bf16")
    if SentenceTransformer is None:
        return take_turns(ways, rounds, device)
    other = SentenceTransformer(str(find_model(model_folder)), device=str(device))
    other.max_seq_length = 256

    def theirs() -> int:
        vectors["embed/sentence_transformers"] = other.encode(texts, batch_size=batch_size, show_progress_bar=False)
        return tokens

    results = take_turns({**ways, "embed/sentence_transformers": theirs}, rounds, device)
    reference = F.normalize(torch.from_numpy(vectors["embed/sentence_transformers"]), dim=1).numpy()
    for name, found in vectors.items():
        results[name]["largest_cosine_distance"] = float((1 - (found * reference).sum(axis=1)).max())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--model", default=None, help="folder of an encoder; default: the packaged one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    device = torch.device(args.device)
    texts = [document["text"] for document in documentation()][: args.texts]
    results = training(texts, args.batch_size, args.rounds, args.model, device)
    results |= embedding(texts, args.batch_size, args.rounds, args.model, device)
    for group in ("train", "embed"):
        base = results.get(f"{group}/sentence_transformers")
        for name in (name for name in results if name.startswith(group)):
            if base is not None:
                results[name]["ratio"] = results[name]["tokens_per_s"] / base["tokens_per_s"]
            print(f"{name:32s}" + "  ".join(f"{key} {value:.4g}" for key, value in results[name].items()))
    if args.out is not None:
        facts = {"torch": torch.__version__, "processor": platform.processor(), "threads": torch.get_num_threads()}
        args.out.write_text(json.dumps({**facts, "device": str(device), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
