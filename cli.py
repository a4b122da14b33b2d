"""The `deeprec` command. Each command calls one function of the rooms below.

Nothing heavy is imported before a command needs it, so that `deeprec --help` is quick.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from . import __version__
from .errors import RequestError, shown
from .terminal import errors, run_app, visible

if TYPE_CHECKING:
    from .graph.state import RunSettings
    from .settings import Settings
    from .tools.workspace import Workspace

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="DeepRec: an LLM explores an item catalog through a recommendation model, then ranks.",
)
console = Console(markup=False)  # paths, names and titles may look like markup

WorkspaceOption = Annotated[
    str | None, typer.Option("--workspace", "-w", help="Workspace in use [DEEPREC_WORKSPACE].")
]
# What is not given comes from the adapter in use, or is guided, titles, 10 items, temperature 0.7.
DecodingOption = Annotated[
    str | None,
    typer.Option(help="free: the LLM writes everything. guided: a grammar keeps it valid."),
]


def main() -> None:
    """Run the `deeprec` command."""
    run_app(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Take what stands before the command."""


def _settings(**given: object) -> Settings:
    from .settings import load_settings

    return load_settings(**given)


def _workspace(name: str | None) -> Workspace:
    from .tools.workspace import Workspace

    return Workspace(_settings(**({"workspace": name} if name else {})))


@app.command()
def demo(
    users: Annotated[int, typer.Option(min=1, help="Test users to recommend for.")] = 3,
    seed: Annotated[int, typer.Option(help="Sampling seed.")] = 0,
) -> None:
    """Set up MovieLens-100K and watch the agent recommend for test users."""
    from .demo import run_demo

    run_demo(_workspace(None), console, users=users, seed=seed)


@app.command()
def assets() -> None:
    """Fetch the demo's models and data, checked by their digests."""
    from .tools.assets import ensure_assets

    folder = _settings().assets_dir
    ensure_assets(folder, notify=lambda message: console.print(f"  {message}", style="dim"))
    console.print(f"Models and data are in {folder}", soft_wrap=True)


@app.command()
def prepare(
    source: Annotated[Path, typer.Argument(help="File or folder of a data set.")],
    format: Annotated[
        str,
        typer.Option(help="recbole, movielens-1m, amazon-2018, amazon-2023, table, or auto."),
    ] = "auto",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", "-o", help="NAME=VALUE for the format's loader, e.g. -o items=items.csv."
        ),
    ] = None,
    k_core: Annotated[int, typer.Option(min=1, help="Least interactions of users and items.")] = 5,
    workspace: WorkspaceOption = None,
) -> None:
    """Read a data set, filter it, and keep it in the workspace."""
    from .tools.interactions import statistics

    place = _workspace(workspace)
    options = _loader_options(option or [])
    with console.status(Text(f"Reading {source}")):
        data = place.prepare(source, format=format, k_core=k_core, options=options)
    _print_table(statistics(data))
    console.print(f"Prepared in {place.dataset_dir}. Next: deeprec train-trm", soft_wrap=True)


@app.command()
def train_trm(
    architecture: Annotated[str, typer.Option(help="deeprec or paper.")] = "deeprec",
    epochs: Annotated[int | None, typer.Option(min=1, help="Most epochs.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of initialisation and order.")] = 0,
    workspace: WorkspaceOption = None,
) -> None:
    """Train the recommendation model on the workspace's data set."""
    from .tools.progress import counted, trm_progress
    from .tools.trm.config import FitConfig, parse_config

    place = _workspace(workspace)
    training = FitConfig() if epochs is None else FitConfig(epochs=epochs)
    config = parse_config({"name": architecture})
    _ = place.data  # a missing data set is told before anything is fetched
    place.ensure_assets(lambda message: console.print(f"  {message}", style="dim"))
    with counted(console, "embedding items") as embedded:
        place.embed_items(progress=embedded)
    with trm_progress(console) as progress:
        place.train_trm(config, training, seed=seed, progress=progress)
    console.print(f"Trained: {place.trm_dir}. Next: deeprec index", soft_wrap=True)


