import pytest

from deeprec.evals.bench.scaling import (
    Accelerator,
    Model,
    Run,
    replicas,
    rows_at_once,
    runs_per_second,
)

GPU = Accelerator("by hand", bandwidth=100.0, flops=1000.0, memory=1000.0)
MODEL = Model("by hand", parameters=10, layers=1, kv_heads=1, head_dim=1)  # 20 bytes, 4 a token
RUN = Run(prompt=10, written=10, environment=0)


def test_a_replica_by_hand() -> None:
    # (0.9 * 1000 - 20) / (4 * 20) = 11 rows; a step moves 20 + 11 * 15 * 4 = 680 bytes in 6.8 s,
    # its 220 operations take 0.22 s; the prompt's 200 take 0.2 s.
    assert rows_at_once(MODEL, RUN, GPU) == 11
    assert runs_per_second(MODEL, RUN, GPU, 1.0, 0.0) == pytest.approx(1 / (10 * 6.8 / 11 + 0.2))
    assert runs_per_second(MODEL, RUN, GPU, 0.5, 0.0) == pytest.approx(1 / (10 * 13.6 / 11 + 0.4))
    assert runs_per_second(MODEL, RUN, GPU, 1.0, 11.0) == pytest.approx(1 / (10 * 11 / 11 + 0.2))


def test_a_model_that_does_not_fit_serves_nobody() -> None:
    assert runs_per_second(Model("large", 500, 1, 1, 1), RUN, GPU, 1.0, 0.0) == 0.0


def test_replicas_by_hand() -> None:
    # 2 runs a second on average, 6 at the peak; a replica is planned for 0.7 of its 1 a second.
    assert replicas(2 * 86_400, 1.0, 3.0) == 9
    assert replicas(1, 1.0, 3.0) == 1
