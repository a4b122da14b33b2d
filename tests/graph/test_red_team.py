"""What a hostile catalog or user writes stays text, from the prompt to the terminal."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from io import StringIO
from typing import Any, cast

import pytest
from rich.console import Console, RenderableType

from deeprec.errors import RequestError
from deeprec.graph import protocol
from deeprec.graph.build import build_graph
from deeprec.graph.display import history_lines, response_lines
from deeprec.graph.engine.tokenizer import load_tokenizer
from deeprec.graph.protocol import AnswerForm, ListedItem
from deeprec.graph.requests import parse_request
from deeprec.graph.state import Failure, RecommendationResponse, RunSettings, State, Turn
from deeprec.graph.transcript import segment_ids
from deeprec.graph.wishes import read_wishes
from deeprec.settings import load_settings
from deeprec.terminal import tells_errors
from deeprec.tools.interactions import Item
from deeprec.tools.retriever import Retriever
from deeprec.tools.titles import display_titles, sanitise, sanitise_attributes

from ..red_team import TEXTS, whole
from . import policies
from .conftest import ScriptedEngine
from .test_loop import answer, ask

FORMS: tuple[AnswerForm, ...] = ("titles", "numbers")
DRIVES = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Characters that a terminal or a reader's eye obeys."""
TEAM = 80  # items of one list
ITEMS = tuple(
    Item(
        f"red-{at}",
        whole(text),
        {"about": (whole(text),), whole(text): ("x",), "team": (f"red {at // TEAM}",)},
    )
    for at, text in enumerate(TEXTS)
)
SHOWN = tuple(
    ListedItem(
        item.id,
        title,
        tuple(f"{name}: {', '.join(values)}" for name, values in shown.items()),
    )
    for item, title in zip(ITEMS, display_titles(ITEMS), strict=True)
    if (shown := sanitise_attributes(item.attributes))
)
NUMBERS = {item.id: at for at, item in enumerate(SHOWN, 1)}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(load_settings().model_name)


