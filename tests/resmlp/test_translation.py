"""Translation: text, networks, beam search, and trainings on a generated language pair."""

import io
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resmlp.translation import main as translation
from resmlp.translation import translate
from resmlp.translation.beam_search import beam_search
from resmlp.translation.corpus import (
    EncodedPairs,
    TokenBatchSampler,
    open_vocabulary,
    pad,
    read_parallel_text,
    train_vocabulary,
)
from resmlp.translation.generated_language import generate_pairs
from resmlp.translation.sequence_models import BOS, EOS, NETWORKS, PAD, UNK, Attention, CrossTokenLinear, Translator
from shared.run.checkpoint import load_latest
from tests.command_lines import error_of
from tests.processes import run_processes
from tests.resmlp import tiny
from tests.run_folders import lines

SIZES = {"max_length": 12, "dim": 16, "hidden_dim": 48, "depth": 2, "heads": 2, "dropout": 0.0}


@pytest.fixture(scope="module")
def vocabulary():
    return open_vocabulary(train_vocabulary([line for side in generate_pairs(200) for line in side], 100))


@pytest.fixture
def few_sentences(monkeypatch):
    """A training set of 60 pairs: 5 steps."""
    monkeypatch.setattr(translation, "GENERATED_PAIRS", None)  # what is put back after the test
    tiny.few_sentences()


def make_network(name: str = "resmlp", vocabulary_size: int = 9, seed: int = 0, **sizes) -> Translator:
    torch.manual_seed(seed)
    network = Translator(vocabulary_size, network=name, **SIZES | sizes)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    return network.eval().requires_grad_(False)


# --- Text -------------------------------------------------------------------------------------------------------------


def test_files_that_are_not_parallel_text_are_refused_by_name(tmp_path):
    files = {"two": "a b\nc\n", "one": "a\n", "empty": "\n", "separator": "a\u2028b\nc\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\n")
    assert read_parallel_text(tmp_path / "two", tmp_path / "separator") == (["a b", "c"], ["a\u2028b", "c"])
    for other, message in (
        ("one", "two has 2 lines, .*one has 1"),
        ("empty", "empty holds no sentence"),
        ("binary", "binary is no UTF-8"),
        ("nowhere", "nowhere is not a file"),
    ):
        with pytest.raises(ValueError, match=message):
            read_parallel_text(tmp_path / "two", tmp_path / other)


def test_lines_end_where_an_editor_ends_them_and_nowhere_else(tmp_path):
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfa\rb\r\nc\n")
    assert read_parallel_text(tmp_path / "text", tmp_path / "text")[0] == ["a\rb", "c"]


def test_the_vocabulary_is_joint_and_of_the_size_that_was_asked_for(vocabulary):
    assert len(vocabulary) == 100
    source, target = generate_pairs(20)
    for sentence in (*source, *target):
        ids = vocabulary.encode(sentence)
        assert UNK not in ids and vocabulary.decode(ids) == sentence
    with pytest.raises(ValueError, match=r"--vocabulary_size 100000: .*too high"):
        train_vocabulary(source, 100_000)
    with pytest.raises(ValueError, match="x is no SentencePiece model"):
        open_vocabulary(b"nonsense", "x")


def test_a_batch_is_padded_behind_the_ends_of_its_sentences(vocabulary):
    source, target = generate_pairs(30)
    pairs = EncodedPairs(vocabulary, [*source, "", "word " * 40], [*target, "a", "a"], max_length=24)
    assert (len(pairs), pairs.left_out) == (30, 2)
    sources, targets_in, targets_out = pairs.batch([3, 29, 0])
    for row, index in enumerate((3, 29, 0)):
        ids, translated = vocabulary.encode(source[index]), vocabulary.encode(target[index])
        padding = [PAD] * (sources.shape[1] - len(ids) - 1)
        assert sources[row].tolist() == [*ids, EOS, *padding]
        padding = [PAD] * (targets_in.shape[1] - len(translated) - 1)
        assert targets_in[row].tolist() == [BOS, *translated, *padding]
        assert targets_out[row].tolist() == [*translated, EOS, *padding]
        assert pairs.lengths[index] == 1 + max(len(ids), len(translated))
    assert pairs.unknown == 0
    foreign = EncodedPairs(vocabulary, [source[0], "\u4f60"], [target[0], "\u597d"], max_length=24)
    ids = [i for side in ((source[0], "\u4f60"), (target[0], "\u597d")) for s in side for i in vocabulary.encode(s)]
    assert foreign.unknown == pytest.approx(ids.count(UNK) / len(ids)) and foreign.unknown > 0
    with pytest.raises(
        ValueError, match=r"valid: no pair of sentences, both with text, of at most 1 subwords \(--max_le"
    ):
        EncodedPairs(vocabulary, source, target, 2, "valid")
    with pytest.raises(ValueError, match="train: no pair of sentences, both with text"):
        EncodedPairs(vocabulary, ["a", ""], ["", "b"], 24)


