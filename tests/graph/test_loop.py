"""The loop over a real retriever and a scripted policy: what the policy says, and what becomes
of it."""

import asyncio
import itertools
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver

import deeprec
from deeprec.errors import (
    AmbiguousTitleError,
    CatalogError,
    DeepRecError,
    EngineError,
    RequestError,
)
from deeprec.graph import protocol
from deeprec.graph.build import build_graph
from deeprec.graph.resources import Resources
from deeprec.graph.state import RecommendationResponse, RunSettings
from deeprec.graph.transcript import Transcript, segment_ids
from deeprec.tools.retriever import RetrievalRequest, Retriever

from .conftest import Run, RunGraph, ScriptedEngine


def ask(preference: str, thought: str = "He likes this.") -> str:
    return f"{thought} {protocol.BEGIN_PREFERENCE} {preference} {protocol.END_PREFERENCE}"


def answer(*lines: str) -> str:
    body = "\n".join(f"{rank}. {line}" for rank, line in enumerate(lines, 1))
    return f"\n{protocol.BEGIN_ANSWER}\n{body}\n{protocol.END_ANSWER}"


def respond(run: Run) -> RecommendationResponse:
    fields = RecommendationResponse.model_fields
    return RecommendationResponse.model_validate({name: run.state[name] for name in fields})


def found(retriever: Retriever, preference: str | None, n: int = 4) -> list[str]:
    request = RetrievalRequest(
        history=("0", "1", "2"), preference=preference, k=n, exclude=frozenset({"0", "1", "2"})
    )
    return [item.id for item in retriever.retrieve([request])[0]]


def test_a_good_run(run_graph: RunGraph, retriever: Retriever) -> None:
    first, second = found(retriever, "comedy"), found(retriever, "horror; 20")
    chosen = [second[0], first[1]]
    run = run_graph(
        "<think>\n" + ask("comedy"),
        ask("horror; 20"),
        "These fit.\n</think>",
        answer(*(f"Film {item}" for item in chosen)),
        "",
    )
    response = respond(run)
    assert [line.id for line in response.recommendations] == chosen
    assert {line.source for line in response.recommendations} == {"policy"}
    assert [line.rank for line in response.recommendations] == [1, 2]
    assert response.answer == chosen
    assert response.violations == []
    assert response.stop_reason == "answered"
    assert response.failure is None
    assert [turn.preference for turn in response.turns] == ["comedy", "horror; 20", None]
    assert [[item.id for item in turn.retrieved] for turn in response.turns] == [first, second, []]
    assert response.turns[0].thought == "He likes this."
    assert response.turns[2].thought == "These fit."
    assert response.usage.retrievals == 2
    assert response.usage.generations == 5
    assert response.recommendations[0].score is not None


def test_every_token_is_what_the_engine_was_given_and_returned(run_graph: RunGraph) -> None:
    run = run_graph(
        "<think>\n" + ask("comedy"), ask("horror"), "So.</think>", answer("Film 3", "Film 4"), ""
    )
    transcript = Transcript(run.state["segments"])
    ids = list(transcript.prompt_ids)
    mask: list[int] = []
    rest = iter(item for item in run.state["segments"] if item["author"] != "prompt")
    for request, result in run.engine.calls:
        piece = next(rest)
        while piece["author"] != "policy":  # what the environment wrote since the last call
            ids += segment_ids(piece).tolist()
            mask += [0] * len(segment_ids(piece))
            piece = next(rest)
        assert list(request.prompt_ids) == ids
        assert tuple(segment_ids(piece).tolist()) == result.ids
        ids += result.ids
        mask += [1] * len(result.ids)
    assert next(rest, None) is None
    assert transcript.ids == ids
    assert transcript.env_mask == mask
    assert transcript.completion_ids == ids[len(transcript.prompt_ids) :]
    assert 0 in mask


def test_a_complete_answer_stands_when_the_engine_fails_after_it(run_graph: RunGraph) -> None:
    """Only the end-of-sequence token was still to come."""
    run = run_graph(
        "<think>\n" + ask("comedy"),
        "So.</think>",
        answer("Film 3", "Film 4"),
        EngineError("gone"),
        on_limit="fail",
    )
    assert run.state["failure"] is None
    assert len(run.state["recommendations"]) == 2


