"""Trajectories: read off finished runs, written to files, and read back, whatever happened."""

import asyncio
import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.types import Command
from rich.console import Console

from deeprec.errors import EngineError, TrajectoryError
from deeprec.graph.build import build_graph
from deeprec.graph.state import RUN_KEYS, RunSettings
from deeprec.graph.transcript import Transcript
from deeprec.settings import load_settings
from deeprec.tools.retriever import Retriever
from deeprec.training import export_trajectories, trajectory_file
from deeprec.training.export_trajectories import export, from_checkpointer
from deeprec.training.show import overview, trajectory_lines
from deeprec.training.trajectories import Rewards, Trajectory, model_fingerprint
from deeprec.training.trajectory_file import (
    iter_trajectories,
    load_dataset,
    read_trajectories,
    write_part,
    write_trajectories,
)

from ..conftest import Disk
from ..graph.conftest import RunGraph, ScriptedEngine
from ..graph.test_loop import answer, ask
from .conftest import MakeRun

GOOD = ("<think>\n" + ask("comedy"), ask("horror"), "So.</think>", answer("Film 3", "Film 4"), "")
SETTINGS = RunSettings(decoding="free", k=2, retrieve_n=4)


def test_tokens_are_those_of_the_engine(run_graph: RunGraph) -> None:
    run = run_graph(*GOOD)
    made = Trajectory.from_state(run.state, run.engine.tokenizer, id="a", model="m", target="3")
    last_request, last = run.engine.calls[-1]
    assert made.prompt_ids == list(run.engine.calls[0][0].prompt_ids)
    assert made.prompt_ids + made.completion_ids == [*last_request.prompt_ids, *last.ids]
    sampled = [token for _, result in run.engine.calls for token in result.ids]
    rows = list(zip(made.completion_ids, made.logprobs, made.env_mask, strict=True))
    assert [(token, logprob) for token, logprob, own in rows if own] == [
        (token, -0.5) for token in sampled
    ]
    assert {logprob for _, logprob, own in rows if not own} == {0.0}
    assert made.authors == Transcript(run.state["segments"]).authors


def test_the_record_holds_the_whole_run(make_run: MakeRun, found: Callable[..., list[str]]) -> None:
    made = make_run(*GOOD, target="3")
    assert [turn.preference for turn in made.turns] == ["comedy", "horror", None]
    assert [item.id for item in made.turns[0].retrieved] == found("comedy")
    assert made.entries == ["Film 3", "Film 4"]
    assert made.history_ids == ["0", "1", "2"]
    assert made.target == "3"
    assert made.stop_reason == "answered"
    assert made.settings == SETTINGS
    assert [piece.author for piece in made.pieces] == [
        "prompt",
        *("policy", "environment", "policy", "environment", "policy"),
    ]
    assert "Film 0" in made.pieces[0].text
    assert made.pieces[2].text.count("Film") == 4
    assert made.pieces[-1].text.endswith("</recommendation_list>")


def test_an_answer_before_the_last_list_is_no_answer(make_run: MakeRun) -> None:
    made = make_run(answer("Film 3") + ask("comedy"), "So.</think>", answer("Film 5", "Film 6"), "")
    assert made.entries == ["Film 5", "Film 6"]
    without = make_run(answer("Film 3") + ask("comedy"), "No list.", on_limit="fail")
    assert without.entries == []
    assert make_run("", on_limit="fail").entries == []  # nor is the prompt's example


def test_ainvoke_gives_what_a_trajectory_needs(retriever: Retriever) -> None:
    engine = ScriptedEngine(GOOD, 8192)
    graph = build_graph(engine, retriever, histories={"u": ["0", "1", "2"]})
    state = asyncio.run(
        graph.ainvoke({"user_id": "u"}, context=SETTINGS, output_keys=list(RUN_KEYS))
    )
    made = Trajectory.from_state(state, engine.tokenizer, id="a", model="m")
    assert made.usage.policy_tokens == sum(made.env_mask) > 0


def test_unfinished_or_foreign_states_are_refused(run_graph: RunGraph) -> None:
    run = run_graph(*GOOD)
    tokenizer = run.engine.tokenizer
    part = {key: run.state[key] for key in RUN_KEYS if key != "usage"}
    with pytest.raises(TrajectoryError, match="lacks usage"):
        Trajectory.from_state(part, tokenizer, id="a", model="m")
    with pytest.raises(TrajectoryError, match="another version"):
        Trajectory.from_state({**run.state, "stop_reason": "?"}, tokenizer, id="a", model="m")


