"""Each rule of the design's "What makes it safe": the failure that it prevents, with the rule and without it.

A scenario runs plain, with every rule, with every rule but the *backstops* (other rules that would notice the same
failure later), and without backstops and without the rule. Only the last may be wrong, and it must be: a rule whose
absence nobody notices is not tested. Rule 15, links between blocks, is `test_links.py`'s.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import faulthandler
import gc
import json
import os
import random
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import memfit
from faults import (
    FITS,
    WIDTH,
    Block,
    Fit,
    Outcome,
    OverwritesInput,
    Scenario,
    Stack,
    Watched,
    at,
    attempt,
    data,
    hold,
    judge,
    train,
)
from gradients import Tensors, copies, differences
from memfit import (
    bits,
    blocks,
    calls,
    canary,
    entries,
    frames,
    graph,
    hooks,
    ops,
    parking,
    plans,
    replay,
    runtime,
    signature,
    steps,
    storages,
    streams,
)
from memfit import handle as handles
from memfit.calls import Call
from memfit.costs import profile_program
from memfit.entries import Entry, ProgramState, remember
from memfit.frames import Frame
from memfit.hooks import PostHook, PreHook, RootHook
from memfit.modes import Modes
from memfit.plans import Policy
from memfit.programs import Program
from memfit.resets import Resets
from memfit.runtime import GRAPH_CHECK_PERIOD, GRAPH_CHECKED_CALLS, Runtime
from memfit.trace import Recorder
from zoo import build

Switch = Callable[[pytest.MonkeyPatch], None]
Failure = Literal["wrong", "silent", "error"]

LATE = 4
"""A step in which nothing is verified any more: recorded in the first, verified in the two that follow."""

BOX: dict[str, Any] = {}
"""What blocks below read behind Memfit's back."""


@pytest.fixture(autouse=True)
def empty_box() -> Iterator[None]:
    """What one test hides is gone in the next."""
    BOX.clear()
    yield
    BOX.clear()


# Switching rules off -------------------------------------------------------------------------------------------------


def no_late_drop(patch: pytest.MonkeyPatch) -> None:
    """Rule 1: drop without a look at what was packed."""
    patch.setattr(Call, "differs", lambda self: "")
    patch.setattr(Runtime, "_checks_graph", lambda self, entry: False)


def no_op_verification(patch: pytest.MonkeyPatch) -> None:
    """Rule 2: whatever the second run of an op gives is believed."""
    verify = Recorder._verify

    def believe(self: Recorder, *args: Any) -> bool:
        verify(self, *args)
        return True

    patch.setattr(Recorder, "_verify", believe)


def no_verified_calls(patch: pytest.MonkeyPatch) -> None:
    """Rule 2: the calls after a recording are not verified."""
    patch.setattr(runtime, "verify", lambda *_: "")


def no_checksums(patch: pytest.MonkeyPatch) -> None:
    """Rule 3: nobody notices that a value changed between two ops."""
    patch.setattr(storages, "fingerprint", lambda tensor: 0)


def no_canary(patch: pytest.MonkeyPatch) -> None:
    """Rule 4: what recipes bring back is not compared with anything."""
    patch.setattr(canary.Samples, "compare", lambda *_: None)
    patch.setattr(canary.Doubts, "settle", lambda _: None)


def allow(name: str) -> Switch:
    """Rule 5: one more op on the allow-list."""

    def switch(patch: pytest.MonkeyPatch) -> None:
        allowed = ops.is_recomputable
        patch.setattr(
            ops, "is_recomputable", lambda func, *args: ops.base_name(func).endswith(name) or allowed(func, *args)
        )

    return switch


def no_watch(patch: pytest.MonkeyPatch) -> None:
    """Rule 9: nobody looks whether a block is still what it was."""
    patch.setattr(signature.Watch, "unchanged", lambda self: True)


def forget(**found: Any) -> Switch:
    """Clear what a recording found out about its block."""

    def switch(patch: pytest.MonkeyPatch) -> None:
        finish = Recorder.finish

        def clear(self: Recorder, *args: Any) -> Program:
            program = finish(self, *args)
            for name, value in found.items():
                setattr(program, name, value)
            return program

        patch.setattr(Recorder, "finish", clear)

    return switch


def matters(
    scenario: Scenario,
    off: Switch,
    *,
    backstops: Sequence[Switch] = (),
    failure: Failure = "wrong",
    refusal: bool = False,
) -> Outcome:
    """Hold a scenario to its plain run, with and without backstops, and see it fail without the rule.

    Args:
        scenario: What happens.
        off: Switches the rule off.
        backstops: Switch off what would notice the failure too.
        failure: What happens without the rule: other bits, no error where plain autograd raises, or an error where it
            does not.
        refusal: Whether a `MemfitError` is as good as equal bits while the rule is on.

    Returns:
        How the run without the rule went.
    """
    plain, again = attempt(scenario, None), attempt(scenario, None)
    assert type(plain.error) is type(again.error)
    assert not differences(again.seen, plain.seen), "the plain scenario does not repeat itself"
    outcomes = []
    for switches in ((), backstops, (*backstops, off)):
        with pytest.MonkeyPatch.context() as patch:
            for switch in switches:
                switch(patch)
            outcomes.append(attempt(scenario, FITS["full"]))
    for outcome in outcomes[:-1]:
        judge(outcome, plain, refusal=refusal)
    broken = outcomes[-1]
    if failure == "error":
        assert broken.error is not None, "without the rule nothing is raised"
        assert plain.error is None
        return broken
    assert broken.error is None, f"without the rule {broken.error!r}"
    if failure == "silent":
        assert plain.error is not None
    else:
        assert plain.error is None
        assert differences(broken.seen, plain.seen), "without the rule nothing is wrong"
    return broken


class Hidden(Block):
    """A factor that autograd keeps and whose making it does not see: only a recipe runs it again."""

    def factor(self, x: Tensor) -> Tensor:
        return (x * BOX["scale"]).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.factor(x.detach()))


def changing(
    make: Callable[[], nn.Module],
    *,
    step: int = LATE,
    inside: bool = False,
    before: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
    steps: int = LATE + 2,
) -> Scenario:
    """Train with ``before`` in the box, and from one step on with ``after``."""
    first = {"scale": 1.0} if before is None else before
    then = {"scale": 1.7} if after is None else after

    def scenario(fit: Fit, seen: Tensors) -> None:
        BOX.update(copy.deepcopy(first))
        change = at(step, lambda model: BOX.update(then))
        BOX["model"] = model = Stack(make)
        train(model, fit, seen, steps=steps, must_drop=False, **{"inside" if inside else "between": change})

    return scenario


@contextlib.contextmanager
def custom_op(schema: str, function: Callable[..., Tensor]) -> Iterator[Any]:
    """An op of the user's, for as long as a test runs."""
    library = torch.library.Library("memfit_rules", "FRAGMENT")
    try:
        library.define(schema)
        name = schema.split("(")[0]
        library.impl(name, function, "CPU")
        yield getattr(torch.ops.memfit_rules, name)
    finally:
        library._destroy()


# Trust ---------------------------------------------------------------------------------------------------------------


class HiddenFunction(Block):
    """Calls a function that may be another one tomorrow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(BOX["function"](x))


class HiddenFactor(Block):
    """Multiplies by a Python number, which autograd keeps and shows to no hook."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * BOX["scale"]).sigmoid())


class HiddenAlias(Block):
    """Two factors, which may be one."""

    def forward(self, x: Tensor) -> Tensor:
        left = x.detach().sigmoid()
        right = left if BOX["same"] else x.detach().tanh()
        return super().forward(x * left + x * right)


@pytest.mark.parametrize("change", ["function", "number"])
def test_rule_01_late_drop_sees_the_graph(change: str) -> None:
    """A function swapped for one that saves the same, a number for another: only the autograd graph shows it."""
    scenario = {
        "function": changing(HiddenFunction, before={"function": F.silu}, after={"function": F.gelu}),
        "number": changing(HiddenFactor),
    }[change]
    matters(scenario, no_late_drop, backstops=[no_canary])


def test_rule_01_late_drop_sees_what_was_packed() -> None:
    """Two saved tensors that become one: the graph is the same."""

    def no_graph(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Runtime, "_checks_graph", lambda self, entry: False)

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Call, "differs", lambda self: "")

    matters(changing(HiddenAlias, before={"same": False}, after={"same": True}), off, backstops=[no_graph, no_canary])


def test_rule_01_more_saved_tensors() -> None:
    """More tensors packed than recorded: dropping them by number fails outright."""
    scenario = changing(
        HiddenFunction, before={"function": F.silu}, after={"function": lambda x: F.silu(x).sin().cos()}
    )
    matters(scenario, no_late_drop, backstops=[no_canary], failure="error")


