"""Compiled blocks: the plan as policies that the compiler obeys, counted in bytes; gradients as without Memfit."""

from __future__ import annotations

import copy
import functools
import gc
import json
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import memfit
from conftest import SCRIPT, Shell
from gradients import assert_bitwise_equal, copies
from memfit.policies import SelectivePolicy, redraws

ROWS, WIDTH = 128, 32
ROW_BYTES = ROWS * WIDTH * 4
"""A block's input; what `up` makes is twice as large."""

# Dynamo looks at tensors in ways that torch warns of, and inductor imports what torch has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing that another test has compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.drop, self.down = nn.Dropout(0.1), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + self.down(self.drop(functional.gelu(self.up(self.norm(x))))) * scale


class InPlace(Block):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + self.down(functional.relu_(self.up(x))) * scale


class Normed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.batch = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(self.batch(x), scale)


class Broken(Block):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x, scale)


class Model(nn.Module):
    def __init__(self, kind: type[Block] = Block, num_blocks: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, scale=2.0)
        return x.square().mean()


def compiled(how: str, backend: str = "aot_eager", **options: Any) -> Any:
    """A model, compiled in one of the ways that there are."""
    torch.manual_seed(0)
    model = Model(**options)
    if how == "wrapped":
        return torch.compile(model, backend=backend)
    for module in [model] if how == "in place" else model.layers:
        module.compile(backend=backend)
    return model


def step(model: Any, i: int) -> tuple[dict[str, Tensor | None], int]:
    """Gradients of step ``i``, and the bytes of activations that autograd saved for it.

    Their storages are at least as large as a block's input: weights, and states of the generator, are smaller.
    """
    torch.manual_seed(i)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() >= ROW_BYTES:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(torch.randn(ROWS, WIDTH))
    loss.backward()
    return copies((name, p.grad) for name, p in model.named_parameters()), sum(saved.values())


def record(model: Any) -> None:
    """The first step, with nothing of ours around it: hooks of somebody else have Memfit step aside."""
    torch.manual_seed(100)
    model(torch.randn(ROWS, WIDTH)).backward()


def rows_of(handle: memfit.Handle) -> list[tuple[str, str]]:
    return [(row["mode"], row["reason"]) for row in handle.summary()["blocks"]]


@pytest.mark.parametrize(
    ("how", "backend"),
    [
        ("wrapped", "aot_eager"),
        ("in place", "aot_eager"),
        ("blocks", "aot_eager"),
        ("wrapped", "inductor"),
        ("blocks", "inductor"),
    ],
)
def test_a_plan_is_obeyed_by_compiled_code(how: str, backend: str) -> None:
    """Nothing but inputs is kept, dropout is drawn again with the same mask, and removal leaves compiled-plain code."""
    model = compiled(how, backend)
    expected = [step(model, i) for i in range(3)]
    before = [{name: vars(m).get(name) for name in ("forward", "_compiled_call_impl")} for m in model.modules()]
    assert expected[0][1] > 16 * ROW_BYTES
    with memfit.fit(model, policy="full") as handle:
        record(model)
        for i in range(3):
            gradients, saved = step(model, i)
            assert_bitwise_equal(gradients, expected[i][0])
            # The inputs of three blocks, and what the loss squares; compiled together, that comes back too.
            assert saved == (4 if how == "blocks" else 3) * ROW_BYTES
        assert rows_of(handle) == [("policy", "")] * 3
        assert handle.summary()["measured_peak_bytes"] > 0
    assert "compiled blocks run the plan as torch's selective checkpointing" in handle.report()
    assert handle.summary()["measured_peak_bytes"] > 0
    after = [{name: vars(m).get(name) for name in ("forward", "_compiled_call_impl")} for m in model.modules()]
    assert after == before
    gradients, saved = step(model, 0)
    assert_bitwise_equal(gradients, expected[0][0])
    assert saved == expected[0][1]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_the_first_step_runs_without_the_compiler() -> None:
    """On a backend that computes as eager code does, it is bitwise the same."""
    model = compiled("wrapped")
    expected, _ = step(model, 0)
    model.zero_grad()
    with memfit.fit(model, budget="min"):
        torch.manual_seed(0)
        model(torch.randn(ROWS, WIDTH)).backward()
        assert_bitwise_equal(copies((name, p.grad) for name, p in model.named_parameters()), expected)


def test_values_are_kept_as_planned() -> None:
    """`selective` keeps what `up` made (autograd saves it for gelu), in each block, and nothing else."""
    found = {}
    for policy in ("full", "selective"):
        model = compiled("wrapped")
        expected, _ = step(model, 0)
        with memfit.fit(model, policy=policy):
            record(model)
            gradients, found[policy] = step(model, 0)
            assert_bitwise_equal(gradients, expected)
    assert found == {"full": 3 * ROW_BYTES, "selective": 9 * ROW_BYTES}


