import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import XLMRobertaConfig

from contriever import encoder as encoder_module
from contriever.encoder import (
    Retriever,
    bare_weights,
    build_encoder,
    load_retriever,
    pack_architecture,
    rows_of_similar_length,
)
from contriever.new_encoder import get_args_parser, new_encoder, train_tokenizer
from shared.networks.weights import WeightMismatch
from tests.contriever.tiny import tiny_retriever

pytestmark = pytest.mark.usefixtures("no_network")
TEXTS = ["the wing", "", "a heat wave in the thin plate . the jet", "shock " * 200]


@pytest.fixture
def retriever(tmp_path):
    return tiny_retriever(tmp_path / "files")


def test_long_texts_are_cut_and_impossible_lengths_refused(retriever):
    assert len(retriever.tokenize(TEXTS)[3]) == 64 and len(retriever.tokenize(TEXTS, 8)[3]) == 8
    with pytest.raises(ValueError, match="65 tokens per text, but tiny reads at most 64"):
        retriever.encode(TEXTS, max_length=65)


def wrapped_bert(encoder: nn.Module) -> dict:
    """As the heads of pre-training come: prefixes, old names of norms, buffers, a pooler and a classifier."""
    old = {
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in encoder.state_dict().items()
    }
    extra = {"bert.pooler.dense.weight": torch.ones(2, 2), "cls.predictions.bias": torch.ones(3)}
    return {**old, **extra, "bert.embeddings.position_ids": torch.arange(64)[None]}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "shards"])
