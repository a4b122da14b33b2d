import json
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from deeprec.configuration import load_config
from deeprec.errors import DataError, SettingsError, TRMError
from deeprec.tools.interactions import InteractionData, leave_one_out
from deeprec.tools.text_encoder import TextEncoder, item_embeddings
from deeprec.tools.trm.card import model_card
from deeprec.tools.trm.config import DeepRecConfig, FitConfig, PaperConfig
from deeprec.tools.trm.evaluate import Judge
from deeprec.tools.trm.model import TRM
from deeprec.tools.trm.record import FitRecord, RunSource
from deeprec.tools.trm.report import RunResults, evaluate_folder, print_table
from deeprec.training.run_trm import TRMRun, main, run

SMALL = {"name": "deeprec", "dim": 16, "transition_dim": 8, "preference_dim": 8, "inner": 16}
BRIEF = {"epochs": 1, "batch_size": 128, "pool": 100}


def load(path: Path, **changes: object) -> TRMRun:
    return load_config(path, TRMRun, **changes)


@pytest.fixture(scope="module")
def config_file(
    tiny_data: InteractionData,
    tiny_encoder_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny_data.save(folder / "data")
    content = {
        "data": str(folder / "data"),
        "encoder": str(tiny_encoder_folder),
        "output": str(folder / "out"),
        "seeds": [0, 1],
        "threads": 1,
        "variants": {
            "ours": {"model": SMALL, "training": BRIEF},
            "twin": {"model": SMALL, "training": {**BRIEF, "preferences": False}},
            "cold": {"model": SMALL, "training": BRIEF, "cold_share": 0.25},
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def results(config_file: Path) -> RunResults:
    return run(load(config_file), Console(quiet=True))


def test_every_variant_has_its_rows(results: RunResults) -> None:
    rows = {(line.variant, line.row): line for line in results.lines}
    assert {("baseline", "Markov"), ("ours", "absent"), ("ours", "unrelated")} <= rows.keys()
    assert [row for variant, row in rows if variant == "twin"] == ["absent"]
    assert [row for variant, row in rows if variant == "cold"] == [
        "warm items, all target values",
        "cold items, all target values",
    ]
    assert rows["ours", "absent"].seeds == 2
    assert rows["ours", "absent"].users == 80
    assert rows["baseline", "Markov"].seeds == 1
    assert results.examples_per_second["ours"][0] > 0
    assert results.statistics["items"] == 40


def test_means_and_spreads_are_those_of_the_seeds(
    results: RunResults, config_file: Path, tiny_encoder: TextEncoder, tmp_path: Path
) -> None:
    data = InteractionData.load(config_file.parent / "data")
    text = item_embeddings(tiny_encoder, data.items, tmp_path)
    judge = Judge(data, leave_one_out(data), text, tiny_encoder)
    folder = config_file.parent / "out" / "ours"
    one, other = (
        judge.row(TRM.from_pretrained(folder / f"seed-{seed}"), None).ndcg10 for seed in (0, 1)
    )
    (line,) = (line for line in results.lines if (line.variant, line.row) == ("ours", "absent"))
    assert one != other
    assert line.ndcg10 == pytest.approx(((one + other) / 2, abs(one - other) / 2))


def test_seconds_are_what_one_fit_takes_alone(results: RunResults, config_file: Path) -> None:
    folder = config_file.parent / "out"
    stored = {
        (name, seed): FitRecord.read(folder / name / f"seed-{seed}")
        for name in ("ours", "twin") for seed in (0, 1)
    }  # fmt: skip
    shown = {(r.variant, r.seed): r for _, r in FitRecord.read_all(folder)}
    # Preference texts were embedded once, for seed 0.
    assert stored["ours", 0].prepare_seconds > 100 * stored["ours", 1].prepare_seconds
    for seed in (0, 1):
        assert shown["ours", seed].prepare_seconds == stored["ours", 0].prepare_seconds
        assert shown["twin", seed] == stored["twin", seed]
    alone = [r.prepare_seconds + r.fit_seconds for r in (shown["ours", 0], shown["ours", 1])]
    assert results.fit_seconds["ours"][0] == pytest.approx(sum(alone) / 2)
    speeds = [r.examples / r.fit_seconds for r in (shown["ours", 0], shown["ours", 1])]
    assert results.examples_per_second["ours"][0] == pytest.approx(sum(speeds) / 2)
    assert shown["cold", 0].prepare_seconds != shown["cold", 1].prepare_seconds  # other data


def test_a_folder_is_evaluated_by_itself(results: RunResults, config_file: Path) -> None:
    folder = config_file.parent / "out"
    for name in ("results.json", "table.md", "cold/seed-1/README.md"):
        (folder / name).unlink()
    told: list[str] = []
    again = evaluate_folder(folder, progress=told.append)
    assert again == results
    assert told[:2] == ["cold, seed 0", "cold, seed 1"]
    assert RunResults.model_validate_json((folder / "results.json").read_text()) == results
    console = Console(record=True, width=140)
    print_table(results, console)
    shown, table = console.export_text(), (folder / "table.md").read_text()
    for line in results.lines:
        assert f"| {' | '.join(line.cells())} |" in table
        assert all(cell in shown for cell in line.cells())
    for variant, (seconds, _) in results.fit_seconds.items():
        speed = results.examples_per_second[variant][0]
        assert f"| {variant} | {seconds:.0f} | {speed:,.0f} |" in table
        assert f"{speed:,.0f}" in shown
    assert "| tiny | 80 | 40 | 960 | 0.3 | 12 | 12 |" in table
    card = (folder / "cold" / "seed-1" / "README.md").read_text()
    assert "25% of its items were held out" in card
    assert "cold items, all target values" in card
    assert "30 items" in card
    assert str(folder.parent) not in card  # no path of the machine it was trained on


def test_the_card_tells_how_to_use_it(results: RunResults, config_file: Path) -> None:
    card = (config_file.parent / "out" / "ours" / "seed-0" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "deeprec"
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    for line in code.splitlines():
        if line.startswith("from "):
            exec(line)


@pytest.mark.parametrize("preferences", [True, False], ids=["asked", "twin"])
@pytest.mark.parametrize(
    ("model", "finds_new_items"),
    [
        (DeepRecConfig(), True),
        (DeepRecConfig(item_dropout=0), False),
        (PaperConfig(), False),
    ],
    ids=["deeprec", "never by text", "paper"],
)
def test_the_card_says_what_is_true_of_the_variant(
    model: DeepRecConfig | PaperConfig,
    finds_new_items: bool,
    preferences: bool,
    tiny_data: InteractionData,
) -> None:
    record = FitRecord(
        variant="v", seed=0, dataset="d", encoder="e", model=model,
        training=FitConfig(preferences=preferences),
        prepare_seconds=30 if preferences else 0, fit_seconds=100, examples=20_000,
    )  # fmt: skip
    card = " ".join(model_card(record, tiny_data, "owner/encoder").split())
    assert ("training are found by their text" in card) == finds_new_items
    assert ("never taught to read it so" in card) != finds_new_items
    assert ("give it none" in card) != preferences
    for told in ("preference-aware", "Preferences in training were made", "embed_preferences"):
        assert (told in card) == preferences
    if preferences:
        assert "It took 130 s, 30 of them to embed preference texts; 200 targets a second" in card
    else:
        assert "It took 100 s; 200 targets a second" in card


@pytest.mark.parametrize(
    ("encoder", "base", "name"),
    [
        ("owner/encoder-v1.5", "owner/encoder-v1.5", "owner/encoder-v1.5"),
        ("models/here", None, "here"),
        ("./models/gone", None, "gone"),
        ("/models/gone", None, "gone"),
        ("all-MiniLM-L6-v2", None, "all-MiniLM-L6-v2"),
    ],
)
def test_only_a_hub_name_is_named_as_base_model(
    encoder: str,
    base: str | None,
    name: str,
    tiny_data: InteractionData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "models" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    record = FitRecord(
        variant="v", seed=0, dataset="d", encoder="e", model=DeepRecConfig(), training=FitConfig()
    )
    card = model_card(record, tiny_data, encoder)
    assert yaml.safe_load(card.split("---")[1]).get("base_model") == base
    assert f'TextEncoder("{name}")' in card


def test_without_data_and_encoder_those_of_the_workspace_are_used(
    tiny_data: InteractionData,
    tiny_encoder_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tiny_encoder_folder.parent)
    monkeypatch.setenv("DEEPREC_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DEEPREC_WORKSPACE", "tiny")
    monkeypatch.setenv("DEEPREC_ENCODER", tiny_encoder_folder.name)
    content = {
        "output": str(tmp_path / "out"),
        "seeds": [0],
        "variants": {"twin": {"model": SMALL, "training": {**BRIEF, "preferences": False}}},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(DataError, match="deeprec prepare"):
        run(load(file), Console(quiet=True))
    data = tmp_path / "home" / "workspaces" / "tiny" / "dataset"
    tiny_data.save(data)
    fitted = run(load(file), Console(quiet=True))
    source = RunSource.read(tmp_path / "out")
    assert source == RunSource(data=data, encoder=str(tiny_encoder_folder))
    monkeypatch.chdir(tmp_path)
    assert evaluate_folder(tmp_path / "out") == fitted


def test_a_place_that_holds_something_else_is_told_before_the_fit(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("fitted")

    monkeypatch.setattr("deeprec.training.run_trm.fit", never)
    place = tmp_path / "out" / "cold" / "seed-0"  # the file's first variant
    place.mkdir(parents=True)
    (place / "thesis.txt").write_text("mine")
    with pytest.raises(TRMError, match=r"thesis\.txt"):
        run(load(config_file, output=tmp_path / "out"), Console(quiet=True))


def test_a_finished_fit_is_kept_and_a_changed_one_refused(
    results: RunResults, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr("deeprec.training.run_trm.fit", never)
    assert run(load(config_file), Console(quiet=True)) == results
    raw = yaml.safe_load(config_file.read_text())
    raw["variants"]["ours"]["training"]["epochs"] = 2
    changed = config_file.with_name("changed.yaml")
    changed.write_text(yaml.safe_dump(raw))
    with pytest.raises(TRMError, match=r"these differ: training\.epochs\."):
        run(load(changed), Console(quiet=True))


def test_a_run_of_other_data_or_encoder_is_refused(
    results: RunResults, config_file: Path, tiny_data: InteractionData, tmp_path: Path
) -> None:
    folder = config_file.parent / "out"
    other = InteractionData(
        tiny_data.name, tiny_data.items, tiny_data.user_ids, tiny_data.users,
        tiny_data.item_indices, tiny_data.times + 1,
    )  # fmt: skip
    other.save(tmp_path / "later")
    with pytest.raises(TRMError, match="belongs to another data set"):
        evaluate_folder(folder, data=tmp_path / "later")
    with pytest.raises(TRMError, match="no TRM run in"):
        evaluate_folder(tmp_path / "nothing")
    shutil.copytree(folder, tmp_path / "run")
    damaged = tmp_path / "run" / "ours" / "seed-0" / "fit.json"
    record = json.loads(damaged.read_text())
    damaged.write_text(json.dumps({**record, "seed": "x"}))
    with pytest.raises(TRMError, match="is damaged"):
        evaluate_folder(tmp_path / "run")
    for path, _ in FitRecord.read_all(folder):
        shutil.rmtree(tmp_path / "run" / path.relative_to(folder))
    with pytest.raises(TRMError, match="no finished fit"):
        evaluate_folder(tmp_path / "run")


def test_mistakes_in_the_configuration(config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="can't read"):
        load(tmp_path / "none.yaml")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("- a\n")
    with pytest.raises(SettingsError, match="holds no fields"):
        load(wrong)
    wrong.write_text(config_file.read_text().replace("epochs", "epoch"))
    with pytest.raises(SettingsError, match="epoch"):
        load(wrong)
    assert load(config_file, seeds=[5], data=None).seeds == (5,)
    for seeds in ([-1], []):
        with pytest.raises(SettingsError, match="seeds"):
            load(config_file, seeds=seeds)


def test_the_shipped_configuration_is_valid() -> None:
    shipped = Path(__file__).parents[2] / "training" / "configs" / "trm_ml100k.yaml"
    config = load(shipped)
    assert (config.data, config.encoder) == (None, None)  # the workspace's
    assert set(config.variants) == {"deeprec", "twin", "paper", "cold"}
    twin, ours = config.variants["twin"], config.variants["deeprec"]
    assert twin.model == ours.model
    assert twin.training == ours.training.model_copy(update={"preferences": False})


def test_the_command_line_tells_errors(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config_file: Path
) -> None:
    code = main(["--config", str(tmp_path / "none.yaml")])
    assert code != 0
    assert "can't read the configuration" in capsys.readouterr().err
    assert main(["--config", str(config_file), "--data", str(tmp_path / "none")]) != 0
    capsys.readouterr()
    assert main(["--config", str(config_file), "--seeds", "-1"]) != 0
    assert "seeds" in capsys.readouterr().err