def test_lists_that_do_not_fit_are_refused(make_run: MakeRun) -> None:
    fields = make_run(*GOOD).model_dump()
    for change in (
        {"logprobs": fields["logprobs"][1:]},
        {"completion_ids": fields["completion_ids"][1:], "pieces": fields["pieces"]},
        {"prompt_ids": fields["prompt_ids"][1:]},
        {"logprobs": [float("nan"), *fields["logprobs"][1:]]},
    ):
        with pytest.raises(ValueError, match=r"length|add up|not a number"):
            Trajectory.model_validate({**fields, **change})


@pytest.fixture
def runs(make_run: MakeRun) -> list[Trajectory]:
    """Runs of every kind: good, refused, failed at once and half-way, guided, with rewards."""
    good = make_run(*GOOD, id="good", target="3")
    rewarded = Rewards(format=0.0, hit=1.0, rank=0.4, point=-0.125, total=1.275)
    return [
        good.model_copy(update={"id": "rewarded", "rewards": rewarded}),
        good,
        make_run(
            "<think>" + ask("comedy"), ask("comedy"), "</think>", answer("X", "X"), "", id="odd"
        ),
        make_run(EngineError("gone"), id="failed", on_limit="fail"),
        make_run("<think>" + ask("x"), EngineError("gone"), id="half", on_limit="fail"),
        make_run("no search, no list", id="silent", on_limit="fail"),
    ]


def test_a_file_gives_back_what_was_written(runs: list[Trajectory], tmp_path: Path) -> None:
    path = tmp_path / "new" / "runs.parquet"
    assert write_trajectories(path, iter(runs)) == len(runs)
    assert read_trajectories(path) == runs
    assert [entry.name for entry in path.parent.iterdir()] == ["runs.parquet"]


def test_many_row_groups_keep_order(runs: list[Trajectory], tmp_path: Path) -> None:
    many = [runs[1].model_copy(update={"id": str(number)}) for number in range(150)]
    write_trajectories(tmp_path / "runs.parquet", many)
    assert pq.ParquetFile(tmp_path / "runs.parquet").num_row_groups == 3
    assert [run.id for run in iter_trajectories(tmp_path / "runs.parquet")] == [
        str(number) for number in range(150)
    ]


def test_any_torn_file_is_noticed(runs: list[Trajectory], tmp_path: Path) -> None:
    whole, torn = tmp_path / "runs.parquet", tmp_path / "torn.parquet"
    write_trajectories(whole, runs)
    content = whole.read_bytes()
    for length in [*range(0, len(content), 997), len(content) - 1]:
        torn.write_bytes(content[:length])
        with pytest.raises(TrajectoryError):
            read_trajectories(torn)
    for at in range(0, len(content), 61):  # a sector that was never written
        torn.write_bytes(content[:at] + bytes(512) + content[at + 512 :])
        with pytest.raises(TrajectoryError):
            read_trajectories(torn)


def test_a_flipped_bit_never_changes_a_run_in_silence(
    runs: list[Trajectory], tmp_path: Path
) -> None:
    whole, rotten = tmp_path / "runs.parquet", tmp_path / "rotten.parquet"
    write_trajectories(whole, runs)
    content = whole.read_bytes()
    noticed = 0
    for at in range(0, len(content), 131):
        rotten.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        try:
            assert read_trajectories(rotten) == runs
        except TrajectoryError:
            noticed += 1
    assert noticed > len(content) / 131 / 2


