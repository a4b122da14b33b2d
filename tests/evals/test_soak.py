"""The soak in small: real graph, retriever and encoder, and an engine that obeys any grammar."""

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deeprec.errors import EngineError, EvaluationError
from deeprec.evals.bench.soak import Player, fault_of, play_all, settled
from deeprec.evals.bench.soak_faults import (
    FAULTS,
    BreakableEncoder,
    WatchedEngine,
    WatchedRetriever,
)
from deeprec.evals.bench.soak_report import Ended, Journal, Memory, growth, judge, report
from deeprec.graph import protocol
from deeprec.graph.build import build_graph
from deeprec.graph.engine.base import Engine, Generation, GenerationRequest
from deeprec.graph.engine.tokenizer import load_tokenizer
from deeprec.settings import load_settings
from deeprec.tools.workspace import Workspace


class ObedientEngine(Engine):
    """Writes what the grammar allows, else a few words; refuses prompts that are too long. A run
    takes it longer than a hurried one has, or than a caller stays that goes away.
    """

    name = "obedient"
    max_model_len = 2048

    def __init__(self) -> None:
        self.tokenizer = load_tokenizer(load_settings().model_name)
        self._pool = ThreadPoolExecutor(max_workers=8)

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        return self._pool.submit(self._write, request)

    def _write(self, request: GenerationRequest) -> Generation:
        if len(request.prompt_ids) + request.max_tokens > self.max_model_len:
            raise EngineError(f"a prompt of {len(request.prompt_ids)} tokens is too long")
        time.sleep(0.06)
        constraint, said = request.constraint, " films.\n"
        if constraint is not None:
            regex = constraint.regex
            said = constraint.choices[-1] if constraint.choices else _preference(regex)
        stop = next((stop for stop in request.stop if stop in said), None)
        ids = self.tokenizer.encode(said, add_special_tokens=False)
        return Generation(tuple(ids), (-0.5,) * len(ids), "stop" if stop else "length", stop)

    def close(self) -> None:
        self._pool.shutdown()


def _preference(regex: str) -> str:
    for genre in ("Comedy", "Drama", "Horror", "Western"):
        said = f" {genre}; films {protocol.END_PREFERENCE}"
        if re.fullmatch(regex, said):
            return said
    raise AssertionError(regex)


MakePlayer = Callable[..., Player]


@pytest.fixture
def player(place: Workspace, tiny_encoder_folder: Path) -> Iterator[MakePlayer]:
    engine = ObedientEngine()
    encoder = BreakableEncoder(str(tiny_encoder_folder))
    histories = place.histories(hold_out=False)
    with WatchedRetriever(place.trm, encoder, place.catalog) as retriever:
        graph = build_graph(WatchedEngine(engine), retriever, histories=histories)
        yield lambda every: Player(graph, list(histories), histories, every, 1, hangs_after_s=60)
    engine.close()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deeprec.evals.bench.soak._LOST_AFTER_S", 1.0)
    monkeypatch.setattr("deeprec.evals.bench.soak._SAMPLED_EVERY", 16)


async def test_every_run_ends_once_and_each_fault_by_its_reason(
    player: MakePlayer, short: None
) -> None:
    lines: list[Ended | Memory] = []
    await play_all(player(4), range(64), 8, lines.append)
    runs = [line for line in lines if isinstance(line, Ended)]
    memory = [line for line in lines if isinstance(line, Memory)]
    assert [sample.runs for sample in memory] == [0, 16, 32, 48, 64]
    memory.append(END)
    checks = judge(runs, memory, wanted=64, warm_up=16)
    assert {name for name, (_, passed) in checks.items() if not passed} <= {"memory"}
    assert {run.fault for run in runs if run.fault} == set(FAULTS)
    written = report(runs, memory, checks)
    assert "| runs lost | 0 | yes |" in written
    assert "| none | max_retrievals | 48 |" in written


async def test_a_run_that_hangs_is_told(player: MakePlayer) -> None:
    lost = player(2)
    lost.hangs_after_s = 0.5
    assert fault_of(3, 2) == "lost"
    ended = await lost.play(3)
    assert (ended.ended, ended.sound) == ("hang", True)


def test_each_fault_has_its_turn() -> None:
    broken = [fault_of(run, 100) for run in range(2000)]
    assert [fault for fault in broken if fault] == [FAULTS[n % len(FAULTS)] for n in range(20)]


def ended(run: int, **changes: Any) -> Ended:
    fields = {"process": 1, "user": "u", "fault": None, "ended": "answered", "why": None}
    sound = {"sound": True, "accounted": True, "seconds": 1.0}
    return Ended.model_validate({"run": run, **fields, **sound, **changes})


