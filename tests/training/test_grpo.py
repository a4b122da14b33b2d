"""GRPO over the real graph: what is planned, what TRL gets, what is trained on."""

import asyncio
import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from statistics import pvariance
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig
from trl.trainer import utils

from deeprec.errors import EngineError
from deeprec.graph.build import build_graph
from deeprec.graph.engine.adapter import merged_model
from deeprec.graph.engine.tokenizer import load_tokenizer
from deeprec.graph.engine.vllm_inprocess import VLLMEngine
from deeprec.graph.state import Limits, RunSettings
from deeprec.settings import load_settings
from deeprec.tools.interactions import InteractionData, leave_one_out
from deeprec.tools.retriever import Retriever
from deeprec.tools.text_encoder import TextEncoder
from deeprec.tools.workspace import Workspace
from deeprec.training import rollout, run_grpo
from deeprec.training import trainer as trainer_module
from deeprec.training.checkpoints import newest_whole, seal
from deeprec.training.configuration import LoRA
from deeprec.training.curves import draw
from deeprec.training.demonstrations import DemonstrationConfig, Demonstrator, demonstrate
from deeprec.training.ground import training_ground
from deeprec.training.policy import load_policy, plain_weights
from deeprec.training.rewards import RewardConfig, Rewarder
from deeprec.training.rollout import Plan, describe, play_step, rows, widest
from deeprec.training.run_grpo import GRPORun, train_stage
from deeprec.training.selection import Example, SelectionConfig, candidates, select
from deeprec.training.trainer import Trainer, by_length, computed_on, without_padding
from deeprec.training.trajectories import Rewards, Trajectory
from deeprec.training.trajectory_file import read_trajectories

from ..graph.conftest import ScriptedEngine
from .conftest import MakeRun

EXAMPLES = [Example(f"u{n}", ("0", "1"), str(n)) for n in range(5)]


def test_a_plan_is_fixed_by_its_seed_and_deals_evenly() -> None:
    plan = Plan("cold_start", EXAMPLES, 12, seed=3)
    order = [plan.example(prompt).user for prompt in plan.prompts]
    assert sorted(order[:5]) == sorted(order[5:10]) == [f"u{n}" for n in range(5)]
    assert order[:5] != order[5:10]
    longer = Plan("cold_start", EXAMPLES, 20, seed=3)
    assert [longer.example(prompt).user for prompt in longer.prompts][:12] == order
    other = Plan("recommendation", EXAMPLES, 12, seed=3)
    assert [other.example(prompt).user for prompt in other.prompts] != order


def test_rows_are_the_runs_tokens(make_run: MakeRun) -> None:
    run = make_run("<think> so", id="a")
    empty = run.model_copy(
        update={"completion_ids": [], "logprobs": [], "authors": [], "pieces": []}
    )
    got = rows([run, empty], eos=2)
    assert got["prompt_ids"] == [run.prompt_ids, run.prompt_ids]
    assert got["completion_ids"] == [run.completion_ids, [2]]
    assert got["logprobs"] == [run.logprobs, [0.0]]
    assert got["env_mask"] == [run.env_mask, [0]]


def test_a_step_begins_runs_in_order_and_no_more_than_the_engine_decodes(
    retriever: Retriever,
) -> None:
    engine = ScriptedEngine(["<think> so"] * 6, 4096)
    real = build_graph(engine, retriever)
    begun: list[list[str]] = []
    under_way: list[int] = []

    class Watched:
        async def ainvoke(self, given: dict[str, list[str]], **options: Any) -> Any:
            begun.append(given["history"])
            under_way.append(under_way[-1] + 1 if under_way else 1)
            state = await real.ainvoke(given, **options)
            under_way.append(under_way[-1] - 1)
            return state

    examples = [Example(f"u{n}", ("0", str(n + 1)), "9") for n in range(3)]
    plan = Plan("cold_start", examples, 3, seed=0)
    runs = asyncio.run(
        play_step(
            Watched(),
            plan,
            plan.prompts,
            RunSettings(on_limit="fail"),
            engine.tokenizer,
            group_size=2,
            at_once=3,
            seed=0,
            step=0,
            model="scripted",
            fingerprint="",
        )
    )
    assert max(under_way) == 3
    assert [run.id for run in runs] == [f"{prompt}/{n}" for prompt in plan.prompts for n in (0, 1)]
    histories = [[f"id:{item}" for item in plan.example(each).history] for each in plan.prompts]
    assert begun == [history for history in histories for _ in range(2)]


