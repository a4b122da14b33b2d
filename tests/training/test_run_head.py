"""Supervised training of the head and its LLM: what is read, what is learnt, what is left."""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from rich.console import Console
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from deeprec.configuration import load_config
from deeprec.errors import SettingsError
from deeprec.graph.engine.tokenizer import load_tokenizer
from deeprec.graph.engine.vllm_inprocess import VLLMEngine
from deeprec.graph.r2ec.backbone import Backbone
from deeprec.graph.r2ec.head import RecommendationHead, load_head, read_card
from deeprec.graph.r2ec.items import catalog_readings
from deeprec.graph.r2ec.ranker import HeadRanker
from deeprec.settings import load_settings
from deeprec.tools.interactions import InteractionData, leave_one_out
from deeprec.tools.retriever import Retriever
from deeprec.tools.trm.vocabulary import Vocabulary
from deeprec.tools.workspace import Workspace
from deeprec.training import ground, run_head, run_recpo
from deeprec.training.card import quarters
from deeprec.training.configuration import LoRA
from deeprec.training.head_folder import leave_head, live_backbone
from deeprec.training.head_start import HeadStart, Reader, _whiten, follow
from deeprec.training.head_training import HeadLearning, HeadTrainer, places_by_step
from deeprec.training.policy import load_policy
from deeprec.training.run_head import HeadRun
from deeprec.training.teacher import Teacher

from .test_run_recpo import CutError, Rambler, cut_once, here, home
from .test_run_recpo import config as recpo_config

__all__ = ["here", "home"]


def config(output: Path, **changes: Any) -> HeadRun:
    fields: dict[str, Any] = {
        "output": output,
        "workspace": "tiny",
        "head_start": {"readings": 60},
        "learning": {
            "steps": 4, "readings_per_step": 4, "refresh_every": 3,
            "valid_users": 10, "valid_every": 2, "save_every": 2, "learning_rate": 0.001,
        },
        "run": {"history_length": 4, "thought_tokens": 8},
        "precision": "float32",
    }  # fmt: skip
    return HeadRun.model_validate({**fields, **changes})


def test_each_position_is_a_target_once_in_a_pass() -> None:
    sequences = [np.arange(23, dtype=np.int32), np.arange(9, dtype=np.int32)]
    # 21 and 7 positions that may be targets, in windows of 4: at most 5 and 2 readings a pass.
    for seed in range(9):
        places = islice(places_by_step(sequences, size=1, left=2, window=4, seed=seed), 5)
        targets = [
            (user, target) for ((user, at),) in places for target in range(max(1, at - 3), at + 1)
        ]
        assert len(set(targets)) == len(targets)
        assert all(target < len(sequences[user]) - 2 for user, target in targets)
    passes = places_by_step(sequences, size=1, left=2, window=4, seed=0)
    drawn = {place for (place,) in islice(passes, 100)}
    assert {at for user, at in drawn if user == 0} == set(range(1, 21))


def test_a_step_larger_than_a_pass_is_refused() -> None:
    two = [np.arange(5, dtype=np.int32)] * 2
    with pytest.raises(SettingsError, match="gives 2 readings"):
        next(places_by_step(two, size=3, left=2, window=4, seed=0))


@pytest.fixture
def reader(tiny_data: InteractionData, tiny_llm: str, retriever: Retriever) -> Reader:
    split, vocabulary = leave_one_out(tiny_data), Vocabulary.build(tiny_data.items)
    tokenizer = load_tokenizer(tiny_llm)
    return Reader(tiny_data, split, retriever.catalog, tokenizer, vocabulary, history_length=4)


def test_the_thought_and_its_end_are_what_is_written(reader: Reader) -> None:
    reading = reader.read(3, 6, thought=True)
    said = reader.tokenizer.decode([reading.ids[place] for place in reading.spoken])
    assert said.startswith("This user seems to like ")
    assert said.endswith(".\n</think>")
    assert reading.spoken == list(range(reading.spoken[0], reading.spoken[-1] + 1))
    assert reader.read(3, 6, thought=False).spoken == []


