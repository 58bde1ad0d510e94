"""Faults injected on purpose: never a wrong gradient where plain autograd is right, never silence where it raises.

Each scenario runs plain, plain again, and fitted in several ways. ``refusal=True`` marks the few faults that a plan
cannot see in time to be right, such as writes behind autograd's back: there a clear error may take the place of the
gradient.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import enum
import itertools
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import memfit
from faults import (
    FITS,
    ROWS,
    SMALLEST,
    WIDTH,
    Block,
    Fit,
    OverwritesInput,
    Scenario,
    Stack,
    Watched,
    at,
    attempt,
    data,
    hold,
    train,
)
from gradients import Tensors, copies, differences
from memfit.programs import Program
from memfit.signature import read_arguments

# What changes between two steps --------------------------------------------------------------------------------------

SCALE = 1.0
BOX: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def fresh_globals() -> Iterator[None]:
    """Blocks below read globals on purpose."""
    reset_globals()
    yield
    reset_globals()


def reset_globals() -> None:
    global SCALE
    SCALE = 1.0
    BOX.clear()
    BOX.update(scale=1.0, tensor=torch.linspace(0.5, 1.5, WIDTH), function=F.silu, calls=0, config={"scale": 1.0})


def set_global_scale(value: float) -> None:
    global SCALE
    SCALE = value


class GlobalScale(Block):
    """Reads a global of its module."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * SCALE


class ClosureScale(Block):
    """Reads what no module attribute shows."""

    def __init__(self) -> None:
        super().__init__()
        scale = BOX

        def scaled(x: Tensor) -> Tensor:
            return x * scale["scale"]

        self.scaled = scaled

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.scaled(x))


class HiddenTensor(Block):
    """Multiplies by a tensor that is neither input nor parameter nor buffer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * BOX["tensor"]).sigmoid())


class HiddenFunction(Block):
    """Calls a function that may be another one tomorrow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(BOX["function"](x))


class ConfiguredBlock(Block):
    """Reads its scale from a configuration object and from a dict, as adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(scale=1.0)
        self.scaling = {"default": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (self.config.scale * self.scaling["default"])


def each(change: Callable[[Any], object]) -> Callable[[Any], object]:
    """Do something to every block."""

    def all_of_them(model: Any) -> None:
        for block in model.blocks:
            change(block)

    return all_of_them


def middle(change: Callable[[Any], object]) -> Callable[[Any], object]:
    """Do something to the second block only: equal blocks are equal no more."""
    return lambda model: change(model.blocks[1])


def put(**attributes: Any) -> Callable[[Any], object]:
    """Set attributes."""

    def change(target: Any) -> None:
        for name, value in attributes.items():
            setattr(target, name, value)

    return change


def new_linear(block: Any) -> None:
    torch.manual_seed(5)
    block.up = nn.Linear(WIDTH, 2 * WIDTH)


def new_parameter(block: Any) -> None:
    torch.manual_seed(5)
    block.up.weight = nn.Parameter(torch.randn(2 * WIDTH, WIDTH) * 0.1)


def load(assign: bool) -> Callable[[Any], object]:
    def change(model: Any) -> None:
        state = {name: value * 0.9 for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=assign)

    return change


def wider(block: Any) -> None:
    """Another width inside: every shape in the block changes, none at its border."""
    torch.manual_seed(5)
    block.up, block.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)


def halve_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 0.5


def halve_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(a * 0.5 for a in args)


def halve_gradient(module: nn.Module, gradients: Any, _: Any) -> Any:
    return tuple(g * 0.5 for g in gradients)


def patched_forward(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.weight, self.bias).tanh()


def weight_norm(block: Any) -> None:
    nn.utils.parametrizations.weight_norm(block.up)


BETWEEN: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], object]]] = {
    "attribute": (Block, each(put(scale=1.7))),
    "attribute of one block": (Block, middle(put(scale=1.7))),
    "attribute to a tensor": (Block, each(put(scale=torch.tensor(1.7)))),
    "configuration": (ConfiguredBlock, each(lambda b: put(scale=1.7)(b.config))),
    "dict in an attribute": (ConfiguredBlock, each(lambda b: b.scaling.update(default=1.7))),
    "closure": (ClosureScale, lambda m: BOX.update(scale=1.7)),
    "global": (GlobalScale, lambda m: set_global_scale(1.7)),
    "hidden tensor written": (HiddenTensor, lambda m: BOX["tensor"].mul_(1.7)),
    "hidden tensor replaced": (HiddenTensor, lambda m: BOX.update(tensor=torch.linspace(1.5, 0.5, WIDTH))),
    "hidden tensor written behind its back": (HiddenTensor, lambda m: BOX["tensor"].numpy().fill(0.7)),
    "hidden function": (HiddenFunction, lambda m: BOX.update(function=F.gelu)),
    "activation module": (Block, each(put(act=nn.GELU()))),
    "activation module of one block": (Block, middle(put(act=nn.GELU()))),
    "activation with an argument": (Block, each(put(act=nn.GELU(approximate="tanh")))),
    "forward hook": (Block, middle(lambda b: b.up.register_forward_hook(halve_output))),
    "forward hook on the activation": (Block, each(lambda b: b.act.register_forward_hook(halve_output))),
    "forward pre-hook": (Block, middle(lambda b: b.down.register_forward_pre_hook(halve_input))),
    "forward hook on a block": (Block, middle(lambda b: b.register_forward_hook(halve_output))),
    "forward pre-hook on a block": (Block, middle(lambda b: b.register_forward_pre_hook(halve_input))),
    "backward hook": (Block, middle(lambda b: b.up.register_full_backward_hook(halve_gradient))),
    "backward hook on a block": (Block, middle(lambda b: b.register_full_backward_hook(halve_gradient))),
    "patched forward": (Block, middle(lambda b: put(forward=types.MethodType(patched_forward, b.up))(b.up))),
    "patched forward of an activation": (Block, each(lambda b: put(forward=F.relu)(b.act))),
    "patched forward of a block": (Block, middle(lambda b: put(forward=types.MethodType(plain_mlp, b))(b))),
    "dropout rate": (Block, each(lambda b: put(p=0.4)(b.dropout))),
    "dropout off": (Block, each(lambda b: put(p=0.0)(b.dropout))),
    "dropout in evaluation mode": (Block, middle(lambda b: b.dropout.eval())),
    "one block in evaluation mode": (Block, middle(lambda b: b.eval())),
    "epsilon": (Block, each(lambda b: put(eps=0.3)(b.norm))),
    "weight frozen": (Block, middle(lambda b: b.up.weight.requires_grad_(False))),
    "block frozen": (Block, middle(lambda b: b.requires_grad_(False))),
    "all but biases frozen": (Block, each(lambda b: [p.requires_grad_(p.ndim == 1) for p in b.parameters()])),
    "weight replaced": (Block, middle(new_parameter)),
    "weight tied": (Block, lambda m: put(weight=m.blocks[0].up.weight)(m.blocks[2].up)),
    "weight data replaced": (Block, middle(lambda b: put(data=b.up.weight.detach() * 0.5)(b.up.weight))),
    "weight data written": (Block, middle(lambda b: b.up.weight.data.mul_(0.5))),
    "state loaded": (Block, load(assign=False)),
    "state assigned": (Block, load(assign=True)),
    "weight norm": (Block, middle(weight_norm)),
    "layer replaced": (Block, middle(new_linear)),
    "layers wider": (Block, each(wider)),
    "norm removed": (Block, middle(put(norm=nn.Identity()))),
    "bias removed": (Block, middle(lambda b: put(bias=None)(b.up))),
    "blocks reordered": (Block, lambda m: put(blocks=nn.ModuleList([m.blocks[i] for i in (2, 0, 1)]))(m)),
    "block removed": (Block, lambda m: m.blocks.pop(1)),
    "block repeated": (Block, lambda m: m.blocks.append(m.blocks[0])),
    "block replaced": (Block, lambda m: m.blocks.__setitem__(1, replacement())),
    "block added": (Block, lambda m: m.blocks.append(replacement())),
    "double precision": (Block, lambda m: put(between=lambda x: x.double().float())(m)),
}

# The plan is chosen before the forward can show that these have changed: an error is as good as the right gradient.
REFUSABLE = {"closure", "global", "hidden tensor written behind its back", "hidden function"}


def plain_mlp(self: Any, x: Tensor) -> Tensor:
    return x + self.down(self.act(self.up(x)))


def replacement() -> nn.Module:
    torch.manual_seed(5)
    block = Block()
    block.scale = 0.8
    return block


@pytest.mark.parametrize("change", list(BETWEEN))
def test_between_steps(change: str) -> None:
    """Something that the recording read is another thing from the third step on."""
    make, action = BETWEEN[change]

    def scenario(fit: Fit, seen: Tensors) -> None:
        reset_globals()
        train(Stack(make), fit, seen, between=at(2, action))

    hold(scenario, refusal=change in REFUSABLE)


@pytest.mark.parametrize("change", ["attribute", "activation module", "dropout rate", "one block in evaluation mode"])
def test_there_and_back(change: str) -> None:
    """The change is undone after a step: the first program fits again."""
    make, action = BETWEEN[change]

    def back(model: Any) -> None:
        for block in model.blocks:
            block.train()
            block.scale, block.act, block.dropout.p = 1.0, nn.SiLU(), 0.1

    def between(model: Any, i: int) -> None:
        (action if i % 2 else back)(model)

    hold(lambda fit, seen: train(Stack(make), fit, seen, between=between, steps=7))


def test_schedule() -> None:
    """A rate that is another one at every step: nothing settles, and nothing may be wrong."""

    def between(model: Any, i: int) -> None:
        each(put(scale=1.0 + 0.1 * i))(model)
        each(lambda block: put(p=0.05 * i)(block.dropout))(model)

    hold(lambda fit, seen: train(Stack(), fit, seen, between=between, steps=8, must_drop=False))


def test_dtype_between_steps() -> None:
    """The model moves to double precision."""

    def forward(model: Any, x: Tensor) -> Tensor:
        return model(x.to(model.head.weight.dtype))

    def scenario(fit: Fit, seen: Tensors) -> None:
        train(Stack(), fit, seen, between=at(2, lambda m: m.double()), forward=forward)

    hold(scenario)


def test_autocast_between_steps() -> None:
    """The third step runs under autocast, the fourth does not."""
    step = 0

    def forward(model: Any, x: Tensor) -> Tensor:
        nonlocal step
        step += 1
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step == 3):
            return model(x)

    def scenario(fit: Fit, seen: Tensors) -> None:
        nonlocal step
        step = 0
        train(Stack(), fit, seen, forward=forward)

    hold(scenario)


def test_class_patched_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries that patch kernels replace the forward of a class, for all instances at once."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        with monkeypatch.context() as patch:
            train(
                Stack(),
                fit,
                seen,
                between=at(2, lambda m: patch.setattr(nn.SiLU, "forward", lambda self, x: F.gelu(x))),
            )

    hold(scenario)


def test_function_patched_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same one level deeper, where no module shows it."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        with monkeypatch.context() as patch:
            train(Stack(), fit, seen, between=at(2, lambda m: patch.setattr(F, "silu", lambda x, inplace: F.gelu(x))))

    hold(scenario, refusal=True)


def test_global_hook_between_steps() -> None:
    """A hook on all modules of the process."""
    from torch.nn.modules.module import register_module_forward_hook

    def halve_linear(module: nn.Module, args: Any, output: Any) -> Any:
        return output * 0.5 if isinstance(module, nn.Linear) else None

    def scenario(fit: Fit, seen: Tensors) -> None:
        handles: list[Any] = []
        try:
            train(
                Stack(), fit, seen, between=at(2, lambda m: handles.append(register_module_forward_hook(halve_linear)))
            )
        finally:
            for handle in handles:
                handle.remove()

    hold(scenario)


def test_adapter_merged_and_switched() -> None:
    """Adapters scaled, switched off, and switched on again between steps."""

    class Adapted(Block):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, 2 * WIDTH, bias=False)
            self.active, self.scaling = True, {"default": 2.0}

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            if self.active:
                h = h + self.b(self.a(x)) * self.scaling["default"]
            return x + self.down(self.act(h))

    def between(model: Any, i: int) -> None:
        each(put(active=i % 3 != 2))(model)
        each(lambda block: block.scaling.update(default=2.0 + (i > 3)))(model)

    hold(lambda fit, seen: train(Stack(Adapted), fit, seen, between=between, steps=6))


class PairBlock(nn.Module):
    """A block of two inputs, which may be one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.tanh() * self.left(y).sigmoid() + self.right(x * y).relu()


