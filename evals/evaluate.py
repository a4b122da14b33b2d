"""The one path that every recommender takes: asked, stored user by user, judged, reported.

A run's folder holds config.json (what was asked for, and of which parts), rankings/ (JSON lines,
one file a recommender), peers/ (what other libraries' models answered, and their own report), and
what is made of them at the end: results.json, per_user.parquet, table.md and report.html.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ..configuration import keep_config, write_text
from ..errors import EvaluationError
from ..tools.progress import judged
from ..tools.workspace import Workspace
from .agents import Agent, Engines, agent_settings, check_one_llm, policy_digest
from .config import AgentEntry, EvalRun, TRMEntry
from .judge import Answers, Judge
from .metrics import check, ranks, values
from .per_user import write_per_user
from .recommenders import Recommender, recommender_of
from .report import render
from .results import Results, Steered
from .steering import Stated, Steering, Wishes, ways_of
from .store import Ranking, Store
from .tables import markdown
from .task import Task, User
from .traces import tell

if TYPE_CHECKING:
    from ..graph.state import RunSettings
    from .config import Past, WishKind

RANKINGS, PEERS = "rankings", "peers"
TABLE, REPORT, CONFIG = "table.md", "report.html", "config.json"
_NEEDED = ("filelock", "ir_measures", "jinja2", "matplotlib")
_VERSIONS = ("deeprec-agent", "ir-measures", "scipy", "torch")
# What may change between a run and the one that goes on with it.
_FREE = frozenset({"output", "concurrency", "traces", "steering", "cost"})


class _Kept(EvalRun):
    """What a folder was made with: the configuration, and what its parts are."""

    made_of: dict[str, str]  # see _made_of


def evaluate(config: EvalRun, workspace: Workspace, console: Console) -> Results:
    """Ask every recommender for every user that isn't stored yet, then judge all.

    Raises EvaluationError for a data set without test users, for a folder that is in use, damaged
    or of another data set; SettingsError for one of another configuration, or for several LLMs over
    an engine that has one; and what the parts of the workspace and the engines raise.
    """
    _check_packages()
    agents = {
        name: entry for name, entry in config.recommenders.items() if isinstance(entry, AgentEntry)
    }
    check_one_llm(workspace.settings, agents.values())
    settings = {
        name: agent_settings(workspace.settings, entry, config) for name, entry in agents.items()
    }
    task = Task.of(workspace.data, workspace.split, limit=config.users, seed=config.seed)
    with _locked(config.output):
        made_of = _made_of(config, workspace, settings)
        _check_dataset(config.output, made_of)
        keep_config(_Kept(**config.model_dump(), made_of=made_of), config.output, free=_FREE)
        with closing(Engines(workspace)) as engines:
            round_ = _Round(config, task, workspace, engines, settings, console)
            answers, steered = round_.answers()
        with console.status("Judging"):
            return _conclude(config, task, workspace, answers, steered, made_of)


@dataclass(frozen=True)
class _Round:
    """One pass over all recommenders and all users that are missing."""

    config: EvalRun
    task: Task
    workspace: Workspace
    engines: Engines
    settings: Mapping[str, RunSettings]  # of agents' runs
    console: Console

    def answers(self) -> tuple[list[Answers], list[Steered]]:
        """What every recommender answered, stored before or asked now; and how it followed wishes.

        Agents never show what the user has had; baselines are asked under each rule.
        """
        stated = self._stated() if self.config.steering else {}
        found: list[Answers] = []
        steered: list[Steered] = []
        for name in self.config.recommenders:
            rules: Sequence[Past] = ("excluded",) if name in self.settings else self.config.past
            of_name = [self._plain(name, past) for past in rules]
            found += of_name
            without = next((one for one in of_name if one.past == "excluded"), None)
            if without is not None:
                steered += self._steered(name, without.rankings, stated)
        return found, steered

    def _stated(self) -> dict[WishKind, dict[str, Stated]]:
        items, embeddings = self.task.data.items, self.workspace.item_embeddings
        wishes = Wishes(items, embeddings, k=self.config.k, seed=self.config.seed)
        return {kind: wishes.of(kind, self.task.users) for kind in self.config.steering}

    def _plain(self, name: str, past: Past) -> Answers:
        title = name if past == "excluded" else f"{name}, past included"
        rankings = self._completed(title, name, past, self.task.users)
        entry = self.config.recommenders[name]
        return Answers(name, entry, past, rankings, self.settings.get(name))

    def _steered(
        self,
        name: str,
        without: Mapping[str, Ranking],
        stated: Mapping[WishKind, Mapping[str, Stated]],
    ) -> Iterator[Steered]:
        """Ask again with each wish, in each form that the recommender takes."""
        for kind, wishes in stated.items():
            for way in ways_of(self.config.recommenders[name], kind):
                users = [
                    replace(user, wish=wishes[user.id].told(way))
                    for user in self.task.users
                    if user.id in wishes
                ]
                title = f"{name}, {kind} as {way}"
                rankings = self._completed(title, name, "excluded", users)
                yield Steering(self.task, self.config).figures(
                    name, kind, way, wishes, without, rankings
                )

    def _completed(
        self, title: str, name: str, past: Past, users: Sequence[User]
    ) -> Mapping[str, Ranking]:
        """Answers for these users from the file of that title; those that are missing are asked."""
        with Store(self.config.output / RANKINGS / f"{title}.jsonl") as store:
            found = store.read(user.id for user in users)
            missing = [user for user in users if user.id not in found or found[user.id].is_outage]
            if missing:
                self._ask(self._recommender(name, past), missing, found, store, title)
        outages = sum(ranking.is_outage for ranking in found.values())
        if outages:
            self.console.print(
                f"{title}: {outages} runs ended by an outage and count as misses. The same command "
                "asks for these users once more.",
                style="yellow",
            )
        return found

    def _recommender(self, name: str, past: Past) -> Recommender:
        entry = self.config.recommenders[name]
        if isinstance(entry, AgentEntry):
            settings = self.settings[name]
            return Agent(lambda: self.engines.graph(entry, settings), self.config.concurrency)
        return recommender_of(
            entry,
            self.task,
            self.workspace,
            past=past,
            depth=self.config.depth,
            seed=self.config.seed,
            fitted=self.config.output / PEERS / f"{name}.json",
        )

    def _ask(
        self,
        recommender: Recommender,
        missing: Sequence[User],
        found: dict[str, Ranking],
        store: Store,
        title: str,
    ) -> None:
        """Store every answer as it comes; `found` grows with it."""
        wanted = {user.id for user in missing}
        total = len(wanted | found.keys())
        summed = self._score(found.values())
        with judged(self.console, title, done=total - len(wanted), total=total) as report:
            for ranking in recommender.recommend(missing):
                if ranking.user not in wanted:
                    raise RuntimeError(f"{title} answered for {ranking.user!r}, who was not asked")
                wanted.remove(ranking.user)
                store.append(ranking)
                before = found.get(ranking.user)  # ended by an outage
                summed += self._score([ranking]) - self._score([before] if before else [])
                found[ranking.user] = ranking
                mean = summed / len(found)
                report(total - len(wanted), f"{self.config.compare_by} {mean:.3f}")
        if wanted:
            raise RuntimeError(f"{title} left out {len(wanted)} users, e.g. {min(wanted)!r}")

    def _score(self, rankings: Collection[Ranking]) -> float:
        """Sum of the leading metric over users, for the progress bar."""
        k, known = self.config.k, self.task.data.item_index
        lists = [check(ranking.items, k, known) for ranking in rankings]
        places = ranks(lists, [self.task.targets[ranking.user] for ranking in rankings])
        return float(values(places, [self.config.compare_by], k).sum())


def _conclude(
    config: EvalRun,
    task: Task,
    workspace: Workspace,
    answers: Sequence[Answers],
    steered: Sequence[Steered],
    made_of: dict[str, str],
) -> Results:
    judge = Judge(task, config, workspace.item_embeddings)
    lists = judge.lists(answers)
    results = Results(
        name=config.output.resolve().name,
        dataset=task.data.name,
        fingerprint=task.data.fingerprint,
        users=len(task.users),
        items=len(task.data.items),
        repeated_targets=task.repeats,
        k=config.k,
        metrics=config.metrics,
        compare_by=config.compare_by,
        made_with={**_machine(), **made_of},
        rows=tuple(one.row for one in lists),
        agents=judge.agents(answers),
        traces=tell(answers, task, most=config.traces),
        steering=tuple(steered),
    )
    write_per_user(config.output, task, config.metrics, lists)
    write_text(config.output / TABLE, markdown(results))
    write_text(config.output / REPORT, render([results]))
    results.write(config.output)
    return results


def _made_of(
    config: EvalRun, workspace: Workspace, settings: dict[str, RunSettings]
) -> dict[str, str]:
    """What answers depend on beside the configuration: fingerprints, and how LLM and search run."""
    made_of = {"dataset": workspace.data.fingerprint}
    entries, chosen = config.recommenders, workspace.settings
    if settings or any(isinstance(entry, TRMEntry) for entry in entries.values()):
        parts = workspace.catalog.fingerprint
        made_of |= {"trm": parts.trm, "encoder": parts.encoder, "search": chosen.catalog.search}
    if settings:
        made_of["engine"] = f"{chosen.engine.kind}, {chosen.engine.dtype}"
    for name, made in settings.items():
        entry = entries[name]
        if isinstance(entry, AgentEntry):
            made_of[f"{name}, LLM"] = policy_digest(chosen, entry)
        made_of[f"{name}, settings"] = made.model_dump_json()
    return made_of


def _check_dataset(folder: Path, made_of: dict[str, str]) -> None:
    """Refuse results of another data set in words of their own. A damaged file is told later."""
    path = folder / CONFIG
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text("utf-8"))["made_of"]["dataset"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{path} is damaged or of another kind of run: {error!r}. Give another output."
        ) from error
    if before != made_of["dataset"]:
        raise EvaluationError(
            f"{folder} holds results of another data set: its fingerprint is {before}, that of "
            f"the workspace {made_of['dataset']}. Give another output, or the workspace it had."
        )


def _machine() -> dict[str, str]:
    return {
        **{f"version of {name}": version(name) for name in _VERSIONS},
        "Python": platform.python_version(),
        "system": platform.platform(),
        "cores": str(os.cpu_count()),
    }


def _check_packages() -> None:
    """Tell before hours of work that a package for judging is missing."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise EvaluationError(f"evaluation needs {', '.join(missing)}: install deeprec-agent[eval]")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder."""
    from filelock import FileLock, Timeout

    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / ".lock", timeout=0))
        except Timeout as error:
            raise EvaluationError(
                f"another evaluation is at work in {folder}: wait for it, or give another output"
            ) from error
        except OSError as error:
            raise EvaluationError(
                f"can't write to {folder}: {error}. Give another output."
            ) from error
        yield
