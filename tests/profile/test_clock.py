"""The clock on a hand: every second is booked once, on the innermost part, and phases are taken out of the part around them."""

from __future__ import annotations

import pytest

from moesaic.profile.clock import Clock, Place, Slot

OTHER, ATTENTION, DISPATCH = Place("other"), Place("attention", 0), Place("dispatch", 1)


class Hand:
    """A clock whose hand is moved."""

    def __init__(self) -> None:
        self.time, self.phases = 100.0, {"gather": 7.0}
        self.clock = Clock(now=lambda: self.time, phases=self.phases)

    def pass_(self, seconds: float, **phases: float) -> None:
        """Let time pass, of which phases report some."""
        self.time += seconds
        for name, spent in phases.items():
            self.phases[name] = self.phases.get(name, 0.0) + spent


def test_the_innermost_part_gets_the_time() -> None:
    hand = Hand()
    hand.clock.start(OTHER)
    hand.pass_(1)
    hand.clock.enter(ATTENTION)
    hand.pass_(2)
    hand.clock.enter(Place("norm", 0))
    hand.pass_(4)
    hand.clock.leave()
    hand.pass_(8)
    hand.clock.leave()
    hand.pass_(16)
    hand.clock.change(ATTENTION, "backward")
    hand.pass_(32)
    lap = hand.clock.stop()
    assert lap.parts == {
        Slot("step", "other", None): 17,
        Slot("step", "attention", 0): 10,
        Slot("step", "norm", 0): 4,
        Slot("backward", "attention", 0): 32,
    }
    assert lap.seconds == 63
    assert not hand.clock.running


def test_phases_are_taken_out_of_the_sparse_layer_around_them() -> None:
    hand = Hand()
    hand.clock.start(OTHER)
    hand.clock.enter(DISPATCH)
    hand.pass_(10, gather=2, products=5)
    hand.clock.leave()
    assert hand.clock.stop().parts == {
        Slot("step", "other", None): 0,
        Slot("step", "gather", 1): 2,
        Slot("step", "products", 1): 5,
        Slot("step", "dispatch", 1): 3,
    }


def test_phases_of_several_threads_cannot_be_more_than_the_time_that_passed() -> None:
    hand = Hand()
    hand.clock.start(DISPATCH)
    hand.pass_(6, gather=4, products=8)
    lap = hand.clock.stop()
    assert lap.parts[Slot("step", "gather", 1)] == pytest.approx(2)
    assert lap.parts[Slot("step", "products", 1)] == pytest.approx(4)
    assert lap.seconds == pytest.approx(6)


def test_phases_elsewhere_stay_with_their_part() -> None:
    hand = Hand()
    hand.clock.start(ATTENTION)
    hand.pass_(6, products=4)
    hand.clock.change(DISPATCH, "step")
    hand.pass_(1)
    assert hand.clock.stop().parts == {Slot("step", "attention", 0): 6, Slot("step", "dispatch", 1): 1}


def test_own_work_is_in_no_part() -> None:
    hand = Hand()
    hand.clock.start(OTHER)
    hand.pass_(1)
    hand.clock.aside(lambda: hand.pass_(5))
    hand.pass_(2)
    lap = hand.clock.restart(ATTENTION)
    assert (lap.seconds, lap.own) == (3, 5)
    hand.pass_(4)
    lap = hand.clock.stop()
    assert (lap.seconds, lap.own, lap.parts) == (4, 0, {Slot("step", "attention", 0): 4})
    assert lap.shared(2).parts == {Slot("step", "attention", 0): 2}
    assert lap.shared(2).seconds == 2


def test_every_reading_waits_for_the_device() -> None:
    waited = []
    clock = Clock(wait=lambda: waited.append(1))
    clock.start(OTHER)
    clock.enter(ATTENTION)
    clock.leave()
    clock.stop()
    assert len(waited) == 4
