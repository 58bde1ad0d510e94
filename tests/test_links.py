"""A block may drop its input where the block before brings it back: same bits, less held, nothing where it breaks."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memfit
from faults import WIDTH, Block, Fit, Outcome, Stack, at, data, hold, train
from gradients import Tensors, assert_bitwise_equal, copies, seed
from memfit import frames, links
from memfit.errors import MemfitError
from memfit.links import Upstream
from memfit.plans import Plan, Policy
from memfit.profiles import Link, ProgramProfile
from policies import link_everything
from test_lifecycle import watched_stack

LINKED = {"linked": {"policy": link_everything}}


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The block whose recipe ran, for every output that was brought back."""
    found: list[str] = []
    original = Upstream._run

    def run(self: Upstream, env: Any) -> Any:
        found.append(self.frame.block)
        return original(self, env)

    monkeypatch.setattr(Upstream, "_run", run)
    return found


def segments(model: nn.Module, x: Tensor, length: int) -> Plan:
    """Full activation checkpointing in which only every ``length``-th block keeps its input."""
    plan = memfit.plan(model, x, policy="full")
    with memfit.fit(model, policy=link_everything) as handle:
        model(x).backward()
        model.zero_grad()
        states = handle.runtime.states
    policies = []
    for number, call in enumerate(plan.calls):
        (output,) = {value.node for value in states[call.program].program.outputs}
        policy = plan.policy(number)
        if number % length:
            policy = replace(policy, kept=policy.kept[1:], linked=policy.kept[0])
        if number + 1 < len(plan.calls) and (number + 1) % length:
            policy = replace(policy, returned=output)
        policies.append(policy)
    unique = list(dict.fromkeys(policies))
    calls = tuple(replace(call, policy=unique.index(policy)) for call, policy in zip(plan.calls, policies, strict=True))
    return replace(plan, policies=tuple(unique), calls=calls)


def stack(count: int = 6, make: Callable[[], nn.Module] = Block) -> Stack:
    torch.manual_seed(0)
    return Stack(make, count)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    seed()
    model.zero_grad()
    model(x).backward()
    return copies((name, p.grad) for name, p in model.named_parameters())


class Narrow(nn.Module):
    """What is dear to hold is the input."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width // 2), nn.Linear(width // 2, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


# The same bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 6])
def test_segments(length: int, restored: list[str]) -> None:
    """Square-root segments: within one, the input of block i comes back through all blocks before it."""
    model = stack()
    plan = segments(stack(), data(0).requires_grad_(), length)
    assert Plan.from_json(plan.to_json()) == plan
    expected = [gradients(model, data(i).requires_grad_()) for i in range(4)]
    with memfit.apply(model, plan) as handle:
        for i in range(4):
            restored.clear()
            assert_bitwise_equal(gradients(model, data(i).requires_grad_()), expected[i])
            drops = [call.policy.linked is not None for call in handle.runtime.calls]
            assert drops == [bool(number % length) for number in range(6)]
            through = [[f"blocks.{k}" for k in range(n - n % length, n)] for n in range(6)]
            assert restored == [name for row in reversed(through) for name in row]
        held = [row["saved_bytes"] for row in handle.summary()["blocks"]]
    size = data(0).numel() * 4
    (full,) = {row for row in held if row >= size}
    assert held == [full - size if number % length else full for number in range(6)]


def test_three_steps_of_training() -> None:
    hold(lambda fit, seen: train(stack(), fit, seen), fits=LINKED)


class Odd(Block):
    """Works in place on what it makes from its input, and returns a view."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone().mul_(1.5).sub_(0.25)
        y = F.relu(self.up(self.norm(y)), inplace=True)
        return (x + self.dropout(self.down(y))).view(-1).view(x.shape)


