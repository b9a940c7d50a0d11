"""Folders of sentence-transformers give the vectors that the library itself gives, or are refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from contriever import finetuning, onnx_encoder, search
from contriever.encoder import load_retriever
from contriever.modules_json import read_steps
from contriever.new_encoder import train_tokenizer
from tests.contriever.tiny import write_texts

sentence_transformers = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

TEXTS = ["the Wing of a thin plate", "", "heat", "shock wave , flow . " * 12]
SHAPE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
KINDS = {  # architecture, pooling, dense layers, norm
    "bert-cls": ("bert", "cls", (), True),
    "bert-dense": ("bert", "mean", ((8, torch.nn.Tanh()), (6, torch.nn.Identity())), True),
    "xlm-roberta-mean": ("xlm-roberta", "mean", (), True),
    "roberta-max": ("roberta", "max", (), False),
    "mpnet-mean": ("mpnet", "mean", (), True),
    "modernbert-cls": ("modernbert", "cls", ((8, torch.nn.GELU()),), False),
}
PROMPTS = {"query": "wing : ", "document": "heat . "}


def write_transformer(folder: Path, architecture: str) -> Path:
    tokenizer = train_tokenizer(iter(write_texts(folder / "text.txt").read_text().splitlines()), 90)
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    config = AutoConfig.for_model(architecture, vocab_size=len(tokenizer), max_position_embeddings=66, **SHAPE, **ids)
    AutoModel.from_config(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Folder and library model of one of ``KINDS``, made once."""
    made = {}

    def get(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            architecture, pooling, dense, normalize = KINDS[kind]
            (folder / "hf").mkdir()
            steps = [modules.Transformer(str(write_transformer(folder / "hf", architecture)), max_seq_length=30)]
            steps.append(modules.Pooling(16, pooling_mode=pooling))
            width = 16
            for features, activation in dense:
                steps.append(modules.Dense(width, features, activation_function=activation))
                width = features
            steps += [modules.Normalize()] if normalize else []
            model = sentence_transformers.SentenceTransformer(modules=steps, prompts=PROMPTS, device="cpu")
            model.save(str(folder / "model"))
            made[kind] = folder / "model", model
        return made[kind]

    return get


def vectors(retriever, texts, kind=""):
    return retriever.encode(texts, normalize=retriever.normalized, amp="fp32", kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_equal_those_of_the_library(kind, folder_of, tmp_path):
    folder, theirs = folder_of(kind)
    ours = load_retriever(folder)
    ours.save(tmp_path / "again")
    for retriever in (ours, load_retriever(tmp_path / "again")):
        assert retriever.dim == theirs.encode("a").shape[0]
        np.testing.assert_allclose(vectors(retriever, TEXTS), theirs.encode(TEXTS), atol=1e-6)
        np.testing.assert_allclose(vectors(retriever, TEXTS, "query"), theirs.encode_query(TEXTS), atol=1e-6)
        np.testing.assert_allclose(vectors(retriever, TEXTS, "passage"), theirs.encode_document(TEXTS), atol=1e-6)
    assert not np.allclose(vectors(ours, TEXTS), vectors(ours, TEXTS, "query"), atol=1e-5)
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "again"), device="cpu")
    np.testing.assert_allclose(again.encode_query(TEXTS), theirs.encode_query(TEXTS), atol=1e-6)


def test_prompts_of_other_names_count_as_in_the_library(folder_of, tmp_path, capsys):
    _, model = folder_of("bert-cls")
    for number, (prompts, default) in enumerate(
        (
            ({"query": "wing : ", "passage": "heat . "}, None),
            ({"search_query": "wing : ", "corpus": "heat . "}, "search_query"),
            ({"default": "wing : ", "document": "heat . ", "passage": "cone "}, "default"),
        )
    ):
        options = {"prompts": prompts, "default_prompt_name": default, "device": "cpu"}
        library = sentence_transformers.SentenceTransformer(modules=list(model), **options)
        library.save(str(tmp_path / str(number)))
        ours = load_retriever(tmp_path / str(number))
        for kind, theirs in (
            ("", library.encode),
            ("query", library.encode_query),
            ("passage", library.encode_document),
        ):
            np.testing.assert_allclose(vectors(ours, TEXTS, kind), theirs(TEXTS), atol=1e-6)
        told = f"--passage_prefix gives the one called {list(prompts)[1]!r}, 'heat . '"
        assert (told in capsys.readouterr().out) == (number < 2)


