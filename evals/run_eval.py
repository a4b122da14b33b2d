"""Judge recommenders on the test users of a workspace; write tables and a report.

    python evals/run_eval.py --config evals/configs/baselines_ml100k.yaml

The same as `deeprec eval`. A run that was cut off goes on where it stood; one that is finished is
judged anew from what is stored. What it does is in deeprec/evals/evaluate.py.
"""

import sys
from collections.abc import Sequence

from rich.console import Console

from deeprec.configuration import RunArguments
from deeprec.evals.config import EvalRun
from deeprec.evals.evaluate import REPORT, TABLE, evaluate
from deeprec.settings import load_settings
from deeprec.terminal import tells_errors, visible
from deeprec.tools.workspace import Workspace


def run(config: EvalRun, console: Console) -> None:
    """Evaluate in the workspace that the configuration names, and print the table."""
    workspace = Workspace(load_settings(workspace=config.workspace))
    evaluate(config, workspace, console)
    console.print(visible((config.output / TABLE).read_text("utf-8")), markup=False, soft_wrap=True)
    console.print(f"Report: {config.output / REPORT}", soft_wrap=True)


@tells_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    run(RunArguments(__doc__, EvalRun).configuration(arguments), Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
