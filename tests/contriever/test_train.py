"""The real script: flags, training, resuming, several processes."""

import argparse
import json
import shutil

import pytest
import torch

from contriever.encoder import load_retriever
from contriever.report import summary
from contriever.text.tokens import token_files
from tests.contriever.tiny import VOCABULARY, make_data, run_train, tiny_retriever, train_on_rank, write_jsonl
from tests.processes import run_processes
from tests.reliability.runs import assert_same_run, log_lines
from tests.run_folders import losses, state_of, stopped_after


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("contriever"))


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """A finished run of every mode, made once."""
    runs = {}

    def get(mode: str):
        if mode not in runs:
            runs[mode] = tmp_path_factory.mktemp(mode) / "run"
            run_train(data, runs[mode], "--contrastive_mode", mode)
        return runs[mode]

    return get


def test_a_killed_run_in_batch_ends_like_an_uninterrupted_one(data, uninterrupted, tmp_path):
    flags = ("--contrastive_mode", "inbatch")
    for updates in (2, 1):
        with stopped_after(updates):
            run_train(data, tmp_path / "run", *flags)
    run_train(data, tmp_path / "run", *flags)
    assert_same_run(tmp_path / "run", uninterrupted("inbatch"))
    steps = [line["step"] for line in log_lines(tmp_path / "run")]
    assert steps == [0, 1, 2, 3, 4, 4, 5, 6, 6]  # three of them evaluations


def test_a_run_leaves_an_encoder_that_every_script_reads(data, uninterrupted):
    run = uninterrupted("moco")
    vectors = [
        load_retriever(path).encode(["the wing of a w3", "heat"], amp="fp32")
        for path in (run, run / "encoder", run / "checkpoint.pth", run / "checkpoint/latest")
    ]
    start = load_retriever(data / "encoder").encode(["the wing of a w3", "heat"], amp="fp32")
    for other in vectors[1:]:
        assert (vectors[0] == other).all()
    assert abs(vectors[0] - start).max() > 0.01
    assert (run / "checkpoint/step-4/checkpoint.pth").is_file()


@pytest.mark.parametrize(
    ("after", "verdict"),
    [(14.0, "learned"), (6.0, "not distinguishable from the first weights"), (0.3, "worse than the first weights")],
)
def test_the_summary_says_whether_documents_are_found_better_than_by_chance(after, verdict, uninterrupted, tmp_path):
    run = shutil.copytree(uninterrupted("moco"), tmp_path / "run")
    measured = [
        {"step": step, "recall_at_1": r, "recall_at_10": r, "recall_chance": 1 / 3} for step, r in ((0, 8), (99, after))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in measured))
    first, tenth = summary(run, argparse.Namespace(**state_of(run)["args"]), None).splitlines()[1:3]
    assert f"the first 1: 8.0 +- 3.2 % with the first weights, {after:.1f} +- " in first
    assert f"after 99 steps (chance 0.3 %): {verdict}" in first and "(chance 3.3 %)" in tenth


def test_two_processes_equal_one_with_twice_the_batch(data, tmp_path):
    """With all text on both and no dropout: the pairs, the keys in the queue and the gradients are the same."""
    flags = ("--loading_mode", "full", "--dropout", 0, "--eval_documents", 0, "--save_freq", 0, "--saveckp_steps", 0)
    for mode in ("moco", "inbatch"):
        flags = (*flags, "--contrastive_mode", mode)
        run_train(data, tmp_path / f"{mode}1", *flags)
        run_processes(train_on_rank, 2, data, tmp_path / f"{mode}2", *flags, "--per_gpu_batch_size", 2)
        torch.testing.assert_close(losses(tmp_path / f"{mode}1"), losses(tmp_path / f"{mode}2"), rtol=1e-3, atol=1e-4)
        one, two = (state_of(tmp_path / f"{mode}{n}")["model"] for n in (1, 2))
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-3)


