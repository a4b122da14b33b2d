"""The whole graph on the real LLM in the real vLLM, in process and over its server."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from deeprec.errors import EngineError
from deeprec.graph.build import build_graph
from deeprec.graph.engine.base import Constraint, Engine, Generation, GenerationRequest
from deeprec.graph.engine.vllm_inprocess import VLLMEngine
from deeprec.graph.engine.vllm_server import VLLMServerEngine
from deeprec.graph.engine.weight_sync import SyncWorker, _end_with
from deeprec.graph.state import RecommendationResponse, RunSettings, State
from deeprec.graph.transcript import Transcript, segment_ids
from deeprec.settings import load_settings
from deeprec.tools.retriever import Retriever

from .test_loop import saved

pytestmark = pytest.mark.engine

SAMPLED = ("policy", "guided")
_SLEEP = "import time; time.sleep(60)"


@pytest.fixture(scope="module")
def server(llm_server: str) -> Iterator[Engine]:
    engine = VLLMServerEngine(llm_server)
    yield engine
    engine.close()


class Recorder(Engine):
    """Passes on to a real engine and keeps what it was given and returned."""

    def __init__(self, engine: Engine) -> None:
        self.name, self.max_model_len = engine.name, engine.max_model_len
        self.tokenizer = engine.tokenizer
        self.engine = engine
        self.calls: list[tuple[GenerationRequest, Generation]] = []

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        future = self.engine.submit(request)
        future.add_done_callback(
            lambda done: done.exception() or self.calls.append((request, done.result()))
        )
        return future

    def close(self) -> None:
        pass


def run(engine: Engine, retriever: Retriever, user: int, **settings: Any) -> dict[str, Any]:
    chosen = RunSettings.model_validate(
        {
            "k": 4,
            "retrieve_n": 5,
            "thought_tokens": 24,
            "temperature": 0.8,
            "seed": user,
            "limits": {"max_retrievals": 3, "max_new_tokens": 96},
            **settings,
        }
    )
    histories = {"u": [str(user), str(user + 1), str(user + 2)]}
    graph = build_graph(engine, retriever, histories=histories, settings=chosen)
    keys = list(State.__annotations__)
    *_, state = graph.stream({"user_id": "u"}, stream_mode="values", output_keys=keys)
    return state


@pytest.mark.parametrize("decoding", ["guided", "free"])
@pytest.mark.parametrize("where", ["real_engine", "server"])
def test_transcripts_are_what_the_engine_was_given_and_returned(
    where: str, decoding: str, retriever: Retriever, request: pytest.FixtureRequest
) -> None:
    """Turn by turn: this fails if any turn is tokenised again."""
    recorder = Recorder(request.getfixturevalue(where))
    state = run(recorder, retriever, 3, decoding=decoding)
    assert len(recorder.calls) >= 2
    ids = Transcript(state["segments"]).prompt_ids
    rest = iter(state["segments"][1:])
    for given, returned in recorder.calls:
        piece = next(rest)
        while piece["author"] not in SAMPLED:
            ids += segment_ids(piece).tolist()
            piece = next(rest)
        assert piece["author"] == ("guided" if given.constraint else "policy")
        assert list(given.prompt_ids) == ids
        assert tuple(segment_ids(piece).tolist()) == returned.ids
        ids += returned.ids
    for piece in rest:
        assert piece["author"] == "forced"
        ids += segment_ids(piece).tolist()
    assert Transcript(state["segments"]).ids == ids


@pytest.mark.parametrize("answer_form", ["titles", "numbers"])
def test_guided_runs_end_with_a_valid_grounded_list(
    real_engine: Engine, retriever: Retriever, answer_form: str
) -> None:
    with ThreadPoolExecutor() as pool:
        states = pool.map(
            lambda user: run(real_engine, retriever, user, answer_form=answer_form), (0, 22)
        )
    for state in states:
        response = RecommendationResponse.model_validate(
            {name: state[name] for name in RecommendationResponse.model_fields}
        )
        ids = [line.id for line in response.recommendations]
        retrieved = {item.id for turn in response.turns for item in turn.retrieved}
        assert len(set(ids)) == 4
        assert not set(ids) & set(state["history_ids"])
        assert set(ids) <= retrieved
        assert {line.source for line in response.recommendations} == {"guided"}
        assert response.usage.retrievals >= 2
        assert response.failure is None


def test_free_running_graphs_share_the_engine(real_engine: Engine, retriever: Retriever) -> None:
    settings = RunSettings.model_validate(
        {
            "k": 2,
            "retrieve_n": 3,
            "thought_tokens": 8,
            "limits": {"max_retrievals": 1, "min_retrievals": 1},
        }
    )
    graph = build_graph(real_engine, retriever, settings=settings)

    async def many() -> list[dict[str, Any]]:
        requests = [{"history": [str(n), str(n + 1)]} for n in range(8)]
        return await asyncio.gather(*(graph.ainvoke(request) for request in requests))

    answers = asyncio.run(many())
    assert [len(answer["recommendations"]) for answer in answers] == [2] * 8
    assert all(answer["failure"] is None for answer in answers)
    assert all(answer["usage"]["retrievals"] == 1 for answer in answers)


def test_what_a_generation_is(real_engine: Engine) -> None:
    tokenizer = real_engine.tokenizer
    prompt = tokenizer.encode("One, two, three, four,")
    base = GenerationRequest(prompt_ids=prompt, max_tokens=16)
    plain = real_engine.submit(base).result()
    assert plain.finish == "length"
    assert len(plain.ids) == len(plain.logprobs) == 16
    assert all(value <= 0 for value in plain.logprobs)
    stopped = real_engine.submit(
        GenerationRequest(prompt_ids=prompt, max_tokens=16, stop=(" six",))
    ).result()
    assert (stopped.finish, stopped.stop_string) == ("stop", " six")
    assert tokenizer.decode(stopped.ids).endswith(" six")
    assert stopped.ids == plain.ids[: len(stopped.ids)]
    chosen = real_engine.submit(
        GenerationRequest(
            prompt_ids=prompt,
            max_tokens=16,
            stop=("\n",),
            constraint=Constraint(choices=(" Alien (1979)\n", " Aliens [x]\n")),
        )
    ).result()
    assert tokenizer.decode(chosen.ids) in {" Alien (1979)\n", " Aliens [x]\n"}


@pytest.mark.parametrize("where", ["real_engine", "server"])
def test_listening_changes_nothing(where: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(where)
    prompt = engine.tokenizer.encode("One, two, three, four,")
    heard: list[str] = []
    silent = GenerationRequest(prompt_ids=prompt, max_tokens=24, stop=(" nine",))
    quiet = engine.submit(silent).result()
    loud = engine.submit(replace(silent, on_text=heard.append)).result()
    assert (loud.ids, loud.finish, loud.stop_string) == (quiet.ids, "stop", " nine")
    assert loud.logprobs == pytest.approx(quiet.logprobs, abs=1e-3)
    assert len(heard) > 4
    assert "".join(heard) == engine.tokenizer.decode(loud.ids)


def test_seeds_repeat_and_cancelling_frees_the_engine(real_engine: VLLMEngine) -> None:
    prompt = real_engine.tokenizer.encode("Once upon a time")
    seeded = GenerationRequest(prompt_ids=prompt, max_tokens=12, temperature=1.0, seed=7)
    assert real_engine.submit(seeded).result().ids == real_engine.submit(seeded).result().ids
    endless = real_engine.submit(GenerationRequest(prompt_ids=prompt, max_tokens=4000, seed=1))
    time.sleep(1)
    assert real_engine.unfinished() == 1
    endless.cancel()
    deadline = time.monotonic() + 20
    while real_engine.unfinished() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert real_engine.unfinished() == 0


@pytest.mark.usefixtures("real_engine")
def test_compiled_products_are_few() -> None:
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "256"  # vLLM's process inherits it


def test_a_prompt_beyond_the_model_is_refused_in_words(real_engine: Engine) -> None:
    request = GenerationRequest(prompt_ids=[1] * 5000, max_tokens=16)
    with pytest.raises(EngineError, match="refused"):
        real_engine.submit(request).result()


def test_time_budget_cuts_a_generation(real_engine: Engine, retriever: Retriever) -> None:
    limits = {"max_retrievals": 3, "time_budget_s": 2.0}
    state = run(real_engine, retriever, 5, thought_tokens=2000, limits=limits)
    assert state["stop_reason"] == "time_budget"
    assert len(state["recommendations"]) == 4
    assert state["usage"]["seconds"] < 6


def test_the_worker_ends_with_the_process_that_it_watches() -> None:
    """The same in little: an engine needs a minute to start."""
    owner, victim = (subprocess.Popen([sys.executable, "-c", _SLEEP]) for _ in range(2))
    watch = ThreadPoolExecutor(max_workers=1)
    ended = watch.submit(_end_with, owner.pid, [victim.pid])
    try:
        time.sleep(0.5)
        assert victim.poll() is None
        owner.kill()
        owner.wait(10)
        assert victim.wait(10) == -signal.SIGKILL
        ended.result(10)
    finally:
        owner.kill()
        victim.kill()
        watch.shutdown()


def test_the_engine_has_its_worker_watch_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    asked = []

    class Started:
        async def collective_rpc(self, method: str, args: tuple[int]) -> None:
            asked.append((method, args))

        def shutdown(self) -> None:
            pass

    monkeypatch.setattr(AsyncLLM, "from_engine_args", lambda _: Started())
    VLLMEngine(load_settings().model_name, max_model_len=1024, kv_cache_gib=1).close()
    assert asked == [("deeprec_watch", (os.getpid(),))]
    assert callable(getattr(SyncWorker, asked[0][0]))


def test_starting_blocks_no_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """LangGraph's server raises BlockingError at it."""
    from vllm.v1.engine.async_llm import AsyncLLM

    seen = []

    def start(_: object) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            seen.append("apart")
        else:
            seen.append("in an event loop")
        raise OSError("no more than this")

    async def in_a_server() -> None:
        VLLMEngine(load_settings().model_name, max_model_len=1024, kv_cache_gib=1)

    monkeypatch.setattr(AsyncLLM, "from_engine_args", start)
    with pytest.raises(EngineError, match="no more than this"):
        asyncio.run(in_a_server())
    assert seen == ["apart"]