def special(tokenizer: Any, ids: list[int]) -> Counter[int]:
    """How often each special token occurs."""
    every = {at for at, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert every >= set(tokenizer.all_special_ids)
    return Counter(token for token in ids if token in every)


def test_the_red_team_is_large() -> None:
    assert len(set(TEXTS)) == len(TEXTS) >= 200


@pytest.mark.parametrize("form", FORMS)
def test_a_list_holds_a_line_for_each_title_and_ends_once(tokenizer: Any, form: AnswerForm) -> None:
    text = protocol.render_retrieved(SHOWN, NUMBERS, form)
    lines = text.strip("\n").split("\n")
    assert lines == text.strip("\n").splitlines()
    assert (lines[0], lines[-1]) == (protocol.BEGIN_ITEMS, protocol.END_ITEMS)
    assert len(lines) == 2 + sum(1 + bool(item.attributes) for item in SHOWN)
    assert max(map(len, lines)) <= protocol.MAX_LINE_CHARS
    inside = "\n".join(lines[1:-1])
    assert not any(marker in inside for marker in policies.MARKERS)
    assert not DRIVES.search(inside)
    assert protocol.parse_turn(inside).preference is None
    assert protocol.parse_answer(inside) is None
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert not special(tokenizer, ids)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("form", FORMS)
def test_a_copied_title_names_its_item(form: AnswerForm) -> None:
    titles = [item.title if form == "titles" else f"#{NUMBERS[item.id]}" for item in SHOWN]
    entries = protocol.parse_answer(answer(*titles))
    assert entries == titles
    resolved = protocol.resolve_entries(entries, SHOWN, NUMBERS, form)
    assert resolved == [item.id for item in SHOWN]


@pytest.mark.parametrize("form", FORMS)
def test_a_prompt_has_the_markers_and_special_tokens_of_its_own(
    tokenizer: Any, form: AnswerForm
) -> None:
    clean = [line for text in TEXTS if (line := sanitise(text))]

    def counted(items: tuple[ListedItem, ...], words: list[str]) -> tuple[Counter[int], list[int]]:
        messages = protocol.build_messages(
            items, k=2, answer_form=form, wishes=words, likes=words, dislikes=words
        )
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        text = "".join(message["content"] for message in messages)
        return special(tokenizer, ids), [text.count(marker) for marker in policies.MARKERS]

    assert counted(SHOWN, clean) == counted((ListedItem("a", "Alien"),), ["comedy"])


def test_a_wish_is_one_clean_line_or_refused(retriever: Retriever) -> None:
    for text in TEXTS:
        try:
            request = parse_request(history=["0"], wishes=[text])
        except RequestError as error:
            assert "wishes" in str(error)  # noqa: PT017
            continue
        read = read_wishes(request.wishes, retriever.catalog)
        assert len(read.words) <= 1
        for line in (*read.words, *(wish.means for wish in read.understood)):
            assert sanitise(line) == line


@pytest.fixture(scope="module")
def red(retriever: Retriever) -> Iterator[Retriever]:
    """The retriever over a catalog in which the red team has items."""
    retriever.upsert(ITEMS)
    yield retriever
    retriever.remove([item.id for item in ITEMS])


@pytest.mark.parametrize("form", FORMS)
def test_a_catalog_of_the_red_team_is_searched_ranked_and_shown(
    red: Retriever, tokenizer: Any, form: AnswerForm
) -> None:
    settings = RunSettings.model_validate(
        {
            "decoding": "free",
            "retrieve_n": 200,
            "answer_form": form,
            "explain": True,
            "limits": {"max_new_tokens": 200_000, "max_total_tokens": 500_000},
        }
    )
    engine = ScriptedEngine([], 500_000)
    graph = build_graph(engine, red, settings=settings)
    for first in range(0, len(ITEMS), TEAM):
        team = ITEMS[first : first + TEAM]
        titles = [red.catalog.display_title(item.id) for item in team]
        numbers = [f"#{rank}" for rank in range(1, len(team) + 1)]
        engine.script = [
            *("<think>" + ask("films"), "So.</think>"),
            *(answer(*(titles if form == "titles" else numbers)), ""),
        ]
        filters = {"team": f"red {first // TEAM}"}
        request = {"history": ["0", "1"], "k": len(team), "filters": filters}
        state = cast(dict[str, Any], graph.invoke(request, output_keys=list(State.__annotations__)))
        heard = [s for s in state["segments"] if s["author"] in ("environment", "forced")]
        for piece in heard:
            assert not special(tokenizer, segment_ids(piece).tolist())
        fields = RecommendationResponse.model_fields
        response = RecommendationResponse.model_validate({name: state[name] for name in fields})
        assert {line.id for line in response.recommendations} == {item.id for item in team}
        assert {line.source for line in response.recommendations} == {"policy"}
        assert response.violations in ([], ["placeholder"])  # a title is the prompt's example
        check_shown(*response_lines(response, trace=True), holds=titles)


def check_shown(*lines: RenderableType, holds: list[str]) -> None:
    """On a terminal with colours and in a file: titles as they are, and nothing that drives it."""
    for colours in ("truecolor", None):
        told = StringIO()
        console = Console(
            file=told,
            width=4000,
            force_terminal=colours is not None,
            color_system=cast(Any, colours),
        )
        for line in lines:
            console.print(line)
        bare = re.sub(r"\x1b\[[0-9;]*m", "", told.getvalue()) if colours else told.getvalue()
        assert not DRIVES.search(bare)
        assert all(text in bare for text in holds)


def test_what_the_policy_wrote_is_shown_as_text() -> None:
    texts = [whole(text)[:2000] for text in TEXTS]
    response = RecommendationResponse(
        recommendations=[],
        turns=[Turn(thought=text, preference=text, refused=text) for text in texts],
        answer=[],
        violations=[],
        stop_reason="no_answer",
        failure=Failure(reason="no_answer", detail="".join(texts)),
        usage={"seconds": 1},  # type: ignore[arg-type]  # pydantic makes it
    )
    tags = [text for text in texts if re.fullmatch(r"[ -~]+", text)]
    check_shown(*response_lines(response, trace=True), holds=tags[:20])
    check_shown(history_lines(texts), holds=[])


def test_an_error_is_told_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(text: str) -> int:
        raise RequestError(text)

    tell: Callable[[str], int] = tells_errors(fail)
    for text in TEXTS:
        assert tell(text[:2000]) == 2
    told = capsys.readouterr().err
    assert not DRIVES.search(told.replace("\t", " "))
    assert "[link=file:///etc/hosts]x" in told
    told.encode()
