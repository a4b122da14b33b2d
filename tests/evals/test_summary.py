"""The result table of a README."""

import sys
from pathlib import Path

import pytest

from deeprec.cli import main
from deeprec.errors import EvaluationError
from deeprec.evals.results import Results
from deeprec.evals.summary import BEGIN, END, insert_summary
from deeprec.evals.tables import interval

from .conftest import Evaluate

BEFORE, AFTER = "# Title\n\n", "\n\nMore |text|\n"


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    file = tmp_path / "README.md"
    file.write_text(f"{BEFORE}{BEGIN}\nan older table\n{END}{AFTER}")
    return file


def test_one_command_writes_every_row(
    run: Evaluate, readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two runs over the same users, and a third over fewer: each row once."""
    one, two, few = (tmp_path / name for name in ("one", "two", "few"))
    first = run(one)
    second = run(two, recommenders={"markov": {"kind": "markov"}, "other": {"kind": "trm"}})
    third = run(few, users=20, recommenders={"markov": {"kind": "markov"}}, past=["excluded"])
    command = ["deeprec", "eval-table", str(one), str(two), str(few), "--into", str(readme)]
    monkeypatch.setattr(sys, "argv", command)
    for _ in range(2):  # the second time over the first
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
    text = readme.read_text()
    assert text.startswith(f"{BEFORE}{BEGIN}\ntiny, 40 items")
    assert text.endswith(f"\n{END}{AFTER}")
    assert "an older table" not in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines[0] == "| recommender | users | ndcg@5 | recall@5 | difference | p |"
    rows = [(row, 80) for row in first.rows]
    rows += [(row, 80) for row in second.rows if row.recommender == "other"]
    rows += [(row, 20) for row in third.rows]
    assert len(lines) == 2 + len(rows)
    for line, (row, users) in zip(lines[2:], rows, strict=True):
        for cell in (row.label, str(users), *(interval(row.metrics[m]) for m in first.leading)):
            assert f"| {cell} |" in line


def test_another_row_of_the_same_label_names_its_run(
    run: Evaluate, readme: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("one", "two", "three", "four")]
    kinds = ("markov", "popularity", "markov", "popularity")
    for folder, kind in zip(folders, kinds, strict=True):
        run(folder, recommenders={"it": {"kind": kind}}, past=["excluded"])
    insert_summary(folders, readme)
    lines = [line for line in readme.read_text().splitlines() if line.startswith("| it")]
    assert [line.split(" | ")[0] for line in lines] == ["| it", "| it (two)"]
    for line, folder in zip(lines, folders[:2], strict=True):
        (row,) = Results.read(folder).rows
        assert interval(row.metrics["ndcg@5"]) in line


@pytest.mark.parametrize(
    "text",
    ["no marker", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}", f"{BEGIN}{BEGIN}{END}"],
)
def test_a_file_without_its_markers_is_left_alone(run: Evaluate, readme: Path, text: str) -> None:
    run(readme.parent / "run")
    readme.write_text(text)
    with pytest.raises(EvaluationError, match=r"README\.md does not hold .* once each"):
        insert_summary([readme.parent / "run"], readme)
    assert readme.read_text() == text


def test_a_file_that_is_not_there_is_told(run: Evaluate, tmp_path: Path) -> None:
    run(tmp_path / "run")
    with pytest.raises(EvaluationError, match="can't be read"):
        insert_summary([tmp_path / "run"], tmp_path / "none.md")


def test_other_data_does_not_enter_the_table(run: Evaluate, readme: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run(one)
    run(two)
    Results.read(two).model_copy(update={"fingerprint": "another"}).write(two)
    with pytest.raises(EvaluationError, match="they can't be compared"):
        insert_summary([one, two], readme)
    assert "an older table" in readme.read_text()