def test_another_schema_is_refused(
    runs: list[Trajectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs.parquet"
    monkeypatch.setattr(trajectory_file, "SCHEMA_VERSION", 7)
    write_trajectories(path, runs)
    monkeypatch.undo()
    for read in (read_trajectories, load_dataset):
        with pytest.raises(TrajectoryError, match="schema version 7"):
            read(path)


def test_a_file_changed_by_hand_is_refused(runs: list[Trajectory], tmp_path: Path) -> None:
    path = tmp_path / "runs.parquet"
    write_trajectories(path, runs)
    about = pq.ParquetFile(path).metadata.metadata
    kept = {key: value for key, value in about.items() if key != b"ARROW:schema"}
    pq.write_table(pq.read_table(path).slice(1).replace_schema_metadata(kept), path)
    with pytest.raises(TrajectoryError, match="changed by hand"):
        read_trajectories(path)
    content = path.read_bytes()
    assert content.count(b'{"schema": 2') == 1
    path.write_bytes(content.replace(b'{"schema": 2', b'{?schema": 1'))
    with pytest.raises(TrajectoryError, match="torn or damaged"):
        read_trajectories(path)


def test_other_files_are_neither_read_nor_overwritten(
    runs: list[Trajectory], tmp_path: Path
) -> None:
    other, text = tmp_path / "items.parquet", tmp_path / "notes.txt"
    pq.write_table(pa.table({"id": ["a"]}), other)
    text.write_text("mine")
    for path in (other, text):
        before = path.read_bytes()
        with pytest.raises(TrajectoryError, match=str(path)):
            write_trajectories(path, runs)
        with pytest.raises(TrajectoryError, match=str(path)):
            read_trajectories(path)
        assert path.read_bytes() == before
    with pytest.raises(TrajectoryError, match="no file"):
        read_trajectories(tmp_path / "nothing.parquet")
    with pytest.raises(TrajectoryError, match="can't write"):
        write_trajectories(text / "runs.parquet", runs)


def test_a_failed_write_leaves_the_old_file(runs: list[Trajectory], tmp_path: Path) -> None:
    path = tmp_path / "runs.parquet"
    write_trajectories(path, runs[:2])

    def broken() -> Iterator[Trajectory]:
        yield runs[2]
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_trajectories(path, broken())
    with pytest.raises(TrajectoryError, match="two trajectories have the id 'good'"):
        write_trajectories(path, [runs[1], runs[1]])
    assert read_trajectories(path) == runs[:2]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_the_old_file(
    runs: list[Trajectory], small_disk: Callable[[int], Disk]
) -> None:
    disk = small_disk(1)
    write_part(disk.folder, "step-1", runs[:2])
    many = [runs[1].model_copy(update={"id": str(number)}) for number in range(70)]
    for left in (0, 4096, 16_384):
        disk.fill(leave=left)
        with pytest.raises(TrajectoryError, match=r"No space left on device.*Free disk space"):
            write_part(disk.folder, "step-1", many)
        assert read_trajectories(disk.folder) == runs[:2]
        assert [path.name for path in (disk.folder / "trajectories").iterdir()] == [
            "step-1.parquet"
        ]
        disk.free()
    write_part(disk.folder, "step-1", many)
    assert read_trajectories(disk.folder) == many


def test_a_part_made_again_is_neither_lost_nor_doubled(
    runs: list[Trajectory], tmp_path: Path
) -> None:
    write_part(tmp_path, "step-000002", runs[2:4])
    write_part(tmp_path, "step-000001", runs[:2])
    path = write_part(tmp_path, "step-000002", runs[2:])  # after a crash
    path.with_name(".step-000003.parquet-x").write_bytes(b"PAR1")  # what a crash left
    assert read_trajectories(tmp_path) == runs
    assert export(str(tmp_path), tmp_path / "all.parquet", model="unused") == len(runs)
    assert read_trajectories(tmp_path / "all.parquet") == runs
    write_part(tmp_path, "step-000003", runs[:1])
    with pytest.raises(TrajectoryError, match="'rewarded'"):
        read_trajectories(tmp_path)
    with pytest.raises(ValueError, match="part name"):
        write_part(tmp_path, "../step", runs)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrajectoryError, match="no run folder"):
        read_trajectories(tmp_path / "empty")


def test_datasets_read_the_file(runs: list[Trajectory], tmp_path: Path) -> None:
    path = tmp_path / "runs.parquet"
    write_trajectories(path, runs)
    usual = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    for dataset in (load_dataset(path), usual):
        assert isinstance(dataset, datasets.Dataset)
        row = dataset[0]
        for name in ("prompt_ids", "completion_ids", "logprobs", "env_mask", "authors", "answer"):
            assert row[name] == getattr(runs[0], name)
        assert row["rewards"] == runs[0].rewards.model_dump()
        assert json.loads(row["settings"])["k"] == 2
        assert row["settings_fingerprint"] == runs[0].settings_fingerprint
        assert row["turns"][0]["retrieved"][0] == runs[0].turns[0].retrieved[0].model_dump()
        assert [failure["reason"] for failure in dataset["failure"] if failure] == [
            *("engine_failure", "engine_failure", "no_answer")
        ]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TrajectoryError, match="torn"):
        load_dataset(path)


