"""Export, hub, SLURM and the text that comes with the dependencies."""

import numpy as np
import pytest

import hubconf
from contriever import embedded_text, export, run_with_submitit, train
from contriever.encoder import load_retriever
from shared.networks.export import ExportMismatch
from tests.contriever.tiny_encoder import tiny_retriever

TEXTS = ["the wing of a thin plate", "heat"]


def test_exported_files_give_the_same_vectors(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    retriever = tiny_retriever(tmp_path / "files")
    retriever.normalized = True
    files = export.export(retriever, tmp_path / "out")
    assert files["onnx"].stat().st_size > 10_000
    other = sentence_transformers.SentenceTransformer(str(files["folder"]), device="cpu")
    np.testing.assert_allclose(other.encode(TEXTS), retriever.encode(TEXTS, normalize=True, amp="fp32"), atol=1e-5)


def test_a_file_that_gives_other_vectors_is_an_error():
    vectors = np.ones((2, 3))
    with pytest.raises(ExportMismatch, match="x differs from the torch network by"):
        export.check_vectors("x", vectors + 0.01, vectors)


def test_hub_entries_read_local_encoders_and_ask_for_nothing_else(tmp_path):
    tiny_retriever(tmp_path / "files").save(tmp_path / "files")
    for name in ("contriever", "contriever_msmarco", "mcontriever", "mcontriever_msmarco"):
        retriever = getattr(hubconf, name)(name_or_path=str(tmp_path / "files"))
        assert retriever.encode(TEXTS).shape == (2, 16)
    untrained = hubconf.contriever(pretrained=False, name_or_path=str(tmp_path / "files"))
    assert not np.allclose(untrained.encode(TEXTS), load_retriever(tmp_path / "files").encode(TEXTS))


def test_every_training_flag_is_accepted_by_the_launcher(monkeypatch):
    calls = []
    monkeypatch.setattr(run_with_submitit.slurm, "submit", lambda *call: calls.append(call))
    run_with_submitit.main("--nodes 4 --ngpus 8 --partition gpu --train_data wiki --output_dir /runs/%j".split())
    ((function, args),) = calls
    assert function is train.train_contriever and args.nodes == 4
    assert vars(train.parse_args(["--train_data", "wiki"])).keys() <= vars(args).keys()


def test_documentation_of_packages_is_prose(tmp_path):
    documents = embedded_text.documentation(("sklearn",))
    assert len(documents) > 300 and len({d["id"] for d in documents}) > 0.9 * len(documents)
    assert all(400 <= len(d["text"]) <= 6000 and "\n" not in d["text"] and ">>>" not in d["text"] for d in documents)
    (fit,) = (d for d in documents if d["id"] == "sklearn.cluster._kmeans.KMeans")
    assert fit["text"].startswith("K-Means clustering.")


def test_documentation_becomes_a_data_set_once(tmp_path, monkeypatch):
    text = [{"id": str(i), "title": "", "text": f"the wing of w{i} . a flow ."} for i in range(4)]
    monkeypatch.setattr(embedded_text, "documentation", lambda: text)
    tokenizer = tiny_retriever(tmp_path / "files").tokenizer
    embedded_text.tokenized_documentation(tmp_path / "docs", tokenizer)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "docs").iterdir()}
    assert set(before) == {
        "documentation.jsonl",
        *(f"documentation-00000.{e}" for e in ("json", "tokens.npy", "borders.npy")),
    }
    embedded_text.tokenized_documentation(tmp_path / "docs", tokenizer)
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "docs").iterdir()}