class PairStack(nn.Module):
    """Passes either one tensor twice or two tensors to its blocks."""

    def __init__(self, *, same: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PairBlock() for _ in range(3))
        self.same = same

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, x if self.same else x.cos())
        return x.square().mean()


@pytest.mark.parametrize("first", [True, False])
def test_same_tensor_twice(first: bool) -> None:
    """``block(x, x)`` after ``block(x, y)``, and the other way round: shapes are equal, aliases are not."""

    def flip(model: Any) -> None:
        model.same = not model.same

    hold(lambda fit, seen: train(PairStack(same=first), fit, seen, between=at(2, flip)))


def test_view_of_the_other_input() -> None:
    """``block(x, x.view_as(x))``: two objects, one storage, one version counter."""

    class ViewStack(PairStack):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, x.view_as(x) if self.same else x.flip(0))
            return x.square().mean()

    hold(lambda fit, seen: train(ViewStack(same=False), fit, seen, between=at(2, lambda m: put(same=True)(m))))


def test_parameter_as_input() -> None:
    """A block's input is its own weight, from the third step on."""

    class Weighted(Block):
        def forward(self, x: Tensor, extra: Tensor) -> Tensor:
            return super().forward(x) * extra.mean(0).sigmoid()

    class WeightedStack(Stack):
        own = False

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, block.up.weight if self.own else block.up.weight.detach() * 2)
            return self.head(x).tanh().square().mean()

    hold(lambda fit, seen: train(WeightedStack(Weighted), fit, seen, between=at(2, put(own=True))))


def test_other_layout_of_the_input() -> None:
    """Same shape, other strides: kernels differ in bits."""
    step = 0

    def forward(model: Any, x: Tensor) -> Tensor:
        nonlocal step
        step += 1
        return model(x if step % 2 else x.T.contiguous().T)

    def scenario(fit: Fit, seen: Tensors) -> None:
        nonlocal step
        step = 0
        train(Stack(), fit, seen, forward=forward, steps=6)

    hold(scenario)


class Column(enum.Enum):
    """Which one a block overwrites."""

    FIRST = 0
    SECOND = 1


def test_enum_argument() -> None:
    """An argument that is neither tensor nor number decides, from one call to the next."""

    class Overwritten(Block):
        def forward(self, x: Tensor, column: Column | None = None) -> Tensor:
            x = super().forward(x)
            return x if column is None else x.masked_fill(torch.arange(WIDTH) == column.value, 0.5).sigmoid() * x

    class OverwrittenStack(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, self.column)
            return self.head(x).tanh().square().mean()

    def between(model: Any, i: int) -> None:
        model.column = Column(i == 10)

    hold(lambda fit, seen: train(OverwrittenStack(Overwritten), fit, seen, between=between, steps=12))


@pytest.mark.parametrize(
    ("before", "after"), [(0.0, -0.0), (1, True), (np.float32(0.5), np.float32(0.25))], ids=["sign", "type", "numpy"]
)
def test_number_argument(before: Any, after: Any) -> None:
    """Python takes both numbers for equal, or another library's are no floats; what the block computes differs."""

    def factor(number: Any) -> Tensor:
        if isinstance(number, int):
            return torch.bitwise_not(torch.tensor(number)).float()  # -2 of the integer, 0 of the boolean
        return torch.copysign(torch.ones(()) * (0.5 + abs(float(number))), torch.tensor(float(number)))

    class Scaled(Block):
        def forward(self, x: Tensor, number: Any = 1.0) -> Tensor:
            x = super().forward(x)
            return (x * factor(number)).sigmoid() * x

    class ScaledStack(Stack):
        number: Any = before

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, self.number)
            return self.head(x).tanh().square().mean()

    hold(lambda fit, seen: train(ScaledStack(Scaled), fit, seen, between=at(10, put(number=after)), steps=12))
    keys = [read_arguments((number,), {}, objects=True)[1] for number in (before, after)]
    assert keys[0] != keys[1], "only what stands behind the signature noticed"


@dataclasses.dataclass
class Inner:
    """Inside another one."""

    column: int = 0


@dataclasses.dataclass(slots=True)
class Outer:
    """Holds an object, a list of them, and a tensor."""

    inner: Inner
    others: list[Inner] = dataclasses.field(default_factory=list)
    mask: Tensor | None = None


class Options:
    """No dataclass."""

    def __init__(self, column: int) -> None:
        self.column = column


OBJECTS: dict[str, tuple[Callable[[int], object], Callable[[Any], int | Tensor]]] = {
    "namespace": (lambda n: types.SimpleNamespace(column=n), lambda how: how.column),
    "dataclass": (Inner, lambda how: how.column),
    "dataclass in a dataclass": (lambda n: Outer(Inner(n)), lambda how: how.inner.column),
    "dataclass in a list": (lambda n: Outer(Inner(), [Inner(n)]), lambda how: how.others[0].column),
    "tensor in a dataclass": (lambda n: Outer(Inner(), [], torch.tensor([n] * WIDTH)), lambda how: how.mask),
    "other class": (Options, lambda how: how.column),
    "slice": (lambda n: slice(n, n + 1), lambda how: how.start),
}


