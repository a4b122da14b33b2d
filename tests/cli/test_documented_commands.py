"""Each command of the README and the guides names what is there: commands, options, make targets,
settings, extras, modules, files. Nothing is run."""

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup
from typer.main import get_command

import deeprec
from deeprec.cli import app
from deeprec.settings import Settings

ROOT = Path(deeprec.__file__).parent
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = ("training/", "evals/", "examples/", "docs/", "tests/", "graph/", "tools/", "constraints-")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
COMMAND = re.compile(r"(?:[A-Z_]+=\S+\s+)*(?:\.venv/bin/|make |deeprec |pip install|python )")


def commands(text: str) -> Iterator[str]:
    """The lines of `bash` blocks, and commands within sentences that are told in full."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        yield from filter(None, map(str.strip, block.replace("\\\n", " ").splitlines()))
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for said in re.findall(r"`([^`]+)`", prose):
        if COMMAND.match(said) and "…" not in said:
            yield said.replace("\n", " ")


FOUND = [(guide.name, line) for guide in GUIDES for line in commands(guide.read_text("utf-8"))]


@pytest.mark.parametrize(("guide", "line"), FOUND, ids=[f"{g}: {line[:60]}" for g, line in FOUND])
def test_a_documented_command_names_what_is_there(guide: str, line: str) -> None:
    check(line)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("make supper", "supper"),
        ("deeprec bake --user 1", "bake"),
        ("deeprec recommend --colour red", "--colour"),
        ("deeprec memory forget --all", "user"),
        ("deeprec eval --config evals/configs/none.yaml", "none.yaml"),
        ("DEEPREC_COLOUR=red deeprec demo", "DEEPREC_COLOUR"),
        ("DEEPREC_ENGINE__COLOUR=red make demo", "DEEPREC_ENGINE__COLOUR"),
        ("python training/run_none.py", "run_none.py"),
        ("python training/run_sft.py --colour red", "--colour"),
        (".venv/bin/python -m deeprec.evals.bench.none", "none"),
        (".venv/bin/python -m deeprec.evals.bench.startup --colour red", "--colour"),
        ('pip install "deeprec-agent[cpu,magic]"', "magic"),
        ('.venv/bin/python -m pip install -e ".[magic]"', "magic"),
        ("bake a cake", "bake"),
    ],
)
def test_what_is_not_there_is_found(line: str, says: str) -> None:
    with pytest.raises(Exception, match=re.escape(says)):  # typer's have no public base
        check(line)


def check(line: str) -> None:
    """Fail where a command line names what is not there."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        _check_setting(words.pop(0).partition("=")[0])
    if not words:
        return
    for word in words:
        assert not word.startswith(OURS) or (ROOT / word).exists(), f"no such path: {word}"
    program, *rest = words
    match program.removeprefix(".venv/bin/"):
        case "make":
            for target in rest:
                assert "=" in target or target in TARGETS, f"no such target: {target}"
        case "deeprec":
            _check_options(rest)
        case "pip" if rest[0] == "install":
            _check_extras(rest)
        case "python" if rest[:3] == ["-m", "pip", "install"]:
            _check_extras(rest)
        case "python" if rest[0] == "-m":
            spec = importlib.util.find_spec(rest[1])
            assert spec is not None, f"no such module: {rest[1]}"
            if rest[1].startswith("deeprec."):
                assert spec.origin is not None
                _check_script(Path(spec.origin), rest[2:])
        case "python":
            assert (ROOT / rest[0]).is_file(), f"no such script: {rest[0]}"
            _check_script(ROOT / rest[0], rest[1:])
        case _:
            raise AssertionError(f"unknown program: {program}")


def _check_setting(name: str) -> None:
    if not name.startswith("DEEPREC_"):
        return
    fields = Settings.model_fields
    *sections, last = name.removeprefix("DEEPREC_").lower().split("__")
    for section in sections:
        kind = fields[section].annotation
        assert kind is not None
        fields = kind.model_fields
    assert last in fields, f"no such setting: {name}"


def _check_options(words: list[str]) -> None:
    """Let typer read the words, without what they ask for being done."""
    command = get_command(app)
    while words and not words[0].startswith("-") and isinstance(command, TyperGroup):
        context = typer.Context(command, info_name=command.name)
        _, command, words = command.resolve_command(context, words)
    if not words:  # the command's name alone, as within a sentence
        return
    with suppress(typer.Exit):  # --help
        command.make_context(command.name, words)


def _check_extras(words: list[str]) -> None:
    for word in words:
        for names in re.findall(r"\[([a-z,]+)\]", word):
            unknown = set(names.split(",")) - set(EXTRAS)
            assert not unknown, f"no such extra: {unknown}"


def _check_script(path: Path, words: list[str]) -> None:
    source = path.read_text("utf-8")
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and name != "--help":
            known = name in source or re.search(rf"\b{name[2:].replace('-', '_')}:", source)
            assert known, f"no such option of {path.name}: {name}"


@pytest.mark.parametrize("guide", GUIDES, ids=[guide.name for guide in GUIDES])
def test_files_that_a_guide_names_are_there(guide: Path) -> None:
    text = guide.read_text("utf-8")
    for name in re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.(?:py|yaml|md|html))`", text):
        assert name.startswith("runs/") or (ROOT / name).exists(), name


def test_the_design_names_the_nodes_of_the_graph() -> None:
    design = (ROOT / "docs" / "design.md").read_text("utf-8")
    table = design.partition("| node |")[2].partition("\n\n")[0]
    source = (ROOT / "graph" / "build.py").read_text("utf-8")
    named = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    assert sorted(named) == sorted(re.findall(r'add_node\("(\w+)"', source))


@pytest.mark.parametrize("guide", GUIDES, ids=[guide.name for guide in GUIDES])
def test_links_within_the_repository_lead_somewhere(guide: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", guide.read_text("utf-8")):
        assert (guide.parent / target).exists(), target
