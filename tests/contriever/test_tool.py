"""The search as a tool of language models, asked by the official client."""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from contriever.own_texts.background import LiveIndex
from contriever.own_texts.index import SearchIndex
from contriever.own_texts.tool import make_server
from tests.contriever.tiny import tiny_retriever

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def notes(tmp_path) -> Path:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("A wing can stall.")
    (tmp_path / "notes" / "b.md").write_text("# Heat\n\nThe heat of a jet.")
    return tmp_path / "notes"


def found_by(target, *calls: tuple[str, dict]) -> list:
    """What the client is answered: tools first, then the results of the calls."""
    anyio = pytest.importorskip("anyio")
    mcp = pytest.importorskip("mcp")

    async def ask() -> list:
        async with mcp.Client(target) as client:
            return [(await client.list_tools()).tools, *[await client.call_tool(*call) for call in calls]]

    return anyio.run(ask)


def test_a_language_model_finds_passages(notes):
    pytest.importorskip("mcp")

    def encode(texts: list[str], kind: str) -> np.ndarray:
        return np.array([["wing" in text, "heat" in text] for text in texts], np.float32)

    live = LiveIndex(lambda: SearchIndex(notes, notes / ".index", encode, {}))
    server = make_server(live, notes, 1, "dense", 0.5)
    calls = [{"query": "wing"}, {"query": "heat", "top_k": 2}, {"query": "wing", "top_k": 0}, {"query": " "}]
    tools, one, two, bad, empty = found_by(server, *(("search", call) for call in calls))
    (tool,) = tools
    assert tool.name == "search" and tool.input_schema["properties"].keys() == {"query", "top_k"}
    assert tool.input_schema["required"] == ["query"] and tool.annotations.read_only_hint
    (hit,) = one.structured_content["results"]
    assert hit["path"] == "a.txt" and hit["text"] == "A wing can stall." and "A wing can stall." in one.content[0].text
    assert [hit["title"] for hit in two.structured_content["results"]] == ["b > Heat", "a"]
    assert bad.is_error and "greater than or equal to 1" in bad.content[0].text
    assert empty.is_error and "the query is empty" in empty.content[0].text


@pytest.mark.slow
def test_the_script_speaks_the_protocol_on_its_standard_streams(notes, tmp_path):
    if importlib.util.find_spec("mcp") is None:
        pytest.skip("mcp is not installed")
    from mcp import StdioServerParameters

    tiny_retriever(tmp_path / "model").save(tmp_path / "model")
    script = [str(ROOT / "contriever" / "search.py"), "--passages", str(notes), "--mcp", "--device", "cpu"]
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--retriever", "bm25"]
    parameters = StdioServerParameters(command=sys.executable, args=[*script, *flags], env=dict(os.environ))
    _, answer = found_by(parameters, ("search", {"query": "stall"}))
    assert [hit["path"] for hit in answer.structured_content["results"]] == ["a.txt"]
