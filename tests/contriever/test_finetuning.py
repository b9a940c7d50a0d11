import json

import numpy as np
import pytest
import torch

from contriever import finetuning
from contriever.encoder import load_retriever
from contriever.index.bm25 import BM25
from contriever.mine_negatives import get_args_parser as mining_parser
from contriever.mine_negatives import mine
from contriever.training.evaluation import accuracy_and_mrr
from contriever.training.optimisation import SharpnessAware
from contriever.training.questions import FineTuningPairs, read_examples
from tests.contriever.tiny import tiny_retriever, write_jsonl
from tests.processes import run_processes
from tests.reliability.runs import assert_same_run
from tests.run_folders import lines, state_of, stopped_after

TINY = (
    "--per_gpu_batch_size 4 --total_steps 5 --lr 0.01 --temperature 0.5 --chunk_length 32 --negative_ctxs 2 "
    "--negative_hard_ratio 0.5 --num_workers 0 --device cpu --amp fp32 --log_freq 1 --eval_freq 2 --saveckp_steps 1"
).split()


def record(i: int) -> dict:
    return {
        "question": f"w{i} wing",
        "positive_ctxs": [{"title": "flow", "text": f"w{i} the"}, {"text": f"w{i} heat"}],
        "negative_ctxs": [{"text": f"w{(i + j) % 40} a"} for j in range(1, 4)],
        "hard_negative_ctxs": [{"text": f"w{(i + j) % 40} wing"} for j in range(1, 4)],
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetuning")
    tiny_retriever(folder / "encoder").save(folder / "encoder")
    write_jsonl(folder / "train.jsonl", *map(record, range(12)))
    (folder / "dev.json").write_text(json.dumps([record(i) for i in range(12, 18)]))
    return folder


def run(data, output_dir, *flags):
    places = ("--train_data", data / "train.jsonl", "--eval_data", data / "dev.json", "--model_path", data / "encoder")
    arguments = [*TINY, *map(str, places), "--output_dir", str(output_dir), *map(str, flags)]
    finetuning.finetune(finetuning.parse_args(arguments))
    return lines(output_dir)


@pytest.mark.parametrize("flags", [(), ("--optim", "asam", "--rho", 0.5)], ids=["adamw", "asam"])
def test_a_killed_run_ends_like_an_uninterrupted_one(flags, data, tmp_path):
    found = run(data, tmp_path / "whole", *flags)
    for updates in (2, 1):
        with stopped_after(updates):
            run(data, tmp_path / "run", *flags)
    run(data, tmp_path / "run", *flags)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    evaluations = [line for line in found if "mrr" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4, 5]  # before, during and after
    assert all(0 <= line["eval_acc"] <= 100 and 0 < line["mrr"] <= 1 for line in evaluations)


@pytest.mark.parametrize("adaptive", [False, True])
def test_sharpness_goes_uphill_as_far_as_it_may_and_comes_back(adaptive):
    w = torch.nn.Parameter(torch.tensor([3.0, -4.0, 0.0]))
    unused = torch.nn.Parameter(torch.ones(2))
    start = w.detach().clone()
    sharpness = SharpnessAware([w, unused], rho=0.1, adaptive=adaptive)
    (w @ torch.tensor([1.0, 2.0, 2.0])).backward()
    sharpness.ascend()
    step = w.detach() - start
    units = start.abs() + 0.01 if adaptive else torch.ones(3)
    assert (step / units).norm().item() == pytest.approx(0.1)
    assert (step * w.grad > 0).all()
    sharpness.descend()
    assert torch.equal(w.detach(), start)


def test_a_batch_larger_than_the_records_is_named(data, tmp_path):
    with pytest.raises(ValueError, match="--per_gpu_batch_size 13: there are 12 records per process"):
        run(data, tmp_path / "run", "--per_gpu_batch_size", 13)


def finetune_on_rank(rank: int, data, output_dir, *flags) -> None:
    run(data, output_dir, *flags)


def test_two_processes_train_on_half_of_the_records_each(data, tmp_path):
    run_processes(finetune_on_rank, 2, data, tmp_path / "run", "--per_gpu_batch_size", 2, "--total_steps", 4)
    state = state_of(tmp_path / "run")
    assert (state["step"], state["batch_size"], state["text"]) == (4, 4, 12)
    records = [record(i) if i % 2 else {"question": "a", "positive_ctxs": [{"text": "b"}]} for i in range(12)]
    write_jsonl(tmp_path / "uneven.jsonl", *records)
    with pytest.raises(Exception, match="the number of passages of a step"):
        run_processes(finetune_on_rank, 2, data, tmp_path / "bad", "--train_data", tmp_path / "uneven.jsonl")


BAD = {
    "no question": ('{"positive_ctxs": [{"text": "a"}]}\n', 'line 1: no "question"'),
    "no positive": ('{"question": "a"}\n', 'line 1: no passage under "positive_ctxs"'),
    "no text": ('{"question": "a", "positive_ctxs": [{"title": "b"}]}\n', 'positive_ctxs: no "text"'),
    "no list": ('{"question": "a", "positive_ctxs": [{"text": "b"}], "negative_ctxs": "c"}\n', "a list of passages"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_records_are_named_with_the_line(what, tmp_path):
    content, message = BAD[what]
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_examples([tmp_path / "train.jsonl"])


def test_the_same_example_has_other_negatives_in_every_epoch(data):
    retriever = load_retriever(data / "encoder")
    pairs = FineTuningPairs(read_examples([data / "train.jsonl"]), retriever, 32, negatives=2, hard_ratio=0.5)
    epochs = [pairs.__getitems__([(epoch, i) for i in range(12)])["k_tokens"] for epoch in range(2)]
    assert torch.equal(epochs[0], pairs.__getitems__([(0, i) for i in range(12)])["k_tokens"])
    assert epochs[0].shape != epochs[1].shape or not torch.equal(*epochs)


# --- Mining -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def passages(tmp_path):
    rows = ["id\ttext\ttitle", *(f"p{i}\tthe w{i} wing of the w{i} plate\tflow" for i in range(10))]
    rows.append("p10\theat of the jet\t")
    (tmp_path / "passages.tsv").write_text("\n".join(rows) + "\n")
    records = [
        {"question": f"w{i} wing", "positive_ctxs": [{"text": f"the w{i} wing of the w{i} plate"}]} for i in range(3)
    ]
    records[0] |= {"answers": ["w5"]}  # a passage that holds it is no negative
    write_jsonl(tmp_path / "questions.jsonl", *records)
    return tmp_path


def mined(folder, *flags) -> list[dict]:
    places = ["--data", folder / "questions.jsonl", "--passages", folder / "passages.tsv"]
    arguments = [*places, "--output_path", folder / "hard.jsonl", "--device", "cpu", *flags]
    mine(mining_parser().parse_args(list(map(str, arguments))))
    return read_examples([folder / "hard.jsonl"])


@pytest.mark.parametrize("method", ["bm25", "dense"])
def test_hard_negatives_are_the_best_passages_that_are_no_positives(method, passages):
    flags = [] if method == "bm25" else ["--method", "dense", "--norm"]
    records = mined(passages, *flags, "--hard_negatives", 4, "--random_negatives", 3)
    for i, found in enumerate(records):
        hard, plain = ([p["id"] for p in found[key]] for key in ("hard_negative_ctxs", "negative_ctxs"))
        assert f"p{i}" not in hard + plain and len(hard) == 4 and len(plain) == 3
        assert "p10" not in hard  # shares no word, and means something else
        assert not set(hard) & set(plain)
    assert "p5" not in str(records[0]["hard_negative_ctxs"])
    assert records == mined(passages, *flags, "--hard_negatives", 4, "--random_negatives", 3)


def test_the_best_may_be_left_out(passages):
    all_of_them = mined(passages, "--hard_negatives", 4)[1]["hard_negative_ctxs"]
    assert mined(passages, "--hard_negatives", 3, "--skip_top", 2)[1]["hard_negative_ctxs"] == all_of_them[1:4]


def score_all(method: str, questions: list[str], texts: list[str]) -> np.ndarray:
    if method == "bm25":
        return np.stack([BM25(texts).scores(question) for question in questions])
    vectors = [load_retriever().encode(group, normalize=True, amp="fp32") for group in (questions, texts)]
    return vectors[0] @ vectors[1].T


@pytest.mark.parametrize(("method", "margin", "relative"), [("bm25", 0.3, 0), ("bm25", 0, 0.6), ("dense", 0.02, 0.05)])
def test_hard_negatives_keep_their_distance_from_every_positive(method, margin, relative, tmp_path):
    texts = [" ".join(["heat"] * (i % 4) + ["wing"] * (i % 5) + [f"w{i} flow"]) for i in range(20)]
    write_jsonl(tmp_path / "passages.jsonl", *({"id": f"p{i}", "title": "jet", "text": t} for i, t in enumerate(texts)))
    groups = {"heat wing": [19, 7], "w3 flow": [3], "wing": [9]}
    records = [{"question": q, "positive_ctxs": [{"text": texts[i]} for i in of]} for q, of in groups.items()]
    records[2]["positive_ctxs"] = [{"id": "p9", "text": "written in another way"}]
    write_jsonl(tmp_path / "questions.jsonl", *records)
    flags = ["--data", tmp_path / "questions.jsonl", "--passages", tmp_path / "passages.jsonl", "--device", "cpu"]
    flags += ["--output_path", tmp_path / "hard.jsonl", "--margin", margin, "--relative_margin", relative, "--no_fp16"]
    flags += ["--method", method, *(["--norm"] if method == "dense" else [])]
    mine(mining_parser().parse_args(list(map(str, flags))))
    scores, dropped = score_all(method, list(groups), [f"jet {text}" for text in texts]), 0
    results = read_examples([tmp_path / "hard.jsonl"])
    for of_query, positives, found in zip(scores, groups.values(), results, strict=True):
        lowest = min(of_query[i] for i in positives)
        fits = [i for i in range(20) if i not in positives and of_query[i] <= lowest - margin - relative * abs(lowest)]
        fits = [i for i in fits if method == "dense" or of_query[i] > 0]
        dropped += 20 - len(positives) - len(fits)
        hard = [int(passage["id"][1:]) for passage in found["hard_negative_ctxs"]]
        assert sorted(hard) == fits and (np.diff(of_query[hard]) <= 1e-6).all()
    assert 0 < dropped < 50


def test_positives_outside_the_collection_have_a_score(tmp_path, capsys):
    write_jsonl(tmp_path / "passages.jsonl", *({"id": str(i), "text": f"wing {'wing ' * i}w{i}"} for i in range(5)))
    write_jsonl(tmp_path / "questions.jsonl", {"question": "wing", "positive_ctxs": [{"text": "wing wing heat"}]})
    flags = f"--data {tmp_path}/questions.jsonl --passages {tmp_path}/passages.jsonl --margin 0"
    mine(mining_parser().parse_args([*flags.split(), "--output_path", str(tmp_path / "hard.jsonl")]))
    scores = BM25([*(f"wing {'wing ' * i}w{i}" for i in range(5)), "wing wing heat"]).scores("wing")
    (found,) = read_examples([tmp_path / "hard.jsonl"])
    assert {int(p["id"]) for p in found["hard_negative_ctxs"]} == set(np.flatnonzero(scores[:5] <= scores[5])) != set()
    assert "1 questions have fewer than 30 among their 310 best passages" in capsys.readouterr().out


def test_judged_queries_become_records(tmp_path):
    (tmp_path / "qrels").mkdir()
    write_jsonl(tmp_path / "corpus.jsonl", *({"_id": f"d{i}", "text": f"wing w{i} flow"} for i in range(6)))
    write_jsonl(tmp_path / "queries.jsonl", {"_id": "q0", "text": "wing w2"})
    (tmp_path / "qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td2\t1\nq0\td3\t0\n")
    arguments = ["--beir", str(tmp_path), "--output_path", str(tmp_path / "out.jsonl"), "--hard_negatives", "2"]
    mine(mining_parser().parse_args(arguments))
    (found,) = read_examples([tmp_path / "out.jsonl"])
    assert [p["id"] for p in found["positive_ctxs"]] == ["d2"]
    assert len(found["hard_negative_ctxs"]) == 2


def test_one_vector_for_every_text_finds_nothing(data):
    examples = FineTuningPairs([record(i) for i in range(4)], load_retriever(data / "encoder"), 16)

    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, ids, mask, normalize):
            return self.weight.expand(len(ids), 3)

    found = accuracy_and_mrr(Constant(), examples, False, False, 2)
    assert found["eval_acc"] == 25 and found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