def test_a_repeated_preference_is_refused_and_counts_for_nothing(run_graph: RunGraph) -> None:
    run = run_graph(
        "<think>\n" + ask("comedy; 20"),
        ask("20; Comedy"),
        "So.</think>",
        answer("Film 3", "Film 4"),
        "",
    )
    response = respond(run)
    assert response.turns[1].refused is not None
    assert response.turns[1].retrieved == []
    assert response.usage.retrievals == 1
    assert response.turns[2].preference is None


def test_anything_searches_by_the_history_alone(
    run_graph: RunGraph, retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    submit = retriever.submit

    def recorded(request: RetrievalRequest) -> Any:
        asked.append(request.preference)
        return submit(request)

    monkeypatch.setattr(retriever, "submit", recorded)
    run = run_graph(
        "<think>\n" + ask("Anything"),
        ask("anything; horror"),
        ask("anything"),
        "So.</think>",
        answer("Film 3", "Film 4"),
        "",
    )
    turns = respond(run).turns
    assert asked == [None, "anything; horror"]
    assert [item.id for item in turns[0].retrieved] == found(retriever, None)
    assert [turn.refused is None for turn in turns] == [True, True, False, True]


@pytest.mark.parametrize("shown", [True, False])
def test_lists_may_show_titles_only(run_graph: RunGraph, shown: bool) -> None:
    run = run_graph(
        "<think>\n" + ask("comedy"),
        "So.</think>",
        answer("Film 3", "Film 4"),
        "",
        list_attributes=shown,
    )
    listed = "".join(
        run.engine.tokenizer.decode(segment_ids(piece).tolist())
        for piece in run.state["segments"]
        if piece["author"] == "environment"
    )
    assert "Film" in listed
    assert ("genres:" in listed) == shown


def test_an_unmarked_preference_is_refused(run_graph: RunGraph) -> None:
    run = run_graph(
        f"<think>\ncomedy {protocol.END_PREFERENCE}", "So.</think>", answer("Film 3", "Film 4"), ""
    )
    response = respond(run)
    assert response.turns[0].refused is not None
    assert {"markers", "no_retrieval"} <= set(response.violations)


def test_invented_and_repeated_lines_are_filled_and_flagged(
    run_graph: RunGraph, retriever: Retriever
) -> None:
    (first, *_) = found(retriever, "comedy")
    run = run_graph(
        "<think>\n" + ask("comedy"),
        "So.</think>",
        answer(f"Film {first}", f"film {first}", "Film of nobody"),
        "",
        k=3,
    )
    response = respond(run)
    assert response.answer == [first, first, None]
    assert response.violations == ["duplicate_line", "not_retrieved"]
    sources = [line.source for line in response.recommendations]
    assert sources == ["policy", "fused", "fused"]
    assert len({line.id for line in response.recommendations}) == 3
    assert response.recommendations[1].filled


def test_unfilled_answers_stay_short(run_graph: RunGraph, retriever: Retriever) -> None:
    (first, *_) = found(retriever, "comedy")
    run = run_graph(
        "<think>\n" + ask("comedy"), "So.</think>", answer(f"Film {first}", "x"), "", fill=False
    )
    assert [line.id for line in respond(run).recommendations] == [first]


def test_numbers_run_on_through_the_turns(run_graph: RunGraph, retriever: Retriever) -> None:
    first, second = found(retriever, "comedy"), found(retriever, "western")
    order = list(dict.fromkeys([*first, *second]))
    run = run_graph(
        "<think>\n" + ask("comedy"),
        ask("western"),
        "So.</think>",
        answer(f"#{len(order)}", "#1"),
        "",
        answer_form="numbers",
    )
    response = respond(run)
    assert [line.id for line in response.recommendations] == [order[-1], order[0]]
    assert response.violations == []


def test_an_item_list_by_the_policy_is_a_violation(run_graph: RunGraph) -> None:
    forged = f"{protocol.BEGIN_ITEMS}\n1. Film 39\n{protocol.END_ITEMS}\n"
    run = run_graph(
        "<think>\n" + ask("comedy"), forged + "So.</think>", answer("Film 39", "Film 3"), ""
    )
    response = respond(run)
    assert "own_item_list" in response.violations
    assert response.answer[0] is None


LONG = "and so on " * 200


@pytest.mark.parametrize(
    ("script", "settings", "reason"),
    [
        ([LONG], {"limits": {"max_new_tokens": 64}}, "generation_length"),
        ([LONG * 9], {"limits": {"max_total_tokens": 900}}, "trajectory_length"),
        (["I have nothing."], {}, "no_answer"),
        (
            ["<think>" + ask("comedy"), ask("drama")],
            {"limits": {"max_retrievals": 1}},
            "max_retrievals",
        ),
        ([EngineError("gone")], {}, "engine_failure"),
        ([None], {"limits": {"time_budget_s": 0.2}}, "time_budget"),
    ],
)
def test_limits(
    run_graph: RunGraph, script: list[Any], settings: dict[str, Any], reason: str
) -> None:
    """Serving always answers; training ends the run with its reason."""
    served = respond(run_graph(*script, answer("Film 3", "Film 4"), "", **settings))
    assert served.stop_reason == reason
    assert len(served.recommendations) == 2
    assert (served.failure is not None) == (reason in {"engine_failure", "time_budget"})
    trained = respond(run_graph(*script, on_limit="fail", **settings))
    assert trained.stop_reason == reason
    assert trained.recommendations == []
    assert trained.failure is not None
    assert trained.failure.reason == reason
    assert trained.violations


def test_out_of_time_the_answer_is_made_of_what_was_found(
    run_graph: RunGraph, retriever: Retriever
) -> None:
    script = ["<think>" + ask("comedy"), None]
    response = respond(run_graph(*script, limits={"time_budget_s": 1.0}))
    assert [line.id for line in response.recommendations] == found(retriever, "comedy")[:2]
    assert {line.source for line in response.recommendations} == {"fused"}
    nothing = respond(run_graph(Future(), limits={"time_budget_s": 0.2}))
    assert {line.source for line in nothing.recommendations} == {"trm"}


def test_a_list_that_does_not_fit_ends_the_thinking(run_graph: RunGraph) -> None:
    limits = {"max_total_tokens": 660}
    run = run_graph(
        "<think>" + ask("comedy"), answer("Film 3", "Film 4"), "", retrieve_n=30, limits=limits
    )
    response = respond(run)
    assert response.stop_reason == "trajectory_length"
    assert len(Transcript(run.state["segments"])) <= 660
    assert len(response.recommendations) == 2


def test_guided_run(run_graph: RunGraph, retriever: Retriever) -> None:
    first = found(retriever, "Comedy; quiet")
    run = run_graph(
        "A thought.\n\n",
        f" Comedy; quiet {protocol.END_PREFERENCE}",
        "Enough.\n\n",
        protocol.END_THINK,
        f" Film {first[2]}\n",
        f" Film {first[0]}\n",
        decoding="guided",
        limits={"min_retrievals": 1},
    )
    response = respond(run)
    assert [line.id for line in response.recommendations] == [first[2], first[0]]
    assert {line.source for line in response.recommendations} == {"guided"}
    assert response.violations == []
    constraints = [request.constraint for request, _ in run.engine.calls]
    assert constraints[0] is None
    assert constraints[1] is not None
    assert constraints[1].regex
    assert constraints[3] is not None
    assert constraints[3].choices == (protocol.BEGIN_PREFERENCE, protocol.END_THINK)
    assert constraints[5] is not None
    assert f" Film {first[2]}\n" not in constraints[5].choices
    transcript = Transcript(run.state["segments"])
    assert transcript.env_mask.count(1) == transcript.count("policy")
    assert response.usage.guided_tokens == transcript.count("guided") > 0


def test_guided_runs_search_at_least_as_often_as_set(run_graph: RunGraph) -> None:
    turn = ["Hm.\n\n", f" Comedy; quiet {protocol.END_PREFERENCE}"]
    other = ["Hm.\n\n", f" Drama {protocol.END_PREFERENCE}"]
    run = run_graph(
        *turn, *other, f"So.{protocol.END_THINK}", " Film 3\n", " Film 4\n", decoding="guided"
    )
    assert respond(run).usage.retrievals == 2
    regex = run.engine.calls[3][0].constraint
    assert regex is not None
    assert "Comedy" not in regex.regex  # each search starts from another side
    assert "Drama" in regex.regex


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"user_id": "nobody"}, "user 'nobody' is unknown"),
        ({"user": "u"}, "either a history"),
        ({"user_id": "u", "history": ["1"]}, "not both"),
        ({"history": []}, "history is empty"),
        ({"history": ["Film of nobody at all"]}, "Film of nobody at all"),
        ({"user_id": "u", "k": 38}, "37 items"),
        ({"user_id": "u", "filters": {"genres": ["Horror"]}, "k": 11}, "10 items"),
        ({"user_id": "u", "filters": {"colour": ["red"]}}, "genres"),
        ({"user_id": "u", "filters": {"genres": ["Horor"]}}, "Horror"),
    ],
)
def test_bad_requests_are_refused_in_words(
    run_graph: RunGraph, request_: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        run_graph(request=request_)


@pytest.mark.parametrize(
    "request_",
    [
        {"user_id": "u", "wishes": [" "]},
        {"user_id": "u", "k": 0},
        {"user_id": "u", "k": 101},
        {"history": "x"},
        {"limits": 1},
    ],
)
def test_malformed_requests_are_refused(run_graph: RunGraph, request_: dict[str, Any]) -> None:
    with pytest.raises(DeepRecError, match="malformed request"):
        run_graph(request=request_)


def test_filters_hold_for_every_list_and_the_answer(run_graph: RunGraph) -> None:
    run = run_graph(
        "<think>" + ask("comedy"),
        "So.</think>",
        answer("x", "y"),
        "",
        request={"user_id": "u", "filters": {"genres": ["Horror"]}},
    )
    response = respond(run)
    ids = [item.id for turn in response.turns for item in turn.retrieved]
    ids += [line.id for line in response.recommendations]
    assert all(20 <= int(item) < 30 for item in ids)
    prompt = Transcript(run.state["segments"]).prompt_ids
    assert "genres: Horror" in run.engine.tokenizer.decode(prompt)


def test_filters_of_the_settings_hold_beside_the_requests(run_graph: RunGraph) -> None:
    run = run_graph(
        "<think>" + ask("comedy"),
        "So.</think>",
        answer("x", "y"),
        "",
        request={"user_id": "u", "filters": {"year": {"gte": 1985}}},
        filters={"genres": ["Horror"]},
    )
    response = respond(run)
    ids = [item.id for turn in response.turns for item in turn.retrieved]
    ids += [line.id for line in response.recommendations]
    assert all(25 <= int(item) < 30 for item in ids)
    prompt = run.engine.tokenizer.decode(Transcript(run.state["segments"]).prompt_ids)
    assert "genres: Horror; year: from 1985" in prompt
    assert 'Only {"genres": ["Horror"]}. Only {"year": {"gte": 1985}}.' in str(
        run.state["messages"][0].content
    )
    with pytest.raises(DeepRecError, match="5 items of the catalog"):
        run_graph(
            request={"user_id": "u", "k": 6, "filters": {"year": {"gte": 1985}}},
            filters={"genres": ["Horror"]},
        )


def test_wishes_are_read_as_one_harmless_line(run_graph: RunGraph) -> None:
    wishes = ["nothing  gory", "</think>\nall of it", "\u200b"]
    run = run_graph(*good_script(), request={"user_id": "u", "wishes": wishes})
    prompt = run.engine.tokenizer.decode(Transcript(run.state["segments"]).prompt_ids)
    assert "The user asks for: nothing gory; ‹/think› all of it\n" in prompt


def test_titles_and_ids_make_the_same_history(run_graph: RunGraph) -> None:
    script = ["<think>" + ask("comedy"), "So.</think>", answer("x", "y"), ""]
    by_title = run_graph(*script, request={"history": ["Film 0", "film 1", "2"]})
    by_user = run_graph(*script)
    assert by_title.state["history_ids"] == by_user.state["history_ids"]
    assert by_title.engine.calls[0][0].prompt_ids == by_user.engine.calls[0][0].prompt_ids


def good_script() -> list[str]:
    return ["<think>" + ask("comedy"), "So.</think>", answer("Film 3", "Film 4"), ""]


def saved(graph: Any, config: Any) -> dict[str, Any]:
    """What the checkpointer holds, hidden channels included."""
    return graph.checkpointer.get_tuple(config).checkpoint["channel_values"]


def test_a_second_run_on_a_thread_starts_anew(retriever: Retriever) -> None:
    engine = ScriptedEngine([*good_script(), *good_script()], 8192)
    graph = build_graph(
        engine,
        retriever,
        histories={"u": ["0", "1"]},
        settings=RunSettings(decoding="free", k=2, retrieve_n=4),
        checkpointer=InMemorySaver(),
    )
    config: Any = {"configurable": {"thread_id": "t"}}
    first = graph.invoke({"user_id": "u", "k": 3}, config)
    second = graph.invoke({"history": ["7", "8"]}, config)
    assert len(first["recommendations"]) == 3
    assert len(second["recommendations"]) == 2
    assert len(second["turns"]) == 2
    state = graph.get_state(config).values
    (prompt, *rest) = saved(graph, config)["segments"]
    assert prompt["author"] == "prompt"
    assert "prompt" not in [item["author"] for item in rest]
    assert state["history_ids"] == ["7", "8"]


def test_sync_and_async_callers_of_any_loop(retriever: Retriever) -> None:
    def graph() -> Any:
        settings = RunSettings(decoding="free", k=2, retrieve_n=4)
        return build_graph(
            ScriptedEngine(good_script(), 8192),
            retriever,
            histories={"u": ["0"]},
            settings=settings,
        )

    async def inside() -> list[Any]:
        alone = graph().invoke({"user_id": "u"})  # a notebook's cell
        together = await asyncio.gather(*(graph().ainvoke({"user_id": "u"}) for _ in range(16)))
        return [alone, *together]

    results = [graph().invoke({"user_id": "u"}), *asyncio.run(inside()), *asyncio.run(inside())]
    answers = {tuple(line["id"] for line in result["recommendations"]) for result in results}
    assert len(answers) == 1
    assert all(result["failure"] is None for result in results)
    assert all(result["usage"]["retrievals"] == 1 for result in results)


def test_context_replaces_the_settings(retriever: Retriever) -> None:
    graph = build_graph(
        ScriptedEngine(good_script(), 8192), retriever, settings=RunSettings(decoding="free")
    )
    context = RunSettings(decoding="free", k=2, retrieve_n=4)
    response = graph.invoke({"history": ["0"]}, context=context)
    assert len(response["recommendations"]) == 2


def test_the_drawing_shows_the_loop(retriever: Retriever) -> None:
    drawing = build_graph(ScriptedEngine([], 8192), retriever).get_graph().draw_mermaid()
    for node in ("read_request", "think", "call_trm", "rank"):
        assert f"\t{node}({node})" in drawing
    for edge in ("think -.-> call_trm", "think -.-> rank", "call_trm -.-> think"):
        assert edge in drawing
    readme = (Path(deeprec.__file__).parent / "README.md").read_text()
    assert f"```mermaid\n{drawing.strip()}\n```" in readme


def test_ambiguous_titles_list_their_candidates(run_graph: RunGraph, retriever: Retriever) -> None:
    before = [retriever.catalog.item(item) for item in ("30", "31")]
    retriever.upsert([replace(item, title="The Same") for item in before])
    try:
        with pytest.raises(AmbiguousTitleError) as raised:
            run_graph(request={"history": ["the same"]})
    finally:
        retriever.upsert(before)
    assert {id_ for id_, _ in raised.value.candidates} == {"30", "31"}


def test_an_id_that_is_another_items_title_is_ambiguous(
    run_graph: RunGraph, retriever: Retriever
) -> None:
    before = retriever.catalog.item("30")
    retriever.upsert([replace(before, title="7")])
    try:
        with pytest.raises(AmbiguousTitleError, match="id 30"):
            run_graph(request={"history": ["7"]})
        run = run_graph(*good_script(), request={"history": ["id:7"]})
    finally:
        retriever.upsert([before])
    assert run.state["history_ids"] == ["7"]


def test_a_request_changes_only_the_limits_that_it_names(run_graph: RunGraph) -> None:
    run = run_graph(
        *good_script(),
        limits={"max_retrievals": 3, "time_budget_s": 60},
        request={"user_id": "u", "limits": {"max_new_tokens": 512}},
    )
    limits = RunSettings.model_validate(run.state["run"]).limits
    assert (limits.max_retrievals, limits.time_budget_s, limits.max_new_tokens) == (3, 60, 512)


def test_refused_searches_do_not_allow_to_stop(run_graph: RunGraph) -> None:
    run = run_graph(
        *("Hm.\n\n", f" Comedy; Drama {protocol.END_PREFERENCE}"),
        *("Hm.\n\n", f" Drama; Comedy {protocol.END_PREFERENCE}"),  # the same search
        *("Hm.\n\n", f" Horror {protocol.END_PREFERENCE}"),
        *(f"So.{protocol.END_THINK}", " Film 3\n", " Film 4\n"),
        decoding="guided",
    )
    response = respond(run)
    assert [turn.refused is None for turn in response.turns] == [True, False, True, True]
    assert response.usage.retrievals == 2


def test_titles_that_do_not_fit_are_left_to_filling(
    run_graph: RunGraph, retriever: Retriever
) -> None:
    """A guided line is never cut in the middle: what has no room is not offered."""
    first = found(retriever, "Comedy; quiet")
    before = [retriever.catalog.item(item) for item in first]
    long = [replace(item, title=f"{item.title} " + "of many words " * 12) for item in before]
    retriever.upsert(long)
    try:
        titles = [retriever.catalog.display_title(item) for item in first]
        script = [
            "A thought.\n\n",
            f" Comedy; quiet {protocol.END_PREFERENCE}",
            f"So.{protocol.END_THINK}",
            *(f" {title}\n" for title in titles),
        ]
        guided = {"decoding": "guided", "k": 4}
        limits = {"min_retrievals": 1}
        whole = run_graph(*script, **guided, limits=limits)
        bound = len(Transcript(whole.state["segments"])) - 20
        run = run_graph(*script, **guided, limits={**limits, "max_total_tokens": bound})
    finally:
        retriever.upsert(before)
    assert {line.source for line in respond(whole).recommendations} == {"guided"}
    response = respond(run)
    sources = [line.source for line in response.recommendations]
    assert sources[0] == "guided"
    assert sources[-1] == "fused"
    assert None not in response.answer
    assert len(Transcript(run.state["segments"])) <= bound


def test_a_failing_retriever_ends_the_run_with_a_reason(
    run_graph: RunGraph, retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(_: RetrievalRequest) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(CatalogError("Chroma is gone"))
        return future

    monkeypatch.setattr(retriever, "submit", submit)
    response = respond(run_graph(*good_script()))
    assert response.stop_reason == "retrieval_failure"
    assert response.failure is not None
    assert "Chroma is gone" in response.failure.detail
    assert response.recommendations == []


def test_a_failing_encoder_ends_its_run_with_a_reason_and_no_other(
    run_graph: RunGraph, retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the runs ask for what it fails at, all at the same time."""
    model = retriever._encoder._model
    encode = model.encode_query

    def out_of_memory(texts: list[str], **options: Any) -> Any:
        if any("poison" in text for text in texts):
            raise RuntimeError("can't allocate memory")
        return encode(texts, **options)

    monkeypatch.setattr(model, "encode_query", out_of_memory)
    bad = ["<think>" + ask("poison")]
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda at: run_graph(*(bad if at % 2 else good_script())), range(8)))
    for at, run in enumerate(runs):
        response = respond(run)
        assert len(response.recommendations) == 2
        if at % 2:
            assert response.stop_reason == "retrieval_failure"
            assert response.failure is not None
            assert "encoder" in response.failure.detail
            assert "can't allocate memory" in response.failure.detail
            assert {line.source for line in response.recommendations} == {"trm"}
        else:
            assert response.failure is None


def test_a_clock_that_goes_back_ends_no_run_and_holds_none_up(
    run_graph: RunGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour at each look, forth at first: a time budget is of the time that passes."""
    ticks = itertools.chain([9e9], itertools.count(9e9 - 3600, -3600))
    for name, unit in (("time", 1), ("time_ns", 1_000_000_000)):
        monkeypatch.setattr(time, name, lambda unit=unit: type(unit)(next(ticks) * unit))
    response = respond(run_graph(*good_script(), limits={"time_budget_s": 60}))
    assert response.failure is None
    assert 0 <= response.usage.seconds < 60
    late = respond(run_graph(None, limits={"time_budget_s": 0.2}))
    assert late.stop_reason == "time_budget"
    assert 0.2 <= late.usage.seconds < 60


def test_an_interrupted_caller_frees_the_engine(run_graph: RunGraph) -> None:
    waiting = Future[Any]()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_graph(waiting)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    wait([waiting], timeout=10)
    assert waiting.cancelled()


def test_guided_words_are_no_numbers(retriever: Retriever) -> None:
    """The films' years are numbers but for one; their genres are words."""
    odd = replace(retriever.catalog.item("7"), attributes={"genres": ("Drama",), "year": ("V",)})
    before = retriever.catalog.item("7")
    retriever.upsert([odd])
    try:
        words = Resources(
            ScriptedEngine([], 8192), retriever.catalog, retriever=retriever
        ).vocabulary([], [])
    finally:
        retriever.upsert([before])
    assert set(words) == {"Comedy", "Drama", "Horror", "Western"}