def test_a_steps_figures(
    make_run: MakeRun, tiny_encoder: TextEncoder, retriever: Retriever
) -> None:
    rewarder = Rewarder(RewardConfig(stage="cold_start"), tiny_encoder, retriever.catalog)
    runs = [make_run("<think> so", id="a", on_limit="fail"), make_run(EngineError("gone"), id="b")]
    runs = [
        run.model_copy(update={"rewards": reward})
        for run, reward in zip(runs, rewarder(runs), strict=True)
    ]
    figures = describe(runs, rewarder)
    assert figures["reward/format"] == -1  # of the run that the engine did not fail
    assert figures["format/strict"] == 0
    assert figures["broken/no_retrieval"] == 1
    assert figures["stop/engine_failure"] == 0.5
    assert figures["run/masked_share"] == 0


@pytest.mark.parametrize(
    ("totals", "count", "places"),
    [
        ([0.5, 1.0, -1.0, 0.6], 2, [1, 2]),
        ([1.0, 1.0, -1.0, 1.0], 2, [2, 3]),
        ([0.0, 0.1, 0.2, 0.3, 5.0, 5.1], 4, [0, 1, 4, 5]),
        ([0.0, 0.0, 0.0, 0.0, 0.0, 1.0], 3, [0, 4, 5]),
        ([1.0, 1.0, 1.0, 1.0], 2, [0, 3]),
        ([None, 0.5, None, 0.7], 2, [1, 3]),
        ([None, 0.5, None, 0.7], 3, [0, 1, 3]),
        ([None, None], 2, [0, 1]),
        ([0.2, 0.1], 2, [0, 1]),
    ],
)
def test_the_runs_that_are_kept_have_the_greatest_variance(
    totals: list[float | None], count: int, places: list[int]
) -> None:
    kept = widest(totals, count)
    assert kept == places
    given = [total for total in totals if total is not None]
    if len(given) > count:
        chosen = pvariance([total for at in kept if (total := totals[at]) is not None])
        assert chosen == pytest.approx(max(map(pvariance, combinations(given, count))))


