"""TRL's trainers: GRPO's with the gap between engine and trainer in its log, and without most of
what TRL computes for nothing: padding, and the head on tokens that the environment wrote.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from trl import GRPOTrainer, SFTTrainer

from .checkpoints import SafeSaving
from .head import score_labelled_positions_only

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor


class Trainer(SafeSaving, GRPOTrainer):  # type: ignore[misc]  # trl is not typed
    """Logs how far the engine's logprobs are from those of the weights that are trained.

    Both are of the tokens that the policy sampled. A gap means that engine and trainer don't
    compute the same policy: stale weights, another precision, another template. At another
    temperature than 1 none is logged: TRL divides logits by it, the engine's logprobs are those
    before.

    `token_baselines` gives, for the rows of the rollout before, what is taken off the advantage at
    each completion token, or None where a run has one advantage.
    """

    def __init__(
        self,
        *args: Any,
        token_baselines: Callable[[], Sequence[Sequence[float]] | None] = lambda: None,
        **kwargs: Any,
    ) -> None:
        score_labelled_positions_only()
        self._token_baselines = token_baselines
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        batch = super()._generate_and_score_completions(inputs)
        taken_off = self._token_baselines()
        if taken_off is not None:
            batch["advantages"] = by_token(batch["advantages"], batch["completion_ids"], taken_off)
        return batch

    _buffered_inputs: list[dict[str, Any]] | None  # TRL's: the passes of a step
    _scored: Tensor | None = None  # of the loss at hand: the tokens that the policy sampled

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self._scored is not None:
            model = partial(_scoring_only, model, self._scored)
        result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        self._own_logps = result[0].detach()
        return result

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        # TRL deals a step's rows out at random. All its passes are summed before the weights move,
        # so that any other order means the same; but for bnpo, which divides by a pass's tokens.
        passes = self._buffered_inputs
        if passes and passes is not before and self.model.training and self.loss_type != "bnpo":
            self._buffered_inputs = by_length(passes)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        inputs = without_padding(inputs)
        metrics = self._metrics["train" if model.training else "eval"]
        for name, value in computed_on(inputs).items():
            metrics[name].append(value)
        if torch.cuda.is_available():
            metrics["memory/peak_gib"].append(torch.cuda.max_memory_allocated() / 2**30)
        # Ratios to logprobs of before are of all tokens: there TRL scores all of them.
        tool_mask = inputs.get("tool_mask")
        if tool_mask is not None and inputs.get("old_per_token_logps") is None:
            self._scored = (inputs["completion_mask"] * tool_mask).bool()
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._scored = None
        sampled = inputs.get("sampling_per_token_logps")
        own = self._own_logps
        # Of a batch that is trained on again the policy has moved on already.
        fresh = self.num_iterations == 1 and self.temperature == 1
        if sampled is not None and own.shape == sampled.shape and fresh:
            mask = inputs["completion_mask"].bool()
            if inputs.get("tool_mask") is not None:
                mask &= inputs["tool_mask"].bool()
            gap = (own - sampled).abs()[mask]
            if gap.numel():
                metrics["engine_gap/mean"].append(float(gap.mean()))
                metrics["engine_gap/max"].append(float(gap.max()))
        return loss


class WarmStart(SafeSaving, SFTTrainer):  # type: ignore[misc]  # trl is not typed
    """SFT, as TRL does it."""


def by_token(
    advantages: torch.Tensor, completions: torch.Tensor, taken_off: Sequence[Sequence[float]]
) -> torch.Tensor:
    """Advantages [rows] less each token's baseline, as [rows, tokens]; padding is right of it."""
    own = advantages.unsqueeze(1).repeat(1, completions.shape[1])
    for row, values in zip(own, taken_off, strict=True):
        row[: len(values)] -= torch.tensor(values, dtype=row.dtype, device=row.device)
    return own


def _scoring_only(model: Any, scored: Tensor, *, labels: Tensor, **inputs: Any) -> Any:
    """Call the model with the labels of its last tokens left out where `scored` `[rows, tokens]` is
    False: the head isn't computed there, and the log-probability reads 0.
    """
    labels[:, -scored.shape[1] :].masked_fill_(~scored, -100)
    return model(labels=labels, **inputs)


def without_padding(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Cut columns off a micro batch that are padding in all of its rows.

    TRL pads a step's rows to the longest of them: prompts [rows, tokens] on the left, all that has
    an entry per completion token on the right. A pass over a few of the rows needs less.
    """
    prompts, completions = inputs["prompt_mask"].any(dim=0), inputs["completion_mask"].any(dim=0)
    first = int(prompts.int().argmax())
    end = int(completions.nonzero().max()) + 1 if completions.any() else 1
    cut = dict(inputs)
    for name, value in inputs.items():
        if name in ("prompt_ids", "prompt_mask"):
            cut[name] = value[:, first:]
        elif getattr(value, "shape", ())[1:] == completions.shape:
            cut[name] = value[:, :end]
    return cut


def by_length(passes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Deal the rows of a step's micro batches out again, so that rows of one length share one.

    Values of one entry for each row are dealt out with it; others are the same in all passes.
    """
    rows = len(passes[0]["completion_mask"])
    lengths = torch.cat([each["completion_mask"].sum(dim=1) for each in passes])
    sorted_rows = lengths.argsort(stable=True)
    order = [sorted_rows[nth * rows : (nth + 1) * rows] for nth in range(len(passes))]
    dealt: list[dict[str, Any]] = [dict(each) for each in passes]
    for name, first in passes[0].items():
        if isinstance(first, torch.Tensor) and first.ndim > 0:
            every = torch.cat([each[name] for each in passes])
            for own, at in zip(dealt, order, strict=True):
                own[name] = every[at]
        elif isinstance(first, list):
            listed = [value for each in passes for value in each[name]]
            for own, at in zip(dealt, order, strict=True):
                own[name] = [listed[row] for row in at.tolist()]
    return dealt


def computed_on(inputs: Mapping[str, Any]) -> dict[str, float]:
    """Tokens of a micro batch: read by the model, padding not counted; of them trained on, that is
    scored by its head; and the share of padding in what is computed.
    """
    prompts, completions = inputs["prompt_mask"], inputs["completion_mask"]
    trained = completions.bool()
    if inputs.get("tool_mask") is not None:
        trained = trained & inputs["tool_mask"].bool()
    real = int(prompts.sum() + completions.sum())
    return {
        "tokens/read": float(real),
        "tokens/trained": float(trained.sum()),
        "tokens/padding_share": 1 - real / (prompts.numel() + completions.numel()),
    }
