"""What a user may get wrong: a clear error that names the value and the way out, and a model as it was.

`test_lifecycle.py` has the first round of these, `test_plans.py` plan files, `test_cli.py` the command line's usage.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memfit
from conftest import SCRIPT, Shell
from faults import WIDTH, Block, Stack, data
from gradients import assert_bitwise_equal, copies, seed
from memfit import plans
from memfit.blocks import find_blocks
from memfit.cli import main
from memfit.plans import Policy
from memfit.units import format_bytes
from test_lifecycle import portrait, process_portrait
from zoo import call, gpt2_model, language


def gradients(model: nn.Module, i: int, *, rows: int = 6) -> dict[str, Tensor | None]:
    """Gradients of one step, with a fixed seed; the model is left without any."""
    seed()
    model.zero_grad()
    model(data(i, rows=rows)).backward()
    found = copies((name, p.grad) for name, p in model.named_parameters())
    model.zero_grad()
    return found


def trains_right(model: nn.Module, **options: Any) -> memfit.Handle:
    """A correct `fit` works: three steps are bitwise those of the plain model. Returns the handle, removed."""
    expected = [gradients(model, i) for i in range(3)]
    with memfit.fit(model, **({"budget": "min"} | options)) as handle:
        for i in range(3):
            assert_bitwise_equal(gradients(model, i), expected[i])
    return handle


# Arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"budget": float("inf")}, memfit.BudgetError, ["`inf`", "6GiB"]),
        ({"budget": "-3%"}, memfit.BudgetError, ["`-3%`", "90%"]),
        ({"budget": "0%"}, memfit.BudgetError, ["`0%`", "above `0%`"]),
        ({"budget": 10**30}, memfit.BudgetError, ["more than any machine has"]),
        ({"budget": b"6GiB"}, memfit.BudgetError, ["b'6GiB'"]),
        ({"budget": "1GiB", "policy": "full"}, memfit.MemfitError, ["`budget=1GiB`", "`policy=full`", "Give one of"]),
        ({"budget": "1GiB", "every_n_layers": 2}, memfit.MemfitError, ["`budget=1GiB`", "`every_n_layers=2`"]),
        ({"policy": 3}, memfit.MemfitError, ["`3`", "`full` or `selective`"]),
        ({"every_n_layers": "2"}, memfit.MemfitError, ["`every_n_layers=2`", "positive integer"]),
        ({"every_n_layers": float("nan")}, memfit.MemfitError, ["`every_n_layers=nan`"]),
        ({"optimizer": 3}, memfit.MemfitError, ["`optimizer=3`", "adamw"]),
        ({"optimizer": torch.optim.SGD}, memfit.MemfitError, ["`optimizer=SGD`", "the optimizer itself"]),
        ({"plan": "plan.json"}, memfit.MemfitError, ["`plan=plan.json`", "`memfit.Plan.load(path)`"]),
        ({"plan": {"model": "Stack"}}, memfit.MemfitError, ["{'model': 'Stack'}", "`memfit.Plan.load(path)`"]),
        ({"blocks": "Block"}, memfit.MemfitError, ['write `blocks=["Block"]`']),
        ({"blocks": []}, memfit.MemfitError, ["`blocks` is empty", "leave it out"]),
        ({"blocks": 3}, memfit.MemfitError, ["`blocks=3`", "named_modules"]),
        ({"blocks": [3]}, memfit.MemfitError, ["`3`", "named_modules"]),
        ({"blocks": ["blocks.0", "blocks.9"]}, memfit.ModelError, ["`blocks.9`", "Stack", "named_modules"]),
        ({"blocks": [""]}, memfit.ModelError, ["Stack itself", "named_modules"]),
        ({"blocks": [nn.Linear(3, 3)]}, memfit.ModelError, ["a Linear that is no part of Stack"]),
    ],
    ids=str,
)
def test_arguments_are_refused_by_name(options: dict[str, Any], error: type[Exception], parts: list[str]) -> None:
    """Each names the value and the way out, in one line; the model stays plain and can be fitted."""
    model = Stack()
    before, process = portrait(model), process_portrait()
    with pytest.raises(error) as caught:
        memfit.fit(model, **options)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert portrait(model) == before
    assert process_portrait() == process
    trains_right(model)


def test_apply_needs_a_plan() -> None:
    with pytest.raises(memfit.MemfitError, match=r"not None.*`memfit.Plan.load\(path\)`"):
        memfit.apply(Stack(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [3, "mse", lambda output: output], ids=["number", "name", "one argument"])
def test_a_loss_that_cannot_be_called_is_refused(loss: Any) -> None:
    model = Stack()
    before = portrait(model)
    with pytest.raises(memfit.MemfitError, match=r"`loss=.*`loss\(output, batch\)`"):
        memfit.plan(model, data(0), loss=loss)
    assert portrait(model) == before


@pytest.mark.parametrize("batch", [{"y": data(0)}, (data(0), 3), data(0, width=3)], ids=["name", "number", "shape"])
def test_a_batch_that_the_model_refuses_raises_its_own_error(batch: Any) -> None:
    """The error is the model's, and the model is what it was."""
    torch.manual_seed(0)
    model = Stack().eval()
    gradients(model, 0)
    before, process, state = portrait(model), process_portrait(), torch.get_rng_state()
    with pytest.raises((TypeError, RuntimeError)):
        memfit.plan(model, batch, budget="min")
    assert portrait(model) == before
    assert process_portrait() == process
    assert torch.equal(torch.get_rng_state(), state)
    trains_right(model.train())


