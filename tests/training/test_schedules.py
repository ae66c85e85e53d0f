import math

import pytest

from prismatic.training.schedules import decay_factor, ema_momentum, noise_scale, warmup_factor


def test_warmup_rises_from_a_tenth_and_stays_at_one():
    assert [warmup_factor(step, 4) for step in (0, 1, 3, 4, 100)] == pytest.approx([0.325, 0.55, 1.0, 1.0, 1.0])
    assert warmup_factor(0, 0) == 1.0


def test_step_decay_is_a_tenth_from_the_given_step_on():
    assert [decay_factor(step, "step", 10, 5) for step in (0, 4, 5, 9)] == [1.0, 1.0, 0.1, 0.1]


def test_warmup_does_not_cancel_the_decay():
    assert warmup_factor(5, 2) * decay_factor(5, "step", 10, 5) == pytest.approx(0.1)


def test_cosine_falls_from_one_to_its_floor():
    factors = [decay_factor(step, "cosine", 8, 0) for step in range(9)]
    assert factors[0] == 1.0 and factors[4] == pytest.approx(0.5) and factors[8] == 0.02
    assert factors == sorted(factors, reverse=True)
    assert factors[2] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_unknown_schedule_names_the_known():
    with pytest.raises(ValueError, match="step, cosine"):
        decay_factor(0, "linear", 10, 5)


def test_noise_ends_where_told_and_is_never_negative():
    assert [noise_scale(step, 10) for step in (0, 5, 10, 12)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert [noise_scale(step, 10, 0.5) for step in (0, 4, 5, 9)] == pytest.approx([1.0, 0.2, 0.0, 0.0])
    assert noise_scale(0, 10, 0.0) == 0.0


def test_ema_momentum_warms_up_to_the_decay():
    assert ema_momentum(20, 0.99) == pytest.approx(0.5)
    assert ema_momentum(10_000, 0.99) == 0.99
