"""What a run of several variants and seeds is worth: the table, for people, README and program.

`evaluate_folder` is what `deeprec eval-trm` does; it needs nothing but the run's folder.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, pstdev

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...configuration import write_text
from ...errors import TRMError
from ...terminal import visible
from ..interactions import InteractionData, leave_one_out, statistics
from ..text_encoder import TextEncoder, item_embeddings
from .card import model_card
from .cold import cold_rows, without_items
from .evaluate import Judge, Row
from .model import TRM
from .record import FitRecord, Frozen, RunSource

_CARD = "README.md"
_FACTS = ("users", "items", "interactions", "density", "mean_length", "median_length")
_HEAD = ("variant", "preference", "users", "NDCG@10", "Recall@10", "Recall@20")
_FIT_HEAD = ("variant", "fit s", "examples/s")


class Line(Frozen):
    """A row of the table over seeds: mean and standard deviation (0 for one seed)."""

    variant: str
    row: str
    seeds: int
    users: float
    ndcg10: tuple[float, float]
    recall10: tuple[float, float]
    recall20: tuple[float, float]

    def cells(self) -> tuple[str, ...]:
        """The row in words, in the order of the table's head."""
        measured = (self.ndcg10, self.recall10, self.recall20)
        shown = (_show(value, self.seeds) for value in measured)
        return (self.variant, self.row, f"{self.users:.0f}", *shown)


class RunResults(Frozen):
    """What a run's folder was measured to be worth."""

    dataset: str
    statistics: dict[str, int | float | str]
    lines: tuple[Line, ...]
    # variant -> mean and standard deviation: all that one waits for, embedding of the preference
    # texts included; and the speed of the fit alone.
    fit_seconds: dict[str, tuple[float, float]]
    examples_per_second: dict[str, tuple[float, float]]


