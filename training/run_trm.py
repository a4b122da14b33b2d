"""Fit TRMs of several variants and seeds, and write checkpoints, model cards and results.

    python training/run_trm.py --config training/configs/trm_ml100k.yaml

It reads the data set and the sentence encoder of the workspace in the settings, unless the
configuration names others. Fits that an earlier, interrupted run of the same configuration
finished are kept. What one fit does is in deeprec/tools/trm/fit.py; this script only loops,
records and sums up.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt
from rich.console import Console

from deeprec.configuration import RunArguments
from deeprec.errors import TRMError
from deeprec.settings import load_settings
from deeprec.terminal import tells_errors
from deeprec.tools.interactions import InteractionData, Split, leave_one_out
from deeprec.tools.progress import trm_progress
from deeprec.tools.text_encoder import TextEncoder, item_embeddings
from deeprec.tools.trm.card import model_card
from deeprec.tools.trm.cold import without_items
from deeprec.tools.trm.config import DeepRecConfig, FitConfig, TRMConfig
from deeprec.tools.trm.fit import FitProgress, fit
from deeprec.tools.trm.model import check_replaceable
from deeprec.tools.trm.preferences import PreferencePool
from deeprec.tools.trm.record import FitRecord, RunSource
from deeprec.tools.trm.report import RunResults, evaluate_folder, print_table
from deeprec.tools.workspace import Workspace


class Variant(BaseModel):
    """One way to build and fit a TRM."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: TRMConfig = Field(default_factory=DeepRecConfig)
    training: FitConfig = FitConfig()
    cold_share: float = Field(0.0, ge=0, lt=1)  # of the items, kept out of training


class TRMRun(BaseModel):
    """The configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path | None = None  # a prepared data set; none: that of the settings' workspace
    encoder: str | None = None  # sentence-transformers hub name or folder; none: the settings'
    output: Path  # checkpoints and results
    seeds: tuple[NonNegativeInt, ...] = Field((0, 1, 2), min_length=1)
    threads: int = Field(2, ge=1)  # of the CPU
    device: str = "cpu"
    variants: dict[str, Variant] = Field(min_length=1)


def run(config: TRMRun, console: Console) -> RunResults:
    """Fit what is missing, evaluate everything, write results.json, table.md and model cards."""
    torch.set_num_threads(config.threads)
    workspace = Workspace(load_settings())
    data = workspace.data if config.data is None else InteractionData.load(config.data)
    name = config.encoder or workspace.settings.encoder_name
    if Path(name).is_dir():
        name = str(Path(name).absolute())  # it is read again from another working directory
    encoder = TextEncoder(name, device=config.device)
    place = config.data or workspace.dataset_dir
    RunSource(data=place.absolute(), encoder=name).write(config.output)
    fitter = Fitter(config, data, encoder, name, console)
    for name, variant in config.variants.items():
        for seed in config.seeds:
            fitter.fit(name, variant, seed)
    with console.status("Evaluating"):
        results = evaluate_folder(config.output, device=config.device)
    print_table(results, console)
    return results


class Fitter:
    """Fits one variant and seed after another; embedded texts are shared between them.

    `encoder_name` is what model cards name.
    """

    def __init__(
        self,
        config: TRMRun,
        data: InteractionData,
        encoder: TextEncoder,
        encoder_name: str,
        console: Console,
    ):
        self.config, self.data, self.encoder, self.console = config, data, encoder, console
        self.encoder_name = encoder_name
        self.cache = config.output / "cache"
        self.embeddings = item_embeddings(encoder, data.items, self.cache)
        self.pools: dict[tuple[str, int, int], PreferencePool] = {}

    def fit(self, name: str, variant: Variant, seed: int) -> None:
        """Raises TRMError if this place holds a fit of another configuration, or anything else."""
        folder = self.config.output / name / f"seed-{seed}"
        wanted = FitRecord(
            variant=name,
            seed=seed,
            dataset=self.data.fingerprint,
            encoder=self.encoder.fingerprint,
            cold_share=variant.cold_share,
            model=variant.model,
            training=variant.training,
        )
        finished = FitRecord.read(folder)
        if finished is not None:
            changed = finished.differences(wanted)
            if changed:
                raise TRMError(
                    f"{folder} was fitted with another configuration; these differ: "
                    f"{', '.join(changed)}. Give another output folder, or remove this one."
                )
            self.console.print(f"{name}, seed {seed}: fitted already")
            return
        check_replaceable(folder)
        data, text = self.data, self.embeddings
        if variant.cold_share:
            data = without_items(self.data, variant.cold_share, seed)
            warm = {item.id for item in data.items}
            text = text[[item.id in warm for item in self.data.items]]
        split = leave_one_out(data)
        self.console.print(f"{name}, seed {seed}")
        examples = 0

        def report(at: FitProgress) -> None:
            nonlocal examples
            examples = at.examples
            show(at)

        with trm_progress(self.console) as show:
            began = time.perf_counter()
            pool = self.pool(data, split, text, variant, report)
            ready = time.perf_counter()
            model = fit(
                data,
                split,
                text,
                self.encoder,
                variant.model,
                variant.training,
                seed=seed,
                pool=pool,
                progress=report,
                device=self.config.device,
            )
            done = time.perf_counter()
        record = wanted.model_copy(
            update={
                "model": model.config,
                "prepare_seconds": ready - began,
                "fit_seconds": done - ready,
                "examples": examples,
            }
        )
        model.save_pretrained(folder, card=model_card(record, data, self.encoder_name))
        record.write(folder)

    def pool(
        self,
        data: InteractionData,
        split: Split,
        text: np.ndarray,
        variant: Variant,
        report: Callable[[FitProgress], None],
    ) -> PreferencePool | None:
        """The embedded preference texts of this data set, made once."""
        if not variant.training.preferences:
            return None
        key = (data.fingerprint, variant.training.pool, variant.model.history_length)
        if key not in self.pools:
            self.pools[key] = PreferencePool(
                data.items,
                text,
                split.train,
                self.encoder,
                size=variant.training.pool,
                history_length=variant.model.history_length,
                progress=lambda done, total: report(FitProgress("preferences", done, total)),
            )
        return self.pools[key]


@tells_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = RunArguments(__doc__, TRMRun)
    parser.replaces("data", otherwise="the workspace's", type=Path)
    parser.replaces("encoder", otherwise="the settings'")
    parser.replaces("seeds", type=int, nargs="+")
    run(parser.configuration(arguments), Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
