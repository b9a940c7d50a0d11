"""Contriever's training against the golden vectors: encoder, losses, views, data, schedules, fine-tuning.

Where the reference has a bug the file holds both results, or the bug is reproduced here to show that it is the whole
difference. Passages, index and metrics: ``test_contriever_search.py``.
"""

import argparse
import json
import random
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BertModel

from contriever import augmentations, finetuning, train
from contriever.augmentations import Draws, Recipe, SpecialTokens, add_bos_eos, augment, crop, two_views
from contriever.encoder import load_retriever
from contriever.losses import InBatch, MoCo, batch_statistics, inbatch_logits
from contriever.text.tokens import ChunkedText, Job, Shard, files_of_rank, tokenize_lines
from contriever.training.evaluation import Evaluation, accuracy_and_mrr
from contriever.training.optimisation import SCHEDULES, Objective, build_optimizer
from contriever.training.pairs import PretrainingPairs, collate, sampling_probabilities
from contriever.training.questions import FineTuningPairs, read_examples
from shared.networks.weights import safe_load
from tests.contriever.tiny import tiny_retriever
from tests.golden.golden_file import GoldenFile
from tests.loop_run import LoopRun

golden = GoldenFile("contriever")
SEARCH = ("has_answer", "tokenize", "calculate_matches", "normalize/", "passages/", "ir/", "beir/")
PROCESSES = ("dist_ib/", "dist_moco/")  # tests/contriever/test_train.py compares two processes with one
INPUTS = ("q_ids", "q_mask", "k_ids", "k_mask")
BATCH = ("q_tokens", "q_mask", "k_tokens", "k_mask")
CHUNK, RATIOS, BOS, EOS = 64, (0.1, 0.5), 2, 3  # of the data-set arrays


