"""When a run ends: patience and time, against counts made by hand."""

from types import SimpleNamespace

import pytest

from rtmdet_fast import UserError
from rtmdet_fast.training.config import seconds_of
from rtmdet_fast.training.horizon import Horizon


def settings(epochs=300, stage2_epochs=20, val_interval=10):
    return SimpleNamespace(epochs=epochs, stage2_epochs=stage2_epochs, val_interval=val_interval)


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("1.5h", 5400), ("45s", 45), ("30", 30), (7, 7)]
)
def test_times(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "2 hours", "-1h", "0s", "1m1h", "1.2.3h", "nan", "inf", "1e400"])
def test_what_is_no_time_is_told(text):
    with pytest.raises(UserError, match="--time"):
        seconds_of(text)


def test_validations_of_the_published_length():
    plan = Horizon(300, 20)
    assert [e for e in range(1, 301) if plan.validates(e, None)] == [*range(10, 281, 10), *range(281, 301)]
    assert [e for e in range(1, 301) if plan.validates(e, 70)] == [70, 140, 210, 280, 300]


def test_patience_goes_over_to_stage_2_and_there_begins_anew():
    plan = Horizon(300, 20)
    assert plan.out_of_patience(59, 10, 50) is plan
    last = plan.out_of_patience(60, 10, 50)
    assert last == Horizon(80, 20, "patience") and last.stage2_begin == 60
    assert last.out_of_patience(61, 10, 50) is last  # not by what came before
    assert last.out_of_patience(70, 64, 5) == Horizon(70, 10, "patience")
    assert last.out_of_patience(80, 61, 5) is last  # it ends there anyhow
    assert Horizon(100, 0).out_of_patience(30, 20, 10) == Horizon(30, 0, "patience")


def test_time_leaves_room_for_stage_2_and_validations():
    plan = Horizon(300, 20)
    # 100 epochs of 60 s; of 86 that remain, 8 validations, 1 last, 20 of stage 2: 29, of 30 s each
    found = plan.within(100 * 60, 1, 60.0, 30.0, settings())
    assert found == Horizon(86, 20, "time")
    assert 85 * 60 + (85 // 10 + 1 + 20) * 30 <= 6000 < 86 * 60 + (86 // 10 + 1 + 20) * 30
    # faster than thought: it grows again, but not beyond what was asked for
    assert found.within(10**6, 2, 60.0, 30.0, settings()) == plan
    assert found.within(30, 2, 60.0, 30.0, settings()) == Horizon(2, 0, "time")
    # so short a run has half of its epochs in stage 2
    assert found.within(20 * 60, 2, 60.0, 30.0, settings()) == Horizon(17, 8, "time")
    # one more epoch is one of stage 2
    assert found.within(95, 2, 60.0, 30.0, settings()) == Horizon(3, 1, "time")


def test_stage_2_once_begun_only_becomes_shorter():
    plan = Horizon(93, 6, "time")
    assert plan.within(10**6, 88, 60.0, 30.0, settings()) == plan
    assert plan.within(200, 88, 60.0, 30.0, settings()) == Horizon(90, 3, "time")
    assert plan.within(0, 88, 60.0, 30.0, settings()) == Horizon(88, 1, "time")
    brought_forward = Horizon(80, 20, "patience")
    assert brought_forward.within(10**6, 60, 60.0, 30.0, settings()) == brought_forward
    assert brought_forward.within(10**6, 60, 60.0, 30.0, settings()).stage2_begin == 60


def test_a_run_that_has_the_time_is_left_alone():
    for plan in (Horizon(300, 20), Horizon(36, 0), Horizon(1, 0)):
        asked = settings(plan.epochs, plan.stage2_epochs)
        for epoch in range(1, plan.epochs):
            assert plan.within(10**6, epoch, 60.0, 30.0, asked) == plan