# Models --------------------------------------------------------------------------------------------------------------


def refused(model: nn.Module, *parts: str) -> None:
    """`fit` raises a `ModelError` that says all this, and leaves no hook."""
    hooks = {n: m["hooks"] for n, m in portrait(model).items() if n != "state"}
    with pytest.raises(memfit.ModelError) as caught:
        memfit.fit(model, budget="min")
    for part in parts:
        assert part in str(caught.value)
    assert {n: m["hooks"] for n, m in portrait(model).items() if n != "state"} == hooks


def test_weights_on_the_meta_device_are_named() -> None:
    with torch.device("meta"):
        refused(Stack(), "all its parameters on the meta device", "Load the weights")
    half = Stack()
    half.head.to("meta")
    refused(half, "2 of its 20 parameters on the meta device", "`head.weight`")


def test_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of a model with parameters elsewhere says so; no second device is here, so one is claimed."""
    model = Stack()
    pretended = {id(model.head.weight): torch.device("cuda", 1)}
    real = Tensor.device.__get__  # type: ignore[attr-defined]
    monkeypatch.setattr(nn.Parameter, "device", property(lambda p: pretended.get(id(p)) or real(p)), raising=False)
    with memfit.fit(model, budget="min") as handle:
        assert handle.summary()["notes"] == ["no block is on `cuda:1` (`head.weight`): nothing is planned there"]


def test_torchscript_is_refused() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(Chain())
    with pytest.raises(memfit.ModelError, match=r"TorchScript.*Fit the module that it was made from"):
        memfit.fit(scripted, budget="min")


def test_a_class_is_no_model() -> None:
    with pytest.raises(memfit.ModelError, match=r"torch\.nn\.Module, not the class Stack: make an instance"):
        memfit.fit(Stack, budget="min")  # type: ignore[arg-type]


def test_budget_under_weights_and_optimizer_state() -> None:
    """An optimizer that was named has a state that nothing can avoid."""
    model = Stack()
    weights = sum(p.nbytes for p in model.parameters())
    for optimizer, needed in [
        (None, weights),
        ("sgd", weights),
        ("adamw", 3 * weights),
        (torch.optim.AdamW(model.parameters()), 3 * weights),
        (torch.optim.AdamW(model.head.parameters()), weights + 2 * (7 * WIDTH + 7) * 4),
        (torch.optim.SGD(model.parameters(), lr=0.1), weights),
        (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 2 * weights),
    ]:
        before = portrait(model)
        with pytest.raises(memfit.InfeasibleBudgetError, match=r"Weights take .* raise `budget`") as caught:
            memfit.fit(model, budget=needed - 1, optimizer=optimizer)
        assert caught.value.minimum == needed
        assert caught.value.event == ("weights" if needed == weights else "weights and optimizer state")
        assert portrait(model) == before
        memfit.fit(model, budget=needed, optimizer=optimizer).remove()


# Blocks --------------------------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """A block without children: matrices of its own and two einsums."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH) / 6)
        self.down = nn.Parameter(torch.randn(2 * WIDTH, WIDTH) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.einsum("bh,hw->bw", torch.einsum("bw,wh->bh", x, self.up).sigmoid(), self.down)


class Scale(nn.Module):
    """A norm of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


class OwnLinear(nn.Linear):
    """Torch's layer under another name."""


def test_blocks_without_children_are_found() -> None:
    torch.manual_seed(0)
    model = Stack(Mixer, count=4)
    assert [name for name, _ in find_blocks(model)] == [f"blocks.{i}" for i in range(4)]
    handle = trains_right(model, budget=None, policy="full")
    assert handle.summary()["recomputed_bytes"] > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(WIDTH, WIDTH),
        lambda: nn.LayerNorm(WIDTH),
        nn.PReLU,
        lambda: nn.Embedding(3, WIDTH),
        lambda: OwnLinear(WIDTH, WIDTH),
        Scale,
    ],
    ids=["linear", "norm", "activation", "embedding", "own linear", "own norm"],
)
def test_single_layers_are_no_blocks(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(memfit.ModelError, match="no repeated modules"):
        find_blocks(Stack(make))
    beside = Stack()
    beside.extra = nn.ModuleList(make() for _ in range(3))
    assert [name for name, _ in find_blocks(beside)] == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_children_free_layer_inside_a_block_stays_inside() -> None:
    class Outer(Block):
        def __init__(self) -> None:
            super().__init__()
            self.mixers = nn.ModuleList(Mixer() for _ in range(2))

    assert [name for name, _ in find_blocks(Stack(Outer))] == ["blocks.0", "blocks.1", "blocks.2"]


@pytest.mark.parametrize(
    "choose",
    [
        lambda m: ["blocks.0", "blocks.1", "blocks.2"],
        lambda m: ("Block",),
        lambda m: m.blocks,
        lambda m: list(m.blocks),
        lambda m: (block for block in m.blocks),
        lambda m: ["blocks.0", m.blocks[1], "Block"],
        lambda m: ["blocks.0", "blocks.1", "blocks.2", "blocks.1.up"],
    ],
    ids=["names", "class", "module list", "modules", "generator", "mixed", "with parts"],
)
def test_blocks_are_chosen_by_name_class_and_module(choose: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    model = Stack()
    handle = trains_right(model, blocks=choose(model))
    assert [block["name"] for block in handle.summary()["blocks"]] == ["blocks.0", "blocks.1", "blocks.2"]


def test_one_module_is_chosen() -> None:
    torch.manual_seed(0)
    model = Stack()
    handle = trains_right(model, blocks=model.blocks[1])
    assert [block["name"] for block in handle.summary()["blocks"]] == ["blocks.1"]


# Compiled models -----------------------------------------------------------------------------------------------------


def compiled_model(how: str) -> nn.Module:
    """A stack that is compiled, or a part of it, in one of the ways that there are."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Stack()
    if how == "wrapped":
        return torch.compile(model, backend="eager")
    if how == "in place":
        model.compile(backend="eager")
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif how == "blocks":
        for block in model.blocks:
            block.compile(backend="eager")
    elif how == "wrapped blocks":
        model.blocks = nn.ModuleList(torch.compile(block, backend="eager") for block in model.blocks)
    elif how == "one block":
        model.blocks[1].compile(backend="eager")
    elif how == "a part":
        model.blocks[1].down.compile(backend="eager")
    return model


# Dynamo looks at tensors in ways that torch warns of.
compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@compiles
@pytest.mark.parametrize(
    ("how", "num_plain"),
    [
        ("wrapped", 3),
        ("in place", 3),
        ("forward", 3),
        ("blocks", 3),
        ("wrapped blocks", 3),
        ("one block", 1),
        ("a part", 1),
    ],
)
def test_what_is_compiled_is_left_alone_and_said(how: str, num_plain: int) -> None:
    """Blocks that are compiled are plain, with the reason; the others are planned; gradients stay right."""
    plain, model = compiled_model(how), compiled_model(how)
    with memfit.fit(model, budget="min") as handle:
        for i in range(3):
            assert_bitwise_equal(gradients(model, i), gradients(plain, i))
    rows = handle.summary()["blocks"]
    assert len(rows) == 3
    assert [row["mode"] for row in rows].count("plain") == num_plain
    assert all("compiled by torch.compile" in row["reason"] for row in rows if row["mode"] == "plain")
    assert all(row["saved_bytes"] is None for row in rows if row["mode"] == "plain")
    which = "every block" if num_plain == 3 else "1 of 3 blocks"
    assert f"stepped aside: {which} is compiled" in handle.report()
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    torch._dynamo.reset()


@compiles
@pytest.mark.parametrize("how", ["wrapped", "in place", "blocks"])
def test_what_is_compiled_after_fit_is_said(how: str) -> None:
    """Compiling takes the hooks' place: nothing is planned any more, and the report does not keep silent."""
    torch._dynamo.reset()
    model = Stack()
    with memfit.fit(model, budget="min") as handle:
        called: Any = model
        if how == "wrapped":
            called = torch.compile(model, backend="eager")
        else:
            for module in [model] if how == "in place" else model.blocks:
                module.compile(backend="eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for i in range(3):
            called(data(i)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert "compiled after `fit`" in handle.report()
    torch._dynamo.reset()


# Plans ---------------------------------------------------------------------------------------------------------------


def hooks_of(model: nn.Module) -> Any:
    return {name: part["hooks"] for name, part in portrait(model).items() if name != "state"}


def stack_plan(**options: Any) -> tuple[Stack, memfit.Plan]:
    torch.manual_seed(0)
    model = Stack()
    return model, memfit.plan(model, data(0), **({"policy": "full"} | options))


def test_a_saved_plan_is_applied(tmp_path: Path) -> None:
    model, plan = stack_plan()
    plan.save(tmp_path / "plan.json")
    loaded = memfit.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    expected = [gradients(model, i) for i in range(3)]
    with memfit.apply(model, loaded) as handle:
        for i in range(3):
            assert_bitwise_equal(gradients(model, i), expected[i])
    assert handle.summary()["recomputed_bytes"] == plan.recomputed_bytes > 0
    assert handle.summary()["notes"] == []


@pytest.mark.parametrize("rows", [[12, 12, 12], [6, 12, 6, 12], [12, 6, 6]])
def test_a_plan_for_another_batch_shape_is_safe_and_said(rows: list[int]) -> None:
    """What the plan does not know runs the smallest policy; what it knows runs the plan."""
    model, plan = stack_plan()
    expected = [gradients(model, i, rows=n) for i, n in enumerate(rows)]
    with memfit.apply(model, plan) as handle:
        for i, n in enumerate(rows):
            assert_bitwise_equal(gradients(model, i, rows=n), expected[i])
    (note,) = handle.summary()["notes"]
    assert "the plan does not know what `blocks.0` ran" in note
    assert "another batch shape" in note
    assert "`memfit.plan`" in note


@pytest.mark.parametrize(
    "change",
    [
        lambda policy: replace(policy, kept=(5000,)),
        lambda policy: replace(policy, kept=tuple(range(8))),
        lambda policy: replace(policy, kept=()),
        lambda policy: replace(policy, narrowed=(0,), kept=()),
    ],
    ids=["nodes that are not there", "nodes that cannot be kept", "nothing", "narrowed"],
)
def test_a_plan_that_no_block_can_run_is_safe_and_said(change: Callable[[Policy], Policy]) -> None:
    """A file may say anything about this very model."""
    model, plan = stack_plan()
    plan = replace(plan, policies=tuple(change(policy) for policy in plan.policies))
    expected = [gradients(model, i) for i in range(3)]
    with memfit.apply(model, memfit.Plan.from_json(plan.to_json())) as handle:
        for i in range(3):
            assert_bitwise_equal(gradients(model, i), expected[i])
    assert "the plan does not know" in handle.report()


def test_a_plan_from_another_kind_of_device_is_said() -> None:
    model, plan = stack_plan()
    with memfit.apply(model, replace(plan, device="cuda:0")) as handle:
        gradients(model, 0)
    assert "the plan was made on `cuda:0`, the model is on `cpu`" in handle.report()


@pytest.mark.parametrize(
    "change",
    [lambda m: m.double(), lambda m: m.bfloat16(), lambda m: m.blocks.requires_grad_(False) and m],
    ids=["float64", "bfloat16", "frozen"],
)
def test_a_plan_for_another_dtype_is_refused(change: Callable[[nn.Module], nn.Module]) -> None:
    """Names, shapes, dtypes and what trains are part of what a plan is for."""
    model, plan = stack_plan()
    change(model)
    before = portrait(model)
    with pytest.raises(memfit.PlanError, match=r"The plan is for Stack .* the model is Stack .*`memfit.plan`"):
        memfit.apply(model, plan)
    assert portrait(model) == before


@pytest.mark.parametrize("policy", [lambda profile: None, lambda profile: Policy(program=profile.key, kept=(5000,))])
def test_a_policy_function_that_returns_no_policy(policy: Any) -> None:
    """Named in the first step; the model is unfitted then, and trains."""
    torch.manual_seed(0)
    model = Stack()
    before = hooks_of(model)
    memfit.fit(model, policy=policy)
    with pytest.raises(memfit.MemfitError, match=r"`policy` returned .* for `blocks.0`.*memfit.plans.Policy"):
        model(data(0))
    assert hooks_of(model) == before
    trains_right(model)


def test_an_infeasible_budget_names_what_is_held() -> None:
    """Where nothing that a plan decides is over the budget, the parts are named."""
    torch.manual_seed(0)
    model = Stack()
    before, process = hooks_of(model), process_portrait()
    memfit.fit(model, budget="20 MiB")
    gradients(model, 0)
    with pytest.raises(memfit.InfeasibleBudgetError, match=r"Before any activation .* weights .* the process itself"):
        model(data(1))
    assert hooks_of(model) == before
    assert process_portrait() == process
    trains_right(model)


# Exceptions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_failed_backward_is_no_profile(error: type[BaseException], block: int) -> None:
    """A first step whose backward ends early is not planned from: half of its events are missing."""
    torch.manual_seed(0)
    model = Stack()
    expected = [gradients(model, i) for i in range(3)]
    armed = True

    def strike(gradient: Tensor) -> None:
        if armed:
            raise error("stop")

    def arm(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(strike)

    model.blocks[block].up.register_forward_hook(arm)
    with memfit.fit(model, budget="min") as handle:
        with pytest.raises(error):
            model(data(0)).backward()
        armed = False
        assert_bitwise_equal(gradients(model, 0), expected[0])
        assert handle.plan is None
        assert_bitwise_equal(gradients(model, 1), expected[1])
        assert handle.plan is not None
        assert [c.name for c in handle.plan.calls] == ["blocks.0", "blocks.1", "blocks.2"]
        assert_bitwise_equal(gradients(model, 2), expected[2])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("first", [True, False])
def test_use_cache_is_back_after_an_exception(error: type[BaseException], first: bool) -> None:
    """Also after Ctrl-C, which no hook of a module sees: at the latest when the model is called again."""
    model = gpt2_model().train()
    assert model.config.use_cache
    armed = False

    def strike(module: nn.Module, args: Any) -> None:
        if armed:
            raise error("stop")

    model.transformer.h[1].mlp.register_forward_pre_hook(strike)
    with memfit.fit(model, budget="min") as handle:
        if not first:
            call(model, language(0)).loss.backward()
        armed = True
        with pytest.raises(error):
            call(model, language(1))
        armed = False
        model.eval()
        with torch.no_grad():
            assert call(model, language(1)).past_key_values is not None
        assert model.config.use_cache
        model.train()
        for i in range(3):
            call(model, language(i)).loss.backward()
        assert handle.plan is not None
    assert model.config.use_cache


# Out of memory -------------------------------------------------------------------------------------------------------


def explode(*_: Any) -> Tensor:
    """The allocator's own error."""
    return torch.empty(2**60, dtype=torch.uint8)


class Explosive(torch.autograd.Function):
    """The allocator's own error, on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return explode()


def told(error: BaseException) -> str:
    """The note on an error; there is one."""
    (note,) = [note for note in getattr(error, "__notes__", []) if note.startswith("Memfit: memory ran out")]
    assert "\n" not in note
    return note


@contextlib.contextmanager
def runs_out(model: nn.Module, where: str) -> Any:
    """Memory runs out there, in a model that is in its first step."""
    handles = []
    if where == "norm":
        handles.append(model.blocks[1].norm.register_forward_pre_hook(explode))
    elif where == "head":
        handles.append(model.head.register_forward_pre_hook(explode))
    elif where == "backward":
        handles.append(model.blocks[1].register_forward_hook(lambda m, a, o: Explosive.apply(o)))
    elif where == "loss backward":
        handles.append(model.register_forward_hook(lambda m, a, o: Explosive.apply(o)))
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("where", "parts"),
    [
        ("norm", ["in the forward of `blocks.1` (in its `norm`), block call 2 of 3"]),
        ("head", ["in the forward in `head`, after block call 3 of 3", "compute it in chunks"]),
        ("backward", ["in the backward of `blocks.2`, 1 of 3 block calls on the way back"]),
        ("loss backward", ["in the backward of the loss, after 3 block calls forward and none back", "in chunks"]),
    ],
)
def test_running_out_of_memory_in_the_first_step_is_explained(where: str, parts: list[str]) -> None:
    """How far it got, what was held and what helps: on the error, whose type stays, and in the report."""
    torch.manual_seed(0)
    model = Stack()
    expected = [gradients(model, i, rows=3) for i in range(3)]
    process = process_portrait()
    handle = memfit.fit(model, budget="min")
    with runs_out(model, where), pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        model(data(0)).backward()
    note = told(caught.value)
    for part in [
        "in the first training step",
        *parts,
        "weights 50.8 KiB",
        "gradients ",
        "optimizer state 0 B",
        "saved by blocks ",
        "another `budget` changes nothing",
        "A smaller batch",
    ]:
        assert part in note
    assert note.removeprefix("Memfit: ") in handle.report()
    assert handle.plan is None
    json.dumps(handle.summary(), allow_nan=False)
    for i in range(3):
        assert_bitwise_equal(gradients(model, i, rows=3), expected[i])
    assert len(handle.plan.calls) == 3
    assert note.removeprefix("Memfit: ") in handle.report()
    handle.remove()
    assert process_portrait() == process


def test_what_was_saved_so_far_is_counted() -> None:
    """Two of three blocks hold what their plan keeps."""
    model = Stack()
    handle = memfit.fit(model, policy="selective")
    with runs_out(model, "head"), pytest.raises(RuntimeError) as caught:
        model(data(0))
    whole = sum(row["saved_bytes"] for row in memfit_rows(Stack(), policy="selective"))
    assert f"saved by blocks {format_bytes(whole)}" in told(caught.value)
    assert '`budget="min"` keeps less' in told(caught.value)
    handle.remove()


def memfit_rows(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    with memfit.fit(model, **options) as handle:
        for i in range(2):
            gradients(model, i)
        rows: list[dict[str, Any]] = handle.summary()["blocks"]
    return rows


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({}, "Memfit only measures here: a `budget`"),
        ({"policy": "selective"}, '`budget="min"` keeps less'),
        ({"every_n_layers": 2}, '`budget="min"` keeps less'),
        ({"policy": "full"}, "another `budget` changes nothing"),
        ({"budget": "100GiB"}, "another `budget` changes nothing"),
    ],
    ids=str,
)
def test_advice_depends_on_what_was_asked_for(options: dict[str, Any], part: str) -> None:
    model = Stack()
    with memfit.fit(model, **options), runs_out(model, "norm"), pytest.raises(RuntimeError) as caught:
        model(data(0))
    assert part in told(caught.value)


def test_whoever_halves_the_batch_still_does() -> None:
    """Accelerate, and so Hugging Face's trainer, tells running out of memory by type and message."""
    from accelerate.utils import find_executable_batch_size

    torch.manual_seed(0)
    model = Stack()
    expected = gradients(model, 0, rows=4)
    tried: list[int] = []

    def strike(module: nn.Module, args: Any) -> None:
        if len(args[0]) > 4:
            explode()

    model.blocks[1].norm.register_forward_pre_hook(strike)

    @find_executable_batch_size(starting_batch_size=16)
    def loop(rows: int) -> None:
        tried.append(rows)
        for _ in range(3):
            assert_bitwise_equal(gradients(model, 0, rows=rows), expected)

    with memfit.fit(model, budget="min") as handle:
        loop()
        assert tried[-1] == 4
        assert tried == sorted(tried, reverse=True)
        assert len(handle.plan.calls) == 3
    assert "block call 2 of 3" in handle.report()


def test_later_steps_are_explained_too() -> None:
    model = Stack()
    with memfit.fit(model, budget="100GiB") as handle:
        for i in range(3):
            gradients(model, i)
        with runs_out(model, "norm"), pytest.raises(RuntimeError) as caught:
            model(data(0))
        assert "in a training step, in the forward of `blocks.1` (in its `norm`)" in told(caught.value)
        assert "lower it" in told(caught.value)
        gradients(model, 1)
        assert "memory ran out" in handle.report()


def test_running_out_behind_the_model_is_explained_where_it_is_seen() -> None:
    """A loss of the training loop passes no hook: the end of the `with` statement does."""
    model = Stack()

    def loss() -> None:
        model(data(0)).backward(retain_graph=explode().any())

    def optimizer() -> None:
        model(data(0)).backward()
        stepping = torch.optim.AdamW(model.parameters())
        stepping.register_step_pre_hook(explode)
        stepping.step()

    with pytest.raises(RuntimeError) as caught, memfit.fit(model, budget="min"):
        loss()
    assert "after the forward (3 of 3 block calls) and before the backward" in told(caught.value)
    with pytest.raises(RuntimeError) as caught, memfit.fit(model, budget="min"):
        optimizer()
    assert "in the optimizer's step" in told(caught.value)
    assert "SGD or Adafactor" in told(caught.value)


@pytest.mark.parametrize("error", [ValueError("stop"), RuntimeError("shape"), KeyboardInterrupt()], ids=repr)
def test_other_errors_get_no_note(error: BaseException) -> None:
    model = Stack()

    def strike(*_: Any) -> None:
        raise error

    hook = model.blocks[1].register_forward_pre_hook(strike)
    with pytest.raises(type(error)) as caught, memfit.fit(model, budget="min"):
        model(data(0)).backward()
    hook.remove()
    assert not getattr(caught.value, "__notes__", [])


def test_backward_is_watched_in_profiled_steps_only() -> None:
    """And by nobody once the handle is gone."""
    backward = torch.autograd.backward
    model = Stack()
    handle = memfit.fit(model, budget="min")
    gradients(model, 0)
    assert torch.autograd.backward is not backward
    gradients(model, 1)
    assert torch.autograd.backward is backward
    handle.remove()
    handle = memfit.fit(model, budget="min")
    gradients(model, 0)
    del handle, model
    import gc

    gc.collect()
    gradients(Stack(), 0)
    assert torch.autograd.backward is backward


LIMITED = """
    import gc, resource, sys, traceback
    import torch
    import memfit
    from torch import nn
    torch.set_num_threads(1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(256, 1024), nn.Linear(1024, 256)

        def forward(self, x):
            return x + self.down(nn.functional.gelu(self.up(x)))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(6))
            self.head = nn.Linear(256, 8000)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.head(x).logsumexp(1).mean()

    def build():
        torch.manual_seed(0)
        return Model()

    def step(model, rows, i):
        x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(i))
        model(x).backward()
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return found

    plain = build()
    expected = [step(plain, 16, i) for i in range(3)]
    model = build()
    handle = memfit.fit(model, budget="min")
    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 500 * 2**20, -1))
    try:
        step(model, int(sys.argv[1]), 0)
    except RuntimeError as error:
        traceback.print_exception(error)
    gc.collect()
    print(handle.report())
    for i in range(3):
        assert all(map(torch.equal, step(model, 16, i), expected[i])), i
    assert len(handle.plan.calls) == 6
    handle.remove()
    print("trained on")
"""


@pytest.mark.parametrize(
    ("rows", "places"),
    [
        (100_000, ["in the forward of `layers.0` (in its `up`), block call 1 of 6"]),
        (9_000, ["after block call 6 of 6", "in the backward of"]),
    ],
)
def test_running_out_of_address_space(rows: int, places: list[str]) -> None:
    """A batch that is too large for the process's limit, for real; a smaller one trains on, bit by bit."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LIMITED), str(rows)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "RuntimeError: [enforce fail at alloc_cpu.cpp" in done.stderr
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("Memfit: memory ran out in the first")]
    assert any(place in told for place in places), told
    assert told.removeprefix("Memfit: ") in done.stdout
    assert "trained on" in done.stdout


# The command line ----------------------------------------------------------------------------------------------------


def status_of(arguments: list[str]) -> int:
    """The exit status of a command line that runs in this process."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["doctor", "now"], ["`memfit doctor` does not know `now`", "`memfit doctor --help`"]),
        (["doctor", "--fast"], ["`memfit doctor` does not know `--fast`"]),
        (["plan"], ["FILE.py:FUNCTION", "`memfit plan --help`"]),
        (["plan", "train.py:build", "--every-n-layers", "two"], ["'two'", "--every-n-layers"]),
        (["plan", "train.py:build", "--policy", "half"], ["'half'", "'full', 'selective'"]),
        (["plan", "train.py:build", "--budget", "inf"], ["`inf`", "`6GiB`"]),
        (["plan", "train.py:build", "--budget", "-3GiB"], ["--budget"]),
        (["plan", "train.py:build", "--optimizer", "adamx"], ["`optimizer=adamx`", "adamw"]),
        (["run", "--budget"], ["--budget", "`memfit run --help`"]),
        (["run", "--bogus", "--", "train.py"], ["does not know `--bogus`", "`--`"]),
        (["run", "train.py", "--epochs", "3"], ["does not know `--epochs 3`", "arguments of the script"]),
        (["run", "--budget", "0%", "--", "train.py"], ["`0%`", "above `0%`"]),
        (["run", "--report", ".", "--", "train.py"], ["is a folder"]),
        (["run", "--plan", "text.json", "--", "train.py"], ["text.json", "not JSON", "`memfit plan`"]),
        (["run", "--plan", "deep.json", "--", "train.py"], ["deep.json", "nested more than"]),
        (["run", "--plan", "large.json", "--", "train.py"], ["large.json", "more than 9.77 KiB"]),
        (["run", "--plan", "version.json", "--", "train.py"], ["version.json", "schema version 9", "reads version 3"]),
        (["run", "--plan", "field.json", "--", "train.py"], ["field.json", "The plan has the unknown field `hello`"]),
        (["run", "--plan", "field.json", "--budget", "1GiB", "--", "train.py"], ["--budget", "not allowed with"]),
    ],
    ids=" ".join,
)
def test_the_command_line_says_it_in_one_line(
    arguments: list[str], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Status 2, one line on stderr, nothing on stdout, no traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(plans, "MAX_FILE_BYTES", 10_000)
    monkeypatch.delitem(sys.modules, "train", raising=False)
    fields = json.loads(memfit.Plan(**EMPTY).to_json())
    Path("train.py").write_text(SCRIPT)
    Path("text.json").write_text("plan")
    Path("deep.json").write_text("[" * 1000)
    Path("large.json").write_text(" " * 10_001)
    Path("version.json").write_text(json.dumps(fields | {"schema_version": 9}))
    Path("field.json").write_text(json.dumps(fields | {"hello": 1}))
    assert status_of(arguments) == 2
    monkeypatch.delitem(sys.modules, "train", raising=False)
    output, error = capsys.readouterr()
    lines = [line for line in error.splitlines() if line != "memfit: planning one training step"]
    assert len(lines) == 1, error
    assert lines[0].startswith("memfit: ")
    for part in parts:
        assert part in lines[0]
    assert output == ""


def test_ctrl_c_while_planning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "stopped.py").write_text("def build():\n    raise KeyboardInterrupt\n")
    assert main(["plan", f"{tmp_path}/stopped.py:build"]) == 130
    assert capsys.readouterr().err == "memfit: interrupted\n"
    monkeypatch.delitem(sys.modules, "stopped")


EMPTY: dict[str, Any] = {
    "model": "Encoder",
    "fingerprint": "9f3a",
    "device": "cpu",
    "budget_bytes": None,
    "predicted_peak_bytes": 1,
    "plain_peak_bytes": 1,
    "recompute_seconds": 0.0,
    "saved_bytes": 0,
    "recomputed_bytes": 0,
    "peak_event": "loss",
    "policies": (),
    "calls": (),
}

TRAIN = """
import os, signal, sys

if __name__ == "__main__":
    model, batch, loss = build()
    optimizer = torch.optim.AdamW(model.parameters())
    for i in range(4):
        value = loss(model(batch), batch)
        if i == 0 and "loss" in sys.argv:
            torch.empty(2**60)
        value.backward()
        if i == 2 and "interrupt" in sys.argv:
            model.layers[1].down.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
        optimizer.step()
        optimizer.zero_grad()
"""


def test_run_refuses_a_plan_for_another_model(shell: Shell) -> None:
    """With both names, before anything is trained."""
    shell.write("train.py", SCRIPT + TRAIN)
    memfit.Plan(**EMPTY).save(shell.folder / "plan.json")
    done = shell.run("--plan", "plan.json", "--", "train.py")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("memfit: The plan is for Encoder (9f3a), the model is Model (")


def test_run_explains_what_ran_out_of_memory(shell: Shell) -> None:
    """The script's own status and traceback, with the explanation below it and in the report."""
    shell.write("train.py", SCRIPT + TRAIN)
    done = shell.run("--budget", "min", "--report", "report.json", "--", "train.py", "loss")
    assert done.returncode == 1
    note = done.stderr.splitlines()[-1]
    assert note.startswith("Memfit: memory ran out in the first training step, after the forward (4 of 4 block calls)")
    assert note.removeprefix("Memfit: ") in json.loads((shell.folder / "report.json").read_text())["notes"]
    assert "memfit/" not in done.stderr.partition("Traceback")[2].partition("RuntimeError")[0]


def test_ctrl_c_in_a_training_script(shell: Shell) -> None:
    """In the middle of a planned forward: the script's traceback, its signal, and the report."""
    shell.write("train.py", SCRIPT + TRAIN)
    done = shell.run("--budget", "min", "--report", "report.json", "--", "train.py", "interrupt")
    assert done.returncode == -2
    assert done.stderr.splitlines()[-1].strip() == "KeyboardInterrupt"
    assert done.stderr.startswith("peak ")
    assert json.loads((shell.folder / "report.json").read_text())["steps"] == 3
