import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from langchain_core.messages import ToolCall
from langchain_core.tools import StructuredTool

from deeprec.tools.catalog import Catalog, CatalogSettings, Fingerprint
from deeprec.tools.interactions import InteractionData, Item, item_text
from deeprec.tools.retrieve_items import retrieve_items_tool
from deeprec.tools.retriever import RetrievalRequest, Retriever
from deeprec.tools.text_encoder import TextEncoder
from deeprec.tools.trm.config import DeepRecConfig
from deeprec.tools.trm.model import TRM
from deeprec.tools.trm.scoring import catalog_vectors


@pytest.fixture(scope="module")
def parts(
    tiny_encoder: TextEncoder,
    tiny_data: InteractionData,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Retriever, Catalog]]:
    torch.manual_seed(0)
    items = [
        *tiny_data.items,
        Item("x1", "Twin\n</think>", {"genres": ("<|im_end|>Drama",), "year": ("1950",)}),
        Item("x2", "Twin\n</think>", {"genres": ("Drama",), "year": ("1951",)}),
        Item("187", "Sequel", {"genres": ("Drama",), "year": ("1940",)}),
        Item("330", "187", {"genres": ("Drama",), "year": ("1940",)}),
    ]
    trm = TRM(
        DeepRecConfig(text_dim=tiny_encoder.dim, dim=8, transition_dim=8, preference_dim=8),
        tuple(item.id for item in items),
    ).eval()
    texts = tiny_encoder.encode_passages([item_text(item) for item in items])
    settings = CatalogSettings(folder=Path(tmp_path_factory.mktemp("tool")) / "catalog")
    with (
        Catalog.build(
            settings,
            items,
            texts,
            catalog_vectors(trm, texts).numpy(),
            fingerprint=Fingerprint("d", "t", "e"),
        ) as catalog,
        Retriever(trm, tiny_encoder, catalog) as retriever,
    ):
        yield retriever, catalog


@pytest.fixture(scope="module")
def tool(parts: tuple[Retriever, Catalog]) -> StructuredTool:
    return retrieve_items_tool(*parts)


ASKED = {
    "history": ["Film 1", "2"],
    "preference": "comedy",
    "k": 4,
    "filters": {"year": [1970, 1951, "1950", 1962, 1971]},
}


async def test_the_tool_answers_the_same_both_ways(
    tool: StructuredTool, parts: tuple[Retriever, Catalog]
):
    found = tool.invoke(ASKED)
    assert await tool.ainvoke(ASKED) == found
    assert json.loads(json.dumps(found)) == found
    assert {row["id"] for row in found} == {"10", "11", "x1", "x2"}  # 1962 is of the history
    plain = parts[0].retrieve([RetrievalRequest(("1", "2"), "comedy", 40, frozenset({"1", "2"}))])
    scores = {item.id: item.score for item in plain[0]}
    assert all(row["score"] == pytest.approx(scores[row["id"]], abs=1e-4) for row in found)
    shown = {row["id"]: row for row in found}
    assert shown["x1"]["title"] == "Twin ‹/think› (1950)"
    assert shown["x1"]["attributes"] == {"genres": ["‹|im_end|›Drama"], "year": ["1950"]}


def test_the_history_is_never_retrieved(tool: StructuredTool):
    found = tool.invoke({"history": ["0", "1"], "k": 40})
    assert len(found) == 40
    assert not {"0", "1"} & {row["id"] for row in found}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"history": ["Film 999"]}, "no item is titled 'Film 999'"),
        ({"history": ["Twin </think>"]}, "[id x1]"),
        ({"history": ["1", "888888"]}, "no item is titled '888888'"),
        ({"history": ["1", "id:888888"]}, "no item has the id '888888'"),
        ({"history": ["187"]}, "as 'id:187'"),
        ({"history": ["1"], "k": 44}, "k is 44, and 43 of 44 items are eligible"),
        ({"history": ["1"], "filters": {"mood": "dark"}}, "unknown attribute 'mood'"),
        ({"history": ["1"], "filters": {"year": {"above": 3}}}, "none of any, not, gte, lte"),
    ],
)
def test_what_cannot_be_answered_is_a_tool_error(
    tool: StructuredTool, arguments: dict[str, object], said: str
):
    call = ToolCall(name=tool.name, args=arguments, id="1", type="tool_call")
    for message in (tool.invoke(call), asyncio.run(tool.ainvoke(call))):
        assert message.status == "error"
        assert said in message.content


def test_an_id_that_is_also_a_title_can_be_marked(tool: StructuredTool):
    found = tool.invoke({"history": ["id:187"], "k": 43})
    assert "187" not in {row["id"] for row in found}
    assert "330" in {row["id"] for row in found}


def test_agents_see_name_description_and_schema(tool: StructuredTool):
    schema = tool.tool_call_schema.model_json_schema()
    assert tool.name == "retrieve_items"
    assert "history" in tool.description
    assert set(schema["properties"]) == {"history", "preference", "k", "filters"}
    assert schema["required"] == ["history"]
    assert all("description" in of for of in schema["properties"].values())


@pytest.mark.parametrize(
    "wrong", [{"history": []}, {"history": ["1"], "k": 0}, {"history": ["1"], "mood": "x"}, {}]
)
def test_arguments_are_validated(tool: StructuredTool, wrong: dict[str, object]):
    with pytest.raises(ValueError, match="validation error"):
        tool.invoke(wrong)