def test_rule_02_verified_op_by_op() -> None:
    """A kernel that tunes itself: its second run on the same data gives other bits than its first."""

    def tuned(x: Tensor) -> Tensor:
        key = (BOX["step"], x.sum().item())
        warm = key in BOX["tuned"]
        BOX["tuned"].add(key)
        return x * (1.001 if warm else 1.0)

    with custom_op("tuned(Tensor x) -> Tensor", tuned) as op:

        class Tuned(Hidden):
            def factor(self, x: Tensor) -> Tensor:
                return op(x)

        def scenario(fit: Fit, seen: Tensors) -> None:
            BOX.update(tuned=set())
            train(Stack(Tuned), fit, seen, between=lambda model, i: BOX.update(step=i), must_drop=False)

        matters(scenario, no_op_verification, backstops=[allow("tuned"), no_verified_calls, no_canary])


def test_rule_02_what_is_left_unwritten_proves_nothing() -> None:
    """A kernel that fills one result and leaves the other as the memory was, as attention leaves its seeds."""

    def leaving(x: Tensor) -> tuple[Tensor, Tensor]:
        BOX["runs"] += 1
        return x.sigmoid(), torch.tensor([BOX["runs"], 1])

    with custom_op("leaving(Tensor x) -> (Tensor, Tensor)", leaving) as op:

        class Attention(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                out, seed = op(x)
                ctx.save_for_backward(out, seed)
                return out

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                out, seed = ctx.saved_tensors
                return gradient * out * (1 - out) * seed[1]

        class Attending(Block):
            def forward(self, x: Tensor) -> Tensor:
                h = Attention.apply(self.norm(x))
                return super().forward(x) + h * op(x.detach())[0]

        def scenario(fit: Fit, seen: Tensors) -> None:
            BOX.update(runs=0)
            train(Stack(Attending), fit, seen)

        def closed(patch: pytest.MonkeyPatch) -> Outcome:
            allow("leaving")(patch)
            outcome = attempt(scenario, FITS["full"])
            judge(outcome, attempt(scenario, None), refusal=False)
            return outcome

        def recomputed(outcome: Outcome) -> int:
            assert outcome.summary is not None
            return outcome.summary["recomputed_bytes"]

        with pytest.MonkeyPatch.context() as patch:
            kept = recomputed(closed(patch))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(ops._UNWRITTEN, "memfit_rules::leaving", ((), (1,)))
            assert recomputed(closed(patch)) > kept


@pytest.mark.parametrize("fails", [1, 2])
def test_rule_02_recordings_that_disagree(fails: int) -> None:
    """What gave the same bits in one block's recording by luck, and others in the next block's, no recipe runs."""
    count = [0]
    verify = Recorder._verify

    def unsteady(self: Recorder, op: Any, func: Any, *args: Any) -> bool | None:
        found = verify(self, op, func, *args)
        if ops.base_name(func) != "silu":
            return found
        count[0] += 1
        return found and count[0] - 1 != fails

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "_verify", unsteady)
        model = Stack()
        with memfit.fit(model, policy="full") as handle:
            for i in range(3):
                model(data(i).requires_grad_()).backward()
            _, middle, last = ([e.state for e in block.entries.values()] for block in handle.runtime.blocks)
    (state,) = last
    assert middle == last
    assert count[0] == 3
    (silu,) = [op for op in state.program.ops if ops.base_name(op.func) == "silu"]
    assert not silu.recomputable
    assert not any(state.program.nodes[n].recomputable for _, n in silu.outputs)


def test_rule_02_verified_again() -> None:
    """What only changes from step to step is noticed by verifying the next steps."""
    matters(changing(Hidden, step=1), no_verified_calls, backstops=[no_canary])


def test_rule_03_no_proof_by_luck() -> None:
    """A kernel that torch does not see adds to zeros, at first nothing: that the zeros came back proved nothing."""

    class Written(Hidden):
        def factor(self, x: Tensor) -> Tensor:
            zeros = (x * 0.0).abs()
            with _disable_current_modes():
                zeros.data.add_(BOX["amount"])
            return zeros

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(storages, "all_equal", lambda tensor: False)

    scenario = changing(Written, before={"amount": 0.0}, after={"amount": 0.25})
    matters(scenario, off, backstops=[no_canary])


def test_rule_03_checksums() -> None:
    """The same kernel writing from the first step on: produced and consumed bits differ."""

    class Written(Hidden):
        def factor(self, x: Tensor) -> Tensor:
            value = x.sigmoid()
            with _disable_current_modes():
                value.data.mul_(0.5)
            return value

    scenario = changing(Written)
    matters(scenario, no_checksums, backstops=[no_verified_calls, no_canary])


def test_rule_04_canary() -> None:
    """What a recipe computes from is another thing than it was, and nothing else can notice: an error, in that step."""
    scenario = changing(Hidden)
    fitted = attempt(scenario, FITS["full"])
    assert isinstance(fitted.error, memfit.RecomputeError)
    assert f"{LATE - 1} parameter head.weight" in fitted.seen
    assert f"{LATE} parameter head.weight" not in fitted.seen, "raised after the optimizer's step"
    matters(scenario, no_canary, refusal=True)


def test_rule_04_step_again() -> None:
    """After the error, the same step again is right: the blocks are recorded anew."""

    def errors(*switches: Switch) -> list[int]:
        torch.manual_seed(0)
        model, plain = Stack(Hidden).eval(), Stack(Hidden).eval()
        plain.load_state_dict(model.state_dict())
        found = []
        with pytest.MonkeyPatch.context() as patch, memfit.fit(model, policy="full"):
            for switch in switches:
                switch(patch)
            for i in range(LATE + 4):
                BOX["scale"] = 1.0 if i < LATE else 1.7
                model.zero_grad(), plain.zero_grad()
                try:
                    model(data(i).requires_grad_()).backward()
                except memfit.RecomputeError:
                    found.append(i)
                    continue
                plain(data(i).requires_grad_()).backward()
                ours, theirs = (copies((n, p.grad) for n, p in m.named_parameters()) for m in (model, plain))
                assert not differences(ours, theirs)
        return found

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(ProgramState, "distrust", lambda self: None)

    # The first block and the others run two programs; the last block's error comes first.
    assert errors() == [LATE, LATE + 1]
    assert errors(off) == [LATE, LATE + 1, LATE + 2, LATE + 3]


class OneElement(Block):
    """One element of many is hidden state."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        many = x.repeat(64, 1)
        one = torch.arange(many.numel()).view_as(many) == 7
        factor = many.detach().sigmoid().masked_fill(one, BOX["scale"])
        return x + (many * factor).view(64, *x.shape).mean(0)


def test_rule_04_hash_of_all_bits() -> None:
    """Samples miss one element among many; the hash of all bits does not, once it is a block's turn."""

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(canary.Doubts, "settle", lambda _: None)

    def scenario(fit: Fit, seen: Tensors) -> None:
        changing(OneElement, before={"scale": 0.5}, after={"scale": 0.9})(fit, seen)

    fitted = attempt(scenario, FITS["full"])
    assert isinstance(fitted.error, memfit.RecomputeError)
    with pytest.MonkeyPatch.context() as patch:
        off(patch)
        broken = attempt(scenario, FITS["full"])
    assert broken.error is None
    assert differences(broken.seen, attempt(scenario, None).seen)


def test_rule_04_doubts_are_settled_together() -> None:
    """Of many pairs, of several kinds, those that differ are told, each judge once: few ulp are not made an error."""
    one = torch.linspace(1, 2, 24)
    close, far = one.clone(), one.clone()
    close[5] = close[5].nextafter(torch.tensor(9.0))
    far[7] = 5.0
    nan = one.clone().fill_(float("nan"))
    told: list[tuple[str, float]] = []

    def judge(name: str) -> Callable[[float], None]:
        return lambda ulp: told.append((name, ulp))

    doubts = canary.Doubts()
    for name, now in (("same", one.clone()), ("close", close), ("far", far)):
        own = judge(name)
        doubts.add((now, one), own)
        doubts.add((canary.all_bits(now), canary.all_bits(one)), own)
    doubts.add((nan.clone(), nan), judge("nan"))
    doubts.add((torch.tensor(True), torch.tensor(True)), judge("scalar"))
    doubts.add((torch.empty(0), torch.empty(0)), judge("empty"))
    doubts.add((one.bfloat16(), one.bfloat16()), judge("half"))
    hashed = judge("hashed")
    doubts.add((one.clone(), one), hashed)
    doubts.add((canary.all_bits(far), canary.all_bits(one)), hashed)
    doubts.settle()
    assert [name for name, _ in told] == ["close", "far", "hashed"]
    assert told[0][1] == 1
    assert told[1][1] > canary.FEW_ULP
    assert told[2][1] == float("inf")


def test_rule_04_every_call_has_its_turn() -> None:
    """Whatever number of forwards a step has, and however many blocks share a program."""
    turns = canary.Turns()
    hashed = [[turns.due("program", step) for _ in range(3)].index(True) for step in range(7)]
    assert sorted(hashed[1:4]) == sorted(hashed[4:]) == [0, 1, 2]


def notes(
    make: Callable[[], nn.Module], switches: Sequence[Switch], forward: Callable[[nn.Module, int], Tensor]
) -> str:
    """What the report says after some steps."""
    torch.manual_seed(0)
    model = Stack(make)
    with pytest.MonkeyPatch.context() as patch, memfit.fit(model, policy="full") as handle:
        for switch in switches:
            switch(patch)
        for i in range(4):
            forward(model, i).backward()
        return "\n".join(handle.summary()["notes"])