class Told(Block):
    """An object among the arguments says which element is overwritten."""

    read: Callable[[Any], int | Tensor]

    def forward(self, x: Tensor, how: object) -> Tensor:
        x = super().forward(x)
        row = (torch.arange(ROWS) == 3)[:, None]
        return x.masked_fill(row & (torch.arange(WIDTH) == self.read(how)), 0.5).sigmoid() * x


class ToldStack(Stack):
    """Passes ``how`` to every block."""

    how: object = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.how)
        return self.head(x).tanh().square().mean()


def told(kind: str, column: Callable[[int], int], steps: int) -> Scenario:
    """Train with an argument whose value in step ``i`` is ``column(i)``."""
    make, read = OBJECTS[kind]

    def scenario(fit: Fit, seen: Tensors) -> None:
        model = ToldStack(Told)
        for block in model.blocks:
            block.read = read

        def between(model: Any, i: int) -> None:
            model.how = make(column(i))

        train(model, fit, seen, between=between, steps=steps, must_drop=False)

    return scenario


@pytest.mark.parametrize("kind", list(OBJECTS))
@pytest.mark.parametrize("run_again", [False, True])
def test_object_argument(kind: str, run_again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an argument holds decides about one element, and changes when nothing is verified any more."""
    if run_again:
        monkeypatch.setattr(Program, "not_replayable", "the test says so")
        monkeypatch.setattr("memfit.blocks.replayable_children", lambda module: [])
    for outcome in hold(told(kind, lambda i: 5 * (i == 8), steps=10)).values():
        assert outcome.summary is not None
        modes = {block["mode"] for block in outcome.summary["blocks"]}
        assert modes == {"fallback" if run_again else "replay"}


def test_object_argument_written_before_the_backward() -> None:
    """The second run of a whole block is told what the first one was."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.inner = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.2), nn.Identity()

        def forward(self, x: Tensor, how: Any) -> Tensor:
            y = x @ self.weight if x.detach().sum() > -1e9 else x
            return x + y.masked_fill(torch.arange(WIDTH) == how.column, 0.5).sigmoid() * y

    def scenario(fit: Fit, seen: Tensors) -> None:
        model = ToldStack(Reads)

        def between(model: Any, i: int) -> None:
            model.how = Options(0)

        def inside(model: Any, i: int) -> None:
            model.how.column = 9

        train(model, fit, seen, between=between, inside=inside, must_drop=False)

    hold(scenario, fits={"full": FITS["full"]})


@pytest.mark.parametrize("matters", [False, True])
def test_object_argument_that_counts(matters: bool) -> None:
    """Another value in every call: recorded a few times where that changes nothing, else not for ever either."""
    recorded: list[int] = []

    def scenario(fit: Fit, seen: Tensors) -> None:
        handles: list[Any] = []

        def keep(model: nn.Module) -> Any:
            handles.append(fit(model))
            return handles[-1]

        make, read = OBJECTS["namespace"]
        model = ToldStack(Told)
        for block in model.blocks:
            block.read = read if matters else lambda how: 3

        def between(model: Any, i: int) -> None:
            model.how = make(i)

        train(model, keep, seen, between=between, steps=44 if matters else 20, must_drop=False)
        if handles[0] is not None:
            recorded.append(handles[0].runtime.recorded)

    (outcome,) = hold(scenario, fits={"full": FITS["full"]}).values()
    assert outcome.summary is not None
    modes = {block["mode"] for block in outcome.summary["blocks"]}
    assert recorded[0] <= (3 * 36 if matters else 3 * 9)
    assert modes == ({"fallback", "replay"} if matters else {"replay"}), "the last one adopts what others recorded"


# What changes between forward and backward ---------------------------------------------------------------------------


class Gated(Block):
    """Reads buffers and a bias whose values plain autograd does not keep: only a recipe needs them again."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.linspace(-1, 1, WIDTH))
        self.register_buffer("factor", torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * x.sigmoid() * self.factor + self.offset).sigmoid())


def no_grad(action: Callable[[Any], object]) -> Callable[[Any], object]:
    return torch.no_grad()(action)


INSIDE: dict[str, Callable[[Any], object]] = {
    # plain autograd raises
    "weight written": no_grad(lambda m: m.blocks[1].up.weight.mul_(1.1)),
    "first weight written": no_grad(lambda m: m.blocks[0].up.weight.mul_(1.1)),
    "norm's weight written": no_grad(lambda m: m.blocks[1].norm.weight.mul_(1.1)),
    "all weights stepped": no_grad(lambda m: [p.sub_(0.01) for p in m.parameters()]),
    "state loaded": load(assign=False),
    "output of a block written": no_grad(lambda m: m.passed[2].mul_(1.1)),
    "input of the first block written": no_grad(lambda m: m.passed[0].mul_(1.1)),
    "factor written": no_grad(lambda m: m.blocks[1].factor.mul_(1.1)),
    # plain autograd is right
    "weight object replaced": lambda m: new_parameter(m.blocks[1]),
    "state assigned": load(assign=True),
    "attribute": each(put(scale=3.0)),
    "activation module": each(put(act=nn.GELU())),
    "evaluation mode": lambda m: m.eval(),
    "dropout rate": each(lambda b: put(p=0.9)(b.dropout)),
    "hook": each(lambda b: b.up.register_forward_hook(halve_output)),
    "patched forward": each(lambda b: put(forward=types.MethodType(patched_forward, b.up))(b.up)),
    "block removed": lambda m: m.blocks.pop(1),
    "seed": lambda m: torch.manual_seed(99),
    "random numbers": lambda m: torch.rand(17),
    "frozen": lambda m: m.blocks[1].requires_grad_(False),
    "buffer replaced": each(lambda b: put(offset=torch.zeros(WIDTH))(b)),
    "evaluation": no_grad(lambda m: m.eval()(data(50)) and m.train()),
    "other forward": lambda m: m(data(51)),
    # plain autograd is right, since it never looks again; a recipe would
    "bias written": no_grad(lambda m: m.blocks[1].up.bias.add_(1.0)),
    "offset written": no_grad(lambda m: m.blocks[1].offset.add_(1.0)),
    # behind the version counters: plain autograd does not see it either, and goes on with what it finds
    "weight data written": lambda m: m.blocks[1].up.weight.data.mul_(1.1),
    "weight data replaced": lambda m: put(data=m.blocks[1].up.weight.detach() * 1.1)(m.blocks[1].up.weight),
    "bias data written": lambda m: m.blocks[1].up.bias.data.add_(1.0),
    "bias data replaced": lambda m: put(data=m.blocks[1].up.bias.detach() + 1.0)(m.blocks[1].up.bias),
    "norm's bias through numpy": lambda m: m.blocks[1].norm.bias.detach().numpy().fill(1.0),
    "offset data written": lambda m: m.blocks[1].offset.data.add_(1.0),
    "factor data written": lambda m: m.blocks[1].factor.data.mul_(1.1),
    "output data written": lambda m: m.passed[2].data.mul_(1.1),
    "input data written": lambda m: m.passed[0].data.mul_(1.1),
}

INSIDE_REFUSABLE = {
    name
    for name in INSIDE
    if "data " in name
    or "numpy" in name
    or name in ("bias written", "offset written", "input of the first block written")
}


@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("change", list(INSIDE))
def test_between_forward_and_backward(change: str, when: int) -> None:
    """Something that a recipe would read is another thing when the backward comes, in step one as in any other."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        train(Watched(Gated), fit, seen, inside=at(when, INSIDE[change]), steps=when + 2)

    hold(scenario, refusal=change in INSIDE_REFUSABLE, fits={**FITS, **SMALLEST} if when == 0 else FITS)


class RunAgain(nn.Module):
    """Reads data and has no children that could be replayed instead; each setting decides about one element."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.2), nn.Parameter(torch.zeros(ROWS, WIDTH))
        self.register_buffer("offset", torch.zeros(ROWS, WIDTH))
        self.column = 3
        self.inner = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight + self.bias + self.offset
        scale = torch.linspace(0.1, 0.9, ROWS * WIDTH).view(ROWS, WIDTH).to(x.dtype)
        scale = scale if x.detach().sum() > -1e9 else y
        scale[3, self.column] = 0.5 if self.training else 0.7
        return x + (y * scale).sin()


def one_more(tensor: Tensor) -> Tensor:
    """A copy that differs in one element."""
    tensor = tensor.detach().clone()
    tensor[3, 7] += 1
    return tensor


RUN_AGAIN: dict[str, Callable[[Any], object]] = {
    "parameter replaced": lambda b: put(bias=nn.Parameter(one_more(b.bias)))(b),
    "buffer replaced": lambda b: put(offset=one_more(b.offset))(b),
    "buffer written": no_grad(lambda b: b.offset[3, 7].add_(1)),
    "buffer data written": lambda b: b.offset.data[3, 7].add_(1),
    "attribute": put(column=9),
    "evaluation mode": lambda b: b.eval(),
    "default dtype": lambda b: torch.set_default_dtype(torch.float64),
}


@pytest.mark.parametrize("change", list(RUN_AGAIN))
def test_a_block_that_runs_again_runs_as_it_was(change: str) -> None:
    """Samples would miss one element: the second run must see what the first one saw."""

    def inside(model: Any) -> None:
        RUN_AGAIN[change](model.blocks[1])

    def scenario(fit: Fit, seen: Tensors) -> None:
        try:
            train(Stack(RunAgain), fit, seen, inside=at(2, inside), steps=3, must_drop=False)
        finally:
            torch.set_default_dtype(torch.float32)

    (outcome,) = hold(scenario, fits={"full": FITS["full"]}).values()
    assert outcome.summary is not None
    assert {block["mode"] for block in outcome.summary["blocks"]} == {"fallback"}


@pytest.mark.parametrize("when", [0, 2])
def test_output_data_replaced(when: int) -> None:
    """``h.data = other`` on what passes between blocks: plain autograd follows it into a wrong gradient.

    The fitted gradient may be wrong in no other way: it is that, an error, or the gradient of the forward that ran.
    """

    def replace(model: Any) -> None:
        model.passed[2].data = model.passed[2].detach() * 1.1

    def gradients_with(fault: bool) -> Callable[[Fit, Tensors], None]:
        def scenario(fit: Fit, seen: Tensors) -> None:
            inside = at(when, replace) if fault else None
            train(Watched(Gated), fit, seen, inside=inside, steps=when + 1)

        return scenario

    followed, right = attempt(gradients_with(True), None).seen, attempt(gradients_with(False), None).seen
    assert differences(followed, right)
    for options in FITS.values():
        fitted = attempt(gradients_with(True), options)
        if fitted.error is not None:
            assert isinstance(fitted.error, memfit.MemfitError)
            continue
        assert not differences(fitted.seen, right) or not differences(fitted.seen, followed)


@pytest.mark.parametrize("change", ["weight written", "output of a block written", "factor written"])
def test_plain_raises(change: str) -> None:
    """The faults above that plain autograd refuses: it would be no test if it did not."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        train(Watched(Gated), fit, seen, inside=at(2, INSIDE[change]))

    error = attempt(scenario, None).error
    assert error is not None
    assert "modified by an inplace operation" in str(error)


def test_functional_call() -> None:
    """Other tensors stand in for the weights while the forward runs, and are gone when the backward comes."""

    def forward(model: Any, x: Tensor) -> Tensor:
        weights = {name: p * 0.9 + 0.01 for name, p in model.named_parameters()}
        return torch.func.functional_call(model, weights, (x,))

    hold(lambda fit, seen: train(Stack(), fit, seen, forward=forward, must_drop=False))


def test_functional_call_between_plain_calls() -> None:
    """One forward with the model's weights and one with other leaves, both open, as in distillation from an average."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        average: dict[str, Tensor] = {}

        def forward(model: Any, x: Tensor) -> Tensor:
            for name, p in model.named_parameters():
                average[name] = (p.detach() * 0.5).requires_grad_()
            return model(x) + torch.func.functional_call(model, average, (x,))

        def backward(loss: Tensor) -> None:
            loss.backward()
            seen.update(copies((f"average {name}", p.grad) for name, p in average.items()))

        train(Stack(), fit, seen, forward=forward, backward=backward, must_drop=False)

    hold(scenario)


def test_weights_swapped_for_evaluation() -> None:
    """An average of the weights is swapped in by ``.data`` for an evaluation, and out again, inside a step."""

    def inside(model: Any, i: int) -> None:
        own = {name: p.data for name, p in model.named_parameters()}
        for p in model.parameters():
            p.data = p.data * 0.9
        with torch.no_grad():
            model(data(60))
        for name, p in model.named_parameters():
            p.data = own[name]

    hold(lambda fit, seen: train(Stack(), fit, seen, inside=inside))


@pytest.mark.parametrize("change", ["threads", "default dtype", "deterministic", "precision", "backends", "matmul"])
@pytest.mark.parametrize("inside", [True, False])
def test_global_switches(change: str, inside: bool) -> None:
    """Switches of the process that decide which kernel runs."""
    switches: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "threads": (lambda: torch.set_num_threads(2), lambda: torch.set_num_threads(1)),
        "default dtype": (
            lambda: torch.set_default_dtype(torch.float64),
            lambda: torch.set_default_dtype(torch.float32),
        ),
        "deterministic": (
            lambda: torch.use_deterministic_algorithms(True),
            lambda: torch.use_deterministic_algorithms(False),
        ),
        "precision": (
            lambda: torch.set_float32_matmul_precision("medium"),
            lambda: torch.set_float32_matmul_precision("highest"),
        ),
        "backends": (
            lambda: setattr(torch.backends, "fp32_precision", "tf32"),
            lambda: setattr(torch.backends, "fp32_precision", "none"),
        ),
        "matmul": (
            lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
            lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "none"),
        ),
    }
    on, off = switches[change]

    def scenario(fit: Fit, seen: Tensors) -> None:
        try:
            moment = {"inside" if inside else "between": at(2, lambda m: on())}
            train(Stack(), fit, seen, **moment)
        finally:
            off()

    hold(scenario, refusal=inside)


# Randomness and Python -----------------------------------------------------------------------------------------------


class PythonRandom(Block):
    """Skips its second half on a coin that torch knows nothing of."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x.tanh() if random.random() < 0.5 else x.sigmoid() * x


class NumpyRandom(Block):
    """Draws a factor from NumPy."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.tanh() * float(np.random.uniform(0.5, 1.5)))


class NumpyMask(Block):
    """Draws a whole mask from NumPy."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.tanh() * torch.from_numpy(np.random.rand(*x.shape)).float())


class Counter(Block):
    """Does something else at every second call; all blocks share the counter."""

    def forward(self, x: Tensor) -> Tensor:
        BOX["calls"] += 1
        x = super().forward(x)
        return x.tanh() if BOX["calls"] % 2 else x.sigmoid() * x


class CountingScale(Block):
    """Multiplies by a number that grows at every call: same ops, other constants."""

    def forward(self, x: Tensor) -> Tensor:
        BOX["calls"] += 1
        return super().forward(x.tanh() * (1.0 + 0.01 * BOX["calls"]))


class OwnGenerator(Block):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.empty_like(x).bernoulli_(0.7, generator=self.generator)
        noise = torch.randn(x.shape, generator=self.generator)
        return super().forward(x.tanh() * mask + noise.sigmoid() * x)


class ReadsData(Block):
    """Decides by the data."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x.tanh() if x.sum() > 0 else x.sigmoid() * x


class ReadsDataSilently(Block):
    """Reads data in ways that no dispatcher sees."""

    def forward(self, x: Tensor) -> Tensor:
        scale = 1.0 + abs(float(x.detach().numpy()[0, 0])) + abs(x.detach().tolist()[0][1])
        return super().forward(x.tanh() * scale)


class StochasticDepth(Block):
    """Leaves itself out, by a coin of torch's that Python reads."""

    def forward(self, x: Tensor) -> Tensor:
        return x if torch.rand(()).item() < 0.4 else super().forward(x)


class DataDependentShape(Block):
    """Routes some rows only."""

    def forward(self, x: Tensor) -> Tensor:
        rows = (x.sum(1) > 0).nonzero().squeeze(1)
        return x.index_add(0, rows, super().forward(x[rows]))


class Noise(Block):
    """Every kind of random op that training uses."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.sigmoid() * torch.rand_like(x) + torch.randn(x.shape).tanh() * x
        x = F.dropout(x, 0.2) + F.alpha_dropout(x, 0.1) * F.feature_dropout(x, 0.1)
        x = F.rrelu(x, training=True) + F.gumbel_softmax(x, tau=0.7) * x
        order = torch.randperm(x.shape[1])
        x = x[:, order] * torch.randint(1, 4, x.shape) * torch.empty_like(x).uniform_(0.5, 1.5).detach()
        return super().forward(x + torch.normal(0.0, 1.0, x.shape) * x.sin())


class ReseedingBlock(Block):
    """Sets the seed itself."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            noise = torch.rand_like(x)
        return super().forward(x.sigmoid() * noise)


STATEFUL = [
    PythonRandom,
    NumpyRandom,
    NumpyMask,
    Counter,
    CountingScale,
    OwnGenerator,
    ReadsData,
    ReadsDataSilently,
    StochasticDepth,
    DataDependentShape,
    Noise,
    ReseedingBlock,
]


@pytest.mark.parametrize("make", STATEFUL)
def test_random_and_stateful_blocks(make: Callable[[], nn.Module]) -> None:
    """Blocks that never do the same twice; also the state that they leave behind is that of the plain run."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        reset_globals()
        model = Stack(make)
        train(model, fit, seen, steps=6, must_drop=False)
        seen["calls"] = torch.tensor(BOX["calls"])
        seen.update(
            {f"generator {i}": b.generator.get_state() for i, b in enumerate(model.blocks) if hasattr(b, "generator")}
        )

    hold(scenario, refusal=make is CountingScale)


# Kernels that nothing sees -------------------------------------------------------------------------------------------


def write_unseen(into: Tensor, value: Tensor) -> None:
    """What a foreign kernel does: no dispatcher, no mode, no version counter sees the write."""
    with _disable_current_modes(), torch.no_grad():
        into.data.copy_(value)


def write_by_pointer(into: Tensor, value: Tensor) -> None:
    """The same as a launcher does it: it asks for the address."""
    value = value.detach().contiguous()
    ctypes.memmove(into.data_ptr(), value.data_ptr(), value.numel() * value.element_size())


def write_by_storage(into: Tensor, value: Tensor) -> None:
    """The same through the storage's address."""
    value = value.detach().contiguous()
    ctypes.memmove(into.untyped_storage().data_ptr(), value.untyped_storage().data_ptr(), value.nbytes)


def write_by_numpy(into: Tensor, value: Tensor) -> None:
    """The same through an array that shares memory."""
    np.copyto(into.numpy(), value.detach().numpy())


def write_by_dlpack(into: Tensor, value: Tensor) -> None:
    """The same through the exchange protocol."""
    np.copyto(np.from_dlpack(into), value.detach().numpy())


LAUNCHER: dict[str, Any] = {"__name__": "triton.backends.nvidia.driver"}
"""A module in the place of Triton's launcher: the recorder knows launches by the module that asks for an address."""
exec("def address(tensor): return tensor.data_ptr()", LAUNCHER)


def write_by_launcher(into: Tensor, value: Tensor) -> None:
    """The same as Triton's launcher does it."""
    value = value.detach().contiguous()
    ctypes.memmove(LAUNCHER["address"](into), value.untyped_storage().data_ptr(), value.nbytes)


WRITERS = {
    "launcher": write_by_launcher,
    "unseen": write_unseen,
    "pointer": write_by_pointer,
    "storage": write_by_storage,
    "numpy": write_by_numpy,
    "dlpack": write_by_dlpack,
}


def kernel_block(writer: str, factory: Callable[[Tensor], Tensor], *, zero_gate: bool) -> Callable[[], nn.Module]:
    """A block whose activation is computed by a kernel that nothing sees."""
    write = WRITERS[writer]

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
            out = factory(x)
            with _disable_current_modes():
                value = x.detach().tanh() * gate.detach()
            write(out, value)
            ctx.save_for_backward(x, out, gate)
            return out

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
            x, out, gate = ctx.saved_tensors
            t = x.tanh()
            return gradient * gate * (1 - t * t) + 0.0 * out, (gradient * t).sum(0)

    class KernelBlock(Block):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(WIDTH) if zero_gate else torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            y = Kernel.apply(x, self.gate)
            return super().forward(x + y * y.cos())

    return KernelBlock


@pytest.mark.parametrize("zero_gate", [False, True])
@pytest.mark.parametrize("factory", ["empty", "zeros"])
@pytest.mark.parametrize("writer", list(WRITERS))
def test_invisible_kernel(writer: str, factory: str, zero_gate: bool) -> None:
    """Into ``empty``, the recording sees uninitialised memory; into ``zeros`` with a zero gate, it sees the truth."""
    make = {"empty": torch.empty_like, "zeros": torch.zeros_like}[factory]

    def scenario(fit: Fit, seen: Tensors) -> None:
        train(Stack(kernel_block(writer, make, zero_gate=zero_gate)), fit, seen, steps=6, must_drop=False)

    hold(scenario)


@pytest.mark.parametrize("writer", ["unseen", "storage", "launcher"])
@pytest.mark.parametrize("zero", [False, True])
def test_invisible_write_between_visible_ops(writer: str, zero: bool) -> None:
    """A visible result that a kernel changes afterwards, by nothing at all at first."""
    BOX["step"] = 0

    class Overwritten(Block):
        def forward(self, x: Tensor) -> Tensor:
            mask = x.detach().sigmoid() + 0.0
            amount = 0.0 if zero and BOX["step"] < 2 else 0.25
            with _disable_current_modes():
                value = mask + amount
            WRITERS[writer](mask, value)
            return super().forward(x * mask)

    def scenario(fit: Fit, seen: Tensors) -> None:
        train(Stack(Overwritten), fit, seen, between=lambda m, i: BOX.update(step=i), must_drop=False)

    hold(scenario, refusal=zero)


@pytest.mark.parametrize("factory", ["empty", "zeros"])
def test_launched_kernels_are_saved_not_replayed(factory: str) -> None:
    """A block with a Triton kernel is replayed around it: the kernel runs in forwards only, as often as without us."""
    make = {"empty": torch.empty_like, "zeros": torch.zeros_like}[factory]
    launches = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal launches
        launches += 1
        return make(x)

    model = Stack(kernel_block("launcher", counted, zero_gate=False))
    num_blocks = len(model.blocks)
    with memfit.fit(model, policy="full") as handle:
        for i in range(4):
            model(data(i)).backward()
        summary = handle.summary()
    assert launches == 4 * num_blocks
    assert [row["mode"] for row in summary["blocks"]] == ["replay"] * num_blocks
    assert summary["recomputed_bytes"] > 0


class Rotated(Block):
    """A kernel turns what a product made, in place and through a view of it, as fused rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.proj(x).view(-1, 2, WIDTH // 2).transpose(0, 1)
        return super().forward(self.turn(q).transpose(0, 1).reshape(-1, WIDTH))

    def turn(self, q: Tensor) -> Tensor:
        return Turned.apply(q).tanh()


class RotatedLast(Rotated):
    """The same, after all that reads it: only a later backward sees it."""

    def turn(self, q: Tensor) -> Tensor:
        y = q * (q * 0.5).exp()
        Turned.apply(q)
        return y


class Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor) -> Tensor:
        flat = q.detach().transpose(0, 1)
        assert flat.is_contiguous()
        with _disable_current_modes():
            value = flat.flip(-1) * 1.25
        write_by_launcher(flat, value)
        return flat.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.flip(-1) * 1.25


@pytest.mark.parametrize("make", [Rotated, RotatedLast])
def test_launched_kernel_writes_a_view(make: Callable[[], nn.Module]) -> None:
    """What a kernel wrote into is compared as a whole, whichever view of it comes back, if any."""
    outcomes = hold(lambda fit, seen: train(Stack(make), fit, seen))
    assert all(outcome.error is None for outcome in outcomes.values())


def test_launched_kernel_writes_the_input() -> None:
    """A kernel that writes what the block was given, unseen by version counters: no recipe reads that."""

    class WritesInput(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = x.sin()
            with _disable_current_modes():
                value = x.detach() * 0.5
            write_by_launcher(x.detach(), value)
            return super().forward(y)

    hold(lambda fit, seen: train(Stack(WritesInput), fit, seen, must_drop=False))


def test_custom_op_without_schema_of_mutation() -> None:
    """A custom op that writes into its argument although its schema says that it does not."""
    library = torch.library.Library("memfit_tests", "FRAGMENT")
    try:
        library.define("liar(Tensor x, Tensor y) -> Tensor")

        def liar(x: Tensor, y: Tensor) -> Tensor:
            y.mul_(0.5)
            return x * y

        library.impl("liar", liar, "CPU")

        class Liar(Block):
            def forward(self, x: Tensor) -> Tensor:
                y = x.detach().sigmoid()
                z = torch.ops.memfit_tests.liar(x.detach(), y)
                return super().forward(x * y + z.sin() * x)

        hold(lambda fit, seen: train(Stack(Liar), fit, seen, must_drop=False))
    finally:
        library._destroy()


# Custom functions that write into what they saved --------------------------------------------------------------------


class OverwritesOwn(torch.autograd.Function):
    """Saves its output and uses that memory for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        kept = x.tanh()
        ctx.save_for_backward(kept)
        return kept.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        return kept.square_().neg_().add_(1).mul_(gradient)


class OverwriteOwnBlock(Block):
    """The saved tensor belongs to the function alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(OverwritesOwn.apply(x.sin()))


class OverwriteInputBlock(Block):
    """What the function overwrites is also the source of a mask that an earlier node keeps."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(x)
        gated = self.up(x)[:, :WIDTH] * h.detach().sigmoid()
        return super().forward(gated + OverwritesInput.apply(h))


class OverwriteBlockInput(Block):
    """What the function overwrites is the block's own input."""

    def forward(self, x: Tensor) -> Tensor:
        before = x.detach().cos() * self.down(self.up(x))
        return super().forward(before + OverwritesInput.apply(x * 1.0))


@pytest.mark.parametrize("make", [OverwriteOwnBlock, OverwriteInputBlock, OverwriteBlockInput])
def test_backward_overwrites_saved_tensors(make: Callable[[], nn.Module]) -> None:
    """A backward may destroy what it saved, as long as nobody else needs it; a recipe must not be that somebody."""
    hold(lambda fit, seen: train(Stack(make), fit, seen))


# Between blocks ------------------------------------------------------------------------------------------------------


def add_one(x: Tensor) -> Tensor:
    x += 1
    return x


def add_one_without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        x += 1
    return x


def add_one_to_data(x: Tensor) -> Tensor:
    x.data += 1
    return x


def add_one_to_view(x: Tensor) -> Tensor:
    x[:, :5].add_(1)
    return x


@pytest.mark.parametrize("change", [add_one, add_one_without_gradient, add_one_to_data, add_one_to_view])
@pytest.mark.parametrize("when", [0, 2])
def test_written_between_blocks(change: Callable[[Tensor], Tensor], when: int) -> None:
    """``h += 1``: the next block is handed the very object that the last one returned, with other values in it."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        train(Stack(), fit, seen, between=at(when, put(between=change)))

    hold(scenario, refusal=change is add_one_to_data)


class KeepsNoInput(Block):
    """Autograd keeps what is made from the input, not the input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x + 1.0).sigmoid() * 2.0)