@pytest.mark.parametrize("kind", KINDS)
def test_searches_without_torch_have_the_same_vectors(kind, folder_of):
    """Pooling, dense layers, norms, lengths and prompts included, and texts are cut at the same places."""
    folder, theirs = folder_of(kind)
    retriever = load_retriever(folder)
    made = onnx_encoder.make(folder, retriever)
    texts = [*TEXTS, "Wing, plate; heat. " * 20]
    for encoder in (made, onnx_encoder.read(folder)):
        np.testing.assert_allclose(encoder.encode(texts, kind="query"), theirs.encode_query(texts), atol=2e-6)
        np.testing.assert_allclose(encoder.encode(texts, kind="passage"), theirs.encode_document(texts), atol=2e-6)
        np.testing.assert_allclose(encoder.encode(texts, batch_size=2), vectors(retriever, texts), atol=2e-6)
        assert encoder.tokenize(texts, "query") == retriever.tokenize(texts, kind="query")
        assert encoder.token_ends(texts[-1]) == retriever.token_ends(texts[-1])
        assert encoder.identity() == retriever.identity() and encoder.max_tokens == retriever.max_tokens
        assert encoder.encode([]).shape == (0, retriever.dim)


def test_older_files_say_the_same_in_other_words(folder_of, tmp_path):
    folder, _ = folder_of("bert-cls")
    shutil.copytree(folder, tmp_path / "old")
    switches = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (tmp_path / "old/1_Pooling/config.json").write_text(json.dumps(switches))
    (tmp_path / "old/sentence_bert_config.json").write_text('{"max_seq_length": 9, "do_lower_case": true}')
    old = load_retriever(tmp_path / "old")
    assert old.model.config.pooling == "cls" and old.default_length == 9 and old.lowercase
    library = sentence_transformers.SentenceTransformer(str(tmp_path / "old"), device="cpu")
    np.testing.assert_allclose(vectors(old, TEXTS), library.encode(TEXTS), atol=1e-6)


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_steps_that_are_not_implemented_are_refused_by_name(folder_of, tmp_path):
    folder, _ = folder_of("bert-dense")
    for name, file, value, message in (
        ("pooling", "1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "pooling lasttoken is not implemented"),
        ("two", "1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, "pooling cls, mean is not implemented"),
        ("prompt", "1_Pooling/config.json", {"include_prompt": False}, "leaves out prompts is not implemented"),
        (
            "dense",
            "2_Dense/config.json",
            {"activation_function": "torch.nn.Softplus"},
            "activation Softplus is not",
        ),
        ("token", "2_Dense/config.json", {"module_input_name": "token_embeddings"}, "layer on each token is not"),
    ):
        shutil.copytree(folder, tmp_path / name)
        change(tmp_path / name / file, **value)
        with pytest.raises(ValueError, match=message):
            read_steps(tmp_path / name)
    steps = json.loads((folder / "modules.json").read_text())
    for listed, message in (
        ([steps[0], {**steps[1], "type": "sentence_transformers.models.LSTM"}], "LSTM is not implemented"),
        ([steps[0], steps[1], steps[4], steps[2]], "in the order Transformer, Pooling, Normalize, Dense are not"),
    ):
        (tmp_path / "two/modules.json").write_text(json.dumps(listed))
        with pytest.raises(ValueError, match=message):
            read_steps(tmp_path / "two")


def test_an_index_knows_pooling_and_prompts(folder_of, tmp_path):
    folder, _ = folder_of("bert-cls")
    shutil.copytree(folder, tmp_path / "mean")
    change(tmp_path / "mean/1_Pooling/config.json", pooling_mode="mean")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("wing")

    def run(model: Path, *flags: str):
        flags = ["--passages", str(tmp_path / "notes"), "--model_name_or_path", str(model), "--device", "cpu", *flags]
        return search.search(search.get_args_parser().parse_args(flags))

    index = run(folder, "--query", "wing")
    expected = vectors(load_retriever(folder), ["a wing"], "passage")[0]
    ((vector,),) = index.database.execute("SELECT vector FROM vectors")
    np.testing.assert_allclose(np.frombuffer(vector, np.float16), expected, atol=1e-3)
    with pytest.raises(ValueError, match="its pooling is cls, now it is average"):
        run(tmp_path / "mean")
    with pytest.raises(ValueError, match=r"its prefix is heat \. , now it is wing \. "):
        run(folder, "--passage_prefix", "wing . ")
    with pytest.raises(ValueError, match="made by another model or with other settings"):
        run(folder, "--passage_prefix", "")
    run(folder, "--query", "wing", "--query_prefix", "")  # passages are the same


def test_an_encoder_with_dense_layers_is_not_trained(folder_of, tmp_path):
    folder, _ = folder_of("bert-dense")
    (tmp_path / "train.jsonl").write_text('{"question": "a", "positive_ctxs": [{"text": "b"}]}\n')
    places = f"--train_data {tmp_path}/train.jsonl --model_path {folder} --output_dir {tmp_path}/run"
    with pytest.raises(ValueError, match="has dense layers after its pooling"):
        finetuning.finetune(finetuning.parse_args([*places.split(), "--device", "cpu"]))
