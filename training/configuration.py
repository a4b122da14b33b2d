"""What every training configuration may hold: LoRA, and options of TRL's trainers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..configuration import RunArguments
from ..errors import SettingsError


class LoRA(BaseModel):
    """Low-rank adapters on every linear layer (peft's LoraConfig)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    r: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)

    def config(self) -> Any:
        """Give peft's own configuration."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )


def add_learning_options(parser: RunArguments[Any]) -> None:
    """Add what may be replaced in every run that learns by reward."""
    parser.replaces("workspace")
    parser.replaces("seed", type=int)
    parser.add_argument(
        "--shuffle-rewards",
        action="store_true",
        default=None,
        help="the control run: what is learnt from is dealt out at random",
    )


def check_options(options: Mapping[str, Any], arguments: type, taken: frozenset[str]) -> None:
    """Refuse options that a trainer's arguments don't have, or that we set ourselves.

    `arguments` is the dataclass of the trainer. Raises SettingsError.
    """
    known = {field.name for field in dataclasses.fields(arguments)}
    for name in options:
        if name in taken:
            raise SettingsError(f"option {name!r} is set by this run's own configuration: drop it")
        if name not in known:
            raise SettingsError(f"{arguments.__name__} has no option {name!r}: see TRL's reference")
