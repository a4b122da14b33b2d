"""The retriever as a LangChain tool, so that any agent can call it."""

import asyncio
from typing import Annotated

from langchain_core.tools import StructuredTool, ToolException
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ..errors import CatalogError, EncoderError, RequestError
from .catalog import Catalog
from .filters import Filters
from .retriever import RetrievalRequest, Retriever, ScoredItem

MAX_HISTORY = 1000
MAX_K = 200
MAX_NAME_CHARS = 1000  # of an id or title of the history
MAX_ASKED_CHARS = 10_000  # of a preference; what is over MAX_PREFERENCE_CHARS is not read

_FilterValue = str | int | float
_FilterRange = dict[str, _FilterValue | list[_FilterValue]]


class RetrieveItemsArgs(BaseModel):
    """Arguments of the tool."""

    model_config = ConfigDict(extra="forbid")

    history: list[Annotated[str, StringConstraints(max_length=MAX_NAME_CHARS)]] = Field(
        description="Items the user liked, oldest first: catalog ids or titles; 'id:' before an "
        "id tells it from a title.",
        min_length=1,
        max_length=MAX_HISTORY,
        examples=[["Toy Story", "Aladdin"]],
    )
    preference: str | None = Field(
        None,
        max_length=MAX_ASKED_CHARS,
        description="What to look for: short phrases joined by ';'. Leave it out to go by the "
        "history alone.",
        examples=["animated adventure; 1990s; for children"],
    )
    k: int = Field(20, ge=1, le=MAX_K, description="How many items to retrieve.")
    filters: dict[str, _FilterValue | list[_FilterValue] | _FilterRange] | None = Field(
        None,
        description="Attributes that items must have: a value, a list (any of them), "
        '{"gte": …, "lte": …} for numbers, {"not": […]} to leave some out.',
        examples=[{"genres": ["Comedy", "Drama"], "year": {"gte": 1990, "lte": 1999}}],
    )


class RetrievedItem(BaseModel):
    """One item of the answer."""

    id: str
    title: str
    score: float
    attributes: dict[str, list[str]]


def retrieve_items_tool(retriever: Retriever, catalog: Catalog) -> StructuredTool:
    """The tool `retrieve_items`: {history, preference, k, filters} to a list of
    {id, title, score, attributes}, best first, without the items of the history.

    Titles and attributes are sanitised. A request that can't be answered comes back as a tool
    error whose text names the value and the remedy.
    """

    def request(
        history: list[str],
        preference: str | None,
        k: int,
        filters: dict[str, _FilterValue | list[_FilterValue] | _FilterRange] | None,
    ) -> RetrievalRequest:
        ids = tuple(catalog.resolve(text) for text in history)
        return RetrievalRequest(ids, preference, k, frozenset(ids), Filters.parse(filters))

    def shown(found: list[ScoredItem]) -> list[dict[str, object]]:
        return [
            RetrievedItem(
                id=item.id,
                title=catalog.display_title(item.id),
                score=item.score,
                attributes={n: list(v) for n, v in catalog.display_attributes(item.id).items()},
            ).model_dump()
            for item in found
        ]

    def retrieve_items(
        history: list[str],
        preference: str | None = None,
        k: int = 20,
        filters: dict[str, _FilterValue | list[_FilterValue] | _FilterRange] | None = None,
    ) -> list[dict[str, object]]:
        """Retrieve the catalog items that fit a user's history and a stated preference best."""
        try:
            wanted = request(history, preference, k, filters)
            return shown(retriever.submit(wanted).result())
        except (RequestError, CatalogError, EncoderError) as error:
            raise ToolException(str(error)) from error

    async def retrieve_items_async(
        history: list[str],
        preference: str | None = None,
        k: int = 20,
        filters: dict[str, _FilterValue | list[_FilterValue] | _FilterRange] | None = None,
    ) -> list[dict[str, object]]:
        try:
            # Matching titles is work, and must not stop the event loop.
            wanted = await asyncio.to_thread(request, history, preference, k, filters)
            return shown(await asyncio.wrap_future(retriever.submit(wanted)))
        except (RequestError, CatalogError, EncoderError) as error:
            raise ToolException(str(error)) from error

    return StructuredTool.from_function(
        func=retrieve_items,
        coroutine=retrieve_items_async,
        name="retrieve_items",
        args_schema=RetrieveItemsArgs,
        handle_tool_error=True,
    )
