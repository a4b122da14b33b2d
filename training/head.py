"""Where TRL computes the LM head: on every position, unless it is told that labels suffice."""

from __future__ import annotations


def score_labelled_positions_only() -> None:
    """Have TRL's trainers compute the head only where a label is, from now on and on any device.

    Without Triton, TRL 1.16 scores every position, prompts and retrieved lists too, to spare
    compilers that don't take changing shapes. Eager PyTorch on a CPU has none, and with a
    vocabulary of 49,152 the head was nearly half of an update.
    """
    from trl.trainer import utils

    # Of this module it decides no more than that; the kernels ask their own.
    utils._use_triton = lambda _: True