def test_rule_04_nan_equals_nan() -> None:
    """A value with NaNs that comes back with the same NaNs is the same."""

    def forward(model: nn.Module, i: int) -> Tensor:
        return model(data(i).index_fill(1, torch.tensor([3]), float("nan")))

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(canary, "as_integers", lambda tensor: tensor)

    assert notes(Block, [], forward) == ""
    assert "differed" in notes(Block, [off], forward)


class Shifted(Block):
    """Hidden state that one saved value shows and no other."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + x * (x.detach() * BOX["scale"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rule_04_another_sign_is_not_few_ulp(dtype: torch.dtype) -> None:
    """Between 2.0 and -2.0 lie 2^63 doubles, one more than an integer counts."""
    two = torch.full((3,), 2.0, dtype=dtype)
    assert bits.max_ulp(two, -two) == 2.0 ** (dtype.itemsize * 8 - 1)
    assert bits.max_ulp(two, two.nextafter(-two)) == 1
    assert bits.max_ulp(two - two, -(two - two)) == 0
    assert bits.max_ulp(two, two * float("nan")) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_rule_04_an_overflow_is_not_few_ulp(dtype: torch.dtype) -> None:
    """Behind the largest number comes infinity, and behind that the first NaN."""
    values = (torch.finfo(dtype).max, float("inf"), float("-inf"), float("nan"))
    largest, infinite, lowest, nan = (torch.tensor([1.0, value], dtype=torch.float64).to(dtype) for value in values)
    for one, other in ((largest, infinite), (infinite, nan), (largest, nan), (lowest, infinite)):
        assert bits.max_ulp(one, other) == bits.max_ulp(other, one) == float("inf")
    for same in (largest, infinite, nan):
        assert bits.max_ulp(same, same.clone()) == 0


def test_rule_04_few_ulp() -> None:
    """A last bit that differs is no error: the value is kept from the next step on, and the report says so."""

    def steps(*switches: Switch) -> tuple[list[bool], str]:
        """Whether the gradients of each step are those of the plain model, and the notes."""
        torch.manual_seed(0)
        model, plain = Stack(Shifted).eval(), Stack(Shifted).eval()
        plain.load_state_dict(model.state_dict())
        equal = []
        with pytest.MonkeyPatch.context() as patch, memfit.fit(model, policy="full") as handle:
            for switch in switches:
                switch(patch)
            for i in range(LATE + 3):
                BOX["scale"] = 1.0 if i < LATE else 1.0 + 2.0**-23
                found = []
                for each in (plain, model):
                    each.zero_grad()
                    each(data(i)).backward()
                    found.append(copies((name, p.grad) for name, p in each.named_parameters()))
                equal.append(not differences(found[1], found[0]))
            return equal, "\n".join(handle.summary()["notes"])

    equal, note = steps()
    assert equal == [*[True] * LATE, False, True, True]
    assert "ulp and is kept from now on" in note
    equal, note = steps(no_canary)
    assert not all(equal[LATE + 1 :])
    assert note == ""


# What may be recomputed ----------------------------------------------------------------------------------------------


def test_rule_05_allow_list() -> None:
    """An op that reads hidden state agrees with itself when recorded, and not when the backward comes."""
    with custom_op("scaled(Tensor x) -> Tensor", lambda x: x * BOX["scale"]) as op:

        class Custom(Hidden):
            def factor(self, x: Tensor) -> Tensor:
                return op(x)

        matters(changing(Custom, inside=True), allow("scaled"), backstops=[no_canary])


@pytest.mark.parametrize("transposed", [False, True])
def test_rule_05_convolutions_that_choose_a_kernel(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN tries its kernels out in each thread, and a recipe runs in another one than the forward."""
    func = torch.ops.aten.convolution.default
    x, weight = torch.ones(1, 2, 5, 5), torch.ones(2, 2, 3, 3)
    args = (x, weight, None, [1, 1], [0, 0], [1, 1], transposed, [0, 0], 1)

    def allowed(device: str) -> bool:
        return ops.is_recomputable(func, args, {}, device)

    assert allowed("cpu")
    assert allowed("cuda") is not transposed
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert allowed("cpu")
    assert not allowed("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert allowed("cuda")


def test_rule_05_running_statistics() -> None:
    """A batch norm in training writes its statistics, whatever its schema says."""

    class Normed(Block):
        def __init__(self) -> None:
            super().__init__()
            self.batch_norm = nn.BatchNorm1d(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.batch_norm(x).relu())

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(ops, "purify", lambda func, args, kwargs: (func, args, kwargs))

    matters(changing(Normed, steps=1), off, failure="error")


def test_rule_05_rewound_generator() -> None:
    """Dropout's mask is drawn again from where the generator stood."""

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(calls, "_states", lambda devices: {each: torch.Generator().get_state() for each in devices})

    matters(changing(Block), off, backstops=[no_verified_calls, no_canary])


def test_rule_05_outside_nothing_moves() -> None:
    """A recipe that draws leaves the generator where the user has it: the next forward draws what it would have."""

    class Drawn(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sigmoid() * torch.rand_like(x))

    class Forgetful:
        """A generator that is put back once only."""

        def __init__(self, generator: torch.Generator) -> None:
            self.generator, self.moved = generator, False

        def get_state(self) -> Tensor:
            return self.generator.get_state()

        def set_state(self, state: Tensor) -> None:
            if not self.moved:
                self.generator.set_state(state)
            self.moved = True

    def no_overload(patch: pytest.MonkeyPatch) -> None:
        """As for ops of which no overload takes a generator."""
        patch.setattr(ops, "with_generator", lambda func: None)

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(replay, "generator_of", lambda device: Forgetful(torch.default_generator))

    matters(changing(Drawn), off, backstops=[no_overload])


def test_rule_06_versions() -> None:
    """An in-place op makes another value of the same storage; a recipe without it is a recipe of the value before."""

    class InPlace(Hidden):
        def factor(self, x: Tensor) -> Tensor:
            return x.sigmoid().mul_(0.5)

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(ops, "written", lambda *_: [])

    matters(changing(InPlace), off, backstops=[no_checksums, no_verified_calls, no_canary])


@pytest.mark.parametrize("view", ["conjugate", "other dtype"])
def test_rule_06_odd_views(view: str) -> None:
    """A view that no size and stride describe: an op that reads it is no op that a recipe can run."""

    class Viewed(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            x = Block.forward(self, x)
            if view == "conjugate":
                z = torch.fft.rfft(x, dim=1)
                return x + torch.fft.irfft(z * z.conj() * z, n=WIDTH, dim=1).tanh()
            value = x.detach().sin()
            bits = (value.view(torch.int32) + 1000).clone()
            return x * value + x * bits.sin()

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(storages.Storages, "is_odd", lambda self, tensor: False)

    matters(changing(Viewed), off, backstops=[no_verified_calls, no_canary])


def test_rule_06_writes_of_recipes() -> None:
    """A recipe that writes in place must not write into what another recipe reads."""

    class Both(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            x = Block.forward(self, x)
            value = x.detach().sin()
            before = x * (value * 2.0).sigmoid()
            value.mul_(0.5)
            return before + x * value

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(steps, "writable", lambda base, shared: base)

    matters(changing(Both), off, backstops=[no_verified_calls, no_canary])


class Overwriting(Block):
    """What the function overwrites is also the source of a mask that an earlier node keeps."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        h = F.gelu(x)
        return self.up(x)[:, :WIDTH] * h.detach().sigmoid() + OverwritesInput.apply(h)


def test_rule_07_custom_functions() -> None:
    """A custom Function may overwrite what it saved: recipes must not read it."""

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(graph, "custom_nodes", lambda *_: [])

    matters(changing(Overwriting), off, backstops=[no_verified_calls, no_canary])


class Buffered(Block):
    """Adds a small buffer, which autograd does not keep."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.linspace(-1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x + self.offset).sigmoid())


@pytest.mark.parametrize("traced", [True, False])
def test_rule_07_small_buffers(traced: bool) -> None:
    """A broadcast writes buffers between forward and backward: plain autograd never looks again, a recipe would."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        def broadcast(model: Any, i: int) -> None:
            for block in model.blocks:
                (block.offset if traced else block.offset.data).add_(1.0)

        train(Stack(Buffered), fit, seen, inside=broadcast)

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(storages, "SMALL_BUFFER_BYTES", 0)

    if traced:
        matters(scenario, off, backstops=[no_canary], failure="error")
    else:
        matters(scenario, off, backstops=[no_canary])


@pytest.mark.parametrize("number", ["saved", "input", -1, 10**6])
def test_rule_07_only_what_loses_nothing_is_narrowed(number: str | int) -> None:
    """A plan that narrows a value of which no smaller form is known: it would come back as a mask of itself."""
    model = Stack()
    with memfit.fit(model, policy="full") as handle:
        model(data(0)).backward()
        state = handle.runtime.calls[1].entry.state
    program = state.program
    which = {
        "saved": next(s.value.node for s in program.saved if program.nodes[s.value.node].mask_scale is None),
        "input": next(n for n, node in enumerate(program.nodes) if node.leaf is not None and node.leaf.kind == "input"),
    }
    policy = Policy(program=program.key, narrowed=(which.get(number, number),))
    with pytest.raises(memfit.MemfitError, match="no smaller form"):
        replay.compile_policy(program, policy)
    assert state.compile(policy).saves_all


def test_rule_08_parameters_are_objects() -> None:
    """A weight replaced between forward and backward: the name means another tensor, the graph still means the old."""

    def replace_weight(model: Any) -> None:
        block = model.blocks[1]
        block.up.weight = nn.Parameter(block.up.weight.detach() * 0.5)

    def scenario(fit: Fit, seen: Tensors) -> None:
        BOX["model"] = model = Stack()
        train(model, fit, seen, inside=at(2, replace_weight))

    def by_name(frame: Frame, nodes: tuple[int, ...], leaves: list[tuple[int, Tensor]]) -> None:
        for node in nodes:
            leaf = frame.compiled.program.nodes[node].leaf
            assert leaf is not None
            module = BOX["model"].get_submodule(frame.block).get_submodule(leaf.owner)
            leaves.append((node, getattr(module, leaf.name).detach()))

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Frame, "_add_parameters", by_name)

    matters(scenario, off, backstops=[no_canary])


class Lookups(dict[str, Any]):
    """Parameters by name, as ZeRO 3 keeps them: ``[]`` gathers what it finds."""

    count = 0

    def __getitem__(self, name: str) -> Any:
        Lookups.count += 1
        return super().__getitem__(name)


def test_rule_08_only_forwards_look_parameters_up() -> None:
    """Ranks that looked one up at another time would gather at another time, and the job would stop."""

    def lookups(*, fitted: bool) -> int:
        model = Stack()
        for module in model.modules():
            module._parameters = Lookups(module._parameters)
        Lookups.count = 0
        with memfit.fit(model, policy="full") if fitted else contextlib.nullcontext():
            for step in range(3):
                model(data(step)).backward()
        return Lookups.count

    assert lookups(fitted=True) == lookups(fitted=False) > 0


# When the model is not what it was -----------------------------------------------------------------------------------


class Pair(nn.Module):
    """A block of two inputs, which may be one, or one of its own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mask = (x.detach() * 2.0 + y.detach()).sigmoid()
        return self.right(x * mask + self.left(x).sigmoid())


class Pairs(nn.Module):
    """Calls its blocks with what the box says."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, BOX["second"](x, block))
        return x.square().mean()


def second(name: str) -> Callable[[Tensor, Any], Tensor]:
    """What a block's second input is."""
    return {
        "same": lambda x, block: x,
        "other": lambda x, block: x.detach().cos().requires_grad_(x.requires_grad),
        "bias": lambda x, block: block.left.bias,
        "other bias": lambda x, block: torch.linspace(0, 1, WIDTH).requires_grad_(),
    }[name]


@pytest.mark.parametrize(("before", "after"), [("same", "other"), ("bias", "other bias")])
def test_rule_09_alias_pattern(before: str, after: str) -> None:
    """``block(x, x)`` is not ``block(x, y)``, and an input that is a parameter is not one that is not."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        BOX["second"] = second(before)
        train(Pairs(), fit, seen, between=at(LATE, lambda m: BOX.update(second=second(after))), steps=LATE + 2)

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(signature, "describe", lambda tensors: tuple([(t.shape, t.dtype) for t in tensors]))
        patch.setattr(signature, "aliases", lambda tensors, own: ())

    matters(scenario, off, backstops=[no_late_drop, no_verified_calls, no_canary])


class Configured(Hidden):
    """Reads its scale from a plain attribute, a configuration, a dict, a submodule, its mode and its trainability."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_scale = 1.0
        self.config = types.SimpleNamespace(scale=1.0)
        self.scaling, self.scales = {"default": 1.0}, [1.0]
        self.gate = nn.Sigmoid()

    def factor(self, x: Tensor) -> Tensor:
        scale = self.gate_scale * self.config.scale * self.scaling["default"] * self.scales[0]
        return self.gate(x * scale + (0.0 if self.training else 1.0))


CHANGES: dict[str, Callable[[Any], object]] = {
    "attribute": lambda block: setattr(block, "gate_scale", 1.7),
    "configuration": lambda block: setattr(block.config, "scale", 1.7),
    "dict": lambda block: block.scaling.update(default=1.7),
    "list": lambda block: block.scales.__setitem__(0, 1.7),
    "submodule": lambda block: setattr(block, "gate", nn.Tanh()),
    "patched forward": lambda block: setattr(block.gate, "forward", torch.tanh),
    "hook": lambda block: block.gate.register_forward_hook(lambda module, args, output: output * 0.5),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_rule_09_what_the_block_is(change: str) -> None:
    """A dropout rate on a schedule, a LoRA scaling, another activation: nothing of it is in the arguments."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        def between(model: Any, i: int) -> None:
            if i == LATE:
                for block in model.blocks:
                    CHANGES[change](block)

        train(Stack(Configured), fit, seen, between=between, steps=LATE + 2)

    matters(scenario, no_watch, backstops=[no_late_drop, no_verified_calls, no_canary])


@pytest.mark.parametrize("change", ["training", "autocast"])
def test_rule_09_modes(change: str) -> None:
    """Evaluation mode, autocast: the same block computes another thing."""
    step = 0

    def forward(model: Any, x: Tensor) -> Tensor:
        nonlocal step
        step += 1
        later = step > LATE
        for block in model.blocks:
            block.train(not (later and change == "training"))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=later and change == "autocast"):
            return model(x)

    class Multiplies(Configured):
        def factor(self, x: Tensor) -> Tensor:
            return super().factor(x @ self.norm.weight.detach().diag())

    def scenario(fit: Fit, seen: Tensors) -> None:
        nonlocal step
        step = 0
        train(Stack(Multiplies), fit, seen, forward=forward, steps=LATE + 2)

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(signature, "autocast_state", lambda tensors: None)
        of = signature.Signatures.of
        patch.setattr(signature.Signatures, "of", lambda *given: of(*given[:4], True, *given[5:]))

    backstops = [no_watch, no_late_drop, no_verified_calls, no_canary]
    matters(scenario, off, backstops=backstops, failure="error")


def adopt_any(self: Runtime, block: Any, wanted: Any) -> Any:
    """Rule 10, switched off: any recording of the same signature will do."""
    for other in self.blocks:
        entry = other.entries.get(wanted)
        if entry is not None and other is not block:
            adopted = Entry(entry.state)
            remember(wanted, adopted, block=block, blocks=self.blocks, states=self.states)
            return adopted
    return None


def test_rule_10_shared_between_equals() -> None:
    """Blocks of one class and one shape, with another constant each: a recording of one is none of the other."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        model = Stack(Configured)
        for i, block in enumerate(model.blocks):
            block.gate_scale = 1.0 + i
        train(model, fit, seen)

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Runtime, "_adopt", adopt_any)

    matters(scenario, off, backstops=[no_late_drop, no_verified_calls, no_canary])


def lengths(model: nn.Module, rows: Sequence[int]) -> memfit.Handle:
    """Train on batches of these lengths."""
    handle = memfit.fit(model, policy="full")
    for i, n in enumerate(rows):
        model(data(i, rows=n).requires_grad_()).backward()
    return handle


def test_rule_10_bounded_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of ever new lengths: a block remembers the last few, and the programs of the others are forgotten."""
    monkeypatch.setattr(runtime, "MAX_RECORDINGS_IN_A_ROW", 10**9)

    def programs() -> tuple[int, int, int]:
        with lengths(Stack(), range(2, 9)) as handle:
            held = handle.runtime
            return max(len(block.entries) for block in held.blocks), len(held.states), len(handle._planning.programs)

    assert programs() == (7, 14, 14), "of each length, one program for the first block and one for the others"
    monkeypatch.setattr(entries, "MAX_PROGRAMS_PER_BLOCK", 3)
    monkeypatch.setattr(entries, "MAX_PROGRAMS", 8)
    known, states, profiles = programs()
    assert known == 3
    assert states <= 8
    assert profiles <= 8


def test_rule_10_changing_blocks_are_demoted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is recorded at every call is not recorded for ever: a recording costs about five forwards."""

    def recorded() -> tuple[int, set[str]]:
        with lengths(Stack(), range(2, 10)) as handle:
            return handle.runtime.recorded, {block.mode for block in handle.runtime.blocks}

    monkeypatch.setattr(runtime, "MAX_RECORDINGS_IN_A_ROW", 3)
    count, modes = recorded()
    assert modes == {"fallback"}
    monkeypatch.setattr(runtime, "MAX_RECORDINGS_IN_A_ROW", 10**9)
    endless, modes = recorded()
    assert modes == {"replay"}
    assert endless > count


def test_rule_10_hidden_numbers_are_demoted() -> None:
    """A number that Python makes anew at every call: recorded a few times, then run as a whole."""

    class Counted(Block):
        def forward(self, x: Tensor) -> Tensor:
            BOX["calls"] += 1
            return super().forward(x.tanh() * (1.0 + 0.01 * BOX["calls"]))

    def scenario(fit: Fit, seen: Tensors) -> None:
        BOX["calls"] = 0
        train(Stack(Counted), fit, seen, steps=4, must_drop=False)

    judge(attempt(scenario, FITS["full"]), attempt(scenario, None), refusal=False)


def no_versions(patch: pytest.MonkeyPatch) -> None:
    """Rule 11: what is unpacked or read is taken as it is."""

    def add(self: Frame, nodes: tuple[int, ...], leaves: list[tuple[int, Tensor]]) -> None:
        leaves += [(node, self.parameters[node][0]) for node in nodes]

    patch.setattr(frames, "kept", lambda handle: handle.tensor)
    patch.setattr(Frame, "_checked", lambda self, node, tensor, *_: tensor)
    patch.setattr(Frame, "_add_parameters", add)


WRITES: dict[str, Callable[[Any], object]] = {
    "weight": lambda model: model.blocks[1].up.weight.mul_(1.1),
    "output of a block": lambda model: model.passed[2].mul_(1.1),
    "bias": lambda model: model.blocks[1].up.bias.add_(1.0),
    "bias data replaced": lambda model: setattr(model.blocks[1].up.bias, "data", torch.ones(2 * WIDTH)),
}


@pytest.mark.parametrize("write", list(WRITES))
def test_rule_11_versions(write: str) -> None:
    """Hooks switch autograd's own check off: what plain autograd would refuse is otherwise returned silently.

    A bias is kept by no graph: plain autograd is right, a recipe that reads it cannot be, and says so.
    """
    refusal = write.startswith("bias")

    def scenario(fit: Fit, seen: Tensors) -> None:
        train(Watched(), fit, seen, inside=at(2, torch.no_grad()(WRITES[write])), steps=4)

    matters(scenario, no_versions, backstops=[no_canary], failure="wrong" if refusal else "silent", refusal=refusal)


class SetsAgain(Block):
    """Sets a bias to itself, as a parametrization does that begins: its version counts that in each forward."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.up.bias.set_(self.up.bias)
        return super().forward(x)


def twice(model: nn.Module, x: Tensor) -> Tensor:
    """A forward, one that nobody trains on, and another, before the backward through both."""
    first = model(x)
    with torch.no_grad():
        model(x)
    return first + model(x.flip(0)).square()


def test_rule_11_what_is_set_to_itself_is_not_written() -> None:
    """Plain autograd keeps no bias, and so minds no version of it."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        train(Stack(SetsAgain), fit, seen, forward=twice)

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Resets, "leave", lambda self: None)

    matters(scenario, off, failure="error")


def test_rule_11_what_is_set_to_itself_may_be_written_too() -> None:
    """Only what the block's forwards add to a version is left out of the comparison."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        train(Stack(SetsAgain), fit, seen, inside=at(2, torch.no_grad()(WRITES["bias"])), forward=twice, steps=4)

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Resets, "version", lambda self, tensor: 0)

    matters(scenario, off, backstops=[no_canary], refusal=True)


READS: dict[str, Callable[[Tensor], float]] = {
    "item": lambda x: x[0, 0].item(),
    "float": lambda x: float(x[0, 0]),
    "bool": lambda x: 1.0 if x[0, 0] > 0 else 0.0,
    "equal": lambda x: 1.0 if torch.equal(x[:1, :1].sign(), x[1:2, :1].sign()) else 0.0,
    "allclose": lambda x: 1.0 if torch.allclose(x[:1, :1].sign(), x[1:2, :1].sign()) else 0.0,
    "nonzero": lambda x: float(len((x[0] > 0).nonzero())),
    "tolist": lambda x: x.tolist()[0][0],
    "numpy": lambda x: float(x.numpy()[0, 0]),
    "array": lambda x: float(np.asarray(x)[0, 0]),
    "dlpack": lambda x: float(np.from_dlpack(x)[0, 0]),
    "address": lambda x: float(ctypes.cast(x.data_ptr(), ctypes.POINTER(ctypes.c_float))[0]),
}


@pytest.mark.parametrize("read", list(READS))
def test_rule_12_data_read_by_python(read: str) -> None:
    """A number that Python took out of a tensor is no constant."""

    class Reads(Hidden):
        def factor(self, x: Tensor) -> Tensor:
            return (x * (1.0 + READS[read](x))).sigmoid()

    matters(changing(Reads), forget(data_dependent=""), backstops=[no_verified_calls, no_late_drop, no_canary])


# When it cannot be replayed ------------------------------------------------------------------------------------------


class Decides(nn.Module):
    """Reads data, and has no children that could be replayed instead."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.act = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.2), nn.SiLU()
        self.register_buffer("count", torch.zeros(5000))  # a small one would be copied for the second run

    def forward(self, x: Tensor) -> Tensor:
        if BOX["writes"]:
            self.count += 1
        y = self.act(x @ self.weight)
        if BOX["coin"]:
            y = y.tanh() if random.random() < 0.5 else y.sigmoid()
        return x + (y if y.detach().sum() > 0 else y * y)


@pytest.mark.parametrize("what", ["writes", "coin"])
def test_rule_13_what_is_run_again(what: str) -> None:
    """A block that counts its calls or tosses Python's coin would do so twice: it is left plain."""
    off = forget(writes="") if what == "writes" else forget(python_random=False)
    box = {"writes": what == "writes", "coin": what == "coin"}
    matters(changing(Decides, before=box, after=box), off, backstops=[no_canary])


def test_rule_13_fallback_is_checked() -> None:
    """What the second run of a whole block gives is compared too: hidden state shows."""

    class Hides(Decides):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * BOX["scale"])

    box = {"writes": False, "coin": False, "scale": 1.0}
    scenario = changing(Hides, inside=True, before=box, after={"scale": 1.7})
    matters(scenario, no_canary, refusal=True)


class HidesOne(nn.Module):
    """Reads data, and runs again as a whole; hidden state shows in one element of what is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.act = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.2), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight if x.detach().sum() > -1e9 else x
        if BOX["kind"] == "few elements":
            few = torch.tensor([1.0, 0.5, 1.0 + BOX["scale"]])
            return x + y * (y.mean(1, keepdim=True) * few).sum(1, keepdim=True).cos()
        factor = torch.ones(x.shape)
        factor = factor.mT.contiguous().mT if BOX["kind"] == "transposed" else factor
        factor[3, 7] += BOX["scale"]
        return x + (y * factor).sin()


@pytest.mark.parametrize("kind", ["one element", "transposed", "few elements"])
@pytest.mark.parametrize("first", [0, LATE])
def test_rule_13_all_bits_of_the_fallback(kind: str, first: int) -> None:
    """Samples miss one element: an error when the block's turn comes, and from then on it is left plain."""
    torch.manual_seed(0)
    model, plain = Stack(HidesOne), Stack(HidesOne)
    plain.load_state_dict(model.state_dict())
    BOX.update(kind=kind)
    errors, right = [], []
    with memfit.fit(model, policy="full") as handle:
        for i in range(LATE + 6):
            for each in (plain, model):
                each.zero_grad()
                BOX["scale"] = 0.0
                loss = each(data(i))
                BOX["scale"] = 1.0 if i >= first else 0.0
                try:
                    loss.backward()
                except memfit.RecomputeError:
                    errors.append(i)
            ours, theirs = (copies((n, p.grad) for n, p in m.named_parameters()) for m in (model, plain))
            right += [] if differences(ours, theirs) else [i]
        modes = {block.mode for block in handle.runtime.blocks}
    assert len(errors) == 3, "each block once"
    assert errors[0] == first
    assert errors[-1] <= first + 5
    assert right == [i for i in range(LATE + 6) if i < first or i > errors[-1]]
    assert modes == {"plain"}


def test_rule_13_descends() -> None:
    """The part of a block that can be replayed is, beside a part that cannot."""

    class Mixed(Block):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Block()

        def forward(self, x: Tensor) -> Tensor:
            rows = (x.sum(1) > 0).nonzero().squeeze(1)
            return self.inner(x).index_add(0, rows, self.up(x[rows])[:, :WIDTH])

    def modes() -> dict[str, str]:
        with lengths(Stack(Mixed), [6, 6]) as handle:
            return {block.name: block.mode for block in handle.runtime.blocks if ".1" in block.name}

    scenario = changing(Mixed)
    judge(attempt(scenario, FITS["full"]), attempt(scenario, None), refusal=False)
    found = modes()
    assert found["blocks.1"] == "descent"
    assert found["blocks.1.inner"] == "replay"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "replayable_children", lambda module: [])
        assert modes() == {"blocks.1": "fallback"}