def test_batches_hold_every_pair_once_and_few_enough_tokens():
    lengths = np.random.default_rng(0).integers(2, 30, 500)
    sampler = TokenBatchSampler(lengths, max_tokens=100, seed=1)
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert len(epochs[-1]) == len(sampler)
        assert sorted(i for batch in epochs[-1] for i in batch) == list(range(500))
        assert all(len(batch) * lengths[batch].max() <= 100 for batch in epochs[-1])
    padding = sum(len(b) * lengths[b].max() for b in epochs[0]) / lengths.sum() - 1
    assert padding < 0.05
    assert epochs[0] != epochs[1]
    sampler.set_epoch(1, start_step=7)
    assert list(sampler) == epochs[1][7:]
    with pytest.raises(ValueError, match="--max_tokens 20 is less than a sentence of 29 tokens"):
        TokenBatchSampler(lengths, max_tokens=20)


def test_processes_share_the_batches_of_an_epoch_equally():
    lengths = np.random.default_rng(0).integers(2, 30, 200)
    whole = [tuple(batch) for batch in TokenBatchSampler(lengths, 100)]
    ranks = [[tuple(b) for b in TokenBatchSampler(lengths, 100, rank=rank, world_size=3)] for rank in range(3)]
    assert {len(batches) for batches in ranks} == {-(-len(whole) // 3)}
    dealt = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert dealt[: len(whole)] == whole and set(dealt) == set(whole)  # the rest fills up the last step


# --- Networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_tokens_communicate_by_one_matrix_over_positions(causal):
    torch.manual_seed(0)
    layer = CrossTokenLinear(max_length=6, causal=causal).requires_grad_(False)
    layer.bias.normal_()
    x, padding = torch.randn(2, 4, 3), torch.tensor([[False] * 4, [False, False, False, True]])
    out = layer(x, padding)
    for b, i in itertools.product(range(2), range(4)):
        seen = [j for j in range(i + 1 if causal else 4) if not padding[b, j]]
        expected = sum(layer.weight[i, j] * x[b, j] for j in seen) + layer.bias[i]
        torch.testing.assert_close(out[b, i], expected)


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = Attention(8, heads=2), nn.MultiheadAttention(8, 2, batch_first=True)
    theirs.in_proj_weight.data = torch.cat([ours.query.weight, ours.key_value.weight])
    theirs.in_proj_bias.data = torch.cat([ours.query.bias, ours.key_value.bias])
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x, memory, padding = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.arange(5) >= torch.tensor([[5], [3]])
    expected, _ = theirs(x, memory, memory, key_padding_mask=padding)
    torch.testing.assert_close(ours(x, memory, padding), expected)
    ours.causal = True
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected, _ = theirs(memory, memory, memory, key_padding_mask=padding, attn_mask=later)
    torch.testing.assert_close(ours(memory, memory, padding), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_token_sees_a_later_one_or_padding(name):
    network = make_network(name)
    source, target = torch.tensor([[4, 5, 6, EOS]]), torch.tensor([[BOS, 7, 8, 4]])
    logits = network((source, target))
    changed = target.clone()
    changed[0, 2] = 5
    torch.testing.assert_close(network((source, changed))[:, :2], logits[:, :2])
    assert (network((source, changed))[:, 2:] - logits[:, 2:]).abs().min() > 0
    padded = network((F.pad(source, (0, 3), value=PAD), F.pad(target, (0, 2), value=PAD)))
    torch.testing.assert_close(padded[:, :4], logits)
    other = source.clone()
    other[0, 0] = 8
    assert (network((other, target)) - logits).abs().max() > 1e-3


def test_the_transformer_has_as_many_parameters():
    for sizes in (SIZES, {"max_length": 128, "dim": 256, "hidden_dim": 1024, "depth": 3, "heads": 8}):
        with torch.device("meta"):
            counts = [sum(p.numel() for p in Translator(500, network=n, **sizes).parameters()) for n in NETWORKS]
        assert abs(counts[1] / counts[0] - 1) < 0.02
    with pytest.raises(ValueError, match=r"--hidden_dim 32: a Transformer of --dim 64 .* give at least 129"):
        Translator(50, network="transformer", max_length=4, dim=64, hidden_dim=32)


def test_sentences_that_are_too_long_and_sizes_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match=r"13 tokens, the network takes 12 \(--max_length\)"):
        make_network().encode(torch.full((1, 13), 5))
    with pytest.raises(ValueError, match="--dim 12 is no multiple"):
        Translator(50, dim=12, heads=4)


def test_the_loss_is_smoothed_and_leaves_padding_out():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[1, 4, 3], [2, PAD, PAD]])
    expected = 0.0
    for b, n in itertools.product(range(2), range(3)):
        if targets[b, n] != PAD:
            log_p = logits[b, n].log_softmax(dim=0)
            expected -= 0.9 * log_p[targets[b, n]] + 0.1 * log_p.mean()
    torch.testing.assert_close(translation.token_loss(logits, targets, label_smoothing=0.1), expected)


