"""What a run leaves beside its weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deeprec.configuration import write_json
from deeprec.errors import EngineError, RequestError, SettingsError
from deeprec.graph.app import run_settings
from deeprec.graph.engine.adapter import BASE, RUN_SETTINGS, trained_settings
from deeprec.graph.state import RunSettings
from deeprec.settings import Settings
from deeprec.training import compare_runs
from deeprec.training.card import policy_card, quarters
from deeprec.training.curves import draw
from deeprec.training.export_adapter import export, main
from deeprec.training.policy import keep_run_settings

HISTORY = [{"step": n, "loss": float(n)} for n in range(1, 9)] + [{"step": 9, "format/strict": 1}]


def test_quarters_by_hand() -> None:
    assert quarters(HISTORY, "loss") == (1.5, 7.5)
    assert quarters(HISTORY, "format/strict") is None
    assert quarters(HISTORY, "reward/hit") is None


def test_the_card_tells_what_was_logged_and_how_to_use_it(tmp_path: Path) -> None:
    base = tmp_path / "Small-LLM"
    base.mkdir()
    config = {"seed": 3, "run": RunSettings(retrieve_n=7).model_dump(mode="json")}
    card = policy_card(
        base=str(base),
        stage="warm_start",
        data="toys",
        adapter=True,
        config=config,
        history=HISTORY,
    )
    assert card.startswith("---\nbase_model: Small-LLM\n")
    assert "| loss | 1.500 | 7.500 |" in card
    assert "reward/hit" not in card
    assert "retrieve n 7" in card
    assert "DEEPREC_ADAPTER=" in card
    assert '"seed": 3' in card
    assert str(tmp_path) not in card


def test_curves_are_drawn_of_what_was_logged(tmp_path: Path) -> None:
    draw(HISTORY, tmp_path / "curves.png", title="a run")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SettingsError, match="logging_steps"):
        draw([{"step": 1, "other": 2}], tmp_path / "none.png", title="a run")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_runs_are_compared_by_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    for name, shuffled, seed, rise in (("a", False, 0, 1), ("b", False, 1, 3), ("c", True, 0, 0)):
        history = [{"step": n, "reward/total": n * rise} for n in range(8)]
        write_json(tmp_path / name / "config.json", {"shuffle_rewards": shuffled, "seed": seed})
        write_json(tmp_path / name / "cold_start" / "log.json", history)
    folders = [str(tmp_path / name) for name in "abc"]
    assert compare_runs.main([*folders, "--plot", str(tmp_path / "all.png")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "own rewards (2)" in told
    assert "1.000 (0.500 to 1.500)" in told
    assert "12.000 (6.000 to 18.000)" in told
    assert "shuffled rewards (1) │ 0.000 │ 0.000 │ 0.000" in told
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    assert compare_runs.main([str(tmp_path)]) == 2
    assert "no finished stage 'cold_start'" in capsys.readouterr().err


def test_a_trained_llm_is_served_as_it_was_trained(tmp_path: Path) -> None:
    trained = RunSettings(
        answer_form="numbers", retrieve_n=7, history_length=5, list_attributes=False, k=3
    )
    keep_run_settings(trained, tmp_path)
    settings = Settings(adapter=tmp_path)
    served = run_settings(settings, {"retrieve_n": 10, "thought_tokens": 9}, history_length=None)
    assert (served.answer_form, served.retrieve_n, served.history_length) == ("numbers", 7, 5)
    assert (served.list_attributes, served.decoding, served.temperature) == (False, "free", 0.0)
    assert (served.thought_tokens, served.k) == (9, 10)
    chosen = run_settings(settings, decoding="guided", retrieve_n=4)
    assert (chosen.decoding, chosen.retrieve_n) == ("guided", 4)
    assert run_settings(Settings(), {"retrieve_n": 6}).retrieve_n == 6
    with pytest.raises(RequestError, match="decoding"):
        run_settings(settings, decoding="wild")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_torn_run_settings_are_refused(tmp_path: Path, text: str) -> None:
    assert trained_settings(tmp_path) == {}
    (tmp_path / RUN_SETTINGS).write_text(text)
    with pytest.raises(EngineError, match=RUN_SETTINGS):
        trained_settings(tmp_path)
    (tmp_path / RUN_SETTINGS).write_text(json.dumps({"k": 2}))
    assert trained_settings(tmp_path) == {"k": 2}


def test_an_exported_adapter_is_half_as_large_and_names_no_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    final = run / "final"
    final.mkdir(parents=True)
    weights = {"lora_A.weight": torch.linspace(-1, 1, 64).reshape(8, 8)}
    save_file(weights, final / "adapter_model.safetensors")
    with pytest.raises(SettingsError, match="README"):
        export(final, tmp_path / "out", "owner/name")
    where = {"base_model_name_or_path": "/somewhere/here", "r": 8}
    (final / "adapter_config.json").write_text(json.dumps(where))
    (final / BASE).write_text("{}")
    (final / "README.md").write_text("---\nbase_model: here\n---\nText\n")
    keep_run_settings(RunSettings(), final)
    (run / "log.json").write_text("[]")
    out = export(final, tmp_path / "out", "owner/name")
    kept = load_file(out / "adapter_model.safetensors")["lora_A.weight"]
    assert kept.dtype == torch.bfloat16
    assert torch.allclose(kept.float(), weights["lora_A.weight"], rtol=2**-8)
    assert json.loads((out / "adapter_config.json").read_text()) == {
        "base_model_name_or_path": "owner/name",
        "r": 8,
    }
    assert (out / "README.md").read_text() == "---\nbase_model: owner/name\n---\nText\n"
    assert trained_settings(out)["decoding"] == "free"
    assert (out / BASE).read_text() == "{}"
    assert (out / "log.json").exists()
    with pytest.raises(SettingsError, match="already"):
        export(final, out, "owner/name")
    assert main([str(final), str(out), "--base", "owner/name"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