def test_rule_14_without_autocast() -> None:
    """A backward under autocast: what the forward computed in single precision, a recipe does too."""

    def backward(loss: Tensor) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss.backward()

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(torch._C, "_DisableAutocast", contextlib.nullcontext)

    matters(lambda fit, seen: train(Stack(), fit, seen, backward=backward), off, failure="error")


class Counting(TorchDispatchMode):
    """A mode of the user: a FLOP counter, a debugger."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is not torch.ops.aten.detach.default  # torch detaches what any unpack hook returns
        return func(*args, **(kwargs or {}))


def test_rule_14_outside_user_modes() -> None:
    """A mode around the backward sees the backward, and no recipe."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        counts: list[int] = []

        def backward(loss: Tensor) -> None:
            with pytest.MonkeyPatch.context() as patch, Counting() as mode:
                if "off" in BOX:  # recordings need it too
                    patch.setattr(torch._C, "_DisableTorchDispatch", contextlib.nullcontext)
                loss.backward()
            counts.append(mode.count)

        train(Stack(), fit, seen, backward=backward)
        seen["counts"] = torch.tensor(counts)

    def off(patch: pytest.MonkeyPatch) -> None:
        BOX["off"] = True

    matters(scenario, off)


def test_rule_14_without_gradients() -> None:
    """A backward that builds a graph: recipes are no part of it."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        model = Stack()
        packed: list[int] = []

        def backward(loss: Tensor) -> None:
            parameters = list(model.parameters())
            count = len(packed)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.numel()) or t, lambda t: t):
                gradients = torch.autograd.grad(loss, parameters, create_graph=True)
            seen[f"packed {len(packed)}"] = torch.tensor(packed[count:])
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.detach()

        train(model, fit, seen, backward=backward)

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)

    matters(scenario, off)


def test_rule_14_flags_of_the_forward() -> None:
    """A forward in another default precision than its backward."""

    class Positions(Hidden):
        def factor(self, x: Tensor) -> Tensor:
            return (torch.arange(WIDTH) / 3).sin().exp().to(x.dtype)

    def forward(model: Any, x: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        try:
            return model(x)
        finally:
            torch.set_default_dtype(torch.float32)

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(frames, "set_numeric_flags", lambda flags: contextlib.nullcontext())

    matters(lambda fit, seen: train(Stack(Positions), fit, seen, forward=forward), off, backstops=[no_canary])


def test_rule_14_iterative() -> None:
    """A recipe of 1,200 chained ops needs no stack of 1,200 frames. A loop: nothing to switch off."""

    class Chain(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            value = x.detach()
            for _ in range(1200):
                value = value.sin()
            return x + x * value

    def scenario(fit: Fit, seen: Tensors) -> None:
        train(Stack(Chain, count=2), fit, seen, steps=2)

    judge(attempt(scenario, FITS["full"]), attempt(scenario, None), refusal=False)


def no_aside(patch: pytest.MonkeyPatch) -> None:
    """Rule 16: whatever surrounds a call, go on."""
    patch.setattr(runtime, "why_aside", lambda *_: "")


def test_rule_16_hooks_of_the_user() -> None:
    """Hooks that change what is saved change the gradient, inside a fitted block as outside."""

    def forward(model: Any, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach() * 0.5, lambda t: t):
            return model(x)

    matters(lambda fit, seen: train(Stack(), fit, seen, forward=forward, must_drop=False), no_aside)


def test_rule_16_hooks_forbidden() -> None:
    """Where hooks on saved tensors are an error."""

    def forward(model: Any, x: Tensor) -> Tensor:
        with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
            return model(x)

    def scenario(fit: Fit, seen: Tensors) -> None:
        train(Stack(), fit, seen, forward=forward, must_drop=False)

    matters(scenario, no_aside, failure="error")


def test_rule_16_functional_transforms() -> None:
    """Gradients by `torch.func`."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        def transform(model: Any, i: int) -> None:
            weights = {name: p.detach() for name, p in model.eval().named_parameters()}
            found = torch.func.grad(lambda w: torch.func.functional_call(model, w, (data(70),)))(weights)
            seen.update({f"{i} func {name}": g for name, g in found.items()})
            model.train()

        train(Stack(), fit, seen, inside=transform)

    matters(scenario, no_aside, failure="error")