class Wide(nn.Module):
    """Returns one part of a larger tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(WIDTH, 3 * WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.norm(x).sigmoid())[:, WIDTH : 2 * WIDTH]


class Pair(nn.Module):
    """Returns two tensors, the larger first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(4, WIDTH)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, side = pair
        y = x + self.up(self.norm(x)).sigmoid() * self.mix(side)
        return y, side + y[:, :4].tanh()


class PairStack(Stack):
    def forward(self, x: Tensor) -> Tensor:
        pair = x, x[:, :4] * 1.0
        for block in self.blocks:
            pair = block(pair)
        return self.head(pair[0]).tanh().square().mean() + pair[1].square().mean()


class Branches(nn.Module):
    """Two closures read the input, one after the other: it comes back once and waits."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((WIDTH,), 1.5))
        self.inner = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (x * 3.0).cos() * 0.5 + (x + self.scale).sin()


@pytest.mark.parametrize("make", [Odd, Wide, Pair, Branches])
def test_other_blocks(make: Callable[[], nn.Module], restored: list[str]) -> None:
    kind = PairStack if make is Pair else Stack
    hold(lambda fit, seen: train(kind(make, 4), fit, seen), fits=LINKED)
    assert len(restored) == 5 * 3 * 2  # five steps, inputs of blocks 1 and 2 and 3 through one, two and three blocks


def test_autocast(restored: list[str]) -> None:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    hold(lambda fit, seen: train(stack(4), fit, seen, forward=forward), fits=LINKED)
    assert restored


def twice(loss: Tensor) -> None:
    loss.backward(retain_graph=True)
    loss.backward()


def penalty(loss: Tensor) -> None:
    """Double backward: the gradient of the squared gradient of the blocks' parameters."""
    leaves = [leaf for leaf in parameters_of(loss) if leaf.requires_grad]
    found = torch.autograd.grad(loss, leaves, create_graph=True)
    sum((g.square().sum() for g in found), start=loss).backward()


def parameters_of(loss: Tensor) -> list[Tensor]:
    leaves, stack_, seen_ = [], [loss.grad_fn], set()
    while stack_:
        node = stack_.pop()
        if node is None or node in seen_:
            continue
        seen_.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        stack_.extend(child for child, _ in node.next_functions)
    return leaves


@pytest.mark.parametrize("backward", [twice, penalty])
def test_graphs_that_are_used_again(backward: Callable[[Tensor], None], restored: list[str]) -> None:
    hold(lambda fit, seen: train(stack(4), fit, seen, backward=backward), fits=LINKED)
    assert restored


def test_two_forwards_before_one_backward(restored: list[str]) -> None:
    """The second forward's first block is not linked to the first forward's last."""

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        return model(x) * model(x * 0.5)

    hold(lambda fit, seen: train(stack(3), fit, seen, forward=forward), fits=LINKED)
    assert restored