@pytest.fixture
def trainer(reader: Reader, tiny_llm: str, tmp_path: Path) -> HeadTrainer:
    llm = AutoModelForCausalLM.from_pretrained(tiny_llm, dtype=torch.float32).eval()
    backbone = Backbone(getattr(llm, llm.base_model_prefix), reader.tokenizer)
    torch.manual_seed(0)
    made = HeadTrainer(
        llm=llm,
        backbone=backbone,
        head=RecommendationHead(backbone.dim),
        items=catalog_readings(reader.catalog.snapshot, backbone),
        reader=reader,
        start=HeadStart(),
        config=HeadLearning(steps=2, readings_per_step=3, thought_weight=0.5, tokens_per_pass=256),
        folder=tmp_path,
        seed=0,
    )
    made._states = backbone.states(made._items)
    return made


class Fixed:
    """A teacher whose answer is made of the place that is asked for."""

    def __init__(self, items: int) -> None:
        self.items = items

    def log_probs(self, sequence: NDArray[np.int32], places: Iterable[int]) -> torch.Tensor:
        def row(place: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(int(sequence[place]))
            return torch.randn(self.items, generator=generator)

        return torch.stack([row(place) for place in places]).log_softmax(dim=-1)


@pytest.mark.parametrize("weight", [0, 0.7])
def test_the_gradient_is_that_of_the_plain_objective(
    trainer: HeadTrainer, monkeypatch: pytest.MonkeyPatch, weight: float
) -> None:
    teacher = Fixed(len(trainer._items))
    if weight:
        trainer._teacher = teacher  # type: ignore[assignment]
    trainer._config = trainer._config.model_copy(update={"teacher_weight": weight})
    places = [(0, 6), (1, 3), (2, 5)]
    rng = np.random.default_rng([0, 29, 1])
    readings = [trainer._reader.read(u, at, thought=rng.random() < 0.5) for u, at in places]
    assert {bool(reading.spoken) for reading in readings} == {False, True}
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: None)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.zeros(()))
    row = trainer._step(1, places)
    found = {name: p.grad.clone() for name, p in trainer._trained.items() if p.grad is not None}

    # Once more in one piece, each reading read by itself.
    for p in trainer._trained.values():
        p.grad = None
    vectors = trainer._head.items(trainer._states)
    line, end, thought = [], [], []
    for (user, at), reading in zip(places, readings, strict=True):
        hidden = trainer._backbone.hidden([reading.ids])[0]
        logprobs = (trainer._head.users(hidden[reading.places]) @ vectors.T).log_softmax(dim=-1)
        sequence = trainer._reader.split.train[user]
        wanted = teacher.log_probs(sequence, range(at + 1 - len(reading.targets), at + 1))
        apart = (wanted.exp() * (wanted - logprobs)).sum(dim=1)
        losses = [
            (1 - weight) * -logprobs[line, target] + weight * apart[line]
            for line, target in enumerate(reading.targets)
        ]
        line += losses[:-1]
        end += losses[-1:]
        if reading.spoken:
            logits = trainer._llm(input_ids=torch.tensor([reading.ids])).logits[0]
            thought += [
                functional.cross_entropy(logits[at - 1], torch.tensor(reading.ids[at]))
                for at in reading.spoken
            ]
    loss = (torch.stack(line).mean() + torch.stack(end).mean()) / 2
    (loss + 0.5 * torch.stack(thought).mean()).backward()  # type: ignore[no-untyped-call]
    for name, p in trainer._trained.items():
        assert (p.grad is None) == name.startswith("head.item.")
        if p.grad is None:
            continue
        torch.testing.assert_close(found[name], p.grad, atol=2e-5, rtol=1e-3, msg=name)
    assert found["head.user.weight"].abs().max() > 1e-4
    assert ("loss/teacher" in row) == bool(weight)