def test_rule_16_dispatch_modes() -> None:
    """A mode of the user's counts what the model does, not what a recording does on top of it."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        counts: list[int] = []

        def forward(model: Any, x: Tensor) -> Tensor:
            with Counting() as mode:
                loss = model(x)
            counts.append(mode.count)
            return loss

        train(Stack(), fit, seen, forward=forward, must_drop=False)
        seen["counts"] = torch.tensor(counts)

    matters(scenario, no_aside, failure="error")


class Adjacent(Block):
    """Multiplies by a sparse matrix that it is given, as graph networks do."""

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return super().forward(torch.sparse.mm(adjacency, x))


class Graph(Stack):
    """Passes its blocks a sparse matrix."""

    def forward(self, x: Tensor) -> Tensor:
        adjacency = torch.eye(len(x)).roll(1, 0).to_sparse()
        for block in self.blocks:
            x = block(x, adjacency)
        return self.head(x).tanh().square().mean()


def test_rule_16_sparse_arguments() -> None:
    """A tensor without strides has no signature."""
    matters(lambda fit, seen: train(Graph(Adjacent), fit, seen, must_drop=False), no_aside, failure="error")


class Wrapped(Tensor):
    """A tensor that holds another one, and no memory of its own, as quantised weights do."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(x: Any) -> Any:
            return x.inner if isinstance(x, Wrapped) else x

        out = func(*torch.utils._pytree.tree_map(unwrap, args), **torch.utils._pytree.tree_map(unwrap, kwargs or {}))
        return Wrapped(out) if func is torch.ops.aten.detach.default else out