def test_saved_tensors_looked_at_in_the_backward() -> None:
    """Somebody else may unpack the same tensor, twice, in the middle of a pass."""

    class Curious(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.up(self.norm(x)).tanh()
            node = y.grad_fn
            z = self.down(y * 2.0).sin()
            z.register_hook(lambda g: (node._saved_result, node._saved_result, None)[2])
            return x + z

    fits = {**LINKED, "full": {"policy": "full"}}
    hold(lambda fit, seen: train(stack(3, Curious), fit, seen), fits=fits)


# No link -----------------------------------------------------------------------------------------------------------


def add_one(x: Tensor) -> Tensor:
    with torch.no_grad():
        x += 1
    return x


BREAKS: dict[str, Callable[[Tensor], Tensor]] = {
    "written": add_one,
    "written with a gradient": lambda x: x.add_(1),
    "written through a view": lambda x: (x[:, :5].add_(1), x)[1],
    "another object": lambda x: x.view_as(x),
    "another tensor": lambda x: x * 1.5,
}


@pytest.mark.parametrize("change", list(BREAKS))
@pytest.mark.parametrize("when", [0, 2])
def test_breaks_between_blocks(change: str, when: int, restored: list[str]) -> None:
    """``h += 1`` keeps the object; nobody may be given what it was before."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        model = stack()
        train(model, fit, seen, between=at(when, lambda m: setattr(m, "between", BREAKS[change])))

    hold(scenario, fits=LINKED)
    assert len(restored) == when * 15


def test_the_version_check_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 15 switched off: the gradient is wrong, or the canary says so."""
    model = stack()
    model.train()
    with memfit.fit(model, policy=link_everything):
        for i in range(3):
            gradients(model, data(i))
        model.between = add_one
        right = gradients(model, data(5))
        monkeypatch.setattr(links, "_same_version", lambda tensor, version: True)
        with monkeypatch.context() as blind:
            blind.setattr(frames.Frame, "_check", lambda *_: None)
            wrong = gradients(model, data(5))
        with pytest.raises(MemfitError, match="not what the forward saved"):
            gradients(model, data(5))
    with pytest.raises(AssertionError, match="differ"):
        assert_bitwise_equal(wrong, right)
    monkeypatch.undo()
    assert_bitwise_equal(gradients(model, data(5)), right)


def clear_one(x: Tensor) -> Tensor:
    x.data[2, 5] = 0.0
    return x


@pytest.mark.parametrize(
    ("steps", "errors"), [(range(12), []), (range(5, 12), [5]), (range(5, 12, 3), [5, 8]), ([4], [4])]
)
def test_written_past_the_version_counter(steps: Sequence[int], errors: list[int]) -> None:
    """Where it is so from the start no link is made; later it is an error once, twice if it comes and goes."""
    model, plain = stack(4), stack(4)
    failed = []
    with memfit.fit(model, policy=link_everything) as handle:
        for i in range(12):
            model.between = plain.between = clear_one if i in steps else None
            expected = gradients(plain, data(i))
            try:
                assert_bitwise_equal(gradients(model, data(i)), expected)
            except MemfitError:
                failed.append(i)
        linked = [call.policy.linked for call in handle.runtime.calls]
        notes = [note for note in handle.summary()["notes"] if "keeps its input" in note]
    assert failed == errors
    assert linked == ([None, 0, 0, 0] if len(steps) == 1 else [None] * 4)
    assert len(notes) == (len(steps) > 1)


class WritesAfter(Stack):
    """Writes the input of the second block when that has run."""

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            before = x
            x = block(x)
            if number == 1 and self.between is not None:
                with torch.no_grad():
                    self.between(before)
        return self.head(x).tanh().square().mean()


def test_input_written_afterwards() -> None:
    """Plain autograd raises: it saved that tensor. So does a block that dropped it and could bring it back."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        torch.manual_seed(0)
        train(WritesAfter(count=4), fit, seen, between=at(2, lambda m: setattr(m, "between", add_one)))

    (outcome,) = hold(scenario, fits=LINKED).values()
    assert isinstance(outcome.error, RuntimeError)


def test_parameter_of_the_block_before_written() -> None:
    """What plain autograd does not keep, the last bias, is read by the recipe: an error, not another gradient."""

    def change(model: Any) -> None:
        with torch.no_grad():
            model.blocks[1].down.bias.add_(1.0)

    def scenario(fit: Fit, seen: Tensors) -> None:
        train(stack(4), fit, seen, inside=at(2, change))

    (outcome,) = hold(scenario, refusal=True, fits=LINKED).values()
    assert "`blocks.1.down.bias` changed between forward and backward" in str(outcome.error)


def test_a_tensor_that_somebody_keeps_is_taken_as_it_is(restored: list[str]) -> None:
    """Nothing is gained by running a recipe for it."""

    class Keeps(Stack):
        def forward(self, x: Tensor) -> Tensor:
            self.passed = []
            for block in self.blocks:
                x = block(x)
                self.passed.append(x)
            return self.head(x).tanh().square().mean()

    hold(lambda fit, seen: train(Keeps(count=4), fit, seen), fits=LINKED)
    assert not restored


def mark_module(model: Any) -> None:
    model.blocks[1]._get_fsdp_state = lambda: None


def mark_parameter(model: Any) -> None:
    model.blocks[1].norm.weight.ds_id = 3


@pytest.mark.parametrize("mark", [mark_module, mark_parameter])
def test_shards_are_not_linked(mark: Callable[[Any], None]) -> None:
    """Rule 8: what a sharded block reads is there in its own backward only."""
    model = stack(4)
    mark(model)
    with memfit.fit(model, policy=link_everything) as handle:
        for i in range(3):
            gradients(model, data(i))
        assert [call.policy.linked for call in handle.runtime.calls] == [None, 0, None, 0]


def test_a_plan_for_other_links() -> None:
    """The plan says that all blocks are linked; this model hands on clones."""
    model, plan = stack(), segments(stack(), data(0), 6)
    model.between = torch.clone
    expected = [gradients(model, data(i)) for i in range(3)]
    with memfit.apply(model, plan) as handle:
        for i in range(3):
            assert_bitwise_equal(gradients(model, data(i)), expected[i])
        assert all(call.policy.linked is None for call in handle.runtime.calls)
        assert all(policy.linked is None for policy in handle.plan.policies)
        assert [row["mode"] for row in handle.summary()["blocks"]] == ["replay"] * 6


def test_policies_that_no_program_has() -> None:
    """Nodes out of range, nodes that are no inputs: everything is kept, and right."""
    for wrong in ({"returned": 999}, {"returned": 1}, {"returned": 0}, {"returned": None}):
        fits = {"wrong": {"policy": lambda p, wrong=wrong: replace(link_everything(p), **wrong)}}
        hold(lambda fit, seen: train(stack(3), fit, seen, must_drop=False), fits=fits)


# What is held ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize("length", [1, 2, 3, 6])
def test_inputs_are_freed(length: int) -> None:
    """Between forward and backward no dropped input is there; afterwards nothing is."""
    plan = segments(stack(), data(0), length)
    model, probe = watched_stack(6)
    size = data(0).numel() * 4
    with memfit.apply(model, plan):
        for i in range(4):
            probe.clear()
            seed()
            loss = model(data(i))
            if i:
                inputs = [s for s, n in zip(probe.storages, probe.lengths, strict=True) if n == size]
                assert len(inputs) >= 6
                between = {s.cdata for s in inputs if not s.expired()}
                assert len(between) == -(-6 // length)  # the head's input for the first block's, which is the batch
            loss.backward()
            del loss
            assert probe.living() == 0
            model.zero_grad()


@pytest.mark.usefixtures("no_garbage_collection")
def test_nothing_is_held_after_dropping_the_loss_or_an_exception() -> None:
    class Stop(Exception):
        pass

    def stop(x: Tensor) -> Tensor:
        raise error

    model, probe = watched_stack(6)
    with memfit.fit(model, policy=link_everything):
        for i in range(3):
            gradients(model, data(i))
        probe.clear()
        loss = model(data(3))
        del loss
        assert probe.living() == 0
        for error in (Stop(), KeyboardInterrupt()):
            model.between = stop  # an output was offered, and nobody takes it
            probe.clear()
            with pytest.raises(type(error)):
                model(data(3))
            error.__traceback__ = None
            assert probe.living() == 0
            model.between = None
            gradients(model, data(3))


@pytest.mark.usefixtures("no_garbage_collection")
def test_a_backward_that_raises_frees_what_came_back(restored: list[str]) -> None:
    class Stop(Exception):
        pass

    def stop(_: Tensor) -> None:
        if armed:
            raise Stop

    armed = False
    model, probe = watched_stack(6)
    with memfit.fit(model, policy=link_everything):
        for i in range(3):
            gradients(model, data(i))
        probe.clear()
        seen: list[weakref.ref[Tensor]] = []
        original = Upstream.restore
        Upstream.restore = lambda self: (seen.append(weakref.ref(t := original(self))), t)[1]
        try:
            model.blocks[3].up.weight.register_hook(stop)
            armed = True
            with pytest.raises(Stop):
                gradients(model, data(3))
            armed = False
            gradients(model, data(3))
        finally:
            Upstream.restore = original
        assert len(seen) > 5
        assert all(ref() is None for ref in seen)
        assert probe.living() == 0


def test_the_tensors_of_a_block_go_one_by_one() -> None:
    """Autograd keeps the pack hook while it keeps any tensor of the block: that must not keep the others."""
    alive: list[int] = []
    kept: list[weakref.ref[Any]] = []

    class Counts(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            y.register_hook(lambda g: alive.append(sum(ref() is not None for ref in kept)))
            return x + self.down(self.act(self.up(y)))

    model = stack(1, Counts)
    with memfit.fit(nn.Sequential(model, stack(1)), policy="plain", blocks=["0.blocks.0"]):
        original = frames.Handle.__init__

        def init(self: Any, tensor: Tensor, index: int) -> None:
            original(self, tensor, index)
            kept.append(weakref.ref(tensor))

        for _ in range(2):
            kept.clear()
            alive.clear()
            frames.Handle.__init__ = init
            try:
                loss = model(data(0).requires_grad_())
            finally:
                frames.Handle.__init__ = original
            loss.backward()
    assert alive[-1] <= 5 < len(kept) - 1  # the norm's are still to come, the others are over


# Many links --------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4) * 0.1 + 1.0)
        self.inner = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).tanh()


class Tower(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Small() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().sum()


def linked_tower(profile: ProgramProfile) -> Policy:
    """What a block returns is saved there, and so kept for nothing, but where the next block drops its input."""
    policy = link_everything(profile)
    return policy if policy.linked is None else replace(policy, kept=())


@pytest.mark.parametrize("count", [300])
def test_a_row_of_blocks(count: int, restored: list[str]) -> None:
    """Each input comes back through all blocks before it; no recursion, so no depth is too deep."""
    model = Tower(count)
    x = torch.linspace(-2, 2, 8).view(2, 4).requires_grad_()
    expected = gradients(model, x)
    with memfit.fit(model, policy=linked_tower) as handle:
        for i in range(3):
            restored.clear()
            assert_bitwise_equal(gradients(model, x), expected)
            assert i == 0 or len(restored) == count * (count - 1) // 2
        assert [call.policy.linked is not None for call in handle.runtime.calls] == [False] + [True] * (count - 1)
    assert gc.collect() >= 0


def test_a_thousand_blocks_for_one_input(restored: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memfit.runtime.VERIFIED_CALLS", 0)
    model = Tower(1100)
    x = torch.linspace(-2, 2, 8).view(2, 4).requires_grad_()
    last = [model.blocks[-1].weight]
    (expected,) = torch.autograd.grad(model(x), last)
    with memfit.fit(model, policy=linked_tower):
        torch.autograd.grad(model(x), last)
        model.zero_grad()
        restored.clear()
        loss = model(x)
        (found,) = torch.autograd.grad(loss, last)
        assert len(restored) == 1099
        del loss  # the row of references from each to the one before goes without recursion, too
    assert torch.equal(found, expected)


# Live --------------------------------------------------------------------------------------------------------------


class Live(nn.Module):
    """Twelve blocks whose inputs are what they hold; ``keep`` returns them too, as hidden states are.

    ``write`` changes them behind the version counter on their way from block to block.
    """

    def __init__(self, *, keep: bool = False, write: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(16, 128)
        self.blocks = nn.ModuleList(Narrow(128) for _ in range(12))
        self.head = nn.Linear(128, 4)
        self.keep, self.write = keep, write

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.embed(x)
        states = []
        for block in self.blocks:
            x = block(x)
            if self.write:
                clear_one(x)
            states += [x] if self.keep else []
        return self.head(x).square().mean(), states


def live_steps(fit: dict[str, Any] | None, steps: int = 3, **options: Any) -> tuple[list[Tensors], Any, Any]:
    model = Live(**options)
    seed()
    handle = memfit.fit(model, **fit) if fit is not None else None
    found = []
    for i in range(steps):
        x = torch.randn(8192, 16, generator=torch.Generator().manual_seed(i))
        output = model(x)
        output[0].backward()
        found.append(copies((name, p.grad) for name, p in model.named_parameters()))
        model.zero_grad()
        del output
    summary = handle.summary() if handle is not None else None
    plan = handle.plan if handle is not None else None
    if handle is not None:
        handle.remove()
    return found, summary, plan


def test_the_smallest_budget_chooses_links() -> None:
    expected, _, _ = live_steps(None)
    found, summary, plan = live_steps({"budget": "min"})
    for ours, theirs in zip(found, expected, strict=True):
        assert_bitwise_equal(ours, theirs)
    drops = [plan.policy(number).linked is not None for number in range(12)]
    assert sum(drops) >= 6
    width = 8192 * 128 * 4
    held = [row["saved_bytes"] for row in summary["blocks"]]
    assert sum(held) == summary["saved_bytes"] == plan.saved_bytes
    assert [size < width for size in held] == drops
    full, full_summary, _ = live_steps({"policy": "full"})
    assert_bitwise_equal(full[-1], expected[-1])
    assert full_summary["saved_bytes"] >= 12 * width
    assert summary["saved_bytes"] <= full_summary["saved_bytes"] - 3 * width


def test_what_somebody_else_keeps_is_not_linked() -> None:
    """Hidden states in the output: dropping them in the blocks frees nothing, so no plan counts on it."""
    expected, _, _ = live_steps(None, keep=True)
    found, _, plan = live_steps({"budget": "min"}, keep=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert_bitwise_equal(ours, theirs)
    assert all(policy.linked is None for policy in plan.policies)


def test_what_is_written_on_the_way_is_not_linked() -> None:
    """Seen in the step that is measured, so the smallest plan does without."""
    expected, _, _ = live_steps(None, write=True)
    found, summary, plan = live_steps({"budget": "min"}, write=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert_bitwise_equal(ours, theirs)
    assert all(policy.linked is None for policy in plan.policies)
    assert [note for note in summary["notes"] if "keeps its input" in note]


def test_a_plan_made_offline_is_linked(restored: list[str]) -> None:
    model, x = Live(), torch.randn(8192, 16)
    plan = memfit.plan(model, x, budget="min", loss=lambda output, _: output[0])
    drops = sum(plan.policy(number).linked is not None for number in range(12))
    assert drops >= 6
    expected, _, _ = live_steps(None, steps=2)
    seed()
    with memfit.apply(model, Plan.from_json(plan.to_json())) as handle:
        for i in range(2):
            restored.clear()
            model(torch.randn(8192, 16, generator=torch.Generator().manual_seed(i)))[0].backward()
            assert_bitwise_equal(copies((name, p.grad) for name, p in model.named_parameters()), expected[i])
            model.zero_grad()
            assert len(restored) >= drops
        assert [call.policy for call in handle.plan.calls] == [call.policy for call in plan.calls]


def test_the_profile_names_the_nodes() -> None:
    model = stack(4)
    with memfit.fit(model, budget="min") as handle:
        for i in range(3):
            gradients(model, data(i))
        ((_, fitted),) = handle._planned
        program = handle.runtime.states[fitted.profile.calls[0].program].program
        link = Link(input=0, output=program.outputs[0].node)
        assert [call.link for call in fitted.profile.calls] == [None, link, link, link]


def test_outcomes_are_compared() -> None:
    """`hold` with these fits does run linked blocks."""
    outcome = Outcome()
    model = stack(3)
    handle = memfit.fit(model, policy=link_everything)
    train(model, lambda _: handle, outcome.seen)
    assert [call.policy.linked for call in handle.runtime.calls] == [None, 0, 0]
    handle.remove()