GOOD: dict[str, Any] = {"output": "out", "stages": [{"stage": "cold_start", "steps": 1}]}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"group_size": 1}, "group_size"),
        ({"rows_per_pass": 5}, "rows_per_pass 5"),
        ({"kept_per_group": 5}, "kept_per_group 5"),
        ({"kept_per_group": 2, "rows_per_pass": 32}, "the 16 runs"),
        ({"stages": [{"stage": "cold_start", "steps": 1, "weights": {"hit": 1}}]}, "'hit'"),
        ({"stages": [{"stage": "recommendation", "steps": 1}]}, "goes on from"),
        ({"start": "/no/such/run"}, "/no/such/run"),
        ({"trainer": {"learning_rat": 1}}, "learning_rat"),
        ({"trainer": {"num_generations": 2}}, "num_generations"),
        ({"run": {"temperature": 0}}, "temperature is 0"),
        ({"model": "/no/such/model"}, "/no/such/model"),
        ({"selection": {"shares": {"recommendation": 1}}}, "cold_start"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_loads(
    changes: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(GOOD | {"output": str(tmp_path / "out")} | changes))
    assert run_grpo.main(["--config", str(config)]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_torn_checkpoints_are_removed(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x" * step)
        if step < 15:
            seal(folder)
    (tmp_path / "checkpoint-10" / "model.safetensors").write_bytes(b"x")
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-5"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert newest_whole(tmp_path / "nothing") is None


def test_curves_are_drawn(tmp_path: Path) -> None:
    history = [{"step": step, "reward/total": step / 2, "run/retrievals": 2} for step in range(4)]
    draw(history, tmp_path / "curves.png", title="t")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("lora", [None, LoRA(r=4)], ids=["full", "lora"])
def test_plain_weights_are_those_that_the_policy_computes_with(
    tiny_llm: str, lora: LoRA | None
) -> None:
    torch.manual_seed(0)
    policy = load_policy(tiny_llm, None, lora)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llm)
    ids = torch.tensor([[1, 5, 9, 200]])
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    with torch.no_grad():
        assert not torch.allclose(plain(ids).logits, policy(ids).logits, atol=1e-2)
        plain.load_state_dict(plain_weights(policy), strict=True)
        assert torch.allclose(plain(ids).logits, policy(ids).logits, atol=1e-4)
    assert all(torch.equal(before[name], weight) for name, weight in policy.state_dict().items())


@pytest.fixture(scope="module")
def demonstrations(
    tiny_data: InteractionData, retriever: Retriever, tiny_encoder: TextEncoder
) -> list[Trajectory]:
    settings = RunSettings(k=3, retrieve_n=4, history_length=3, answer_form="numbers")
    ids = [item.id for item in tiny_data.items]
    examples = [
        Example(str(at.user), tuple(ids[item] for item in at.history), ids[at.target])
        for at in candidates(leave_one_out(tiny_data), SelectionConfig())
    ]
    return demonstrate(
        examples,
        Demonstrator(retriever, tiny_encoder, settings, DemonstrationConfig()),
        retriever,
        load_tokenizer(load_settings().model_name),
        wanted=4,
        max_model_len=4096,
    )


def test_padding_that_no_row_needs_is_cut() -> None:
    step = {
        "prompt_ids": torch.tensor([[0, 5, 6], [0, 0, 7], [1, 2, 3]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [0, 0, 1], [1, 1, 1]]),
        "completion_ids": torch.tensor([[8, 9, 0, 0], [8, 0, 0, 0], [1, 2, 3, 4]]),
        "completion_mask": torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]),
        "tool_mask": torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 1]]),
        "sequence": torch.tensor([[1.0], [2.0], [3.0]]),
        "advantages": torch.tensor([1.0, 2.0, 3.0]),
        "num_items_in_batch": torch.tensor(6.0),
    }
    rows_of = {name: value[:2] if value.dim() else value for name, value in step.items()}
    got = {name: value.tolist() for name, value in without_padding(rows_of).items()}
    assert got == {
        "prompt_ids": [[5, 6], [0, 7]],
        "prompt_mask": [[1, 1], [0, 1]],
        "completion_ids": [[8, 9], [8, 0]],
        "completion_mask": [[1, 1], [1, 0]],
        "tool_mask": [[1, 0], [1, 0]],
        "sequence": [[1.0], [2.0]],
        "advantages": [1.0, 2.0],
        "num_items_in_batch": 6.0,
    }
    whole = without_padding(step)
    assert all(torch.equal(whole[name], value) for name, value in step.items())
    empty = {**rows_of, "completion_mask": torch.zeros(2, 4)}
    assert without_padding(empty)["completion_ids"].shape == (2, 1)


def test_the_environments_tokens_get_no_gradient(
    demonstrations: list[Trajectory],
    tiny_llm: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    scored: list[int] = []
    head = utils._ChunkedLogProbFunction.apply

    def watched_head(hidden: torch.Tensor, *rest: Any) -> Any:
        scored.append(len(hidden))
        return head(hidden, *rest)

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", watched_head)

    class Watched(Trainer):
        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            result[0].retain_grad()
            self.kept = result[0]
            return result

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            assert self.kept.grad is not None
            seen.append((self.kept.grad, self.mask))
            return loss

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            self.mask = inputs["completion_mask"].bool() & inputs["tool_mask"].bool()
            return super()._compute_loss(model, inputs)

    eos = int(load_tokenizer(tiny_llm).eos_token_id)
    trainer = Watched(
        model=load_policy(tiny_llm, None, None),
        reward_funcs=[lambda prompts, **_: [float(n) for n in range(len(prompts))]],
        args=GRPOConfig(
            str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=4,
            max_steps=1,
            bf16=False,
            use_cpu=True,
            report_to=[],
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["cold_start/0"]}),
        processing_class=load_tokenizer(tiny_llm),
        rollout_func=lambda _, __: rows(demonstrations, eos),
    )
    trainer.train()
    ((gradient, own),) = seen
    assert own.sum() == sum(sum(run.env_mask) for run in demonstrations)
    assert gradient[~own].abs().max() == 0
    assert (gradient[own] != 0).all(dim=0).any()
    # Prompts, padding and the environment's tokens are not worth the head.
    assert scored == [int(own.sum())]