class KeepsNoInputRunAgain(nn.Module):
    """Likewise, and it reads data, so that it runs again as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.2), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = (x + 1.0).sigmoid()
        return y * 2.0 + (y @ self.weight if y.detach().sum() > -1e9 else y).sin()


class WrittenAfterwards(Stack):
    """Writes the input of every block when the block has run; ``alive`` keeps the tensors within reach."""

    write: Callable[[Tensor], object] | None = None
    alive = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.head.weight.new_ones(()) * x
        self.passed = []
        for block in self.blocks:
            before = x
            x = block(x)
            if self.write is not None:
                with torch.no_grad():
                    self.write(before)
            if self.alive:
                self.passed.append(before)
        return self.head(x).tanh().square().mean()


AFTERWARDS: dict[str, Callable[[Tensor], object]] = {
    "all": lambda x: x.add_(1.0),
    "one element": lambda x: x[3, 7].add_(1.0),
    "data": lambda x: x.data.add_(1.0),
    "one element of data": lambda x: x.data[3, 7].add_(1.0),
}


@pytest.mark.parametrize("write", list(AFTERWARDS))
@pytest.mark.parametrize("make", [KeepsNoInput, KeepsNoInputRunAgain])
@pytest.mark.parametrize("fit", ["full", "linked", "min"])
def test_input_written_after_the_block(make: Callable[[], nn.Module], write: str, fit: str) -> None:
    """Plain autograd does not mind. Seen in step one, whose recipes read copies; then no recipe reads that input."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        model = WrittenAfterwards(make)
        model.write = AFTERWARDS[write]
        train(model, fit, seen, steps=6, must_drop=False)

    (outcome,) = hold(scenario, fits={fit: {**FITS, **SMALLEST}[fit]}).values()
    assert outcome.summary is not None
    if make is KeepsNoInput:
        assert fit != "full" or outcome.summary["recomputed_bytes"] > 0
        assert fit != "full" or len(outcome.summary["notes"]) == 3
        assert {block["mode"] for block in outcome.summary["blocks"]} == {"replay"}


