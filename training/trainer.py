"""TRL's GRPOTrainer, with the gap between engine and trainer in its log."""

from __future__ import annotations

from typing import Any

from trl import GRPOTrainer


class Trainer(GRPOTrainer):  # type: ignore[misc]  # trl is not typed
    """Logs how far the engine's logprobs are from those of the weights that are trained.

    Both are of the tokens that the policy sampled, at temperature 1. A gap means that engine and
    trainer don't compute the same policy: stale weights, another precision, another template.
    """

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._own_logps = result[0].detach()
        return result

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
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
