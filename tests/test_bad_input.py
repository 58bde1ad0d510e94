"""What a user may get wrong: a clear error that names the value and the way out, and a model as it was.

`test_lifecycle.py` has the first round of these, `test_plans.py` plan files, `test_cli.py` the command line's usage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memfit
from faults import WIDTH, Block, Stack, data
from gradients import assert_bitwise_equal, copies, seed
from memfit.blocks import find_blocks
from test_lifecycle import portrait, process_portrait


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
    """A `device_map` model is refused with its devices; no second device is here, so one is claimed."""
    model = Stack()
    pretended = {id(model.head.weight): torch.device("cuda", 1)}
    real = Tensor.device.__get__  # type: ignore[attr-defined]
    monkeypatch.setattr(nn.Parameter, "device", property(lambda p: pretended.get(id(p)) or real(p)), raising=False)
    with pytest.raises(memfit.ModelError) as caught:
        memfit.fit(model, budget="min")
    for part in ("2 devices", "19 on `cpu`", "1 on `cuda:1` (`head.weight`)", "`device_map`"):
        assert part in str(caught.value)


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