def survives(run: Callable[[], object]) -> bool:
    """Whether a copy of this process gets through ``run``."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            run()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return not os.WIFSIGNALED(status)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_rule_16_unknown_subclasses() -> None:
    """A class of tensors without memory: there is nothing to hold, and whoever tries reads from nowhere."""

    class Quantised(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * Wrapped(torch.linspace(0.5, 1.5, WIDTH)))

    def scenario(fit: Fit, seen: Tensors) -> None:
        train(Stack(Quantised), fit, seen, must_drop=False)

    judge(attempt(scenario, FITS["full"]), attempt(scenario, None), refusal=False)
    assert survives(lambda: attempt(scenario, FITS["full"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storages.Storages, "plain", (Tensor, nn.Parameter, Wrapped))
        patch.setattr(parking, "PLAIN_TYPES", (Tensor, nn.Parameter, Wrapped))
        assert not survives(lambda: attempt(scenario, FITS["full"]))


def replica(module: nn.Module, scale: float) -> Any:
    """What `nn.DataParallel` runs on another device: a shallow copy with weights of its own, hooks and all."""
    copied = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(copied, name, None if parameter is None else parameter * scale)
    for name, child in module.named_children():
        copied._modules[name] = replica(child, scale)
    return copied


MAIN, SIDE = 7, 8
"""Streams that are not there: on the CPU there is one, and nobody asks."""


class Streamed(nn.Module):
    """Computes what it adds on a stream, and tells the box where what that stream saved is."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH) for _ in range(2))
        self.stream = SIDE
        self.of_all = False  # the whole block is called on it

    def forward(self, x: Tensor) -> Tensor:
        before, BOX["stream"] = BOX["stream"], self.stream
        y = (x @ self.up).sigmoid()  # saved by the sigmoid, and by what reads it on the other stream
        BOX["saved"].append(StorageWeakRef(y.untyped_storage()))
        if not self.of_all:
            BOX["stream"] = before
        return x + (y * y) @ self.down


def no_streams(patch: pytest.MonkeyPatch) -> None:
    """Rule 16: where something computes does not matter."""
    patch.setattr(streams.Stream, "look", lambda self: None)
    patch.setattr(streams.Stream, "is_same", lambda self, other: True)


@pytest.fixture
def two_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is on a device with streams; the one that works go to is in the box."""
    BOX["stream"] = MAIN
    monkeypatch.setattr(streams, "of", lambda tensors, home: streams.Stream(0))
    monkeypatch.setattr(streams, "here", lambda home: streams.Stream(0))
    monkeypatch.setattr(streams, "_current", lambda index: (BOX["stream"], index, 1))


def streamed(model: Any, choose: Callable[[Any, int], object], *, start: Callable[[int], int]) -> Scenario:
    """Train with blocks on streams; what they saved is there until the backward, as it is under plain autograd."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        stack = Stack(model)

        def between(_: Any, i: int) -> None:
            BOX["stream"], BOX["saved"] = start(i), []
            for number, block in enumerate(stack.blocks):
                choose(block, 10 * i + number)

        def inside(_: Any, i: int) -> None:
            seen[f"{i} alive"] = torch.tensor([not saved.expired() for saved in BOX["saved"]])

        train(stack, fit, seen, steps=8, between=between, inside=inside, must_drop=False)

    return scenario