def test_a_checkpoint_of_the_reference_is_continued(data, uninterrupted, tmp_path):
    """Its options are a Namespace, and its link to the newest one points nowhere when the folder was relative."""
    state = state_of(uninterrupted("moco"))
    old = {key: state[key] for key in ("step", "model", "optimizer", "scheduler")}
    old |= {"step": 3, "opt": argparse.Namespace(retriever_model_id=str(data / "encoder"))}
    (tmp_path / "old/checkpoint/step-3").mkdir(parents=True)
    torch.save(old, tmp_path / "old/checkpoint/step-3/checkpoint.pth")
    (tmp_path / "old/checkpoint/latest").symlink_to("old/checkpoint/step-3")
    lines = run_train(data, tmp_path / "new", "--model_path", tmp_path / "old", "--continue_training")
    assert [line["step"] for line in lines if "loss" in line] == [4, 5, 6]


BAD = {
    "--queue_size 6": "--queue_size 6 is not a multiple of the 4 texts",
    "--chunk_length 200": "--chunk_length 200: the encoder reads 64 tokens",
    "--projection_size 768": "--projection_size 768: the encoder is 16 wide",
    "--train_data nowhere": "--train_data nowhere is no folder",
    "--per_gpu_batch_size 4000 --queue_size 4000": "do not fill one batch of --per_gpu_batch_size 4000",
    "--continue_training --model_path {data}/encoder": "cannot|checkpoint",
}


@pytest.mark.parametrize("flags", BAD)
def test_what_cannot_be_trained_is_one_clear_error(flags, data, tmp_path):
    with pytest.raises((ValueError, OSError), match=BAD[flags]):
        run_train(data, tmp_path / "run", *flags.format(data=data).split())


def test_text_of_another_vocabulary_is_refused(data, tmp_path):
    other = tiny_retriever(tmp_path / "other", [*VOCABULARY[:-1], "different"])
    other.save(tmp_path / "other")
    with pytest.raises(ValueError, match="whose vocabulary is not that of --retriever_model_id"):
        run_train(data, tmp_path / "run", "--retriever_model_id", tmp_path / "other")


def test_other_tokens_of_equal_size_are_another_text(data, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted("inbatch"), tmp_path / "run", symlinks=True)
    shutil.copytree(data / "tokens", tmp_path / "tokens")
    file = token_files(tmp_path / "tokens")[-1]
    content = bytearray(file.read_bytes())
    content[-4:] = content[-8:-4]  # the last token is the one before it
    file.write_bytes(content)
    flags = ("--train_data", tmp_path / "tokens", "--contrastive_mode", "inbatch")
    for name, choice in (("refuse", ["--on_changed_run", "refuse"]), ("same_data", [])):
        with pytest.raises(ValueError, match=f"--on_changed_run {name}: text was .* with --on_changed_run continue"):
            run_train(data, tmp_path / "run", *flags, *choice)
    run_train(data, tmp_path / "run", *flags, "--on_changed_run", "continue")


def test_collections_are_searched_before_during_and_after(data, tmp_path):
    folder = tmp_path / "tiny"
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(folder / "corpus.jsonl", *({"_id": f"d{i}", "title": "", "text": f"w{i} wing flow"} for i in range(6)))
    write_jsonl(folder / "queries.jsonl", *({"_id": f"q{i}", "text": f"w{i}"} for i in range(2)))
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t1\n")
    found = run_train(data, tmp_path / "run", "--eval_datasets", "tiny", "--eval_datasets_dir", tmp_path)
    values = {line["step"]: line["tiny/NDCG@10"] for line in found if "tiny/NDCG@10" in line}
    assert list(values) == [0, 4, 6] and all(0 < value <= 100 for value in values.values())
    with pytest.raises(ValueError, match="--eval_datasets: there is no folder"):
        run_train(data, tmp_path / "other", "--eval_datasets", "absent", "--eval_datasets_dir", tmp_path)
