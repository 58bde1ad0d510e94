"""What a CPU cannot show: kernels that run later, a caching allocator, streams, graphs. Skipped without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import memfit
from gradients import Run, assert_bitwise_equal, assert_repeats, run_steps, sgd
from policies import keep_everything, link_everything, random_policy
from test_gradients import MODES
from zoo import NAMES, Batch, Case, build

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning"),
]

DEVICE = "cuda"
MIB = 2**20
FITS: dict[str, dict[str, Any]] = {
    "min": {"budget": "min"},
    "full": {"policy": "full"},
    "random": {"policy": random_policy(0)},
    "linked": {"policy": link_everything},
}
WIDTH, ROWS = 512, 4096


@pytest.fixture(autouse=True)
def repeatable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that add in one order, where there are such."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # what training has, tests have
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()


def moved(name: str) -> Case:
    """A model of the zoo, and its batches, on the device."""
    case = build(name)

    def batches(i: int) -> Batch:
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(DEVICE), case.batches(i))

    return Case(case.model.to(DEVICE), batches, case.loss)


class Block(nn.Module):
    """Saves eight times its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm(x)))))


class Stack(nn.Module):
    """Returns its loss."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def stack(*blocks: nn.Module) -> Stack:
    torch.manual_seed(0)
    model = Stack([*blocks] or [Block() for _ in range(8)])
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    return model.to(DEVICE).train()


def data(i: int, rows: int = ROWS) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(i)).to(DEVICE)


def train(model: nn.Module, steps: int = 6) -> list[Tensor]:
    """Losses and, at the end, weights."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for i in range(steps):
        loss = model(data(i))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*losses, *(p.detach().clone() for p in model.parameters())]


def same(found: list[Tensor], plain: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_plain_run(name: str):
    optimizer = {"optimizer": sgd} if name in ("unet", "residual-net") else {}

    def run(**options: Any) -> Run:
        return run_steps(moved(name), **optimizer, **options)

    try:
        plain = assert_repeats(run)
    except AssertionError:
        pytest.skip("plain training does not repeat itself on this device")
    for options in FITS.values():
        fitted = run(fit=options)
        assert_bitwise_equal(fitted, plain)
        if name in MODES and options.get("policy") == "full":
            assert any(block["recomputed_bytes"] for block in fitted.summary["blocks"])


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_budgets_hold_in_reserved_bytes(share: float):
    model = stack()
    with memfit.fit(model, policy=keep_everything) as handle:
        train(model, steps=3)
        saved = handle.summary()["saved_bytes"]
    del model, handle
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = stack()
    plain = train(model)
    del model
    peak = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    budget = int(peak - share * saved)
    model = stack()
    with memfit.fit(model, budget=budget) as handle:
        assert same(train(model), plain)
        summary = handle.summary()
    assert summary["measured_peak_bytes"] <= budget
    assert abs(summary["measured_peak_bytes"] - summary["predicted_peak_bytes"]) <= 0.05 * budget
    assert summary["recomputed_bytes"] > 0
    assert summary["context_bytes"] > 0


def test_ops_are_timed_by_the_device():
    model = stack()
    with memfit.fit(model, budget="min") as handle:
        train(model, steps=3)
        profile = handle.profile
    assert profile is not None
    products = [op.seconds for program in profile.programs.values() for op in program.ops if op.seconds > 0]
    flops = 2 * ROWS * WIDTH * 4 * WIDTH
    assert max(products) > flops / 1e15, "no device is as fast: the launch was timed"


def test_a_device_canary_sees_what_changed():
    factor = [1.0]

    class Hidden(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * factor[0])

    model = stack(*(Hidden() for _ in range(3)))

    def change() -> None:
        for i in range(8):
            loss = model(data(i))
            loss.backward()
            factor[0] += 0.5

    with memfit.fit(model, policy="full"):
        train(model, steps=4)
        factor[0] = 1.5
        with pytest.raises(memfit.RecomputeError):
            change()


def test_a_step_on_a_stream_of_its_own():
    plain = train(stack())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    model = stack()
    with memfit.fit(model, policy="full") as handle, torch.cuda.stream(side):
        found = train(model)
        side.synchronize()
        assert same(found, plain)
        assert handle.summary()["recomputed_bytes"] > 0
        assert not handle.summary()["notes"]


class Forked(nn.Module):
    """What the side stream makes is read late, while that stream goes on with what it needs nobody for."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.side = torch.cuda.Stream()

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        main = torch.cuda.current_stream()
        with torch.cuda.stream(self.side):
            y = self.up(first).sigmoid()
        main.wait_stream(self.side)
        torch.cuda._sleep(20_000_000)
        return x + self.down(y * y)

    def __deepcopy__(self, memo: Any) -> Forked:
        raise TypeError("a stream is not copied")


class ForkedStack(Stack):
    def forward(self, x: Tensor) -> Tensor:
        first = x
        for block in self.blocks:
            x = block(x, first)
        return x.square().mean()


def test_blocks_on_two_streams_are_left_alone():
    def run(*, fitted: bool) -> tuple[list[Tensor], Any]:
        torch.manual_seed(0)
        model = ForkedStack([Forked() for _ in range(6)]).to(DEVICE).train()
        torch.cuda.synchronize()
        if not fitted:
            return train(model), None
        with memfit.fit(model, policy="full") as handle:
            return train(model), handle.summary()

    plain, _ = run(fitted=False)
    found, summary = run(fitted=True)
    assert same(found, plain)
    assert "stepped aside: blocks run on several CUDA streams" in summary["notes"]


def test_a_captured_step_is_the_plain_step():
    def run(*, fitted: bool) -> list[Tensor]:
        model = stack(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(4)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
        handle = memfit.fit(model, policy="full", blocks=["Sequential"]) if fitted else None
        held = data(0)

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = model(held)
            loss.backward()
            optimizer.step()
            return loss

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(4):
                step()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            loss = step()
        losses = []
        for i in range(3):
            held.copy_(data(i))
            captured.replay()
            losses.append(loss.detach().clone())
        if handle is not None:
            assert "stepped aside: a CUDA graph is captured" in handle.summary()["notes"]
            handle.remove()
        return [*losses, *(p.detach().clone() for p in model.parameters())]

    assert same(run(fitted=True), run(fitted=False))