# --- Beam search ------------------------------------------------------------------------------------------------------


def log_probability(network: Translator, source: torch.Tensor, tokens: list[int]) -> float:
    """Of a whole translation."""
    logits = network((source[None], torch.tensor([[BOS, *tokens[:-1]]])))[0]
    logits[:, [PAD, BOS]] = -math.inf  # a search never writes these
    log_p = logits.log_softmax(dim=-1)
    return sum(log_p[i, t].item() for i, t in enumerate(tokens))


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_of_all_translations(length_penalty, monkeypatch):
    monkeypatch.setattr("resmlp.translation.beam_search.EXTRA_TOKENS", 0)
    network = make_network(vocabulary_size=6, max_length=4)
    monkeypatch.setattr(network, "decode", masked(network.decode))
    source = torch.tensor([[4, 5, UNK, EOS], [5, 5, 4, EOS]])
    words = [UNK, 4, 5]
    for row, found in zip(source, beam_search(network, source, beam=100, length_penalty=length_penalty), strict=True):
        scored = {}
        for length in range(5):  # four words fill the network: they end as they are
            for ids in itertools.product(words, repeat=length):
                tokens = list(ids) if length == 4 else [*ids, EOS]
                scored[ids] = log_probability(network, row, tokens) / ((5 + len(tokens)) / 6) ** length_penalty
        assert tuple(found) == max(scored, key=scored.get)


def masked(decode):
    """A decoder that gives nothing to padding and begin, for which the search looks neither."""

    def decode_masked(*inputs):
        logits = decode(*inputs)
        logits[..., [PAD, BOS]] = -math.inf
        return logits

    return decode_masked


def test_a_beam_of_one_is_greedy_and_sentences_do_not_depend_on_their_batch():
    network = make_network(vocabulary_size=30)
    source = torch.tensor([[4, 5, 6, EOS, PAD, PAD], [7, 8, 9, 10, 11, EOS]])
    together = beam_search(network, source, beam=1)
    assert [together[0]] == beam_search(network, source[:1, :4], beam=1)
    wide = beam_search(network, source, beam=5)
    assert [wide[0]] == beam_search(network, source[:1, :4], beam=5)
    for row, found in zip(source, together, strict=True):
        ids: list[int] = []
        while len(ids) < network.max_length:
            logits = network((row[row != PAD][None], torch.tensor([[BOS, *ids]])))[0, -1]
            logits[[PAD, BOS]] = -math.inf
            if logits.argmax() == EOS:
                break
            ids.append(int(logits.argmax()))
        assert found == ids


# --- Trainings --------------------------------------------------------------------------------------------------------


