"""Loading without the garbage collector."""

import gc

import pytest

from deeprec.tools.loading import uncollected


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