def test_items_keep_their_vectors_where_states_move(trainer: HeadTrainer) -> None:
    torch.manual_seed(0)
    head, before = trainer._head, trainer._states
    _whiten(head, before)
    with torch.no_grad():
        vectors = head.items(before)
    # All states move one way, and are turned a little.
    after = before @ (torch.eye(64) + 0.02 * torch.randn(64, 64)) + 0.3 * torch.randn(64)
    with torch.no_grad():
        left = (vectors * head.items(after)).sum(dim=1).mean()
    assert left < 0.3
    kept = follow(head, before, after)
    assert kept > 0.97
    with torch.no_grad():
        assert float((vectors * head.items(after)).sum(dim=1).mean()) == pytest.approx(kept)


def test_the_teacher_knows_what_came_before_alone(here: None) -> None:
    workspace = Workspace(load_settings(workspace="tiny"))
    trm, text = workspace.trm, workspace.item_embeddings
    trm.config = trm.config.model_copy(update={"history_length": 3})
    teacher = Teacher(trm, workspace.data, text)
    sequence = workspace.split.train[0]
    said = teacher.log_probs(sequence, [1, 6])
    past = torch.tensor(sequence[None, 3:6].astype(np.int64))
    with torch.no_grad():
        items = trm.item_vectors(torch.arange(len(text)), torch.as_tensor(text))
        user = trm.user_vectors(past, torch.as_tensor(text)[past], torch.tensor([3]))
        wanted = (user @ items.T).log_softmax(dim=-1)
    torch.testing.assert_close(said[1:], wanted)
    other = sequence.copy()
    other[6:] = sequence[:1]
    torch.testing.assert_close(teacher.log_probs(other, [1, 6]), said)