def train(output_dir, *flags) -> dict[str, float]:
    arguments = [*tiny.TRANSLATION_FLAGS.split(), "--output_dir", str(output_dir), *map(str, flags)]
    return translation.train_translation(translation.parse_args(arguments))


def write_text(folder) -> list[str]:
    """Files of 2,060 generated pairs, and the flags that name them."""
    source, target = generate_pairs(2060, seed=3)
    flags = []
    for part, rows in (("train", slice(60, None)), ("valid", slice(0, 30)), ("test", slice(30, 60))):
        for side, sentences in (("source", source), ("target", target)):
            (folder / f"{part}.{side}").write_text("".join(s + "\n" for s in sentences[rows]), encoding="utf-8")
            flags += [f"--{part}_{side}", str(folder / f"{part}.{side}")]
    return flags


# sizes and rates for a few CPU seconds; both networks have about 180,000 parameters
LEARNS = (
    "--vocabulary_size 150 --max_length 16 --dim 64 --hidden_dim 256 --depth 2 --heads 4 --dropout 0 --max_tokens 512 "
    "--optimizer adam --lr 0.004 --warmup_steps 50 --device cpu"
).split()


def train_on_files(folder, *flags) -> dict[str, float]:
    arguments = [*write_text(folder), *LEARNS, "--output_dir", str(folder / "run"), *map(str, flags)]
    return translation.train_translation(translation.parse_args(arguments))


@pytest.mark.slow
def test_parallel_text_is_learned_to_a_nearly_perfect_bleu(tmp_path, monkeypatch, capsys):
    result = train_on_files(tmp_path, "--epochs", 12)
    assert min(result["valid"], result["test"]) > 95
    assert "nrefs:1|case:mixed" in capsys.readouterr().out
    (test, reference), out = (tmp_path / f"test.{side}" for side in ("source", "target")), tmp_path / "out.txt"
    command = ["translate.py", "--weights", tmp_path / "run/checkpoint.pth", "--input", test, "--output", out]
    monkeypatch.setattr("sys.argv", [*map(str, command), "--reference", str(reference), "--device", "cpu"])
    translate.main()
    assert capsys.readouterr().out.startswith(f"BLEU = {result['test']:.2f}")
    assert len(out.read_text().splitlines()) == 30


def test_adagrad_runs_and_skips_a_step_that_is_not_finite(tmp_path, monkeypatch, few_sentences):
    loss = translation.token_loss
    calls = itertools.count()
    monkeypatch.setattr(
        translation, "token_loss", lambda *a, **k: loss(*a, **k) * (math.nan if next(calls) == 1 else 1)
    )
    train(tmp_path, "--optimizer", "adagrad", "--lr", 0.2, "--warmup_steps", 4, "--epochs", 1)
    steps = [line for line in lines(tmp_path) if "skipped" in line]
    assert [line["skipped"] for line in steps[:3]] == [0, 1, 0]
    np.testing.assert_allclose([line["lr"] for line in steps[:5]], [0.05, 0.1, 0.15, 0.2, 0.2])
    state = load_latest(tmp_path / "checkpoint.pth")
    assert all(value.isfinite().all() for value in state["network"].values())


