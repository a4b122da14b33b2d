"""How commands behave on a terminal: quiet libraries, errors told in words, a clean end.

What a policy, a catalog or a data file wrote is untrusted: `visible` keeps it from driving one.
"""

from __future__ import annotations

import os
import signal
import sys
import unicodedata
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec

from rich.console import Console

from .errors import DeepRecError

if TYPE_CHECKING:
    import typer

errors = Console(stderr=True)

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # Unicode's categories

_Args = ParamSpec("_Args")


def run_app(app: typer.Typer) -> None:
    """Run a command; an error that the user can mend is told without a traceback."""
    _quiet()
    # A plain SIGTERM would leave the engine's processes behind: nothing that ends them would run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except DeepRecError as error:
        sys.exit(_tell(error))


def tells_errors(main: Callable[_Args, int]) -> Callable[_Args, int]:
    """Make a script's `main` tell an error that the user can mend, and give its exit code."""

    @wraps(main)
    def told(*args: _Args.args, **kwargs: _Args.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except DeepRecError as error:
            return _tell(error)

    return told


def visible(text: str) -> str:
    """Text that can neither colour nor steer a terminal, nor turn its reading direction.

    Each control or format character but line breaks and tabs, and each half of a surrogate pair,
    becomes a visible mark.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        "\ufffd" if unicodedata.category(char) in _HIDDEN and char not in "\n\t" else char
        for char in text
    )


def _tell(error: DeepRecError) -> int:
    errors.print("error:", style="bold red", end=" ")
    errors.print(visible(str(error)), markup=False, highlight=False, soft_wrap=True)
    return error.exit_code


def _quiet() -> None:
    """Keep the libraries' own progress bars and warnings off the terminal, if nobody set them."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
