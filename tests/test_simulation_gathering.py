"""What ZeRO-3 has gathered at each moment, counted by hand."""

from __future__ import annotations

import random

import pytest

from memfit.simulation.gathering import Gathering, Settings, Weight

NONE = Settings(prefetch=0, persistence=0, live=0, reuse=0)


def weight(number: int, elements: int, *, trains: bool = True) -> Weight:
    return Weight(number=number, elements=elements, itemsize=4, trains=trains)


A, B, C = weight(0, 100), weight(1, 10), weight(2, 100)
CHAIN = {"a": [A], "b": [B], "c": [C]}
ORDER = ["a", "b", "c", "c", "b", "a"]


def settings(**changes: int) -> Settings:
    named = {name: getattr(NONE, name) for name in ("prefetch", "persistence", "live", "reuse")}
    return Settings(**{**named, "live": 10**9, **changes})


def test_a_module_has_its_parameters_and_no_other():
    step = Gathering(CHAIN, NONE, 3, order=ORDER)
    for name in "abc":
        step.fetch(name)
        assert step.now == {"a": 4 * 102, "b": 4 * 12, "c": 4 * 102}[name], "parts are equally long"
        step.release(name)
        assert step.now == 0
    assert step.order == ["a", "b", "c"]


def test_small_ones_stay():
    step = Gathering(CHAIN, settings(persistence=10), 2, order=ORDER)
    step.gather_persistent()
    assert step.now == step.persistent_bytes() == 40
    step.fetch("a")
    step.release("a")
    step.fetch("b")
    step.release("b")
    assert step.now == 40
    step.release_all()
    assert step.now == 0


@pytest.mark.parametrize(("reuse", "stays"), [(220, False), (221, True)])
def test_what_comes_again_soon_stays(reuse, stays):
    """Between the forward of ``a`` and its backward lie b, c, c and b: 220 elements."""
    step = Gathering(CHAIN, settings(reuse=reuse), 2, order=ORDER)
    step.fetch("a")
    step.release("a")
    assert step.now == (400 if stays else 0)


def test_the_next_ones_are_gathered_ahead():
    """Into one buffer; copied out of it when the first is fetched, and it is there until the last has been."""
    sent: list[int] = []
    step = Gathering(CHAIN, settings(prefetch=11), 4, order=ORDER, sent=lambda _, size: sent.append(size))
    step.fetch("a")
    buffer = 4 * (12 + 100)
    assert sent == [400, buffer]
    assert step.now == 400 + buffer
    step.release("a")
    step.fetch("b")
    assert sent == [400, buffer, 400], "c and b are here, so that a is next, for its backward"
    assert step.now == buffer + 40 + 400 + 400
    step.release("b")
    step.fetch("c")
    assert step.now == 40 + 400 + 400, "b stays: it was not gathered ahead because it was here"


def test_no_more_is_live_than_allowed():
    step = Gathering(CHAIN, settings(prefetch=1000, live=100), 2, order=ORDER)
    step.fetch("a")
    assert step.now == 400, "its own hundred leave no room"


def test_a_step_of_another_order_prefetches_nothing():
    step = Gathering(CHAIN, settings(prefetch=1000, reuse=1000), 2, order=ORDER)
    step.fetch("b")
    assert step.now == 40
    step.release("b")
    assert step.now == 0


def test_what_no_module_releases_goes_with_the_backward():
    """An embedding's input has no gradient that could tell that its backward has ended."""
    step = Gathering(CHAIN, settings(), 2, order=ORDER)
    step.fetch("c", backward=True)
    step.fetch("b", backward=True)
    step.release("c", backward=True)
    assert step.now == 40
    step.ended()
    assert step.now == 0


def test_frozen_ones_of_a_second_forward_go_with_the_backward_that_it_is_for():
    frozen = weight(0, 100, trains=False)
    step = Gathering({"block": [], "a": [frozen]}, settings(), 2, order=["block", "a"])
    step.fetch("block", backward=True)
    step.fetch("a", again=True)
    step.release("a")
    assert step.now == 400
    step.release("block", backward=True)
    assert step.now == 0


def test_reuse_is_that_of_the_plain_loop():
    """DeepSpeed walks the modules that come until it has passed enough elements."""
    draw = random.Random(0)
    for _ in range(200):
        weights = [weight(number, draw.randint(1, 9)) for number in range(6)]
        modules = {f"m{i}": draw.sample(weights, draw.randint(0, 3)) for i in range(5)}
        order = [draw.choice(list(modules)) for _ in range(12)]
        reuse = draw.randint(0, 30)
        step = Gathering(modules, settings(reuse=reuse), 1, order=order)
        for place, name in enumerate(order, 1):
            step.fetch(name)
            step.release(name)
            passed, coming = 0, set()
            for module in order[place:]:
                if passed >= reuse:
                    break
                coming |= {w.number for w in modules[module]}
                passed += sum(w.elements for w in modules[module])
            here = {w.number for w in modules[name]} & step._there.keys()
            assert here == {w.number for w in modules[name]} & coming


def test_settings_of_auto():
    assert Settings.of(None) == Settings()
    assert Settings.of(128) == Settings(bucket=16384, prefetch=14745, persistence=1280)
