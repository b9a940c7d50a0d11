"""Export and hub."""

import numpy as np
import pytest

import hubconf
from contriever import export
from contriever.encoder import load_retriever, pad
from tests.contriever.tiny import tiny_retriever

TEXTS = ["the wing of a thin plate", "heat"]


@pytest.mark.parametrize("normalized", [True, False])
def test_exported_files_give_the_same_vectors(normalized, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    onnxruntime = pytest.importorskip("onnxruntime")
    retriever = tiny_retriever(tmp_path / "files")
    retriever.normalized = normalized
    files = export.export(retriever, tmp_path / "out")
    weights, onnx_file = files["folder"] / "model.safetensors", files["onnx"]
    assert weights.stat().st_mode == onnx_file.stat().st_mode == (files["folder"] / "config.json").stat().st_mode
    expected = retriever.encode(TEXTS, normalize=normalized, amp="fp32")
    library = sentence_transformers.SentenceTransformer(str(files["folder"]), device="cpu")
    np.testing.assert_allclose(library.encode(TEXTS), expected, atol=1e-5)
    ids, mask = pad(retriever.tokenize(TEXTS))
    inputs = {"input_ids": ids.numpy(), "attention_mask": mask.long().numpy()}
    (vectors,) = onnxruntime.InferenceSession(str(files["onnx"])).run(None, inputs)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_hub_entries_read_local_encoders_and_ask_for_nothing_else(tmp_path):
    tiny_retriever(tmp_path / "files").save(tmp_path / "files")
    for name in ("contriever", "contriever_msmarco", "mcontriever", "mcontriever_msmarco"):
        retriever = getattr(hubconf, name)(name_or_path=str(tmp_path / "files"))
        assert retriever.encode(TEXTS).shape == (2, 16)
    untrained = hubconf.contriever(pretrained=False, name_or_path=str(tmp_path / "files"))
    assert not np.allclose(untrained.encode(TEXTS), load_retriever(tmp_path / "files").encode(TEXTS))