@pytest.mark.parametrize(
    ("make", "write"),
    [
        *itertools.product([KeepsNoInput, KeepsNoInputRunAgain], AFTERWARDS),
        (Block, "data"),  # keeps its input: plain autograd goes on with what it finds
        (Block, "one element of data"),
    ],
)
@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("alive", [True, False])
def test_errors_of_written_inputs_end(make: Callable[[], nn.Module], write: str, first: int, alive: bool) -> None:
    """Where it begins late, or nobody holds what was written behind the version counter, there are errors, but few."""
    torch.manual_seed(0)
    model, plain = WrittenAfterwards(make), WrittenAfterwards(make)
    plain.load_state_dict(model.state_dict())
    model.alive = plain.alive = alive
    failed, wrong = [], []
    with memfit.fit(model, policy="full"):
        for i in range(16):
            found = []
            for each in (plain, model):
                torch.manual_seed(i)
                each.write = AFTERWARDS[write] if i >= first else None
                each.zero_grad()
                try:
                    each(data(i)).backward()
                except memfit.MemfitError:
                    failed.append(i)
                found.append(copies((name, p.grad) for name, p in each.named_parameters()))
            if differences(found[1], found[0]) and i not in failed:
                wrong.append(i)
    assert not wrong or "one element" in write, "samples miss one element where it is nobody's turn"
    assert len(failed) <= 6
    assert not [i for i in (*failed, *wrong) if i >= 14]
    assert first or not failed or ("data" in write and (make is Block or not alive))


