"""Searches without torch: what is made once for them, that they answer the same, and what happens without it."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from contriever import onnx_encoder, search
from contriever.encoder import load_retriever
from shared.networks import export
from tests.contriever.tiny import tiny_retriever

ROOT = Path(__file__).resolve().parents[2]
HEAVY = "torch", "transformers", "scipy", "sklearn", "faiss", "bm25s", "tqdm", "http.server", "pandas", "matplotlib"


@pytest.fixture
def notes(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "notes").mkdir()
    for name, text in (("a", "the wing of a thin plate"), ("b", "heat and flow"), ("c", "shock wave")):
        (tmp_path / "notes" / f"{name}.txt").write_text(text)
    tiny_retriever(tmp_path / "model").save(tmp_path / "model")
    return tmp_path / "notes"


def run(notes: Path, *flags: str) -> tuple[search.SearchIndex, str, str]:
    """Index, standard output and standard error of a search."""
    flags = ["--passages", str(notes), "--model_name_or_path", str(notes.parent / "model"), "--device", "cpu", *flags]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        index = search.search(search.get_args_parser().parse_args(flags))
    return index, out.getvalue(), err.getvalue()


def answers(out: str) -> str:
    """Without the line that says how long it took."""
    return out.partition("\n")[2]


def test_later_searches_import_no_torch_and_answer_the_same(notes, tmp_path, monkeypatch):
    queries = {"hybrid": "wing", "bm25": '"wing of a"', "dense": "wing"}
    with monkeypatch.context() as patch:
        patch.setattr(onnx_encoder, "missing_packages", lambda: ["onnxruntime"])
        by_torch = {how: answers(run(notes, "--query", query, "--retriever", how)[1]) for how, query in queries.items()}
    assert all("a.txt:1" in out for out in by_torch.values())
    run(notes)
    code = (
        "import sys; from contriever import search; search.main(); "
        f"heavy = sorted({set(HEAVY)} & set(sys.modules)); assert not heavy, heavy"
    )
    flags = ["--passages", str(notes), "--model_name_or_path", str(tmp_path / "model")]
    for how, query in queries.items():
        command = [sys.executable, "-c", code, *flags, "--query", query, "--retriever", how]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr, answers(done.stdout)) == (0, "", by_torch[how])
    (notes / "d.txt").write_text("cone")  # few new texts need no torch either
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "1 new" in done.stdout
    assert os.listdir(tmp_path / "cache") == ["contriever"]  # onnxruntime keeps nothing to report


def test_what_is_made_is_read_by_its_owner_alone_and_made_again_for_other_weights(notes, tmp_path):
    run(notes)
    (folder,) = (tmp_path / "cache" / "contriever").iterdir()
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["encoder.onnx", "facts.json", "tokenizer.json", "weights.bin"]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    before = files[0].stat().st_mtime_ns
    run(notes)
    assert files[0].stat().st_mtime_ns == before
    for damage in (lambda: files[3].write_bytes(b""), files[0].unlink, lambda: files[1].write_text("{")):
        damage()
        index, _, err = run(notes)
        assert "equal to the torch network" in err and index.encode.onnx is not None
    tiny_retriever(tmp_path / "model", seed=1).save(tmp_path / "model")
    with pytest.raises(ValueError, match="made by another model"):
        run(notes)
    index, _, _ = run(notes, "--rebuild")
    expected = load_retriever(tmp_path / "model").encode(["heat"], amp="fp32")
    np.testing.assert_allclose(index.encode(["heat"], "query"), expected, atol=1e-5)


def test_what_is_made_knows_the_models_own_prompts_and_not_those_of_the_flags(notes, tmp_path, monkeypatch):
    index, _, _ = run(notes, "--query_prefix", "heat : ")
    index.encode(["heat"] * search.PASSAGES_PER_TRANSACTION, "passage")  # by torch
    assert index.encode.onnx.prompts["query"] == index.encode.retriever.prompts["query"] == "heat : "
    monkeypatch.chdir(tmp_path)  # another path to the same model
    found = onnx_encoder.read(Path("model"))
    assert (
        found.prompts["query"] == "" and found.encode(["heat"]).tolist() == found.encode(["heat"], 1, "query").tolist()
    )


def test_torch_goes_on_where_the_file_would_give_other_vectors_or_cannot_be_made(notes, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(onnx_encoder, "find_spec", lambda name: None if name == "onnxruntime" else name)
        index, _, err = run(notes, "--query", "wing")
        assert "onnxruntime is not installed: pip install -e '.[export]'" in err and index.encode.onnx is None
    with monkeypatch.context() as patch:
        (tmp_path / "file").write_text("")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        _, _, err = run(notes)
        assert "NOTE: each search waits for torch: " in err and "cannot be written: Not a directory" in err
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    _, _, err = run(notes)
    assert "encoder.onnx differs from the torch network by" in err
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    index, out, err = run(notes, "--query", "wing")
    assert "differs from the torch network" in err and "equal" not in err  # it is not tried again
    assert index.encode.onnx is None and "a.txt:1" in out


def test_many_texts_are_embedded_by_torch(notes, monkeypatch):
    run(notes)
    index, _, _ = run(notes, "--no_fp16")
    assert "retriever" not in vars(index.encode)
    monkeypatch.setattr(search, "PASSAGES_PER_TRANSACTION", 2)
    few = index.encode(["heat"], "passage")
    assert "retriever" not in vars(index.encode)
    many = index.encode(["heat", "wing"], "passage")
    assert "retriever" in vars(index.encode)
    np.testing.assert_allclose(many[:1], few, atol=1e-5)