def gradient(rank: int, pairs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of one process of two, each with one of two batches of unequal numbers of tokens."""
    from shared import distributed

    torch.manual_seed(0)
    network = distributed.wrap(Translator(9, **SIZES), torch.device("cpu"))
    source, target_in, target_out = pairs[rank]
    tokens = distributed.all_reduce_mean((target_out != PAD).sum().float())
    (translation.token_loss(network((source, target_in)), target_out, 0.1) / tokens).backward()
    return [p.grad for p in network.parameters()]


def test_two_processes_weigh_every_token_as_one_process_does():
    ids = [[[4, 5, EOS], [BOS, 6], [6, EOS]], [[7, 8, 4, EOS], [BOS, 5, 5, 6, 7], [5, 5, 6, 7, EOS]]]
    batches = [tuple(torch.tensor([row]) for row in pair) for pair in ids]
    found = run_processes(gradient, 2, batches)
    torch.manual_seed(0)
    network = Translator(9, **SIZES)
    source, target_in, target_out = (pad([pair[i] for pair in ids]) for i in range(3))
    (translation.token_loss(network((source, target_in)), target_out, 0.1) / 7).backward()
    for grads in found:
        torch.testing.assert_close(grads, [p.grad for p in network.parameters()])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_source", "a"], "--train_source and --train_target belong together"),
        (["--train_source", "a", "--train_target", "b"], "--train_source and --valid_source belong together"),
        (["--test_source", "a", "--test_target", "b"], "--test_source needs --train_source"),
        (["--length_penalty", "-1"], "--length_penalty -1.0 is less than 0"),
        (["--dropout", "1.5"], "--dropout 1.5 is outside [0, 1)"),
    ],
)
def test_mistakes_on_the_command_line_are_named(flags, message):
    assert message in error_of(translation.parse_args, *flags)


def test_the_vocabulary_of_another_run_is_refused(tmp_path, few_sentences, capsys):
    train(tmp_path / "run", "--epochs", 1)
    own = load_latest(tmp_path / "run/checkpoint.pth")["vocabulary"].numpy().tobytes()
    (tmp_path / "own.model").write_bytes(own)
    (tmp_path / "other.model").write_bytes(train_vocabulary(["other words \u00fcber all"] * 9, 24))
    (tmp_path / "empty.model").touch()
    train(tmp_path / "run", "--epochs", 2, "--vocabulary", tmp_path / "own.model")
    with pytest.raises(
        ValueError, match=r"--vocabulary .*other\.model is not the vocabulary of the checkpoint in .*run"
    ):
        train(tmp_path / "run", "--epochs", 2, "--vocabulary", tmp_path / "other.model")
    with pytest.raises(ValueError, match=r"--vocabulary .*empty\.model has the ids"):
        train(tmp_path / "new", "--vocabulary", tmp_path / "empty.model")
    capsys.readouterr()
    train(tmp_path / "new", "--epochs", 1, "--vocabulary", tmp_path / "other.model", "--max_length", 60)
    assert re.search(r"train: 60 pairs .*; \d+ % of the subwords are unknown", capsys.readouterr().out)


def test_empty_lines_are_left_out_of_the_training_and_translated_by_empty_ones(tmp_path, capsys):
    flags = write_text(tmp_path)
    for name, keep in (("train", 60), ("valid", 4), ("test", 4)):
        for side, empty in (("source", 1), ("target", 2)):
            path = tmp_path / f"{name}.{side}"
            rows = path.read_text().splitlines()[:keep]
            path.write_text("".join(f"{row}\n" for row in [*rows[:empty], "", *rows[empty + 1 :]]))
    train(tmp_path / "run", "--epochs", 1, *flags)
    out = capsys.readouterr().out
    assert "train: 58 pairs of sentences, 2 left out" in out and "valid: 2 pairs of sentences, 2 left out" in out
    network, vocabulary = translate.load_translator(tmp_path / "run/checkpoint.pth")
    sentences = (tmp_path / "test.source").read_text().splitlines()
    found = translate.translate_sentences(network, vocabulary, sentences, torch.device("cpu"))
    assert len(found) == 4 and found[1] == ""


def test_another_network_than_the_checkpoints_is_refused(tmp_path, few_sentences, monkeypatch, capsys):
    train(tmp_path, "--epochs", 1)
    hint = capsys.readouterr().out.splitlines()[-1].split()
    assert hint[:2] == ["next:", "python"] and Path(hint[2]).is_file()
    with pytest.raises(ValueError, match=r"--network transformer does not fit .*--network resmlp"):
        train(tmp_path, "--epochs", 2, "--network", "transformer")
    (tmp_path / "other.pth").write_bytes((tmp_path / "checkpoint.pth").read_bytes())
    given = ["--weights", str(tmp_path / "other.pth"), "--device", "cpu"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n")))
    with pytest.raises(ValueError, match="standard input is no UTF-8 text"):
        translate.translate(translate.parse_args(given))
    with pytest.raises(ValueError, match=r"--output .*out\.txt: there is no folder .*nowhere"):
        translate.translate(translate.parse_args([*given, "--output", str(tmp_path / "nowhere/out.txt")]))
    _, vocabulary = translate.load_translator(tmp_path / "other.pth")
    assert len(vocabulary) == 100
    torch.save({"model": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"is no checkpoint of translation/main\.py"):
        translate.load_translator(tmp_path / "other.pth")