@pytest.mark.usefixtures("two_streams")
@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("step", [0, 6])
def test_rule_16_streams_in_a_block(step: int, fallback: bool) -> None:
    """One stream may be given memory that another still reads, where a block uses both: at once, or one day."""

    class Aside(Streamed):
        def forward(self, x: Tensor) -> Tensor:
            if fallback and x.sum().item() > 1e9:
                return x
            return super().forward(x)

    def choose(block: Any, number: int) -> None:
        block.stream = SIDE if number // 10 >= step else MAIN

    def scenario(fit: Fit, seen: Tensors) -> None:
        streamed(Aside, choose, start=lambda i: MAIN)(fit, seen)
        for i in range(step):  # until then they are dropped, and may be
            seen.pop(f"{i} alive")

    broken = matters(scenario, no_streams)
    assert broken.summary is not None
    assert {row["mode"] for row in broken.summary["blocks"]} == ({"fallback"} if fallback else {"replay"})
    outcome = attempt(scenario, FITS["full"])
    assert outcome.summary is not None
    assert "stepped aside: blocks run on several CUDA streams" in outcome.summary["notes"]


@pytest.mark.usefixtures("two_streams")
@pytest.mark.parametrize("aside", [{1}, {0, 1, 2}])
def test_rule_16_streams_between_blocks(aside: set[int]) -> None:
    """What one block returns, a block on another stream may read when it is gone, or the model outside its blocks."""

    def choose(block: Any, number: int) -> None:
        block.of_all, block.stream = True, SIDE if number % 10 in aside else MAIN

    def scenario(fit: Fit, seen: Tensors) -> None:
        streamed(Switched, choose, start=lambda i: MAIN)(fit, seen)
        if 0 not in aside:
            seen.pop("0 alive")  # of the step in which it shows, what came before is gone

    matters(scenario, no_streams)


class Switched(Streamed):
    """The model, not the block, chooses the stream; here, before Memfit looks."""

    def __call__(self, x: Tensor) -> Tensor:
        BOX["stream"] = self.stream
        return super().__call__(x)


@pytest.mark.usefixtures("two_streams")
def test_rule_16_another_stream_in_every_step() -> None:
    """A step is on one stream, whichever: nothing is in the way."""

    def choose(block: Any, number: int) -> None:
        block.of_all, block.stream = True, MAIN + number // 10

    def scenario(fit: Fit, seen: Tensors) -> None:
        streamed(Switched, choose, start=lambda i: MAIN + i)(fit, seen)
        for i in range(8):
            seen.pop(f"{i} alive")

    for outcome in hold(scenario).values():
        assert outcome.summary is not None
        assert outcome.summary["recomputed_bytes"] > 0
        assert not outcome.summary["notes"]


def test_rule_16_captured_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph captures is replayed without Python: blocks are left alone, and no step begins."""
    block = Block()
    argument = types.SimpleNamespace(layout=torch.strided, is_nested=False, is_cuda=True)
    assert runtime.why_aside(block, block, [argument]) == ""  # type: ignore[list-item]
    model = Stack()
    handle = memfit.fit(model, policy="full")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with monkeypatch.context() as patch:
        for module in (streams, hooks, handles):
            patch.setattr(module, "capturing", lambda: True)
        assert runtime.why_aside(block, block, [argument]) == "a CUDA graph is captured"  # type: ignore[list-item]
        patch.setattr(runtime, "why_aside", lambda *_: "a CUDA graph is captured")
        model(data(0).requires_grad_()).backward()
        optimizer.step()
    assert handle.summary()["steps"] == 0
    assert handle.summary()["blocks"] == []
    assert "stepped aside: a CUDA graph is captured" in handle.summary()["notes"]
    assert handle.runtime.steps == 0
    for i in range(2):
        model(data(i).requires_grad_()).backward()
        optimizer.step()
    assert handle.summary()["recomputed_bytes"] > 0
    handle.remove()


def test_rule_16_replicas() -> None:
    """A replica brings the hooks of the original along, and other weights."""

    def forward(model: Any, x: Tensor) -> Tensor:
        copied = replica(model, 0.9)
        return model(x) + copied(x)

    def scenario(fit: Fit, seen: Tensors) -> None:
        train(Stack(), fit, seen, forward=forward, must_drop=False)

    matters(scenario, no_aside, backstops=[no_canary, no_verified_calls, no_late_drop])


# Life ----------------------------------------------------------------------------------------------------------------


def test_rule_17_copies_are_inert() -> None:
    """A deep copy of a fitted model is a plain model."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        model = Stack()
        train(model, fit, seen, steps=2)
        train(copy.deepcopy(model), lambda model: None, seen)

    def off(patch: pytest.MonkeyPatch) -> None:
        for hook in (RootHook, PreHook, PostHook):
            patch.delattr(hook, "__deepcopy__")
            patch.delattr(hook, "__reduce__")

    matters(scenario, off, failure="error")


def test_rule_17_interrupted() -> None:
    """Ctrl-C runs no hook: what it left on the stack of saved-tensor hooks is taken off at the next entry."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        def strike(module: nn.Module, args: Any) -> None:
            if BOX.pop("strike", False):
                raise KeyboardInterrupt

        def forward(model: Any, x: Tensor) -> Tensor:
            with contextlib.suppress(KeyboardInterrupt):
                return model(x)
            y = model.blocks[0](x)
            hooks = 0
            while torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
                torch._C._autograd._pop_saved_tensors_default_hooks()
                hooks += 1
            seen["hooks left"] = torch.tensor(hooks)
            return model.head(y).square().mean()

        model = Stack()
        model.blocks[1].down.register_forward_pre_hook(strike)
        train(model, fit, seen, forward=forward, between=at(2, lambda model: BOX.update(strike=True)))

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Call, "is_stale", lambda self: False)

    matters(scenario, off)


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """What reference counting does not free stays."""
    Stack()(data(0)).backward()
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def living(model: nn.Module, run: Callable[[], object]) -> int:
    """Bytes of the modules' outputs that are still alive when ``run`` is over."""
    storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        storage = output.untyped_storage()
        storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    watching = [module.register_forward_hook(watch) for module in model.modules()]
    run()
    for hook in watching:
        hook.remove()
    return sum(size for weak, size in storages.values() if not weak.expired())


@pytest.mark.usefixtures("no_garbage_collection")
def test_rule_18_nothing_outlives_the_graph() -> None:
    """When the loss is gone, so is everything that its graph held."""

    def left(*switches: Switch) -> int:
        model = Stack()
        with pytest.MonkeyPatch.context() as patch, memfit.fit(model, policy=FITS["random"]["policy"]):
            for i in range(3):
                model(data(i)).backward()
            for switch in switches:
                switch(patch)
            return living(model, lambda: model(data(3)) and None)

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Call, "settle", lambda self: None)

    assert left() == 0
    assert left(off) > 0


def tensors() -> int:
    """How many there are in the process."""
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize("ending", ["end", "error"])
def test_rule_18_caches_are_cleared(ending: str) -> None:
    """A backward that asks for one gradient of many leaves nothing of what its recipes cached."""

    def cached(*switches: Switch) -> int:
        torch.manual_seed(0)
        model = Stack()
        with pytest.MonkeyPatch.context() as patch, memfit.fit(model, policy="full"):
            for i in range(3):
                model(data(i)).backward()
            for switch in switches:
                switch(patch)
            loss = model(data(3))
            before = tensors()
            if ending == "error":
                hook = model.blocks[0].down.weight.register_hook(lambda gradient: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    torch.autograd.grad(loss, model.blocks[0].down.weight, retain_graph=True)
                hook.remove()
                del hook
                model(data(4))
            else:
                torch.autograd.grad(loss, model.blocks[1].down.weight, retain_graph=True)
            return tensors() - before

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Frame, "end", lambda self: None)

    assert cached() == 0
    assert cached(off) > 0


class Captured(Block):
    """Hands something that autograd saves to somebody else, as hooks that collect attention maps do."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.sin()
        BOX["capture"](h)
        return super().forward(h.sigmoid() + h.cos())


def test_rule_18_held_by_somebody_else() -> None:
    """Dropping a storage that somebody still holds frees nothing: it is kept, at no cost."""

    def kept(hold: bool, *switches: Switch) -> tuple[int, int, int]:
        """Nodes that were seen to be held; bytes that the plan's calls recompute; bytes that it says are saved."""
        held: list[Tensor] = []
        BOX["capture"] = held.append if hold else lambda h: None
        model = Stack(Captured)
        with pytest.MonkeyPatch.context() as patch, memfit.fit(model, policy="full") as handle:
            for switch in switches:
                switch(patch)
            for i in range(3):
                held.clear()
                model(data(i).requires_grad_()).backward()
            found = sum(len(state.held) for state in handle.runtime.states.values())
            summary = handle.summary()
            return found, summary["recomputed_bytes"], summary["saved_bytes"]

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(ProgramState, "saw_held", lambda *_, **__: None)

    value = data(0).nbytes
    count, recomputed, saved = kept(hold=False)
    assert count == 0
    assert kept(hold=True) == (2, recomputed - 3 * value, saved), "of two programs, one node each"
    assert kept(True, off) == (0, recomputed, saved), "recomputed, and nothing was freed"


