"""Runs that train a head: what their configurations share, and the folders they start and leave."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open

from ..configuration import keep_config, write_json
from ..graph.app import tuned_model
from ..graph.engine.adapter import ADAPTER_CONFIG, keep_base
from ..graph.engine.limits import check_model_folder
from ..graph.engine.tokenizer import load_tokenizer
from ..graph.r2ec.backbone import Backbone
from ..graph.r2ec.head import (
    HEAD,
    HeadCard,
    RecommendationHead,
    save_head,
    weights_fingerprint,
)
from ..graph.r2ec.items import ItemStates, catalog_readings, content_key
from ..graph.r2ec.readings import VERSION
from ..graph.state import RunSettings
from ..settings import load_settings
from ..tools.trm.vocabulary import Vocabulary
from ..tools.workspace import Workspace
from .configuration import LoRA
from .head_start import HeadStart, Reader, fit_head, follow, readings_of, states_of
from .policy import check_start, keep_made_of, keep_run_settings, load_policy

if TYPE_CHECKING:
    from rich.console import Console

    from ..settings import Settings


class HeadedRun(BaseModel):
    """What the configurations of runs that train a head have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: Path  # checkpoint, `head` as it was fitted, and `final` as it was trained
    workspace: str = "ml-100k"  # a prepared one (`make demo` prepares this)
    model: str | None = None  # hub name or folder of the LLM; none: the settings' model
    start: Path | None = None  # adapter or model that an earlier run left
    seed: int = 0
    head_start: HeadStart = HeadStart()
    run: RunSettings = RunSettings()
    lora: LoRA | None = None  # none: train all weights
    precision: Literal["bfloat16", "float32"] = "bfloat16"  # of products; weights of the adapter,
    # of the head, and of the whole LLM without an adapter, are float32


def open_run(config: HeadedRun, *, free: frozenset[str] = frozenset()) -> Workspace:
    """Open a run's workspace, and keep in its folder what it is made of.

    Fields in `free` may change from one start of the run to the next. What is trained starts from
    `start` alone: an adapter of the environment's is not taken over. Raises SettingsError.
    """
    own = {} if config.model is None else {"model": config.model}
    settings = load_settings(workspace=config.workspace, adapter=None, **own)
    check_model_folder(settings.model_name)
    if config.start is not None:
        check_start(config.start, config.lora)
    keep_config(config, config.output, free=free)
    workspace = Workspace(settings)
    data = workspace.data.fingerprint
    keep_made_of(data, settings.model_name, config.start, config.output)
    return workspace


def load_llm(config: HeadedRun, workspace: Workspace) -> Any:
    """Load the LLM that is trained, on a GPU where torch finds one."""
    torch.manual_seed(config.seed)  # an adapter's first weights are drawn
    llm = load_policy(
        workspace.settings.model_name,
        config.start,
        config.lora,
        dtype="auto" if config.lora and config.precision == "bfloat16" else "float32",
    )
    llm.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return llm


def start_head(config: HeadedRun, workspace: Workspace, folder: Path, console: Console) -> None:
    """Fit a head over the states of the LLM as it starts; it and its item states go to `folder`.

    One that is there already is left. States are kept in `states` beside the folder, where a fit
    that was cut off goes on.
    """
    if (folder / HEAD).exists():
        return
    settings, run, start = workspace.settings, config.run, config.start
    backbone = _served(settings, start)
    data, catalog = workspace.data, workspace.catalog
    reader = reader_of(workspace, backbone, run)
    users, targets, owners = states_of(
        readings_of(reader, config.head_start, seed=config.seed),
        backbone,
        folder.parent / "states",
        progress=lambda done, total: console.print(f"  readings {done} of {total}", style="dim"),
    )
    weights = weights_fingerprint(settings.model_name, start)
    states = ItemStates.read(folder, weights)
    now = catalog.snapshot
    sequences = catalog_readings(now, backbone)
    items = states.of(sequences, backbone)[[now.index[item.id] for item in data.items]]
    head = RecommendationHead(backbone.dim)
    rows = fit_head(head, users, targets, owners, items, seed=config.seed)
    write_json(folder / "log.json", rows)
    best = min(rows, key=lambda row: row["valid_loss"])
    console.print(
        f"head: ridge {best['ridge']:g}, held-out loss {best['valid_loss']:.3f}, NDCG@10 "
        f"{best['ndcg@10']:.3f} (the past not left out)"
    )
    states.save(folder)
    keep_run_settings(run, folder)
    save_head(folder, head, _card(workspace, run, sequences, weights, head))