def test_a_teacher_is_followed_and_is_part_of_the_run(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learning = {
        "steps": 60, "readings_per_step": 8, "learning_rate": 0.001, "head_learning_rate": 0.003,
        "valid_users": 5,
        "teacher_weight": 1.0,
    }  # fmt: skip
    taught = config(tmp_path / "run", learning=learning)
    run_head.run(taught, Console(quiet=True))
    log = json.loads((tmp_path / "run" / "log.json").read_text())
    first, last = quarters(log, "loss/teacher") or (0.0, 0.0)
    assert last < 0.7 * first
    (tmp_path / "run" / "final" / "finished.json").unlink()
    monkeypatch.setattr(ground, "trm_fingerprint", lambda _: "of other weights")
    with pytest.raises(SettingsError, match="another TRM"):
        run_head.run(taught, Console(quiet=True))


def test_rates_rise_and_fall(trainer: HeadTrainer) -> None:
    trainer._config = HeadLearning(steps=100, warmup=0.1)
    factors = [trainer._factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert max(factors) == factors[10] == pytest.approx(1)
    assert factors[55] == pytest.approx(0.55)
    assert factors[99] == pytest.approx(0.1, abs=0.001)


def test_a_run_leaves_what_is_served_and_what_recpo_starts_from(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = run_head.run(config(tmp_path / "run"), Console(quiet=True))
    log = json.loads((tmp_path / "run" / "log.json").read_text())
    assert [row["step"] for row in log] == [0, 1, 2, 3]
    assert [row["step"] for row in log if "valid/ndcg@10" in row] == [1, 3]
    settings = load_settings(workspace="tiny")
    workspace = Workspace(settings)
    ranker = HeadRanker.load(settings, final, workspace.catalog)  # fingerprints hold
    kept, fresh = ranker.table().vectors, ranker.backbone.states(ranker.table().readings)
    with torch.no_grad():
        torch.testing.assert_close(kept, ranker.head.items(fresh), atol=1e-4, rtol=0)
    ranker.close()
    index = json.loads((final / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(load_file(final / "model.safetensors"))
    monkeypatch.setattr(run_recpo, "local_engine", Rambler)
    changes = {"start": final, "head": final, "lora": None, "updates": 1, "steps": 1}
    trained = run_recpo.run(recpo_config(tmp_path / "recpo", **changes), Console(quiet=True))
    one, other = (load_file(at / "head.safetensors")["user.weight"] for at in (final, trained))
    assert not torch.equal(one, other)


@pytest.mark.engine
def test_vllm_takes_no_head_for_weights(here: None, tmp_path: Path) -> None:
    learning = {"steps": 1, "readings_per_step": 2, "valid_users": 2}
    final = run_head.run(config(tmp_path / "run", learning=learning), Console(quiet=True))
    assert (final / "head.safetensors").is_file()
    VLLMEngine(str(final), max_model_len=512, dtype="float32", kv_cache_gib=1).close()


def test_what_is_left_follows_what_is_served(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where served weights are rounded: their states lie elsewhere, and vectors stay."""
    settings = load_settings(workspace="tiny")
    workspace = Workspace(settings)
    fitted = run_recpo.run(recpo_config(tmp_path / "fitted", steps=0), Console(quiet=True))
    llm = load_policy(settings.model_name, None, None)
    backbone = live_backbone(llm, settings.model_name, autocast=False)
    head = load_head(fitted, read_card(fitted))
    readings = catalog_readings(workspace.catalog.snapshot, backbone)
    with torch.no_grad():
        trained = head.items(backbone.states(readings))
    plain = Backbone.states

    def moved(self: Backbone, sequences: Any) -> torch.Tensor:
        return plain(self, sequences) + (0.0 if self.body is backbone.body else 0.5)

    monkeypatch.setattr(Backbone, "states", moved)
    run = recpo_config(tmp_path).run
    leave_head(workspace, run, llm, backbone, head, tmp_path / "final")
    ranker = HeadRanker.load(settings, tmp_path / "final", workspace.catalog)
    served = ranker.table().vectors
    ranker.close()
    torch.testing.assert_close(served, trained, atol=1e-3, rtol=0)


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
def test_a_run_goes_on_after_a_kill(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: LoRA | None
) -> None:
    told = cut_once(monkeypatch, run_head, 2)
    with pytest.raises(CutError):
        run_head.run(config(tmp_path / "cut", lora=lora), Console(quiet=True))
    resumed = run_head.run(config(tmp_path / "cut", lora=lora), Console(quiet=True))
    assert told == [0, 1, 2, 2, 3]  # from the checkpoint after step 1
    whole = run_head.run(config(tmp_path / "whole", lora=lora), Console(quiet=True))
    weights = "model.safetensors" if lora is None else "adapter_model.safetensors"
    for name in (weights, "head.safetensors"):
        one, other = (load_file(folder / name) for folder in (whole, resumed))
        for key, value in one.items():
            torch.testing.assert_close(value, other[key], atol=1e-5, rtol=0, msg=key)


def test_it_learns(here: None, tmp_path: Path) -> None:
    learning = {
        "steps": 150, "readings_per_step": 8, "learning_rate": 0.001, "head_learning_rate": 0.003,
        "valid_every": 150,
        "valid_users": 40,
    }  # fmt: skip
    run_head.run(config(tmp_path / "run", learning=learning), Console(quiet=True))
    log = json.loads((tmp_path / "run" / "log.json").read_text())
    # The users walk from film to film, so that the next one can be known.
    for name, gain in (("loss/end", 0.7), ("loss/line", 0.7), ("loss/thought", 5)):
        first, last = quarters(log, name) or (0.0, 0.0)
        assert last < first - gain, name
    assert log[-1]["valid/ndcg@10"] > 0.4  # by chance .11


def test_the_command_line_says_what_is_missing(
    here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    fields = {"output": str(tmp_path / "run"), "start": "nowhere", "learning": {"steps": 1}}
    path.write_text(yaml.safe_dump({**fields, "workspace": "tiny"}))
    assert run_head.main(["--config", str(path)]) == 2
    assert "start nowhere does not exist" in capsys.readouterr().err


def test_the_shipped_configurations_are_sound(tmp_path: Path) -> None:
    folder = Path(run_head.__file__).parent / "configs"
    paths = list(folder.glob("head_*.yaml"))
    assert paths
    for path in paths:
        assert load_config(path, HeadRun).learning.steps > 0
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump({"output": "out", "learning": {"steps": 0}}))
    with pytest.raises(SettingsError, match=r"learning.steps"):
        load_config(bad, HeadRun)
