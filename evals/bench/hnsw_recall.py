"""HNSW against exact search: how much of the exact lists the approximate index finds.

Reads a prepared workspace (`make demo` makes one) and asks its retriever for every test user, with
and without a preference, once by each search. Writes hnsw_recall.json into the workspace's folder
`bench`.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from rich.console import Console
from rich.table import Table

from ...settings import Settings, load_settings
from ...tools.retriever import RetrievalRequest
from ...tools.trm.vocabulary import Vocabulary, render
from ...tools.workspace import Workspace
from .command import leave, machine, run_benchmark

_K = 20
_COLUMNS = ("users", "list_overlap", "same_list", "recall_exact", "recall_hnsw")


def compare(
    exact: Sequence[Sequence[str]], hnsw: Sequence[Sequence[str]], targets: Sequence[str]
) -> dict[str, float]:
    """Figures over users: the mean share of the exact list that HNSW's list holds, the share of
    lists that are the same in the same order, and how many lists of each hold the user's target.
    """
    pairs = list(zip(exact, hnsw, strict=True))
    return {
        "users": len(pairs),
        "list_overlap": fmean(len(set(one) & set(other)) / len(one) for one, other in pairs),
        "same_list": fmean(list(one) == list(other) for one, other in pairs),
        "recall_exact": fmean(t in found for t, found in zip(targets, exact, strict=True)),
        "recall_hnsw": fmean(t in found for t, found in zip(targets, hnsw, strict=True)),
    }


def requests(workspace: Workspace) -> dict[str, list[tuple[RetrievalRequest, str]]]:
    """For each kind of preference the requests of test users, each with the user's target.

    A user's past is excluded, the target apart. Users whose history has no describing attribute
    have no request with a preference.
    """
    data, split = workspace.data, workspace.split
    vocabulary = Vocabulary.build(data.items)
    kinds: dict[str, list[tuple[RetrievalRequest, str]]] = {"none": [], "history's first": []}
    histories = workspace.histories(hold_out=True)
    for at, name in enumerate(data.user_ids):
        if split.test[at] < 0:
            continue
        target = data.items[int(split.test[at])].id
        past = frozenset(histories[name]) - {target}
        top = vocabulary.history_terms(split.test_history(at).tolist(), 1)
        wishes: dict[str, str | None] = {"none": None}
        if top:
            wishes["history's first"] = render(vocabulary, top, "{name}: {}")
        for kind, preference in wishes.items():
            request = RetrievalRequest(
                history=tuple(histories[name]),
                preference=preference,
                k=min(_K, len(data.items) - len(past)),
                exclude=past,
            )
            kinds[kind].append((request, target))
    return {kind: asked for kind, asked in kinds.items() if asked}


def answers(
    settings: Settings,
    search: Literal["exact", "hnsw"],
    asked: Sequence[Sequence[RetrievalRequest]],
) -> list[list[list[str]]]:
    """The ids that the workspace's retriever gives for several groups of requests."""
    catalog = settings.catalog.model_copy(update={"search": search})
    workspace = Workspace(settings.model_copy(update={"catalog": catalog}))
    with workspace.catalog, workspace.retriever as retriever:
        return [
            [[item.id for item in found] for found in retriever.retrieve(group)] for group in asked
        ]


def main() -> None:
    """Run the benchmark on the workspace of the settings."""
    console = Console()
    where = machine()
    settings = load_settings()
    workspace = Workspace(settings)
    kinds = requests(workspace)
    asked = [[request for request, _ in group] for group in kinds.values()]
    with console.status("Searching exactly"):
        exact = answers(settings, "exact", asked)
    with console.status("Searching by HNSW"):
        hnsw = answers(settings, "hnsw", asked)
    figures = {
        kind: compare(one, other, [target for _, target in group])
        for (kind, group), one, other in zip(kinds.items(), exact, hnsw, strict=True)
    }
    report = {
        "workspace": settings.workspace,
        "items": len(workspace.data.items),
        "k": _K,
        "preference": figures,
    }
    folder = leave(workspace, "hnsw_recall", report, where=where)
    table = Table("preference", *(name.replace("_", " ") for name in _COLUMNS))
    for kind, row in figures.items():
        table.add_row(kind, *(f"{row[name]:.4g}" for name in _COLUMNS))
    console.print(table)
    console.print(f"Lists of {_K}. Written to {folder}", soft_wrap=True)


if __name__ == "__main__":
    run_benchmark(main)