def test_rule_18_held_by_one_block_only() -> None:
    """Blocks share a program: what one of them does not hold is freed there, and is charged."""
    calls_seen = 0
    held: list[Tensor] = []

    def capture(h: Tensor) -> None:
        nonlocal calls_seen
        calls_seen += 1
        if calls_seen % 3 != 0:
            held.append(h)

    BOX["capture"] = capture
    model = Stack(Captured)
    with memfit.fit(model, policy="full") as handle:
        for i in range(2):
            model(data(i).requires_grad_()).backward()
        assert [len(state.held) for state in handle.runtime.states.values()] == [1, 0]


def test_rule_18_demoted_values_are_charged() -> None:
    """A value that recipes bring back with other bits is kept, and its bytes count."""
    BOX["capture"] = lambda h: None
    model = Stack(Captured)
    with memfit.fit(model, policy="full") as handle:
        model(data(0).requires_grad_()).backward()
        state = next(iter(handle.runtime.states.values()))
    node = next(n.value.node for n in state.program.nodes if n.producer is not None and n.recomputable)
    profile = profile_program(state.program, demoted={node})
    assert profile.nodes[node].must_keep
    assert profile.nodes[node].keep_bytes == profile.nodes[node].storage_bytes


def test_rule_19_kept_tensors_by_handle() -> None:
    """``z`` and ``z.conj()`` share storage, offset, shape and stride: a map keyed by these confuses them."""

    class Complex(Block):
        def forward(self, x: Tensor) -> Tensor:
            z = torch.fft.rfft(x, dim=1)
            z = z * z.conj() * z
            return super().forward(torch.fft.irfft(z, n=WIDTH, dim=1).tanh())

    def off(patch: pytest.MonkeyPatch) -> None:
        unpack = calls.unpack
        known: dict[Any, Tensor] = {}

        def by_value(handle: frames.Handle) -> Tensor:
            tensor = unpack(handle)
            key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
            return known.setdefault(key, tensor)

        patch.setattr(calls, "unpack", by_value)

    matters(changing(Complex), off)


def test_rule_20_remove() -> None:
    """Hooks are all there is, and `remove` takes them off."""

    def hooks(*switches: Switch) -> int:
        model = Stack()
        before = (type(model), model.forward, list(model.state_dict()), dict(vars(model)))
        with pytest.MonkeyPatch.context() as patch:
            for switch in switches:
                switch(patch)
            with memfit.fit(model, policy="full"):
                model(data(0)).backward()
                assert (type(model), model.forward, list(model.state_dict()), dict(vars(model))) == before
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Runtime, "remove", lambda self: None)

    assert hooks() == 0
    assert hooks(off) > 0


def test_rule_20_no_budget_no_hooks() -> None:
    """``budget=None`` measures, and touches no saved tensor."""

    def pushed(*switches: Switch) -> int:
        model = Stack()
        count = 0
        push = calls._push

        def counted(*hooks: Any) -> None:
            nonlocal count
            count += 1
            push(*hooks)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calls, "_push", counted)
            for switch in switches:
                switch(patch)
            with memfit.fit(model, budget=None):
                for i in range(3):
                    model(data(i)).backward()
        return count

    def off(patch: pytest.MonkeyPatch) -> None:
        from memfit import handle
        from memfit.blocks import find_blocks

        patch.setattr(handle, "Runtime", lambda model, blocks: Runtime(model, find_blocks(model)))

    assert pushed() == 0
    assert pushed(off) > 0


def test_rule_20_what_is_kept_is_left_to_autograd() -> None:
    """Blocks that drop nothing have no hooks once they are settled, but the first, and each in every sixteenth step."""
    model = Stack(HiddenFunction)
    BOX["function"] = F.silu
    parked: list[set[int]] = []
    park = runtime.park

    def counted(call: Call) -> Any:
        parked[-1].add(call.index)
        return park(call)

    with pytest.MonkeyPatch.context() as patch, memfit.fit(model, budget=1 << 45) as handle:
        patch.setattr(runtime, "park", counted)
        for i in range(2 * GRAPH_CHECK_PERIOD + 1):
            if i == GRAPH_CHECK_PERIOD + 1:
                BOX["function"] = F.gelu
            parked.append(set())
            model(data(i)).backward()
            modes = {call.mode for call in handle.runtime.calls[1:]}
            assert modes == ({"replay"} if i < 2 * GRAPH_CHECK_PERIOD else {"kept"}), "there the swap is noticed"
        notes = " ".join(handle.runtime.notes.values())
    looked = [i for i in range(GRAPH_CHECKED_CALLS, len(parked)) if parked[i] != {0}]
    assert looked == [GRAPH_CHECK_PERIOD, 2 * GRAPH_CHECK_PERIOD]
    assert all(parked[i] == {0, 1, 2} for i in looked)
    assert "its autograd graph changed" in notes


def test_rule_20_no_cache_while_training() -> None:
    """Keys and values that nobody will read are not collected; the configuration is back afterwards."""

    def cached(*switches: Switch) -> bool:
        case = build("llama")
        case.model.config.use_cache = True
        batch = case.batches(0)
        with pytest.MonkeyPatch.context() as patch, memfit.fit(case.model.train(), policy="full"):
            for switch in switches:
                switch(patch)
            output = case.model(**batch)
            output.loss.backward()
            assert case.model.config.use_cache is True
            return output.past_key_values is not None

    def off(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Modes, "enter", lambda self: None)

    assert not cached()
    assert cached(off)


def plan_json() -> str:
    """A plan of a small model."""
    return memfit.plan(Stack(), data(0), policy="full").to_json()


HOSTILE: dict[str, tuple[Callable[[str], str], Switch]] = {
    "unknown field": (
        lambda text: text.replace('"model":', '"hook":"os.system","model":', 1),
        lambda patch: patch.setattr(plans, "_object", lambda value, where, fields: value),
    ),
    "field given twice": (
        lambda text: text.replace('"model":', '"model":"Other","model":', 1),
        lambda patch: patch.setattr(plans, "_unique_keys", dict),
    ),
    "not a number": (
        lambda text: json.dumps({**json.loads(text), "recompute_seconds": float("nan")}),
        lambda patch: [
            patch.setattr(plans, "_refuse_constant", float),
            patch.setattr(plans, "_seconds", lambda value, where: value),
        ],
    ),
    "too many characters": (
        lambda text: text + " " * 10_000,
        lambda patch: patch.setattr(plans, "MAX_FILE_BYTES", 2**40),
    ),
    "other version": (
        lambda text: text.replace('"schema_version":3', '"schema_version":99', 1),
        lambda patch: patch.setattr(plans, "SCHEMA_VERSION", 99),
    ),
    "huge integer": (
        lambda text: json.dumps({**json.loads(text), "saved_bytes": 2**80}),
        lambda patch: patch.setattr(plans, "_MAX_INTEGER", 2**90),
    ),
    "control characters": (
        lambda text: json.dumps({**json.loads(text), "model": "\x1b[2J"}),
        lambda patch: patch.setattr(plans, "_text", lambda value, where: value),
    ),
}


@pytest.mark.parametrize("attack", list(HOSTILE))
def test_rule_21_plans_are_data(attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan file may come from anyone: what a plan does not say is refused, not read."""
    text = plan_json()
    make, off = HOSTILE[attack]
    monkeypatch.setattr(plans, "MAX_FILE_BYTES", len(text) + 1_000)
    with pytest.raises(memfit.PlanError):
        memfit.Plan.from_json(make(text))
    off(monkeypatch)
    assert isinstance(memfit.Plan.from_json(make(text)), memfit.Plan)


def test_rule_21_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nesting is refused before a parser that recurses sees it."""
    read: list[str] = []
    loads = json.loads
    monkeypatch.setattr(plans.json, "loads", lambda text, **more: read.append(text) or loads(text, **more))
    deep = "[" * 100_000 + "]" * 100_000
    with pytest.raises(memfit.PlanError, match="levels deep"):
        memfit.Plan.from_json(deep)
    assert not read
    monkeypatch.setattr(plans, "MAX_DEPTH", 10**9)
    with pytest.raises(memfit.PlanError):
        memfit.Plan.from_json(deep)
    assert read


def test_rule_21_names_are_looked_up() -> None:
    """A name in a plan is compared with the names of modules, and nothing else is done with it."""
    model = Stack()
    plan = memfit.plan(model, data(0), policy="full")
    hostile = replace(plan, calls=tuple([replace(call, name="__import__('os').abort()") for call in plan.calls]))
    with memfit.apply(model, hostile):
        for i in range(3):
            model(data(i)).backward()


def test_rules_of_geometry_decide_where_torch_has_no_guards(monkeypatch):
    """Without torch's own check of many tensors a changed geometry is found all the same."""
    import memfit
    from memfit import checks, guards

    for module in (checks, signature):
        monkeypatch.setattr(module, "guard_of", lambda tensors: guards._Never())

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(self.linear(x)).exp()

    model = torch.nn.Sequential(*[Block() for _ in range(3)])
    with memfit.fit(model, policy="full", optimizer="sgd") as handle:
        for size in (4, 4, 4, 6, 6):
            model(torch.rand(size, 8)).sum().backward()
        assert not [note for note in handle.summary()["notes"] if "recorded again" in note]
        assert all(row["mode"] == "replay" for row in handle.summary()["blocks"])