def cases(pattern: str) -> list[str]:
    return list(dict.fromkeys(match[0] for key in golden.arrays if (match := re.match(pattern, key))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@cache
def architecture() -> tuple[list[str], dict]:
    return golden["vocab"].tolist(), golden.json("config")


@pytest.fixture
def retriever(folder):
    """The golden encoder."""
    vocabulary, config = architecture()
    retriever = tiny_retriever(folder, vocabulary, config)
    retriever.model.load_state_dict(golden.state_dict("sd/"))
    return retriever


@pytest.fixture
def encoder(retriever):
    return retriever.model


@cache
def special_tokens() -> SpecialTokens:
    vocabulary, _ = architecture()
    mask = vocabulary.index("[MASK]")
    return SpecialTokens(BOS, EOS, mask, mask + 1, len(vocabulary))


def crops_of(ratio_min: float, ratio_max: float) -> Recipe:
    return Recipe(ratio_min, ratio_max, "none", 0.0)


def seeded(seed: int) -> Draws:
    return Draws(random.Random(seed), np.random.RandomState(seed))


# --- Encoder ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["average", "cls"])
def test_vectors(encoder, pooling):
    ids, mask = golden.tensor("emb/ids"), golden.tensor("emb/mask")
    encoder.config.pooling = pooling
    with torch.no_grad():
        for name, normalize in ((pooling, False), (f"{pooling}_norm", True)):
            torch.testing.assert_close(
                encoder(ids, mask, normalize=normalize), golden.tensor(f"emb/{name}"), atol=1e-5, rtol=1e-5
            )


def test_states_and_segments(encoder):
    ids, mask = golden.tensor("emb/ids"), golden.tensor("emb/mask")
    with torch.no_grad():
        hidden = BertModel.forward(encoder, input_ids=ids, attention_mask=mask).last_hidden_state
        # what stands at padded places is never used and differs between kernels
        torch.testing.assert_close(hidden[mask], golden.tensor("emb/last_hidden")[mask], atol=1e-5, rtol=1e-5)
        segments = encoder(ids, mask, token_type_ids=golden.tensor("emb/token_type_ids"))
    torch.testing.assert_close(segments, golden.tensor("emb/average_tt"), atol=1e-5, rtol=1e-5)


# --- Losses and steps -------------------------------------------------------------------------------------------------


class RecordingRun(LoopRun):
    """Also keeps the gradients and the queue after each step."""

    def __init__(self, folder: Path, model: MoCo, steps: int):
        super().__init__(folder, steps, model=model)
        self.model, self.recorded = model, []

    def end_step(self, images, averages, health=None):
        super().end_step(images, averages, health)
        grads = {name: p.grad.clone() for name, p in self.model.encoder_q.named_parameters()}
        queue, ptr = self.model.queue.clone(), int(self.model.queue_ptr)
        self.recorded.append({**averages, **health, "grads": grads, "queue": queue, "ptr": ptr})


@pytest.mark.parametrize("case", cases(r"moco[A-Z]\b"))
def test_steps_of_moco(case, retriever, encoder, tmp_path):
    args = argparse.Namespace(**vars(train.get_args_parser().parse_args([])) | golden.json(f"{case}/opt"))
    encoder.config.pooling = args.pooling
    model = MoCo(encoder, args.queue_size, args.momentum)
    model.queue.copy_(golden.tensor(f"{case}/queue0"))
    batches, vectors = [], {"q": [], "k": []}
    while f"{case}/q_ids{len(batches)}" in golden:
        arrays = (golden.tensor(f"{case}/{name}{len(batches)}") for name in INPUTS)
        batches.append(dict(zip(BATCH, arrays, strict=True)))
    for side, network in (("q", model.encoder_q), ("k", model.encoder_k)):
        network.register_forward_hook(lambda *call, side=side: vectors[side].append(call[-1].detach().clone()))
    run = RecordingRun(tmp_path, model, len(batches))
    run.args.save_freq, run.path = 0, tmp_path / "checkpoint.pth"
    optimizer, objective = build_optimizer(model, args), Objective(args)
    train.train_one_epoch(model, model.encoder_q, batches, optimizer, objective, Evaluation(args, retriever), run)
    for name in ("loss", "accuracy", "stdq", "stdk", "lr", "ptr"):
        values = np.array([torch.as_tensor(step[name]).item() for step in run.recorded])
        np.testing.assert_allclose(values, golden[f"{case}/{name}"], rtol=1e-5, atol=1e-5, err_msg=name)
    for i, step in enumerate(run.recorded):
        torch.testing.assert_close(step["queue"], golden.tensor(f"{case}/queue_after{i}"), atol=1e-5, rtol=1e-5)
        for side in ("q", "k"):
            torch.testing.assert_close(vectors[side][i], golden.tensor(f"{case}/{side}_emb{i}"), atol=2e-5, rtol=2e-5)
    grads = run.recorded[0]["grads"]
    for name, expected in golden.state_dict(f"{case}/grad0/").items():
        torch.testing.assert_close(grads[name], expected, atol=1e-5, rtol=1e-5)
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm().item()
    assert norm == pytest.approx(golden.scalar(f"{case}/gradnorm0"), rel=1e-5)
    state = model.state_dict()
    for name, expected in golden.state_dict(f"{case}/final/").items():
        torch.testing.assert_close(state[name.replace("/", ".")], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", cases(r"ib[A-Z]\b"))
def test_inbatch_loss(case, encoder):
    options = golden.json(f"{case}/opt")
    encoder.config.pooling = options.get("pooling", "average")
    inputs = [golden.tensor(f"{case}/{name}") for name in INPUTS]
    q, k = InBatch(encoder)(*inputs, options.get("norm_query", False), options.get("norm_doc", False))
    logits, labels = inbatch_logits(q, k, options["temperature"], rank=0, world_size=1)
    loss = F.cross_entropy(logits, labels, label_smoothing=options.get("label_smoothing", 0.0))
    loss.backward()
    assert loss.item() == pytest.approx(golden.scalar(f"{case}/loss"), abs=1e-4)
    for name, value in batch_statistics(logits, labels, q, k).items():
        assert value.item() == pytest.approx(golden.scalar(f"{case}/{name}"), rel=1e-4), name
    for name, expected in golden.state_dict(f"{case}/grad/").items():
        grad = encoder.get_parameter(name).grad
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def test_names_of_the_weights(encoder):
    keys = golden.json("moco/state_dict_keys")
    assert sorted(MoCo(encoder, 4).state_dict()) == sorted(keys)
    assert sorted(InBatch(encoder).state_dict()) == sorted(golden.json("inbatch/state_dict_keys"))


@pytest.mark.parametrize("layout", [key[15:-15] for key in golden.keys("load_retriever/")])
def test_every_layout_is_restored_completely(layout, retriever, folder, tmp_path):
    """The reference restores a fraction of the tensors of the last two, and says nothing."""
    assert 0 <= golden.json(f"load_retriever/{layout}_fraction_equal") <= 1
    encoder = retriever.model
    states = {
        "moco": MoCo(encoder, 4).state_dict(),
        "inbatch": InBatch(encoder).state_dict(),
        "finetuned": encoder.state_dict(),
    }
    options = argparse.Namespace(retriever_model_id=str(folder), pooling="cls")
    torch.save({"step": 1, "model": states[layout], "opt": options}, tmp_path / "checkpoint.pth")
    restored = load_retriever(tmp_path).model
    assert restored.config.pooling == "cls"
    for name, expected in golden.state_dict("sd/").items():
        assert torch.equal(restored.state_dict()[name], expected), name


def test_layout_of_a_run(folder, retriever, tmp_path):
    tree = golden.json("checkpoint/tree")
    last = max(int(name.removeprefix("step-")) for name in tree if name.startswith("step-"))
    data = tmp_path / "data"
    data.mkdir()
    ids = torch.randint(5, len(architecture()[0]), (400,), generator=torch.Generator().manual_seed(0))
    torch.save(ids.to(getattr(torch, golden.json("prep/dtype0").removeprefix("torch."))), data / "text.pkl")
    retriever.save(tmp_path / "encoder")
    arguments = (
        f"--train_data {data} --retriever_model_id {tmp_path / 'encoder'} --output_dir {tmp_path / 'run'} "
        f"--total_steps {last} --save_freq {last} --per_gpu_batch_size 2 --queue_size 4 --chunk_length 16 "
        "--num_workers 0 --device cpu --amp fp32 --log_freq 1"
    )
    train.train_contriever(train.parse_args(arguments.split()))
    assert sorted(path.name for path in (tmp_path / "run/checkpoint").iterdir()) == sorted(tree)
    file = tmp_path / f"run/checkpoint/step-{last}/checkpoint.pth"
    assert golden.json("checkpoint/weights_only_default_loads") is False  # a Namespace; ours holds plain values
    checkpoint = torch.load(file, weights_only=True)
    assert set(golden.json("checkpoint/keys")) <= checkpoint.keys()
    parsers = (train.get_args_parser(), finetuning.get_args_parser())
    assert set(golden.json("checkpoint/opt_keys")) <= {action.dest for p in parsers for action in p._actions}
    assert safe_load(tmp_path / "run/checkpoint/latest/checkpoint.pth")["step"] == last


# --- Views ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases(r"crop\d+"))
def test_crops(case):
    length, ratio_min, ratio_max, count, seed = golden[f"{case}/args"]
    draws = seeded(int(seed))
    crops = [crop(np.arange(int(length)), crops_of(ratio_min, ratio_max), draws) for _ in range(int(count))]
    found = [(view[0] if len(view) else -1, len(view)) for view in crops]
    np.testing.assert_array_equal(found, golden[f"{case}/start_len"])


def test_many_crops():
    draws = seeded(151)
    histogram, starts = golden["cropstat/len_hist"], golden["cropstat/start_hist16"]
    crops = [crop(np.arange(256), crops_of(*RATIOS), draws) for _ in range(histogram.sum())]
    np.testing.assert_array_equal(np.bincount([len(view) for view in crops], minlength=len(histogram)), histogram)
    np.testing.assert_array_equal(np.bincount([view[0] // 16 for view in crops], minlength=len(starts)), starts)


def shuffle_of_the_reference(tokens: np.ndarray, p: float, draws: Draws, special=None) -> np.ndarray:
    """Writes the tokens one by one to where they go, and reads some that it has overwritten already."""
    places = draws.py.sample(range(len(tokens)), int((draws.np.rand(len(tokens)) < p).sum()))
    sources = list(places)
    draws.py.shuffle(sources)
    tokens = tokens.copy()
    for place, source in zip(places, sources, strict=True):
        tokens[place] = tokens[source]
    return tokens


@pytest.mark.parametrize("case", [key[4:] for key in golden.keys("aug/") if re.search(r"_p[\d.]+$", key)])
def test_augmentations(case):
    name, p = re.fullmatch(r"(.*)_p([\d.]+)", case).groups()
    source, expected, draws = golden["aug/src"].astype(np.int64), golden[f"aug/{case}"], seeded(160)
    if f"aug/{case}_dtype" in golden:
        assert str(expected.dtype) == golden.json(f"aug/{case}_dtype").removeprefix("torch.")
    if name == "shuffle":
        np.testing.assert_array_equal(shuffle_of_the_reference(source, float(p), draws), expected)
        return
    tokens = augment(source, name.removesuffix("_list"), float(p), draws, special_tokens())
    np.testing.assert_array_equal(tokens, expected)
    if name == "shuffle_list":
        assert sorted(tokens) == sorted(source)


def test_deletion_keeps_as_many_tokens():
    draws, expected = seeded(161), golden["aug/delete_kept_of1000_x50"]
    kept = [len(augment(np.arange(1000), "delete", 0.1, draws, special_tokens())) for _ in expected]
    np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize("case", [key[7:] for key in golden.keys("boseos/")])
def test_special_tokens_around_a_view(case):
    bos, eos = (None if part == "None" else int(part) for part in case.split("_"))
    np.testing.assert_array_equal(add_bos_eos(np.array([7, 8, 9]), bos, eos), golden[f"boseos/{case}"])


# --- Text -------------------------------------------------------------------------------------------------------------


def chunked(tokens: np.ndarray) -> ChunkedText:
    return ChunkedText([Shard(Path("data/text.pkl"), tokens, None)], CHUNK)


@pytest.mark.parametrize("case", [name for name in golden.cases("ds/") if not name.startswith("data")])
def test_pairs_of_one_data_set(case, monkeypatch):
    if case == "shuffle":
        monkeypatch.setattr(augmentations, "shuffle", shuffle_of_the_reference)
    recipe = Recipe(*RATIOS, case, {"none": 0.0, "delete": 0.1, "shuffle": 0.2}[case])
    draws, text = seeded(171), chunked(golden["ds/data1"])
    offset = text.draw_offset(draws.py)
    assert offset == golden.scalar(f"ds/{case}/offset")
    assert text.num_chunks(offset) == golden.scalar(f"ds/{case}/len")
    pairs = []
    for key in golden.keys(f"ds/{case}/q"):
        number = int(key.rpartition("/q")[2])
        views = two_views(text.chunk(number, offset), recipe, draws, special_tokens())
        for side, view in zip("qk", views, strict=True):
            np.testing.assert_array_equal(view, golden[f"ds/{case}/{side}{number}"])
        assert [f"torch.{view.dtype}" for view in views] == golden.json(f"ds/{case}/dtype{number}")
        pairs.append(views)
    batch = collate(*zip(*pairs, strict=True), pad_id=0)
    for name in BATCH:
        np.testing.assert_array_equal(batch[name].numpy(), golden[f"ds/{case}/coll_{name}"])
    for name, dtype in golden.json(f"ds/{case}/coll_dtypes").items():
        assert str(batch[name].dtype) == dtype


def test_pairs_of_several_data_sets():
    datasets = {"x": chunked(golden["ds/data1"]), "y": chunked(golden["ds/data2"])}
    draws = seeded(172)
    offsets = [text.draw_offset(draws.py) for text in datasets.values()]
    sizes = [text.num_chunks(offset) for text, offset in zip(datasets.values(), offsets, strict=True)]
    assert sizes == golden["md/lens"].tolist() and sum(sizes) == golden.scalar("md/len")
    for key in golden.keys("md/prob_"):
        np.testing.assert_allclose(sampling_probabilities(sizes, float(key[8:])), golden[key], rtol=1e-12)
    pairs = PretrainingPairs(datasets, Recipe(*RATIOS, "none", 0.0), special_tokens(), 0.5, 0, seed=0)
    pairs.probabilities = sampling_probabilities(sizes, 0.5)  # the reference counts after the first offset, we before
    drawn = [pairs.draw_pair(offsets, draws) for _ in golden.json("md/ids")]
    assert [pairs.names[which] for which, _, _ in drawn] == golden.json("md/ids")
    for number, (_, q, k) in enumerate(drawn):
        if f"md/q{number}" in golden:
            np.testing.assert_array_equal(q, golden[f"md/q{number}"])
            np.testing.assert_array_equal(k, golden[f"md/k{number}"])


def test_files_of_each_process():
    for where, expected in golden.json("shard/split_5_files").items():
        world_size, rank = map(int, where.split("/"))
        files = list(range(max(i for group in golden.json("shard/split_5_files").values() for i in group or [0]) + 1))
        assert files_of_rank(files, "split", rank, world_size) == (expected or [])
    per_file = len(golden.json("shard/single"))
    for mode in ("single", "full"):
        shards = [Shard(Path("data/text.pkl"), np.full(per_file, i), None) for i in files_of_rank(files, mode, 0, 1)]
        text = ChunkedText(shards, 1)
        assert text.read(0, text.num_tokens).tolist() == golden.json(f"shard/{mode}")


def test_tokenised_text(retriever, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(golden.json("prep/text"), encoding="utf-8")
    for normalized, name in ((False, "tokens"), (True, "tokens_norm")):
        job = Job.of(file, tmp_path, normalize_text=normalized)
        tokens, borders = tokenize_lines(job, retriever.tokenizer)
        np.testing.assert_array_equal(tokens, golden[f"prep/{name}"])
        assert len(borders) - 1 == len(golden.json("prep/text").splitlines())  # what the reference does not keep
        assert golden.json(f"prep/dtype{int(normalized)}") == "torch.int32" and tokens.max() < 2**31


@pytest.mark.parametrize("case", [key[6:-5] for key in golden.keys("sched/") if key.endswith("_args")])
def test_schedules(case):
    warmup, total, min_ratio = golden[f"sched/{case}_args"]
    schedule = SCHEDULES["cosine" if case.startswith("cos") else "linear"]
    expected = golden[f"sched/{case}"]
    values = [schedule(step, int(warmup), int(total), min_ratio) for step in range(len(expected))]
    np.testing.assert_allclose(values, expected, atol=1e-9)


# --- Fine-tuning ------------------------------------------------------------------------------------------------------


def fine_tuning_pairs(retriever, **options) -> FineTuningPairs:
    """The reference normalises texts whatever its flag says."""
    names = {"negative_ctxs": "negatives", "negative_hard_ratio": "hard_ratio", "negative_hard_min_idx": "hard_min_idx"}
    options = {names[name]: value for name, value in options.items()}
    return FineTuningPairs(golden.json("ft/data"), retriever, 10, normalize_text=True, **options)


@pytest.mark.parametrize("case", cases(r"ft/[a-z]$"))
def test_draws_of_fine_tuning(case, retriever):
    options, expected = golden.json(case)["kw"], golden.json(case)["out"]
    pairs, draws = fine_tuning_pairs(retriever, **options), seeded(180)
    assert [pairs.draw(example, draws) for example in pairs.examples[: len(expected)]] == expected


def test_items_of_the_evaluation(retriever):
    expected = golden.json("ft/eval_items")
    pairs = fine_tuning_pairs(retriever)
    assert [pairs.evaluation_item(i) for i in range(len(expected))] == expected


def write_records(path):
    path.write_text("".join(json.dumps(record) + "\n" for record in golden.json("ft/data")))
    return [path]


def test_records_of_each_process(tmp_path):
    files = write_records(tmp_path / "records.jsonl")
    for where, expected in golden.json("ft/rank_shards").items():
        world_size, rank = map(int, where.split("/"))
        assert [r["question"] for r in read_examples(files, None, rank, world_size)] == expected
    for where, expected in golden.json("ft/maxload").items():
        maxload, world_size, rank = map(int, where.split("/"))
        count = len(read_examples(files, maxload, rank, world_size))
        assert count == sum(number % world_size == rank for number in range(1, maxload + 1))
        # the reference looks at the limit on records of this process only, and reads on if the last one is another's
        owns_the_last = maxload % world_size == rank
        assert expected == (count if owns_the_last else len(read_examples(files, None, rank, world_size)))


def test_batch_of_fine_tuning(retriever):
    questions = len(golden["ft/coll_q_tokens"])
    negatives = len(golden["ft/coll_n_tokens"]) // questions
    pairs = fine_tuning_pairs(retriever, negative_ctxs=negatives, negative_hard_ratio=1.0)
    draws = seeded(180)
    tokens = pairs.tokenize([pairs.draw(example, draws) for example in pairs.examples[:questions]])
    batch = collate(*tokens, retriever.tokenizer.pad_token_id)
    for name in BATCH:
        np.testing.assert_array_equal(batch[name].numpy(), golden[f"ft/coll_{name}"])
    for part in ("tokens", "mask"):
        both = np.concatenate([golden[f"ft/coll_g_{part}"], golden[f"ft/coll_n_{part}"]])
        np.testing.assert_array_equal(batch[f"k_{part}"].numpy(), both)


def test_accuracy_of_held_out_questions(retriever):
    expected = golden.json("ft/evaluate")
    assert accuracy_and_mrr(retriever.model, fine_tuning_pairs(retriever), False, False, 4) == pytest.approx(
        expected, abs=1e-6
    )


def test_every_array_was_compared():
    unread = [key for key in golden.unread() if not key.startswith((*SEARCH, *PROCESSES))]
    assert not unread, unread