def test_rows_of_one_length_share_a_pass() -> None:
    lengths = [5, 1, 4, 2, 3, 6]
    masks = torch.tensor([[1] * n + [0] * (6 - n) for n in lengths])
    step = [
        {
            "prompt_mask": torch.ones(2, 3),
            "completion_mask": masks[at : at + 2],
            "advantages": torch.tensor(lengths[at : at + 2]) * 10.0,
            "names": [str(n) for n in lengths[at : at + 2]],
            "num_items_in_batch": torch.tensor(21.0),
            "old_per_token_logps": None,
        }
        for at in (0, 2, 4)
    ]
    dealt = by_length(step)
    assert [each["advantages"].tolist() for each in dealt] == [[10, 20], [30, 40], [50, 60]]
    assert [each["names"] for each in dealt] == [["1", "2"], ["3", "4"], ["5", "6"]]
    assert [each["completion_mask"].sum(1).tolist() for each in dealt] == [[1, 2], [3, 4], [5, 6]]
    assert all(each["num_items_in_batch"] == 21 for each in dealt)
    assert all(each["old_per_token_logps"] is None for each in dealt)
    told = computed_on(without_padding({**dealt[0], "tool_mask": dealt[0]["completion_mask"]}))
    assert told == {"tokens/read": 9, "tokens/trained": 3, "tokens/padding_share": 1 - 9 / 10}


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_neither_the_order_of_rows_nor_the_unscored_tokens_change_a_step(
    demonstrations: list[Trajectory],
    tiny_llm: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loss_type: str,
) -> None:
    eos = int(load_tokenizer(tiny_llm).eos_token_id)

    def step(folder: str) -> dict[str, torch.Tensor]:
        trainer = Trainer(
            model=load_policy(tiny_llm, None, None),
            reward_funcs=[lambda prompts, **_: [float(n) for n in range(len(prompts))]],
            args=GRPOConfig(
                str(tmp_path / folder),
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                num_generations=4,
                max_steps=1,
                loss_type=loss_type,
                optim="sgd",
                learning_rate=1.0,
                max_grad_norm=0.0,
                bf16=False,
                use_cpu=True,
                report_to=[],
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["cold_start/0"]}),
            processing_class=load_tokenizer(tiny_llm),
            rollout_func=lambda _, __: rows(demonstrations, eos),
        )
        trainer.train()
        return {name: value.detach() for name, value in trainer.model.named_parameters()}

    ours = step("ours")
    monkeypatch.setattr(trainer_module, "by_length", list)
    monkeypatch.setattr(trainer_module, "_scoring_only", lambda model, _, **given: model(**given))
    plain = step("plain")
    start = dict(load_policy(tiny_llm, None, None).named_parameters())
    moved = max(float((plain[name] - value.detach()).abs().max()) for name, value in start.items())
    apart = max(float((plain[name] - ours[name]).abs().max()) for name in plain)
    assert moved > 1e-3
    assert apart < 1e-4 * moved


@pytest.fixture
def base(
    tiny_data: InteractionData, tiny_encoder_folder: Path, tmp_path: Path
) -> Iterator[Workspace]:
    settings = load_settings(home=tmp_path, workspace="tiny", encoder=str(tiny_encoder_folder))
    place = Workspace(settings)
    tiny_data.save(place.dataset_dir)
    return place