def test_every_second_block_keeps_everything() -> None:
    model = compiled("blocks", num_blocks=4)
    expected, plain = step(model, 0)
    with memfit.fit(model, every_n_layers=2) as handle:
        record(model)
        gradients, saved = step(model, 0)
        assert_bitwise_equal(gradients, expected)
        assert saved < 0.75 * plain
        assert len({row["recomputed_bytes"] for row in handle.summary()["blocks"]}) == 2


def test_more_policies_than_torch_compiles_become_the_smaller_ones() -> None:
    """Blocks that are compiled one by one share their code, and torch gives up on a code that it compiles too often."""
    model = compiled("blocks", num_blocks=4)
    expected, _ = step(model, 0)
    with memfit.fit(model, every_n_layers=2) as handle, torch._dynamo.config.patch(recompile_limit=3):
        record(model)
        assert_bitwise_equal(step(model, 0)[0], expected)
        assert len({row["recomputed_bytes"] for row in handle.summary()["blocks"]}) == 1
        assert "without compiled code" not in handle.report()


def test_a_block_that_is_not_compiled_any_more_is_named() -> None:
    model = compiled("blocks")
    expected, _ = step(model, 0)
    with memfit.fit(model, budget="min") as handle:
        record(model)
        with torch.compiler.set_stance("force_eager"):
            gradients, _ = step(model, 0)
        assert_bitwise_equal(gradients, expected)
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        assert "`layers.0` ran without compiled code, and kept everything" in handle.report()


@pytest.mark.parametrize("how", ["wrapped", "in place", "blocks"])
def test_blocks_that_are_never_recorded_are_soon_compiled_again(how: str) -> None:
    """Hooks of somebody else are active in every step: nothing can be planned, and no step stays without compiler."""
    model = compiled(how)
    expected = [step(model, i) for i in range(4)]
    with memfit.fit(model, budget="min") as handle:
        for i in range(4):
            gradients, saved = step(model, i)
            assert_bitwise_equal(gradients, expected[i][0])
            assert (saved == expected[i][1]) == (i >= 2)  # eager code keeps more
        assert {row["mode"] for row in handle.summary()["blocks"]} == {"plain"}
        assert "saved-tensor hooks of somebody else are active" in handle.report()
        assert all("could be recorded" in reason for _, reason in rows_of(handle))


def test_an_unmodified_script(shell: Shell) -> None:
    """`memfit run` catches a model that the script compiles."""
    shell.write("train.py", SCRIPT + TRAINING)
    for how in ("wrapped", "in place"):
        done = shell.run("--policy", "full", "--report", "report.json", "--", "train.py", how)
        assert done.returncode == 0, done.stderr
        assert done.stdout == shell.python("train.py", how).stdout
        report = json.loads((shell.folder / "report.json").read_text())
        assert [row["mode"] for row in report["blocks"]] == ["policy"] * 4, done.stderr


TRAINING = """
import sys
import warnings

warnings.simplefilter("ignore")
torch.set_num_threads(1)
model, x, loss = build()
called = torch.compile(model, backend="aot_eager") if sys.argv[1] == "wrapped" else model
if sys.argv[1] == "in place":
    model.compile(backend="aot_eager")
optimizer = torch.optim.AdamW(model.parameters())
for step in range(4):
    value = loss(called(x), x)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(value.item().hex())
"""


@pytest.mark.parametrize(
    ("options", "why"),
    [({"backend": "eager"}, "was run by a backend"), ({"kind": Broken}, "around a graph break")],
    ids=["eager", "graph break"],
)
def test_where_no_policy_is_obeyed_blocks_run_again_once_and_are_left(options: dict[str, Any], why: str) -> None:
    """The step in which that shows draws the same dropout masks again; afterwards the blocks keep everything."""
    model = compiled("wrapped", **options)
    expected = [step(model, i) for i in range(3)]
    with memfit.fit(model, budget="min") as handle:
        record(model)
        for i in range(3):
            gradients, saved = step(model, i)
            assert_bitwise_equal(gradients, expected[i][0])
        assert saved == expected[2][1]
        assert all(mode == "plain" and why in reason for mode, reason in rows_of(handle))
        assert "stepped aside: every block is compiled" in handle.report()


@pytest.mark.parametrize(
    ("kind", "why"), [(InPlace, "relu_ writes in place"), (Normed, "writes its buffer num_batches_tracked")]
)
def test_blocks_that_write_keep_everything(kind: type[Block], why: str) -> None:
    """Torch asks for regions without in-place operations; and what a block writes, it would write twice."""
    model = compiled("wrapped", kind=kind)
    with memfit.fit(model, budget="min") as handle:
        record(model)
        twin = copy.deepcopy(model._orig_mod)
        gradients, _ = step(model, 0)
        assert all(mode == "plain" and why in reason for mode, reason in rows_of(handle)), rows_of(handle)
    torch._dynamo.reset()
    assert_bitwise_equal(gradients, {f"_orig_mod.{name}": g for name, g in step(twin, 0)[0].items()})
    assert_bitwise_equal(dict(model._orig_mod.named_buffers()), dict(twin.named_buffers()))


