import numpy as np
import pytest

from deeprec.evals.significance import adjusted, intervals, paired_p


def test_intervals_hold_the_mean_and_shrink_with_users() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.random((2, 50)) < 0.3, rng.random((2, 5000)) < 0.3
    widths = []
    for table in (few, many):
        for row, found in zip(table, intervals(table * 1.0, resamples=500, seed=0), strict=True):
            assert found.low is not None
            assert found.high is not None
            assert found.low < found.mean == row.mean() < found.high
            # Two standard errors each way, roughly.
            error = row.std() / np.sqrt(len(row))
            assert found.high - found.low == pytest.approx(4 * error, rel=0.2)
            widths.append(found.high - found.low)
    assert max(widths[2:]) < min(widths[:2]) / 5


def test_the_same_seed_gives_the_same_interval() -> None:
    table = np.random.default_rng(0).random((3, 40))
    assert intervals(table, resamples=200, seed=1) == intervals(table, resamples=200, seed=1)


def test_few_users_have_no_interval() -> None:
    (one,) = intervals(np.array([[0.5]]), resamples=200, seed=0)
    assert (one.mean, one.low, one.high) == (0.5, None, None)
    (none,) = intervals(np.zeros((1, 0)), resamples=200, seed=0)
    assert (none.mean, none.low) == (0.0, None)


def test_users_who_all_agree_have_an_interval_of_no_width() -> None:
    (found,) = intervals(np.zeros((1, 10)), resamples=200, seed=0)
    assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_p_by_hand() -> None:
    # Three differences of one sign: 2 of the 8 ways to swap are as extreme.
    ours, theirs = np.array([1.0, 1, 1, 0.5]), np.array([0.0, 0, 0, 0.5])
    assert paired_p(ours, theirs, resamples=1000, seed=0) == pytest.approx(2 / 8)
    assert paired_p(theirs, ours, resamples=1000, seed=0) == pytest.approx(2 / 8)
    assert paired_p(ours, ours, resamples=1000, seed=0) == 1
    assert paired_p(ours[2:], theirs[2:], resamples=1000, seed=0) == 1  # of both ways, both


def test_p_of_noise_and_of_a_difference() -> None:
    rng = np.random.default_rng(1)
    base = rng.random(400)
    assert paired_p(base + rng.normal(0, 0.1, 400), base, resamples=999, seed=0) > 0.05
    assert paired_p(base + rng.normal(0.05, 0.1, 400), base, resamples=999, seed=0) < 0.01


def test_adjusted_by_hand() -> None:
    assert adjusted([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert adjusted([]) == []