def play(
    retriever: Retriever, saver: Any, *threads: tuple[str, tuple[Any, ...], dict[str, Any]]
) -> None:
    for name, script, metadata in threads:
        graph = build_graph(
            ScriptedEngine(script, 8192),
            retriever,
            histories={"u": ["0", "1", "2"]},
            settings=SETTINGS,
            checkpointer=saver,
        )
        graph.invoke(
            {"user_id": "u"},
            {"configurable": {"thread_id": name}, "metadata": metadata},
            durability="sync",
        )


def break_off(retriever: Retriever, saver: Any, thread: str) -> None:
    """Kill a run on its way, as a crash would: its thread stays unfinished."""
    graph = build_graph(
        ScriptedEngine(GOOD, 8192),
        retriever,
        histories={"u": ["0", "1", "2"]},
        settings=SETTINGS,
        checkpointer=saver,
    )
    config: Any = {"configurable": {"thread_id": thread}}
    steps = graph.stream({"user_id": "u"}, config, durability="sync", stream_mode="updates")
    for update in steps:
        if "call_trm" in update:
            return


@pytest.fixture
def checkpoints(retriever: Retriever, tmp_path: Path) -> Path:
    """Thread a with two runs, b with one that failed, c with one broken off; a broken off anew."""
    path = tmp_path / "check points.sqlite"
    with sqlite3.connect(path, check_same_thread=False) as connection:
        saver = SqliteSaver(connection)
        play(
            retriever,
            saver,
            ("a", GOOD, {"target": "3"}),
            ("b", (EngineError("gone"),), {}),
            ("a", ("<think>" + ask("drama"), "Well.</think>", answer("Film 9"), ""), {"target": 4}),
        )
        break_off(retriever, saver, "c")
        break_off(retriever, saver, "a")
    connection.close()
    return path


def test_every_finished_run_of_a_checkpointer_is_exported(
    checkpoints: Path, run_graph: RunGraph, tmp_path: Path
) -> None:
    model = load_settings().model_name
    before = checkpoints.read_bytes()
    output = tmp_path / "runs.parquet"
    assert export(str(checkpoints), output, model=model) == 3
    first, failed, second = read_trajectories(output)
    assert [run.id.split("/")[0] for run in (first, failed, second)] == ["a", "b", "a"]
    assert [run.target for run in (first, failed, second)] == ["3", None, "4"]
    assert failed.failure is not None
    assert failed.failure.reason == "engine_failure"
    assert [turn.preference for turn in second.turns] == ["drama", None]
    assert first.model_fingerprint == model_fingerprint(model) != ""
    run = run_graph(*GOOD)
    plain = Trajectory.from_state(run.state, run.engine.tokenizer, id="x", model=model)
    for name in ("prompt_ids", "completion_ids", "logprobs", "authors", "pieces", "turns"):
        assert getattr(first, name) == getattr(plain, name)
    assert export(str(checkpoints), output, model=model, thread="b") == 1
    assert checkpoints.read_bytes() == before  # a reader writes nothing


def test_any_checkpointer_will_do(retriever: Retriever) -> None:
    saver = InMemorySaver()
    play(retriever, saver, ("a", GOOD, {}), ("b", GOOD, {}))
    made = list(from_checkpointer(saver, load_settings().model_name))
    assert len({run.id for run in made}) == 2
    assert [run.stop_reason for run in made] == ["answered"] * 2