def test_folders_of_hugging_face(name, retriever, tmp_path, capsys):
    folder = tmp_path / "model"
    retriever.save(folder)
    tensors = retriever.model.state_dict()
    if name != "model.safetensors":
        (folder / "model.safetensors").unlink()
    if name == "pytorch_model.bin":
        torch.save(wrapped_bert(retriever.model), folder / name)
    if name == "shards":
        for i, part in enumerate((list(tensors)[:10], list(tensors)[10:])):
            torch.save({key: tensors[key] for key in part}, folder / f"part{i}.bin")
        index = {"weight_map": {key: f"part{int(i >= 10)}.bin" for i, key in enumerate(tensors)}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    again = load_retriever(folder)
    np.testing.assert_array_equal(again.encode(TEXTS), retriever.encode(TEXTS))
    assert "37/37 entries of the network matched" in capsys.readouterr().out


def test_weights_that_do_not_fit_are_refused(retriever, tmp_path):
    retriever.save(tmp_path / "model")
    state = retriever.model.state_dict()
    state.pop("encoder.layer.1.output.dense.weight")
    torch.save({"step": 1, "model": state, **pack_architecture(retriever)}, tmp_path / "checkpoint.pth")
    with pytest.raises(WeightMismatch, match="36/37"):
        load_retriever(tmp_path / "checkpoint.pth")
    with pytest.raises(WeightMismatch, match="no encoder among these weights"):
        bare_weights({"fc.weight": torch.ones(1)})


BAD = {"empty": "holds no model", "config": "cannot be read", "weights": "holds no weights", "pth": "no entry 'model'"}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_model_is_named(what, retriever, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    if what == "config":
        (folder / "config.json").write_text("{")
    if what == "weights":
        retriever.save(folder)
        (folder / "model.safetensors").unlink()
    if what == "pth":
        torch.save({"weights": 1}, folder / "checkpoint.pth")
    with pytest.raises(ValueError, match=BAD[what]):
        load_retriever(folder)


def test_a_name_is_not_asked_for_on_the_network():
    with pytest.raises(ValueError, match=r"nobody/nothing is neither a file or folder .* --allow_download"):
        load_retriever("nobody/nothing")


def test_an_official_checkpoint_says_what_it_needs(retriever, tmp_path):
    torch.save({"step": 1, "model": retriever.model.state_dict(), "opt": {}}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="needs configuration and tokenizer of bert-base-multilingual-cased"):
        load_retriever(tmp_path)
    again = load_retriever(tmp_path, architecture=tmp_path / "files")
    np.testing.assert_array_equal(again.encode(TEXTS), retriever.encode(TEXTS))


def test_the_packaged_encoder_knows_that_it_is_normalised_and_what_words_mean():
    retriever = load_retriever()
    assert retriever.normalized and retriever.dim == 384
    cat, kitten, tax = retriever.encode(["a cat", "a kitten", "the income tax"], normalize=True)
    assert cat @ kitten > cat @ tax + 0.3


def test_a_new_encoder_has_a_vocabulary_of_its_own_text(tmp_path):
    texts = ["the quick brown fox jumps over the lazy dog", "quick foxes and lazy dogs"] * 5
    tokenizer = train_tokenizer(iter(texts), vocab_size=60)
    ids = tokenizer("The quick DOG")["input_ids"]
    assert [tokenizer.convert_ids_to_tokens(i) for i in (ids[0], ids[-1])] == ["[CLS]", "[SEP]"]
    assert tokenizer.unk_token_id not in ids and tokenizer("日")["input_ids"][1] == tokenizer.unk_token_id
    (tmp_path / "text.txt").write_text("\n".join(texts))
    flags = f"--text {tmp_path}/text.txt --vocab_size 60 --hidden_size 16 --layers 1 --positions 32".split()
    with pytest.raises(ValueError, match="--hidden_size 16 is not a multiple of --heads 3"):
        new_encoder(get_args_parser().parse_args([*flags, "--outdir", str(tmp_path / "new"), "--heads", "3"]))
    retriever = new_encoder(get_args_parser().parse_args([*flags, "--outdir", str(tmp_path / "new"), "--heads", "2"]))
    again = load_retriever(tmp_path / "new")
    np.testing.assert_array_equal(again.encode(texts[:2]), retriever.encode(texts[:2]))
    with pytest.raises(ValueError, match="no words"):
        train_tokenizer(iter([" ", ""]), 60)


def test_xlm_roberta_reads_two_tokens_less_than_it_has_positions():
    shape = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    encoder = build_encoder(XLMRobertaConfig(**shape, max_position_embeddings=34), "cls")
    assert Retriever(encoder, None, "xlm").max_length == 32
    renamed = {f"roberta.{name}": value for name, value in encoder.state_dict().items()}
    bare, heads = bare_weights({**renamed, "lm_head.bias": torch.ones(3)})
    assert bare.keys() == encoder.state_dict().keys() and list(heads) == ["lm_head.bias"]


def masks(lengths: list[int]) -> torch.Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def test_groups_on_a_cpu_fit_its_caches(monkeypatch):
    monkeypatch.setitem(encoder_module.MIN_TOKENS, "cpu", 20)
    monkeypatch.setitem(encoder_module.MOST_TOKENS, "cpu", 64)
    lengths = [30, 30, 30, 30, 30, 12, 12, 12, 70, 3]
    groups = rows_of_similar_length(masks(lengths))
    assert sorted(row for rows, _ in groups for row in rows.tolist()) == list(range(10))
    assert [(len(rows), end) for rows, end in groups] == [(1, 70), (2, 30), (2, 30), (1, 30), (4, 12)]


@pytest.mark.parametrize("pooling", ["average", "cls"])
def test_grouping_by_length_changes_neither_vectors_nor_gradients(pooling, tmp_path, monkeypatch):
    network = tiny_retriever(tmp_path / "files").model.train()
    network.config.pooling = pooling
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    lengths = [3, 30, 7, 29, 4, 11, 30, 12, 5]
    mask = masks(lengths)
    ids = torch.randint(5, 30, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    found = []
    for least, most in ((1000, 1000), (20, 1000), (20, 64)):
        monkeypatch.setitem(encoder_module.MIN_TOKENS, "cpu", least)
        monkeypatch.setitem(encoder_module.MOST_TOKENS, "cpu", most)
        network.zero_grad()
        vectors = network(ids, mask, normalize=True)
        (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()
        found.append([vectors.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)])
    assert len(found[0]) > 20
    for together, *grouped in zip(*found, strict=True):
        for other in grouped:
            torch.testing.assert_close(other, together, rtol=1e-4, atol=1e-6)
