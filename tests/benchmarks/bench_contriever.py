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

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import torch
import torch.nn.functional as F

import shared.run.passive_threads  # noqa: F401

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
from tests.benchmarks.harness import alternate, finish, get_args_parser, spread

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


def speeds(ways: dict[str, Callable[[], object]], rounds: int, tokens: list[int]) -> dict[str, dict[str, float]]:
    """Tokens per second of each way, which handles so many in each round; the first round is not counted."""
    times = alternate(ways, rounds)
    return {
        name: {"tokens_per_s": spread(count / s for count, s in zip(tokens[1:], seconds, strict=True))}
        for name, seconds in times.items()
    }


def synchronized(work: Callable[[], object]) -> Callable[[], None]:
    """``work``, finished on the device when it returns."""

    def run() -> None:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


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
    ways = {}
    for name, step in steps.items():
        mine = iter(batches)
        ways[name] = synchronized(lambda step=step, mine=mine: step(next(mine)))
    return speeds(ways, rounds, [int(batch["q_mask"].sum() + batch["k_mask"].sum()) for batch in batches])


def embedding(texts: list[str], batch_size: int, rounds: int, model_folder: str | None, device: torch.device) -> dict:
    """All texts per round."""
    retriever = load_retriever(model_folder, device=device)
    ways = {"embed/ours": lambda: retriever.encode(texts, batch_size, 256, normalize=True, amp="fp32")}
    if fast_bf16(device):
        ways["embed/ours_bf16"] = lambda: retriever.encode(texts, batch_size, 256, normalize=True, amp="bf16")
    if SentenceTransformer is not None:
        other = SentenceTransformer(str(find_model(model_folder)), device=str(device))
        other.max_seq_length = 256
        ways["embed/sentence_transformers"] = lambda: other.encode(
            texts, batch_size=batch_size, show_progress_bar=False, normalize_embeddings=True
        )
    tokens = sum(map(len, retriever.tokenize(texts, 256)))
    results = speeds({name: synchronized(way) for name, way in ways.items()}, rounds, [tokens] * (rounds + 1))
    if SentenceTransformer is not None:
        vectors = {name: way() for name, way in ways.items()}
        for name, found in vectors.items():
            cosines = (found * vectors["embed/sentence_transformers"]).sum(axis=1)
            results[name]["largest_cosine_distance"] = float((1 - cosines).max())
    return results


def main() -> None:
    parser = get_args_parser(__doc__, rounds=5)
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--model", default=None, help="folder of an encoder; default: the packaged one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    texts = [document["text"] for document in documentation()][: args.texts]
    results = training(texts, args.batch_size, args.rounds, args.model, device)
    results |= embedding(texts, args.batch_size, args.rounds, args.model, device)
    for name, result in results.items():
        base = results.get(f"{name.partition('/')[0]}/sentence_transformers", result)
        result["ratio"] = result["tokens_per_s"]["median"] / base["tokens_per_s"]["median"]
        speed = "{median:.4g} ({min:.4g} .. {max:.4g}) tokens/s".format(**result["tokens_per_s"])
        print(f"{name:32s}{speed}, ratio {result['ratio']:.2f}  {result.get('largest_cosine_distance', '')}")
    finish(args, {"results": results})


if __name__ == "__main__":
    main()