@pytest.mark.engine
def test_engine_and_trainer_agree_at_every_step(
    base: Workspace,
    tiny_llm: str,
    tiny_engine: VLLMEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rollouts on the real vLLM over the real graph, trained by TRL; then killed and resumed."""

    def reward(_: Rewarder, runs: list[Trajectory]) -> list[Rewards]:
        return [Rewards(format=-1.0, total=float(sum(run.completion_ids) % 5)) for run in runs]

    trained_on: list[str] = []

    def watched_rows(runs: list[Trajectory], eos: int) -> dict[str, list[Any]]:
        trained_on.extend(run.id for run in runs)
        return rows(runs, eos)

    async def watched_step(*given: Any, at_once: int, **options: Any) -> list[Trajectory]:
        bounds.append(at_once)
        return await play_step(*given, at_once=at_once, **options)

    bounds: list[int] = []
    base.settings.engine.max_num_seqs = 4  # of the six runs of a step
    monkeypatch.setattr(Rewarder, "__call__", reward)
    monkeypatch.setattr(rollout, "rows", watched_rows)
    monkeypatch.setattr(rollout, "play_step", watched_step)
    config = GRPORun.model_validate(
        {
            "output": str(tmp_path / "run"),
            "stages": [{"stage": "cold_start", "steps": 3}],
            "selection": {"shares": {"cold_start": 1}, "top": 40},
            "prompts_per_step": 2,
            "group_size": 3,
            "kept_per_group": 2,
            "run": RunSettings(
                k=2, history_length=3, temperature=1.0, limits=Limits(max_new_tokens=24)
            ),
            "lora": None,
            "trainer": {"learning_rate": 0.01, "save_steps": 1, "report_to": "none"},
        }
    )
    ground = training_ground(base)
    selection = select(base.data, ground.trm, base.item_embeddings, config.selection)
    tokenizer = load_tokenizer(tiny_llm)
    engine = tiny_engine

    def train() -> Path:
        stage = config.stages[0]
        return train_stage(config, stage, None, engine, tokenizer, base, ground, selection)

    try:
        folder = train().parent
        log = json.loads((folder / "log.json").read_text())
        gaps = [row["engine_gap/max"] for row in log if "engine_gap/max" in row]
        assert len(gaps) == 3
        assert max(gaps) < 1e-3
        assert any(row.get("grad_norm", 0) > 0 for row in log)
        first = read_trajectories(config.output)
        weights = (folder / "final" / "model.safetensors").read_bytes()
        assert len({run.id for run in first}) == 18
        assert bounds == [4, 4, 4]
        ids = [run.id for run in first]
        groups = [first[at : at + 3] for at in range(0, 18, 3)]
        assert all(len({run.id.rpartition("/")[0] for run in group}) == 1 for group in groups)
        kept = [widest([run.rewards.total for run in group], 2) for group in groups]
        assert trained_on == [ids[3 * n + at] for n, places in enumerate(kept) for at in places]
        # The newest checkpoint is torn, as by a kill; its step is made again.
        (folder / "checkpoint-3" / "model.safetensors").write_bytes(b"")
        train()
        again = read_trajectories(config.output)
        assert [run.id for run in again] == [run.id for run in first]
        assert [run.completion_ids for run in again] == [run.completion_ids for run in first]
        assert (folder / "final" / "model.safetensors").read_bytes() == weights
        # Without new weights in the engine the gap is there to see.
        monkeypatch.setattr(engine, "load_weights", lambda _: None)
        for step in (2, 3):
            (folder / f"checkpoint-{step}" / "complete.json").unlink()
        train()
        log = json.loads((folder / "log.json").read_text())
        assert max(row.get("engine_gap/max", 0) for row in log[-2:]) > 1e-3
    finally:
        ground.retriever.close()
        ground.catalog.close()


def test_an_adapter_is_merged_once(tiny_llm: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = load_policy(tiny_llm, None, LoRA(r=4))
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    policy.save_pretrained(tmp_path / "run" / "final")
    folder = merged_model(tiny_llm, tmp_path / "run" / "final", tmp_path / "merged")
    ids = torch.tensor([[1, 5, 9, 200]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        assert torch.allclose(logits, policy(ids).logits, atol=1e-4)
    assert load_tokenizer(folder).chat_template
    made = Path(folder).stat().st_mtime_ns
    assert merged_model(tiny_llm, tmp_path / "run" / "final", tmp_path / "merged") == folder
    assert Path(folder).stat().st_mtime_ns == made
    with pytest.raises(EngineError, match="is no adapter"):
        merged_model(tiny_llm, tmp_path, tmp_path / "merged")
    half = str(tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(tiny_llm).to(torch.bfloat16).save_pretrained(half)
    load_tokenizer(tiny_llm).save_pretrained(half)
    for dtype, kept in (("auto", torch.bfloat16), ("float32", torch.float32)):
        folder = merged_model(half, tmp_path / "run" / "final", tmp_path / "merged", dtype=dtype)
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == kept