def reader_of(workspace: Workspace, backbone: Backbone, run: RunSettings) -> Reader:
    """What makes readings of a workspace's training part."""
    return Reader(
        workspace.data,
        workspace.split,
        workspace.catalog,
        backbone.tokenizer,
        Vocabulary.build(workspace.data.items),
        run.history_length,
    )


def live_backbone(llm: Any, base: str, *, autocast: bool) -> Backbone:
    """The body of an LLM that is trained, with or without an adapter; `base` has the tokenizer."""
    inner = llm.get_base_model() if hasattr(llm, "get_base_model") else llm
    body = getattr(inner, inner.base_model_prefix)
    return Backbone(body, load_tokenizer(base), autocast=autocast)


def leave_head(
    workspace: Workspace,
    run: RunSettings,
    llm: Any,
    backbone: Backbone,
    head: RecommendationHead,
    final: Path,
) -> HeadCard:
    """Write a trained LLM or adapter, its head with a card and item states, and the run's settings.

    What is served computes in other steps than what was trained, and the items' projection makes
    much of little: it follows the states that will be served.
    """
    base = workspace.settings.model_name
    readings = catalog_readings(workspace.catalog.snapshot, backbone)
    # Layers that were compiled are not compiled once more for this.
    with torch.compiler.set_stance("force_eager"):
        before = backbone.states(readings)
    whole = not hasattr(llm, "peft_config")
    if whole and backbone.autocast:
        llm.to(torch.bfloat16)  # as it computed; an engine would take float32 for what is meant
    llm.save_pretrained(str(final))
    if whole:
        backbone.tokenizer.save_pretrained(str(final))
        _name_weights(final)
    else:
        keep_base(base, final)
    keep_run_settings(run, final)
    card = _card(workspace, run, readings, weights_fingerprint(base, final), head)
    states = ItemStates(card.weights)
    follow(head, before, states.of(readings, _served(workspace.settings, final)))
    states.save(final)
    save_head(final, head, card)
    return card


def _name_weights(folder: Path) -> None:
    """Name the LLM's file in an index; without one vLLM takes the head's files for weights too."""
    index, weights = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if weights.is_file():  # shards have an index already
        with safe_open(weights, framework="pt") as file:
            names = dict.fromkeys(file.keys(), weights.name)
        write_json(index, {"metadata": {}, "weight_map": names})


def _served(settings: Settings, folder: Path | None) -> Backbone:
    """The LLM as it is served: the settings' own, or what an earlier run left in `folder`."""
    if folder is not None:
        adapter = (folder / ADAPTER_CONFIG).is_file()
        change = {"adapter": folder} if adapter else {"model": str(folder)}
        settings = settings.model_copy(update=change)
    return Backbone.load(tuned_model(settings), dtype=settings.engine.dtype)


def _card(
    workspace: Workspace,
    run: RunSettings,
    readings: Sequence[Sequence[int]],
    weights: str,
    head: RecommendationHead,
) -> HeadCard:
    return HeadCard(
        base=Path(workspace.settings.model_name).name,
        dim=head.dim,
        readings=VERSION,
        dataset=workspace.data.fingerprint,
        weights=weights,
        history_length=run.history_length,
        thought_tokens=run.thought_tokens,
        trained_items=tuple(content_key(reading) for reading in readings),
    )