def test_moved_between_blocks() -> None:
    """What passes between blocks is a view, a detached alias, another memory layout."""
    changes = [lambda x: x.view_as(x), lambda x: x[:], lambda x: x.T.contiguous().T, lambda x: x.clone()]

    def scenario(fit: Fit, seen: Tensors) -> None:
        train(Stack(), fit, seen, between=lambda m, i: put(between=changes[i % 4])(m), steps=6)

    hold(scenario)


# Several backwards at once -------------------------------------------------------------------------------------------


def in_threads(actions: list[Callable[[], Any]]) -> list[Any]:
    """Start all at once; return what they return; raise what they raise."""
    results: list[Any] = [None] * len(actions)
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(actions))

    def run(i: int) -> None:
        try:
            torch.get_num_threads()  # a new thread takes the process's count when first asked, not at its first matmul
            barrier.wait()
            results[i] = actions[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def gradients_of(loss: Tensor, model: nn.Module, *, retain: bool = False) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=retain))


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_switching")
@pytest.mark.parametrize("shared", [True, False])
def test_three_backwards_at_once(shared: bool) -> None:
    """Three threads go backward through one graph, or each through its own: all get the same gradients."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        model = Stack()
        train(model, fit, seen, steps=2)
        for repeat in range(3):
            losses = [model(data(7))] * 3 if shared else [model(data(7 + i)) for i in range(3)]
            found = in_threads([lambda loss=loss: gradients_of(loss, model, retain=shared) for loss in losses])
            for i, gradients in enumerate(found):
                seen.update({f"thread {repeat} {i} {j}": g for j, g in enumerate(gradients)})

    hold(scenario)


class RandLike(Block):
    """A random op that takes no generator: nothing but the default one will do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sigmoid() * torch.rand_like(x))


@pytest.mark.usefixtures("eager_switching")
@pytest.mark.parametrize("make", [Block, RandLike])
def test_random_numbers_drawn_during_backward(make: Callable[[], nn.Module]) -> None:
    """A data loader's thread draws while recipes with dropout run: plain backward draws nothing, so neither may we."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        model = Stack(make)
        train(model, fit, seen, steps=2)
        loss = model(data(7))

        def draw() -> Tensor:
            return torch.cat([torch.rand(8) for _ in range(1500)])

        def backward() -> list[list[Tensor]]:
            return [gradients_of(loss, model, retain=True) for _ in range(25)]

        drawn, found = in_threads([draw, backward])
        seen["drawn"] = drawn
        for i, gradients in enumerate(found):
            seen.update({f"backward {i} {j}": g for j, g in enumerate(gradients)})

    hold(scenario)


@pytest.mark.usefixtures("eager_switching")
def test_forwards_in_threads() -> None:
    """Three threads train one model on their own data: each stack of calls belongs to its thread."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        model = Stack()
        model.eval()  # dropout draws from one generator: which thread draws first is chance
        fit(model)
        for i in range(3):
            model(data(i)).backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            model.zero_grad()
        found = in_threads([lambda i=i: gradients_of(model(data(20 + i)), model) for i in range(3)])
        for i, gradients in enumerate(found):
            seen.update({f"thread {i} {j}": g for j, g in enumerate(gradients)})

    hold(scenario)


