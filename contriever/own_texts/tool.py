"""The search as a tool of language models, by the official library of the Model Context Protocol (MCP)."""

import contextlib
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .background import LiveIndex, NotReady
from .index import answer
from .rendering import MOST_RESULTS

if TYPE_CHECKING:
    from mcp.server.mcpserver import MCPServer

SECONDS_TO_WAIT = 50  # for what is being indexed; then what is there is searched


def make_server(index: LiveIndex, root: Path, top_k: int, retriever: str, dense_weight: float) -> "MCPServer":
    """A server with the one tool ``search``."""
    if find_spec("mcp") is None:
        raise ValueError("--mcp needs mcp: pip install -e '.[mcp]'")
    from mcp.server.mcpserver import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError
    from mcp.types import ToolAnnotations
    from pydantic import Field

    @contextlib.asynccontextmanager
    async def indexing(server: MCPServer) -> AsyncIterator[None]:
        index.start()  # not before the server has taken standard output for itself, which threads may redirect
        yield

    instructions = f"Finds passages of the texts in {root}."
    server = MCPServer("search", instructions=instructions, log_level="WARNING", lifespan=indexing)
    most = Field(ge=1, le=MOST_RESULTS, description="passages to return")

    @server.tool(annotations=ToolAnnotations(read_only_hint=True, open_world_hint=False))
    def search(
        query: Annotated[str, Field(min_length=1, description="words, a question, or a sentence")],
        top_k: Annotated[int, most] = min(top_k, MOST_RESULTS),
    ) -> dict[str, Any]:
        """Passages of the user's own texts that fit a query, best first.

        Parts in "quotation marks" must occur as they are. Each of the results has score, path, line (or, as unit says,
        page or paragraph), title (headings), text, and others (further places of the same text). A state that is not
        empty tells that not everything is indexed yet.
        """
        try:
            index.wait(SECONDS_TO_WAIT)
            hits = index.search(query, top_k, retriever, dense_weight)
        except NotReady as error:
            raise ToolError(f"{error}, ask again in a minute") from None
        except (ValueError, OSError) as error:
            raise ToolError(str(error)) from None
        return answer(query, hits, index.left_out, index.state)

    return server
