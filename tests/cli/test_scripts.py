"""Scripts that are run by their path: Python looks into their folder before all others."""

import sys
from pathlib import Path

import pytest

import deeprec

ROOT = Path(deeprec.__file__).parent


@pytest.mark.parametrize("folder", ["evals", "training"])
def test_no_neighbour_of_a_script_hides_a_module_of_python(folder: str) -> None:
    """As evals/statistics.py hid `statistics` from vLLM in `python evals/run_eval.py`."""
    assert (ROOT / folder).is_dir()
    names = {path.stem for path in (ROOT / folder).iterdir()}
    assert not names & sys.stdlib_module_names