def test_what_the_recording_does_not_know_is_saved() -> None:
    """Compiled code may run what eager code did not."""
    policy = SelectivePolicy({"aten.sin.default": (False,)})
    contexts = functools.partial(policy)

    def block(x: Tensor) -> Tensor:
        return x.sin().sin().cos().t().exp()

    def run(x: Tensor) -> Tensor:
        again: Tensor = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return again

    x = torch.randn(5, 7, requires_grad=True)
    expected = torch.autograd.grad(block(x).sum(), x)
    assert torch.equal(*torch.autograd.grad(torch.compile(run, backend="aot_eager")(x).sum(), x), *expected)
    assert policy.unknown == {"aten.sin.default", "aten.cos.default", "aten.exp.default"}
    assert policy.num_traced > 0
    assert not policy.ran_whole


def test_dropout_is_tried() -> None:
    """Of this torch it is known that compiled code draws a mask again; the generator is left as it was."""
    before = torch.get_rng_state()
    assert redraws(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.compiler.set_stance("force_eager"):
        assert not redraws(torch.device("cpu"))  # nothing was compiled: nothing is known
    assert torch.equal(torch.get_rng_state(), before)


def test_masks_are_saved_where_they_may_not_be_drawn_again() -> None:
    """Found out under a stance that compiles nothing; the blocks are compiled afterwards."""
    model = compiled("wrapped")
    expected, _ = step(model, 0)
    with memfit.fit(model, policy="full") as handle:
        record(model)
        with torch.compiler.set_stance("force_eager"):
            record(model)
        gradients, saved = step(model, 0)
        assert_bitwise_equal(gradients, expected)
        assert saved == 9 * ROW_BYTES  # with each block's input what its dropout gave, twice as large
        assert "draws dropout masks anew in compiled code: they are saved" in handle.report()


def test_a_fitted_model_can_be_dropped() -> None:
    """The hook of all optimizers does not keep it alive."""
    model = compiled("in place")
    memfit.fit(model, budget="min")
    record(model)
    reference = weakref.ref(model)
    torch._dynamo.reset()
    del model
    gc.collect()
    assert reference() is None


def test_copies_are_inert() -> None:
    model = compiled("in place")
    with memfit.fit(model, budget="min"):
        record(model)
        step(model, 0)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.layers[0].forward.__func__ is Block.forward
            assert twin.layers[0].forward.__self__ is twin.layers[0]
            assert_bitwise_equal(step(twin, 1)[0], step(model, 1)[0])


def test_evaluation_between_steps() -> None:
    model = compiled("wrapped")
    x = torch.randn(ROWS, WIDTH)
    expected = model.eval()(x)
    with memfit.fit(model, budget="min"), torch.no_grad():
        assert torch.equal(model(x), expected)
        with torch.enable_grad():
            record(model.train())
            step(model, 0)
        assert torch.equal(model.eval()(x), expected)
        with torch.enable_grad():
            step(model.train(), 0)


def test_no_plan_fits() -> None:
    """The model is compiled as it was, and so are its blocks."""
    model = compiled("in place")
    before = vars(model)["_compiled_call_impl"]
    limit = memfit.plan(Model(), torch.randn(ROWS, WIDTH), budget="min").predicted_peak_bytes
    with pytest.raises(memfit.InfeasibleBudgetError):  # noqa: PT012 - the second step raises
        memfit.fit(model, budget=limit // 2)
        record(model)
        record(model)
    assert vars(model)["_compiled_call_impl"] is before
    assert all("forward" not in vars(m) and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("one block", "`layers.1` is not compiled as a whole"),
        ("a part", "`layers.1` is not compiled as a whole"),
        ("wrapped blocks", "`layers.0` is wrapped by"),
        ("forward", "the `forward` of this Model was replaced"),
    ],
)
def test_what_gets_no_policies_is_said(how: str, why: str) -> None:
    model = Model()
    if how == "one block":
        model.layers[0].compile(backend="aot_eager")
    elif how == "a part":
        model.layers[0].up.compile(backend="aot_eager")
    elif how == "wrapped blocks":
        model.layers = nn.ModuleList(torch.compile(layer, backend="aot_eager") for layer in model.layers)
    else:
        model.forward = torch.compile(model.forward, backend="aot_eager")  # type: ignore[method-assign]
    expected, _ = step(model, 0)
    with memfit.fit(model, budget="min") as handle:
        record(model)
        assert_bitwise_equal(step(model, 0)[0], expected)
        assert f"no policy was handed to a compiler: {why}" in handle.report()
