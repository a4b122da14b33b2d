"""Loading without the garbage collector."""

import gc

import pytest

from deeprec.tools.loading import keep_loaded, uncollected


def test_collection_is_off_inside_and_back_after_an_error() -> None:
    def failing_load() -> None:
        with uncollected():
            assert not gc.isenabled()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing_load()
    assert gc.isenabled()


def test_within_another_it_stays_off() -> None:
    with uncollected():
        with uncollected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_is_kept_is_not_looked_through_again() -> None:
    before = gc.get_freeze_count()
    try:
        keep_loaded()
        assert gc.get_freeze_count() > before + 10_000
    finally:
        gc.unfreeze()