@pytest.mark.slow
def test_a_killed_owner_leaves_no_process_behind(tmp_path: Path) -> None:
    code = (
        "import time\n"
        "from deeprec.graph.engine.vllm_inprocess import VLLMEngine\n"
        "from deeprec.settings import load_settings\n"
        "if __name__ == '__main__':\n"
        "    VLLMEngine(load_settings().model_name, max_model_len=1024, kv_cache_gib=1)\n"
        "    print('up', flush=True)\n"
        "    time.sleep(600)\n"
    )
    script = tmp_path / "owner.py"
    script.write_text(code)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"up\n"
        started = psutil.Process(owner.pid).children(recursive=True)
        engine = [process for process in started if "VLLM" in " ".join(process.cmdline())]
        assert engine
        owner.kill()
    _, alive = psutil.wait_procs(engine, timeout=20)
    assert alive == []


def test_people_edit_reject_and_go_on(real_engine: Engine, retriever: Retriever) -> None:
    recorder = Recorder(real_engine)
    settings = {
        "k": 4,
        "retrieve_n": 5,
        "thought_tokens": 24,
        "limits": {"max_retrievals": 2, "min_retrievals": 1, "max_new_tokens": 96},
        "explain": True,
        "ask_before_search": True,
        "ask_after_ranking": True,
    }
    graph = build_graph(
        recorder,
        retriever,
        histories={"u": ["3", "4", "5"]},
        settings=RunSettings.model_validate(settings),
        checkpointer=InMemorySaver(),
    )
    config: Any = {"configurable": {"thread_id": "t"}}
    output = graph.invoke({"user_id": "u"}, config)
    edited, lists = 0, []
    while "__interrupt__" in output:
        asked = output["__interrupt__"][0].value
        if "preference" in asked:
            edit = {"action": "edit", "preference": f"western; {edited}"}
            reply = edit if asked["searches_so_far"] == 0 else {"action": "stop"}
            edited += reply is edit
        else:
            lists.append([line["id"] for line in asked["recommendations"]])
            reject = {"action": "reject", "items": [{"item": lists[0][0], "reason": "no"}]}
            reply = reject if len(lists) == 1 else {"action": "accept"}
        output = graph.invoke(Command(resume=reply), config)
    response = RecommendationResponse.model_validate(output)
    first, second = lists
    assert second == [line.id for line in response.recommendations]
    assert len(set(second)) == 4
    assert not set(second) & {first[0], "3", "4", "5"}
    assert all(line.reason for line in response.recommendations)
    assert [turn.asked_by for turn in response.turns if turn.preference] == ["user"] * 2
    state = saved(graph, config)
    assert Transcript(state["segments"]).env_mask.count(1) > 0
    ids: list[int] = []
    calls = iter(recorder.calls)
    for piece in state["segments"]:
        if piece["author"] in SAMPLED:
            given, returned = next(calls)
            assert list(given.prompt_ids) == ids
            assert tuple(segment_ids(piece).tolist()) == returned.ids
        ids += segment_ids(piece).tolist()
    assert next(calls, None) is None