@app.command()
def eval_trm(
    run: Annotated[Path, typer.Argument(help="Output folder of training/run_trm.py.")],
    data: Annotated[
        Path | None, typer.Option(help="The prepared data set, if it has moved since the run.")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="The sentence encoder, if it has moved since the run.")
    ] = None,
    users: Annotated[int, typer.Option(min=1, help="Most test users to judge by.")] = 10_000,
) -> None:
    """Judge the recommendation models of a run on test users; write its table and model cards."""
    from .tools.trm.report import evaluate_folder, print_table

    with console.status("Judging") as status:
        results = evaluate_folder(
            run,
            data=data,
            encoder=encoder,
            users=users,
            progress=lambda what: status.update(f"Judging {what}"),
        )
    print_table(results, console)
    console.print(f"Written to {run / 'table.md'}", soft_wrap=True)


@app.command("eval")
def evaluate(
    config: Annotated[Path, typer.Option(help="YAML file, see evals/configs.")],
    output: Annotated[Path | None, typer.Option(help="Instead of the file's output.")] = None,
) -> None:
    """Judge recommenders on all test users; goes on where an earlier run was cut off."""
    from .configuration import load_config
    from .evals.config import EvalRun
    from .evals.run_eval import run

    run(load_config(config, EvalRun, output=output), console)


@app.command()
def eval_report(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of `deeprec eval`.")],
    output: Annotated[Path, typer.Option(help="HTML file to write.")],
) -> None:
    """Write the report of an evaluation anew, or of several side by side."""
    from .configuration import write_text
    from .evals.report import report

    write_text(output, report(runs))
    console.print(f"Written to {output}", soft_wrap=True)


@app.command()
def eval_table(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of `deeprec eval`.")],
    into: Annotated[Path, typer.Option(help="Markdown file with the two marker comments.")],
) -> None:
    """Write the result table of evaluations into a README, in the place of the one before."""
    from .evals.summary import insert_summary

    insert_summary(runs, into)
    console.print(f"Written to {into}", soft_wrap=True)


@app.command()
def index(workspace: WorkspaceOption = None) -> None:
    """Fill the catalog with the workspace's items and their vectors."""
    from .tools.progress import counted

    place = _workspace(workspace)
    _ = place.data  # a missing data set is told before the encoder loads
    with counted(console, "embedding items") as progress:
        place.embed_items(progress=progress)
    with counted(console, "filling the catalog") as progress:
        catalog = place.index(progress=progress)
    console.print(f"{len(catalog.ids)} items are in the catalog. Next: deeprec recommend --user …")