def test_losses_summed_and_interleaved() -> None:
    """Three graphs open at once: backward together, in order, in reverse."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        model = Stack()
        train(model, fit, seen, steps=2)
        for name, order in {"forth": [0, 1, 2], "back": [2, 1, 0], "mixed": [1, 2, 0]}.items():
            losses = [model(data(30 + i)) for i in range(3)]
            for i in order:
                losses[i].backward()
            seen.update(copies((f"{name} {n}", p.grad) for n, p in model.named_parameters()))
            model.zero_grad()
        torch.autograd.backward([model(data(30 + i)) for i in range(3)])
        seen.update(copies((f"together {n}", p.grad) for n, p in model.named_parameters()))

    hold(scenario)


def test_backward_in_another_thread() -> None:
    """Forward here, backward there."""

    def backward(loss: Tensor) -> None:
        in_threads([loss.backward])

    hold(lambda fit, seen: train(Stack(), fit, seen, backward=backward))


def test_backward_inside_backward() -> None:
    """A custom function whose backward runs a forward and a backward of the same model."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        model = Stack()

        class Nested(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                model.between = None
                with torch.enable_grad():
                    x = data(40).requires_grad_()
                    (inner,) = torch.autograd.grad(model(x), x)
                model.between = Nested.apply
                return gradient + inner.mean()

        between: Any = put(between=Nested.apply)
        train(model, fit, seen, between=at(2, between))

    hold(scenario)


# Ctrl-C and other exceptions -----------------------------------------------------------------------------------------


def interrupted_run(error: type[BaseException], where: str, when: int) -> Callable[[Fit, Tensors], None]:
    """Train, be interrupted in one step, go on."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        model = Stack()
        armed = [False]

        def strike(*_: Any) -> None:
            if armed[0]:
                armed[0] = False
                raise error("stop")

        def strike_in_backward(module: Any, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(strike)

        # The hooks are there from the start: what is recorded has them.
        if where == "forward":
            model.blocks[1].down.register_forward_pre_hook(strike)
        elif where == "between blocks":
            model.blocks[1].register_forward_pre_hook(strike)
        else:
            model.blocks[1].down.register_forward_hook(strike_in_backward)
        model.train()
        fit(model)
        for i in range(6):
            armed[0] = i == when
            x = data(i)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
            try:
                loss = model(x)
                loss.backward()
            except error:
                seen[f"{i} interrupted"] = torch.tensor(i)
                optimizer.zero_grad()
                continue
            seen[f"{i} loss"] = loss.detach()
            seen.update(copies((f"{i} gradient {name}", p.grad) for name, p in model.named_parameters()))
            optimizer.step()
            optimizer.zero_grad()

    return scenario


@pytest.mark.parametrize("when", [0, 1, 3])
@pytest.mark.parametrize("where", ["forward", "between blocks", "backward"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted(error: type[BaseException], where: str, when: int) -> None:
    """Ctrl-C, or any exception, in any place of any step: the next step is right."""
    hold(interrupted_run(error, where, when), fits={**FITS, **SMALLEST})


# Where Memfit steps aside --------------------------------------------------------------------------------------------


def test_saved_tensor_hooks_of_the_user() -> None:
    """Hooks around the forward: to NumPy and back, as offloading to disk does."""

    def forward(model: Any, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
            return model(x)

    hold(lambda fit, seen: train(Stack(), fit, seen, forward=forward, must_drop=False))


def test_user_hooks_see_everything() -> None:
    """A user's hooks that change what is saved change the gradient: inside a fitted block as outside."""

    def forward(model: Any, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach() * 0.5, lambda t: t):
            return model(x)

    hold(lambda fit, seen: train(Stack(), fit, seen, forward=forward, must_drop=False))


def test_saved_tensor_hooks_from_the_third_step() -> None:
    """The same, when a plan is active already."""
    step = 0

    def forward(model: Any, x: Tensor) -> Tensor:
        nonlocal step
        step += 1
        if step < 3:
            return model(x)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach() * 0.5, lambda t: t):
            return model(x)

    def scenario(fit: Fit, seen: Tensors) -> None:
        nonlocal step
        step = 0
        train(Stack(), fit, seen, forward=forward)

    hold(scenario)


def test_saved_tensor_hooks_inside_a_block() -> None:
    """A block that saves one part of itself in its own way."""

    class Own(Block):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach() * 0.5, lambda t: t):
                x = x.sigmoid() * x
            return super().forward(x)

    hold(lambda fit, seen: train(Stack(Own), fit, seen, must_drop=False))


def test_saved_tensor_hooks_forbidden() -> None:
    """A region in which hooks on saved tensors are an error: the block is left alone, not broken."""

    def forward(model: Any, x: Tensor) -> Tensor:
        with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
            return model(x)

    hold(lambda fit, seen: train(Stack(), fit, seen, forward=forward, must_drop=False))