def test_sources_without_runs_are_refused(
    checkpoints: Path, runs: list[Trajectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = load_settings().model_name, tmp_path / "out.parquet"
    empty, note = tmp_path / "empty.sqlite", tmp_path / "note.txt"
    with sqlite3.connect(empty) as connection:
        connection.execute("CREATE TABLE mine (a INTEGER)")
    connection.close()
    note.write_text("hello")
    write_part(tmp_path / "run", "p", runs)
    monkeypatch.setitem(sys.modules, "langgraph.checkpoint.postgres", None)
    for source, thread, told in (
        (str(tmp_path / "none.sqlite"), None, "holds no runs"),
        (str(note), None, "holds no runs"),
        (str(empty), None, "can't be read as LangGraph's checkpoints"),
        (str(checkpoints), "c", "thread 'c' of"),
        (str(tmp_path / "run"), "a", "no threads"),
        ("postgresql://localhost/x", None, "pip install langgraph-checkpoint-postgres"),
    ):
        with pytest.raises(TrajectoryError, match=told):
            export(source, output, model=model, thread=thread)
    with pytest.raises(EngineError, match="no tokenizer"):
        export(str(checkpoints), output, model=str(tmp_path))
    with pytest.raises(TrajectoryError, match="neither a folder nor"):
        model_fingerprint("nobody/nothing")
    assert not output.exists()


def test_the_script(checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "runs.parquet"
    script = str(Path(export_trajectories.__file__))
    command = [sys.executable, script, str(checkpoints), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "3 trajectories" in done.stdout
    assert len(read_trajectories(output)) == 3
    assert export_trajectories.main([str(tmp_path / "x"), str(output)]) == 2
    assert "error: " in capsys.readouterr().err


def shown(*lines: Any) -> str:
    console = Console(width=200, no_color=True)
    with console.capture() as captured:
        for line in lines:
            console.print(line)
    return captured.get()


def test_people_see_what_is_masked(runs: list[Trajectory]) -> None:
    text = shown(*trajectory_lines(runs[0]))
    environment = [line for line in text.splitlines() if "environment · " in line]
    assert len(environment) == 2
    assert all("masked" in line for line in environment)
    assert f"environment · {runs[0].pieces[2].tokens} tokens" in text
    assert "rewards      format +0.000, hit +1.000, rank +0.400, point -0.125" in text
    assert "The user's history" not in text
    assert "The user's history" in shown(*trajectory_lines(runs[0], prompt=True))
    failed = shown(*trajectory_lines(runs[3]))
    assert "gone" in failed
    assert "not computed" in failed
    table = shown(overview(runs))
    assert "+1.275" in table
    assert all(run.id in table for run in runs)


def test_a_run_cannot_drive_the_terminal(make_run: MakeRun) -> None:
    run = make_run("\x1b]0;owned\x07\x1b[2J[bold]x[/bold]\u202e", id="\x1b[2J", on_limit="fail")
    text = shown(*trajectory_lines(run), overview([run]))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    assert "[bold]x[/bold]" in text


def test_a_run_that_was_sent_back_is_exported_once_with_all_rounds(retriever: Retriever) -> None:
    saver = InMemorySaver()
    settings = RunSettings(decoding="free", k=2, retrieve_n=4, ask_after_ranking=True)
    script = [*GOOD, "<think>" + ask("western"), "Now.</think>", answer("Film 38", "Film 39"), ""]
    engine = ScriptedEngine(script, 8192)
    graph = build_graph(engine, retriever, settings=settings, checkpointer=saver)
    config: Any = {"configurable": {"thread_id": "a"}}
    graph.invoke({"history": ["0", "1"]}, config)
    model = load_settings().model_name
    (before,) = from_checkpointer(saver, model)
    assert not before.with_people
    graph.invoke(Command(resume={"action": "more"}), config)
    graph.invoke(Command(resume={"action": "accept"}), config)
    (run,) = from_checkpointer(saver, model)
    assert run.with_people
    assert run.completion_ids[: len(before.completion_ids)] == before.completion_ids
    assert [piece.author for piece in run.pieces].count("user") == 1
    assert run.entries == ["Film 38", "Film 39"]
    assert "user · " in shown(*trajectory_lines(run))


def test_files_keep_what_people_did_and_why_items_are_there(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(*GOOD, explain=True)
    turns = [run.turns[0].model_copy(update={"asked_by": "user"}), *run.turns[1:]]
    edited = run.model_copy(update={"turns": turns})
    write_trajectories(tmp_path / "runs", [edited])
    (read,) = read_trajectories(tmp_path / "runs")
    assert read == edited
    assert read.with_people
    assert read.recommendations[0].reason


def test_files_of_the_first_version_are_read(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(field: pa.Field) -> pa.Field:
        """The column as version 1 had it."""
        new = {"turns": ["asked_by"], "recommendations": ["turn", "preference", "reason"]}
        if field.name not in new:
            return field
        kept = [inner for inner in field.type.value_type if inner.name not in new[field.name]]
        element = field.type.value_field.with_type(pa.struct(kept))
        return field.with_type(pa.list_(element))

    run = make_run(*GOOD)
    with monkeypatch.context() as patched:
        patched.setattr(trajectory_file, "SCHEMA_VERSION", 1)
        columns = [without(field) for field in trajectory_file.SCHEMA]
        patched.setattr(trajectory_file, "SCHEMA", pa.schema(columns))
        write_trajectories(tmp_path / "old", [run])
    assert read_trajectories(tmp_path / "old") == [run]
