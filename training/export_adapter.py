r"""Copy a trained adapter to where it is shipped or published from, in half the room.

    python training/export_adapter.py runs/grpo_ml100k/recommendation/final adapters/mine \
        --base HuggingFaceTB/SmolLM2-135M-Instruct

Weights are rounded to bfloat16; card, curves and run settings come along. `--base` is what others
call the LLM that it was trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from argparse import RawTextHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from deeprec.configuration import write_json, write_text
from deeprec.errors import SettingsError
from deeprec.graph.engine.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE, RUN_SETTINGS
from deeprec.terminal import tells_errors

_CARD = "README.md"
_NEEDED = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, _CARD, RUN_SETTINGS)
_BASE_LINE = re.compile("^base_model: .*$", re.MULTILINE)
_BESIDE = ("curves.png", "log.json")  # of the run, in the folder above


def export(final: Path, to: Path, base: str) -> Path:
    """Write the folder `to`, whole or not at all; `base` is the LLM's hub name.

    Raises SettingsError.
    """
    import torch
    from safetensors.torch import load_file, save_file

    missing = [name for name in _NEEDED if not (final / name).is_file()]
    if missing:
        raise SettingsError(f"{final} lacks {', '.join(missing)}: give the `final` of a LoRA run")
    if to.exists():
        raise SettingsError(f"{to} is there already: remove it, or give another folder")
    to.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=to.parent, prefix=f".{to.name}-"))
    try:
        weights = load_file(final / ADAPTER_WEIGHTS)
        save_file(
            {name: weight.to(torch.bfloat16) for name, weight in weights.items()},
            beside / ADAPTER_WEIGHTS,
            metadata={"format": "pt"},
        )
        shutil.copyfile(final / RUN_SETTINGS, beside / RUN_SETTINGS)
        if (final / BASE).is_file():  # not of adapters that an earlier version trained
            shutil.copyfile(final / BASE, beside / BASE)
        config = json.loads((final / ADAPTER_CONFIG).read_text("utf-8"))
        write_json(beside / ADAPTER_CONFIG, {**config, "base_model_name_or_path": base})
        card = (final / _CARD).read_text("utf-8")
        write_text(beside / _CARD, _BASE_LINE.sub(f"base_model: {base}", card, count=1))
        for name in _BESIDE:
            if (final.parent / name).is_file():
                shutil.copyfile(final.parent / name, beside / name)
        beside.chmod(0o755)
        for path in beside.iterdir():
            path.chmod(0o644)
        os.replace(beside, to)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return to


@tells_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("final", type=Path, help="what a run left in `final`")
    parser.add_argument("to", type=Path, help="a folder that is not there yet")
    parser.add_argument("--base", required=True, help="hub name of the LLM")
    given = parser.parse_args(arguments)
    folder = export(given.final, given.to, given.base)
    size = (folder / ADAPTER_WEIGHTS).stat().st_size / 2**20
    print(f"{folder}: {size:.1f} MiB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
