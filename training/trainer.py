"""TRL's trainers: GRPO's with the gap between engine and trainer in its log, and without the
padding that TRL computes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from trl import GRPOTrainer, SFTTrainer

from .checkpoints import SafeSaving
from .head import score_labelled_positions_only

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class Trainer(SafeSaving, GRPOTrainer):  # type: ignore[misc]  # trl is not typed
    """Logs how far the engine's logprobs are from those of the weights that are trained.

    Both are of the tokens that the policy sampled, at temperature 1. A gap means that engine and
    trainer don't compute the same policy: stale weights, another precision, another template.

    `token_baselines` gives, for the rows of the rollout before, what is taken off the advantage at
    each completion token, or None where a run has one advantage.
    """

    def __init__(
        self,
        *args: Any,
        token_baselines: Callable[[], Sequence[Sequence[float]] | None],
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

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._own_logps = result[0].detach()
        return result

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        inputs = without_padding(inputs)
        loss = super()._compute_loss(model, inputs)
        sampled = inputs.get("sampling_per_token_logps")
        own = self._own_logps
        # Of a batch that is trained on again the policy has moved on already.
        if sampled is not None and own.shape == sampled.shape and self.num_iterations == 1:
            mask = inputs["completion_mask"].bool()
            if inputs.get("tool_mask") is not None:
                mask &= inputs["tool_mask"].bool()
            gap = (own - sampled).abs()[mask]
            if gap.numel():
                metrics = self._metrics["train" if model.training else "eval"]
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
