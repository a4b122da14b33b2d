"""What loading of large libraries and models has in common."""

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
