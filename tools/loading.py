"""What loading of large libraries and models has in common: objects by the million that stay."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the garbage collector from running meanwhile.

    Importing makes some million objects that stay, and looking through them for garbage again and
    again is a fifth of the CPU time of a start (docs/experiments.md).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def keep_loaded() -> None:
    """Let the garbage collector leave alone from now on what has been loaded by now.

    A full collection looks through all of it while every run stands still: half a second and more
    for libraries and models (docs/experiments.md). What is kept so is freed only by its last
    reference: not for what will be replaced and refers to itself, such as a trainer.
    """
    gc.collect()
    gc.freeze()