def notes_of(model: nn.Module) -> list[str]:
    """What the report says of three steps of a model."""
    with memfit.fit(model, budget="min") as handle:
        for i in range(3):
            model(data(i).requires_grad_()).backward()
        notes: list[str] = handle.summary()["notes"]
        return notes


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_the_user(reentrant: bool) -> None:
    """A model that checkpoints its own blocks: recomputed once, not twice, and right; the report says so."""
    from torch.utils.checkpoint import checkpoint

    runs = 0

    class Counted(Block):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal runs
            runs += 1
            return super().forward(x)

    class Checkpointed(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.head(x).tanh().square().mean()

    hold(lambda fit, seen: train(Checkpointed(), fit, seen, must_drop=False))
    model = Checkpointed(Counted)
    assert any("the model checkpoints its blocks itself" in note for note in notes_of(model))
    assert runs == 3 * 2 * len(model.blocks)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_inside_a_block(reentrant: bool) -> None:
    """A block that checkpoints a part of itself: left alone, and reported."""
    from torch.utils.checkpoint import checkpoint

    class Inner(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + checkpoint(super().forward, x, use_reentrant=reentrant)

    hold(lambda fit, seen: train(Stack(Inner), fit, seen, must_drop=False))
    assert any("checkpoints a part of itself" in note for note in notes_of(Stack(Inner)))
    assert not any("checkpoint" in note for note in notes_of(Stack()))


class Logging(TorchDispatchMode):
    """A mode of the user: a FLOP counter, a debugger."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("first", [0, 2])
def test_dispatch_mode_of_the_user(first: int) -> None:
    """A mode around a step, from the start or later."""
    step = 0

    def forward(model: Any, x: Tensor) -> Tensor:
        nonlocal step
        step += 1
        if step <= first:
            return model(x)
        with Logging() as mode:
            loss = model(x)
        assert mode.count > 20
        return loss

    def scenario(fit: Fit, seen: Tensors) -> None:
        nonlocal step
        step = 0
        train(Stack(), fit, seen, forward=forward, must_drop=False)

    hold(scenario)


def test_functional_transforms() -> None:
    """Gradients by `torch.func`, per sample and forward-mode, beside ordinary steps."""

    def inside(seen: Tensors) -> Callable[[Any, int], None]:
        def transforms(model: Any, i: int) -> None:
            model.eval()
            weights = {name: p.detach() for name, p in model.named_parameters()}

            def loss(weights: Any, x: Tensor) -> Tensor:
                return torch.func.functional_call(model, weights, (x,))

            found = torch.func.grad(loss)(weights, data(70))
            seen.update({f"{i} func {name}": g for name, g in found.items()})
            per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, data(71).unsqueeze(1))
            seen.update({f"{i} vmap {name}": g for name, g in per_sample.items()})
            _, tangent = torch.func.jvp(lambda x: loss(weights, x), (data(72),), (data(73),))
            seen[f"{i} jvp"] = tangent
            model.train()

        return transforms

    hold(lambda fit, seen: train(Stack(), fit, seen, inside=inside(seen)))


def test_traced() -> None:
    """Tracing a fitted model records what a plain one does."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def inside(model: Any, i: int) -> None:
        if i == 2:
            model.eval()
            graph = make_fx(lambda x: model(x))(data(80))
            assert "silu" in graph.code
            model.train()

    hold(lambda fit, seen: train(Stack(), fit, seen, inside=inside))


def test_compiled() -> None:
    """A compiled model takes Memfit for what it is not: left alone."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        torch._dynamo.reset()
        model = Stack()
        handle = fit(model)
        compiled = torch.compile(model, backend="eager")
        for i in range(3):
            loss = compiled(data(i))
            loss.backward()
            seen[f"{i} loss"] = loss.detach()
            seen.update(copies((f"{i} gradient {name}", p.grad) for name, p in model.named_parameters()))
            model.zero_grad()
        del handle

    hold(scenario)


class Tagged(torch.Tensor):
    """A tensor of the user's own class."""


def test_tensor_subclass() -> None:
    """Inputs of a class that Memfit does not know."""

    def forward(model: Any, x: Tensor) -> Tensor:
        return model(x.as_subclass(Tagged)).as_subclass(torch.Tensor)

    hold(lambda fit, seen: train(Stack(), fit, seen, forward=forward, must_drop=False))


def test_backward_under_no_grad_and_inference() -> None:
    """Grad mode at the time of the backward says nothing about the forward."""

    def backward(loss: Tensor) -> None:
        with torch.no_grad():
            loss.backward()

    hold(lambda fit, seen: train(Stack(), fit, seen, backward=backward))


# Unusual blocks ------------------------------------------------------------------------------------------------------


class AuxiliaryLoss(Block):
    """Leaves a part of the loss in an attribute, as routers do."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        self.auxiliary = x.sigmoid().square().mean()
        return x


class AuxiliaryStack(Stack):
    """Adds what its blocks left."""

    def forward(self, x: Tensor) -> Tensor:
        loss = super().forward(x)
        return loss + sum(block.auxiliary for block in self.blocks)


class InPlace(Block):
    """In-place ops of every kind, views among them."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.norm(x))
        h.add_(0.1).mul_(1.5)
        h[:, ::2].mul_(0.5)
        left, right = h.chunk(2, dim=1)
        h = torch.cat([left.sigmoid(), right.tanh()], dim=1).clamp_(-0.9, 0.9)
        h.masked_fill_(h > 0.8, 0.8)
        h.mul_(2).relu_()
        return super().forward(x + self.down(h))


class OverwritesItsOwn(Block):
    """Writes into what autograd saved: plain autograd refuses the backward."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.norm(x)).relu_()
        h.add_(0.1)
        return super().forward(x + self.down(h))


class WritesInput(Block):
    """Writes into its own input."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.add_(self.down(self.act(self.up(x * 1.0))))
        return x.sigmoid() * x


class CopyBeforeFirst(Stack):
    """The blocks write into their inputs, and a leaf must not be written."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 1.0)


class ReturnsInput(Block):
    """Returns its input beside its output, and the output twice."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return {"x": x, "y": y, "again": y, "both": [y, (x,)]}


class StructuredStack(Stack):
    """Unpacks what its blocks return."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            found = block(x)
            x = found["x"] * 0.5 + found["again"].tanh() + found["both"][1][0] * 0.1
        return self.head(x).tanh().square().mean()


class ListArgument(Block):
    """Reads and appends to a list that its caller owns."""

    def forward(self, x: Tensor, earlier: list[Tensor], *, weight: Tensor) -> Tensor:
        x = super().forward(x + sum(h.sigmoid() for h in earlier)) * weight
        earlier.append(x)
        return x


class ListStack(Stack):
    """Dense connections through a list."""

    def forward(self, x: Tensor) -> Tensor:
        earlier: list[Tensor] = []
        weight = torch.linspace(0.5, 1.5, WIDTH)
        for block in self.blocks:
            x = block(x, earlier, weight=weight)
        return self.head(x).tanh().square().mean()


class ComplexNumbers(Block):
    """A Fourier transform: values and their conjugates share storage, offset, shape and stride."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.rfft(x, dim=1)
        z = z * z.conj() + torch.polar(z.abs(), z.angle() * 0.5) * z.imag
        return super().forward(torch.fft.irfft(z, n=WIDTH, dim=1).tanh() + z.real.sum())


class PartlyNoGrad(Block):
    """A part without gradients, and a detached one."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            statistics = x.std(dim=1, keepdim=True) + self.up(x).mean(dim=1, keepdim=True)
        return super().forward(x / statistics.abs().add(1) + x.detach().cos() * x)


class Expanded(Block):
    """Strides of zero, transposes, integers, indices, scalars."""

    def forward(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[0]).unsqueeze(1).expand(-1, WIDTH)
        order = position.float().sin().argsort(dim=1)
        x = x.gather(1, order) * position.float().cos() + x.mean().exp() * x.T.reshape(x.shape).sigmoid()
        x = torch.where(x > 0, x.exp().clamp(max=3), x * 0.1)
        return super().forward(x[torch.tensor([0, 2, 1, 4, 3, 5])].cumsum(1).softmax(1) * x)


class FixedMask(Block):
    """A causal mask filled with minus infinity, and a softmax that turns it into zeros."""

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.T / WIDTH**0.5
        mask = torch.full_like(scores, float("-inf")).triu(1)
        return super().forward((scores + mask).softmax(-1) @ x)


class NormWithStatistics(Block):
    """Batch norm: its statistics move once a step."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.batch_norm(x).relu())


class CountsItself(Block):
    """A buffer that its forward advances: recomputing the block would advance it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.average.lerp_(x.detach().mean(0), 0.1)
        return super().forward((x - self.average).tanh() * (1 + 1 / self.count))


class CachesTensor(Block):
    """Computes a table once and keeps it, as rotary embeddings do; computes it anew when rows change."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or len(self.table) != len(x):
            self.table = torch.arange(len(x)).float().outer(torch.linspace(0, 1, WIDTH)).cos()
        return super().forward(x * self.table)


class SparseAndEmbedding(Block):
    """Gradients that are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, WIDTH, sparse=False)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.detach().sum(1).abs() * 3).long() % 11
        return super().forward(x + self.table(ids).tanh())


UNUSUAL: dict[str, tuple[type[Stack], Callable[[], nn.Module]]] = {
    "auxiliary loss": (AuxiliaryStack, AuxiliaryLoss),
    "in place": (Stack, InPlace),
    "writes its input": (CopyBeforeFirst, WritesInput),
    "structured output": (StructuredStack, ReturnsInput),
    "list argument": (ListStack, ListArgument),
    "complex": (Stack, ComplexNumbers),
    "partly without gradients": (Stack, PartlyNoGrad),
    "expanded": (Stack, Expanded),
    "mask": (Stack, FixedMask),
    "batch norm": (Stack, NormWithStatistics),
    "counts itself": (Stack, CountsItself),
    "caches a table": (Stack, CachesTensor),
    "embedding": (Stack, SparseAndEmbedding),
}


@pytest.mark.parametrize("when", [0, 2])
def test_block_overwrites_what_it_saved(when: int) -> None:
    """In the first step, or in a block that is put in later: an error in plain autograd is an error here."""

    def overwrite(model: Any) -> None:
        model.blocks[1].__class__ = OverwritesItsOwn

    outcomes = hold(lambda fit, seen: train(Stack(), fit, seen, between=at(when, overwrite)))
    assert all("modified by an inplace operation" in str(outcome.error) for outcome in outcomes.values())


@pytest.mark.parametrize("kind", list(UNUSUAL))
def test_unusual_blocks(kind: str) -> None:
    """What blocks do in the wild."""
    stack, block = UNUSUAL[kind]
    hold(lambda fit, seen: train(stack(block), fit, seen, must_drop=False))


def test_copy_trains_beside_the_original() -> None:
    """A deep copy of a fitted model, as target networks are made, takes part in the same step."""

    def scenario(fit: Fit, seen: Tensors) -> None:
        model = Stack()
        train(model, fit, seen, steps=2)
        target = copy.deepcopy(model)
        for i in range(3):
            loss = (model(data(i)) - target(data(i + 1))).square() + model(data(i + 2))
            loss.backward()
            seen.update(copies((f"{i} model {n}", p.grad) for n, p in model.named_parameters()))
            seen.update(copies((f"{i} target {n}", p.grad) for n, p in target.named_parameters()))
            model.zero_grad()
            target.zero_grad()

    hold(scenario)


# The tests themselves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", list(BETWEEN))
def test_changes_matter(change: str) -> None:
    """Every change above changes the gradients of the plain run: one that does not would prove nothing."""
    make, action = BETWEEN[change]

    def scenario(with_it: bool) -> Tensors:
        def run(fit: Fit, seen: Tensors) -> None:
            reset_globals()
            train(Stack(make), fit, seen, steps=3, between=at(2, action) if with_it else None)

        return attempt(run, None).seen

    if change in ("double precision",):
        pytest.skip("changes dtypes on the way, not values")
    assert differences(scenario(True), scenario(False))


def test_hold_notices() -> None:
    """The comparison itself sees a difference, silence, and an undue error."""
    calls = iter(range(100))

    def wrong(fit: Fit, seen: Tensors) -> None:
        seen["value"] = torch.tensor(1.0 if next(calls) < 2 else 1.0000001)

    def silent(fit: Fit, seen: Tensors) -> None:
        if next(calls) < 5:
            raise RuntimeError("plain autograd raises")

    def undue(fit: Fit, seen: Tensors) -> None:
        if next(calls) >= 8:
            raise memfit.MemfitError("refused")

    with pytest.raises(AssertionError, match="elements differ"):
        hold(wrong, fits={"any": {}})
    with pytest.raises(AssertionError, match="silent"):
        hold(silent, fits={"any": {}})
    with pytest.raises(AssertionError, match="plain autograd is right"):
        hold(undue, fits={"any": {}})


def test_rows_are_enough() -> None:
    """`Expanded` indexes rows by number."""
    assert ROWS == 6