def evaluate_folder(
    folder: Path,
    *,
    data: Path | None = None,
    encoder: str | None = None,
    users: int = 10_000,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> RunResults:
    """Judge every finished checkpoint of a run; write results.json, table.md and model cards.

    `data` and `encoder` say where the data set and the sentence encoder are now, if not where
    the run had them. Of more than `users` test users a fixed random sample is judged. `progress`
    is told what is judged next. Raises TRMError if there is no
    checkpoint or one of another data set or encoder, DataError and EncoderError.
    """
    folder = Path(folder)
    source = RunSource.read(folder)
    given = InteractionData.load(data or source.data)
    reader = TextEncoder(encoder or source.encoder, device=device)
    embeddings = item_embeddings(reader, given.items, folder / "cache")
    judge = Judge(given, leave_one_out(given), embeddings, reader, users=users)
    results = evaluate_run(folder, judge, progress=progress)
    write_text(folder / "results.json", results.model_dump_json(indent=2) + "\n")
    tables = (statistics_table(results), markdown_table(results), fit_table(results))
    write_text(folder / "table.md", "\n".join(tables))
    for path, record in FitRecord.read_all(folder):
        fitted = given
        if record.cold_share:
            fitted = without_items(given, record.cold_share, record.seed)
        own = _table([line for line in results.lines if line.variant == record.variant])
        write_text(path / _CARD, model_card(record, fitted, source.encoder, own))
    return results


def evaluate_run(
    folder: Path, judge: Judge, *, progress: Callable[[str], None] | None = None
) -> RunResults:
    """Judge every finished checkpoint of a run. Raises TRMError, as `evaluate_folder` does."""
    records = FitRecord.read_all(folder)
    if not records:
        raise TRMError(
            f"no finished fit in {folder}. Make one with "
            "`python training/run_trm.py --config training/configs/trm_ml100k.yaml`."
        )
    table: dict[tuple[str, str], list[Row]] = {}
    for path, record in records:
        if record.dataset != judge.data.fingerprint:
            raise TRMError(
                f"the checkpoint in {path} belongs to another data set: it was trained on "
                f"{record.dataset}, this one has {judge.data.fingerprint}. Evaluate it on the "
                "data that it was trained on, or train again."
            )
        if progress is not None:
            progress(f"{record.variant}, seed {record.seed}")
        model = TRM.from_pretrained(path, encoder_fingerprint=judge.encoder_fingerprint)
        if record.cold_share:
            rows = cold_rows(model, judge)
        elif record.training.preferences:
            rows = judge.rows(model)
        else:
            rows = {"absent": judge.row(model, None)}
        for name, row in rows.items():
            table.setdefault((record.variant, name), []).append(row)
    return _results(judge, table, [record for _, record in records])


def print_table(results: RunResults, console: Console) -> None:
    """The table for people."""
    facts = ", ".join(f"{results.statistics[name]:,} {name}" for name in _FACTS[:3])
    console.print(Text.assemble((visible(results.dataset), "bold"), f": {facts}"))
    table = Table(*_HEAD)
    for line in results.lines:
        table.add_row(*line.cells())
    console.print(table)
    fits = Table(*_FIT_HEAD)
    for row in _fit_rows(results):
        fits.add_row(*row)
    console.print(fits)


def markdown_table(results: RunResults) -> str:
    """The same table for a README."""
    return _table(results.lines)


def statistics_table(results: RunResults) -> str:
    """The data set's row of a README's table."""
    head = "".join(f"| {name.replace('_', ' ')} " for name in _FACTS)
    facts = [results.statistics[name] for name in _FACTS]
    cells = [f"{fact:,.4g}" if isinstance(fact, float) else f"{fact:,}" for fact in facts]
    rows = (f"| data {head}|", "| --- " * (len(_FACTS) + 1) + "|")
    return "\n".join([*rows, f"| {' | '.join([results.dataset, *cells])} |"]) + "\n"


def fit_table(results: RunResults) -> str:
    """What fitting each variant took: seconds with the embedding of preference texts, and targets
    learned a second in the fit alone.
    """
    return _markdown(_FIT_HEAD, _fit_rows(results))


def _fit_rows(results: RunResults) -> list[tuple[str, str, str]]:
    return [
        (variant, f"{seconds:.0f}", f"{results.examples_per_second[variant][0]:,.0f}")
        for variant, (seconds, _) in results.fit_seconds.items()
    ]


def _table(lines: Sequence[Line]) -> str:
    return _markdown(_HEAD, [line.cells() for line in lines])


def _markdown(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    rows += [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join(rows) + "\n"


def _results(
    judge: Judge, table: dict[tuple[str, str], list[Row]], records: Sequence[FitRecord]
) -> RunResults:
    everything = {("baseline", name): [row] for name, row in judge.baselines().items()} | table
    by_variant: dict[str, list[FitRecord]] = {}
    for record in records:
        by_variant.setdefault(record.variant, []).append(record)
    return RunResults(
        dataset=judge.data.name,
        statistics=statistics(judge.data),
        lines=tuple(
            Line(
                variant=variant,
                row=name,
                seeds=len(rows),
                users=fmean(row.users for row in rows),
                ndcg10=_spread([row.ndcg10 for row in rows]),
                recall10=_spread([row.recall10 for row in rows]),
                recall20=_spread([row.recall20 for row in rows]),
            )
            for (variant, name), rows in everything.items()
        ),
        fit_seconds={
            v: _spread([r.prepare_seconds + r.fit_seconds for r in rs])
            for v, rs in by_variant.items()
        },
        examples_per_second={
            v: _spread([r.examples / r.fit_seconds for r in rs if r.fit_seconds])
            for v, rs in by_variant.items()
        },
    )


def _spread(values: list[float]) -> tuple[float, float]:
    return (fmean(values), pstdev(values)) if values else (0.0, 0.0)


def _show(value: tuple[float, float], seeds: int) -> str:
    return f"{value[0]:.3f}" + (f" ± {value[1]:.3f}" if seeds > 1 else "")