GOOD = [ended(0), ended(1), ended(2, fault="lost", ended="time_budget", why="used up")]
FLAT = [Memory(process=1, runs=n, own_mib=100, children_mib=900) for n in (0, 100, 200)]
END = Memory(process=1, runs=200, own_mib=100, children_mib=900, unfinished=0)


def failing(
    runs: list[Ended] = GOOD, memory: list[Memory] = FLAT, unfinished: int | None = 0
) -> set[str]:
    end = END.model_copy(update={"unfinished": unfinished, "process": memory[-1].process})
    checks = judge(runs, [*memory, end], wanted=3, warm_up=100)
    return {name for name, (_, passed) in checks.items() if not passed}


def test_each_check_can_fail() -> None:
    assert failing() == set()
    assert failing(GOOD[1:]) == {"runs lost"}
    assert failing([*GOOD, ended(1)]) == {"runs ended twice"}
    hung = ended(0, ended="hang", why="it had not ended")
    assert failing([hung, *GOOD[1:]]) == {"runs that hung", "runs without a fault that failed"}
    silent = ended(2, fault="lost", ended="time_budget")
    assert failing([*GOOD[:2], silent]) == {"runs with a fault and no reason"}
    astray = ended(2, fault="lost", ended="engine_failure", why="?")
    assert failing([*GOOD[:2], astray]) == {"runs with a fault that ended by another reason"}
    failed = ended(0, ended="engine_failure", why="?")
    assert failing([failed, *GOOD[1:]]) == {"runs without a fault that failed"}
    unsound = ended(0, sound=False)
    assert failing([unsound, *GOOD[1:]]) == {"lists that are not K new items"}
    other = ended(0, accounted=False)
    assert failing([other, *GOOD[1:]]) == {"runs whose usage is not what engine and retriever gave"}
    under_way = {"generations under way at the end"}
    assert failing(unfinished=1) == failing(unfinished=None) == under_way
    killed = [*FLAT, END, Memory(process=2, runs=0, own_mib=100, children_mib=900)]
    checks = judge(GOOD, killed, wanted=3, warm_up=100)
    assert {name for name, (_, passed) in checks.items() if not passed} == under_way
    grown = [*FLAT, Memory(process=1, runs=300, own_mib=100, children_mib=951)]
    assert failing(memory=grown) == {"memory"}
    assert failing(memory=FLAT[:2]) == {"memory"}  # nothing to compare


def test_growth_is_of_the_process_that_played_most() -> None:
    other = [Memory(process=2, runs=n, own_mib=100 + n, children_mib=0) for n in (0, 100)]
    assert failing(memory=[*FLAT, *other]) == set()
    assert growth(other, 0) == pytest.approx(1.0)


def test_a_killed_soak_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "soak" / "runs.jsonl"
    journal = Journal(path)
    journal.add(FLAT[0])
    for run in GOOD:
        journal.add(run)
    with path.open("ab") as file:
        file.write(b'{"run": 3, "user"')
    again = Journal(path)
    assert [run.run for run in again.runs] == [0, 1, 2]
    assert again.process == 2
    again.add(ended(3))
    assert [run.run for run in Journal(path).runs] == [0, 1, 2, 3]
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(EvaluationError, match="line 1 is damaged"):
        Journal(path)


def test_a_failed_check_fails_again_when_nothing_is_left_to_play(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "runs.jsonl")
    for line in (*FLAT, *GOOD, END.model_copy(update={"unfinished": 2})):
        journal.add(line)
    for kept in (journal, Journal(tmp_path / "runs.jsonl")):
        checks = judge(kept.runs, kept.memory, wanted=3, warm_up=100)
        assert checks["generations under way at the end"] == ("2", False)


def test_an_engine_has_time_to_drop_what_was_cancelled() -> None:
    class Busy:
        def __init__(self, *left: int) -> None:
            self.left = list(left)

        def unfinished(self) -> int:
            return self.left.pop(0) if len(self.left) > 1 else self.left[0]

    assert settled(Busy(2, 1, 0)) == 0
    assert settled(Busy(1), within_s=0.3) == 1


def test_a_run_keeps_its_own_fault() -> None:
    """Two at once: asyncio's tasks have contexts of their own."""
    from deeprec.evals.bench.soak_faults import Watched, at_work

    async def one(fault: Any) -> Any:
        at_work.set(Watched(fault))
        await asyncio.sleep(0.01)
        return await asyncio.create_task(read())

    async def read() -> Any:
        return at_work.get().fault

    async def both() -> Any:
        return await asyncio.gather(one("lost"), one(None))

    assert asyncio.run(both()) == ["lost", None]