@app.command()
def recommend(
    titles: Annotated[
        list[str] | None, typer.Argument(help="Items the user liked, oldest first: titles or ids.")
    ] = None,
    user: Annotated[
        str | None, typer.Option("--user", "-u", help="A user of the data set.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Recommendations wanted.")] = 10,
    filters: Annotated[
        str | None, typer.Option(help='JSON, e.g. \'{"genres": ["Comedy"]}\'.')
    ] = None,
    wish: Annotated[
        list[str] | None, typer.Option(help="What you want, in your own words; repeatable.")
    ] = None,
    decoding: DecodingOption = None,
    answer_form: Annotated[str | None, typer.Option(help="titles or numbers.")] = None,
    retrieve_n: Annotated[int | None, typer.Option(help="Items that one search returns.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature; 0 is greedy.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Sampling seed.")] = None,
    time_budget: Annotated[
        float | None, typer.Option(help="Seconds; then the answer is made of what was found.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say of each recommendation why it is there.")
    ] = False,
    trace: Annotated[bool, typer.Option("--trace", help="Show every turn.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the response as JSON.")] = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Recommend for a user of the data set, or for typed titles."""
    from .graph.app import run_settings
    from .graph.requests import parse_request, resolve_request

    place = _workspace(workspace)
    settings = run_settings(
        place.settings,
        {"retrieve_n": 10, "temperature": 0.7},
        k=k,
        decoding=decoding,
        answer_form=answer_form,
        retrieve_n=retrieve_n,
        temperature=temperature,
        seed=seed,
        limits={"time_budget_s": time_budget},
        explain=explain or None,
    )
    request = parse_request(
        history=titles or None, user_id=user, filters=_json_object(filters), wishes=wish or []
    )
    with errors.status("Loading the recommendation model and the LLM"):
        # A request that can't be answered is told before the LLM takes its time to load.
        resolve_request(request, settings, place.catalog, place.histories(hold_out=False))
        graph = _agent(place, settings)
    from .graph.display import response_lines
    from .graph.state import RecommendationResponse

    with errors.status("Thinking"):
        response = RecommendationResponse.model_validate(graph.invoke(request))
    if as_json:
        print(response.model_dump_json(indent=2))
        return
    for line in response_lines(response, trace=trace):
        console.print(line)


@app.command()
def serve_llm(
    host: Annotated[str, typer.Option(help="Address to bind; loopback by default.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to bind.")] = 8000,
) -> None:
    """Serve the LLM with vLLM's OpenAI-compatible server (then DEEPREC_ENGINE__KIND=server)."""
    from .graph.app import tuned_model
    from .graph.engine.vllm_server import serve

    settings = _settings()
    serve(tuned_model(settings), settings.engine, host=host, port=port)


trajectories = typer.Typer(no_args_is_help=True, help="Finished runs as training data.")
app.add_typer(trajectories, name="trajectories")


@trajectories.callback()
def _trajectories() -> None:
    """Keep `show` a command of its own, though it is the only one."""


@trajectories.command()
def show(
    source: Annotated[Path, typer.Argument(help="A file of trajectories, or a run's folder.")],
    only: Annotated[
        list[str] | None, typer.Option("--id", help="Show these runs in full; else an overview.")
    ] = None,
    number: Annotated[int, typer.Option("-n", min=1, help="Most runs of the overview.")] = 50,
    prompt: Annotated[bool, typer.Option("--prompt", help="Show the request too.")] = False,
) -> None:
    """Show what was written by whom, what the loss sees, and what it earned."""
    from itertools import islice

    from .errors import TrajectoryError
    from .training.show import overview, trajectory_lines
    from .training.trajectory_file import iter_trajectories

    runs = iter_trajectories(source)
    if not only:
        console.print(overview(list(islice(runs, number))))
        return
    found = {run.id: run for run in runs if run.id in only}
    missing = [id_ for id_ in only if id_ not in found]
    if missing:
        raise TrajectoryError(f"{source} holds no trajectory {missing[0]!r}: see the overview")
    for id_ in only:
        for line in trajectory_lines(found[id_], prompt=prompt):
            console.print(line)


memory = typer.Typer(no_args_is_help=True, help="What users told the server's agent.")
app.add_typer(memory, name="memory")


@memory.command("list")
def list_memory(
    user: Annotated[str | None, typer.Argument(help="A user; none: who has notes.")] = None,
    workspace: WorkspaceOption = None,
) -> None:
    """List what is remembered of a user, oldest first, or of whom anything is."""
    from .graph.memory import list_notes

    for line in list_notes(_workspace(workspace).settings.memory_at, user):
        console.print(visible(line), highlight=False, soft_wrap=True)


@memory.command("forget")
def forget_memory(
    user: Annotated[str, typer.Argument(help="A user.")],
    about: Annotated[
        list[str] | None, typer.Argument(help="Titles, item ids or words, as `list` shows them.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that is remembered.")] = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Delete what is remembered of a user: some of it, or all."""
    from .graph.memory import forget_notes

    if everything == bool(about):
        raise RequestError("say what is to be forgotten, or --all; not both")
    gone = forget_notes(_workspace(workspace).settings.memory_at, user, about)
    console.print(f"Forgotten: {gone} of user {user!r}")


def _agent(place: Workspace, settings: RunSettings) -> Any:
    from .graph.app import load_graph

    return load_graph(place, settings)


def _json_object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter: nested too deeply
        raise RequestError(f"--filters {shown(text)} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError(
            f'--filters {shown(text)} is not a JSON object like {{"genres": ["Comedy"]}}'
        )
    return value


def _loader_options(pairs: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise RequestError(f"--option {pair!r} is not of the form NAME=VALUE")
        options[name] = value
    return options


def _print_table(values: dict[str, int | float | str]) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False)
    for name, value in values.items():
        table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else f"{value}")
    console.print(table)


if __name__ == "__main__":
    main()
