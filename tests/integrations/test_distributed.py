"""Several ranks: what plain DDP and FSDP2 compute, to the last bit; nobody hangs; nothing is gathered twice.

Each test starts its ranks as processes of their own, gloo on CPU, and ends them after two minutes. A run without Memfit
in the same processes is the truth. Ranks draw other dropout masks and see other batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import memfit
from ranks import equal, loss_of, make_batch, make_model, run, values, whole

STEPS = 5
FULL = {"policy": "full"}
"""Everything is dropped, whatever the memory of so small a model measures."""
Wrap = Callable[[nn.Module], nn.Module]


def train(
    wrap: Wrap,
    fit: str = "",
    *,
    fitting: Mapping[str, Any] = FULL,
    steps: int = STEPS,
    accumulate: int = 1,
    lengths: tuple[int, ...] = (12,),
    unsynchronised: Callable[[nn.Module], Any] | None = None,
    look: Callable[[nn.Module], Any] | None = None,
    **options: Any,
) -> tuple[list[dict[str, Any]], Any]:
    """Train, and keep losses, gradients and buffers of each optimizer step.

    Args:
        wrap: Makes what is trained from the model.
        fit: ``before`` or ``after`` wrapping, or not at all.
        fitting: Arguments of `memfit.fit`.
        steps: Optimizer steps.
        accumulate: Batches of each; all but the last within ``unsynchronised``.
        lengths: Of the batches, in turn.
        unsynchronised: A context in which gradients are not reduced.
        look: Called with the wrapped model after each forward; what it returns is kept too.
        options: Of the model.

    Returns:
        The steps, and the report's data if the model was fitted.
    """
    torch.manual_seed(dist.get_rank())
    model = make_model(**options)
    handle = memfit.fit(model, **fitting) if fit == "before" else None
    wrapped = wrap(model)
    if fit == "after":
        handle = memfit.fit(wrapped, **fitting)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    torch.manual_seed(100 + dist.get_rank())
    found = []
    for step in range(steps):
        kept: dict[str, Any] = {}
        for part in range(accumulate):
            ids = make_batch(step * accumulate + part, lengths[(step * accumulate + part) % len(lengths)])
            last = part == accumulate - 1
            with contextlib.nullcontext() if last or unsynchronised is None else unsynchronised(wrapped):
                loss = loss_of(wrapped(ids), ids)
                if look is not None:
                    kept[f"look {part}"] = look(wrapped)
                loss.backward()
            kept[f"loss {part}"] = loss.detach().clone()
        kept.update({f"gradient {n}": whole(p.grad) for n, p in wrapped.named_parameters()})
        kept.update({f"buffer {n}": whole(b) for n, b in wrapped.named_buffers()})
        found.append(kept)
        optimizer.step()
        optimizer.zero_grad()
    summary = None
    if handle is not None:
        summary = handle.summary()
        handle.remove()
    return found, summary


def assert_replayed(summary: dict[str, Any]) -> None:
    """Every block was replayed, and something was dropped."""
    assert {block["mode"] for block in summary["blocks"]} == {"replay"}, summary["blocks"]
    assert all(block["recomputed_bytes"] for block in summary["blocks"]), summary["blocks"]


# DDP ------------------------------------------------------------------------------------------------------------------


def ddp_static(model: nn.Module) -> nn.Module:
    return DDP(model, static_graph=True)


def ddp_unused(model: Any) -> nn.Module:
    model.uses_other = False
    return DDP(model, find_unused_parameters=True)


def ddp_view(model: nn.Module) -> nn.Module:
    return DDP(model, gradient_as_bucket_view=True, bucket_cap_mb=1, broadcast_buffers=True)


def no_sync(model: Any) -> Any:
    return model.no_sync()


DDP_VARIANTS: dict[str, tuple[Wrap, dict[str, Any]]] = {
    "plain": (DDP, {}),
    "static": (ddp_static, {}),
    "unused": (ddp_unused, {}),
    "view": (ddp_view, {}),
    "accumulate": (DDP, {"accumulate": 3, "unsynchronised": no_sync, "steps": 3}),
    "static, two backwards": (ddp_static, {"accumulate": 2, "steps": 3}),
    "budget": (DDP, {"fitting": {"budget": "min"}}),
    "lengths": (DDP, {"lengths": (12, 9, 12, 15), "steps": 8}),
}


def compare_ddp(names: list[str]) -> list[str]:
    found = []
    for name in names:
        wrap, options = DDP_VARIANTS[name]
        plain, _ = train(wrap, **options)
        for fit in ("before", "after"):
            fitted, summary = train(wrap, fit, **options)
            if "fitting" not in options:
                assert_replayed(summary)
            found.append(f"{name}, fitted {fit}: {equal(fitted, plain) or 'equal'}")
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_ddp_computes_what_it_computes_alone(ranks):
    """Gradients of every step, synchronised or not; a parameter is never marked as ready twice."""
    names = list(DDP_VARIANTS) if ranks == 2 else ["plain", "unused", "accumulate"]
    for found in values(run(compare_ddp, names, ranks=ranks)):
        assert [line for line in found if not line.endswith(": equal")] == []
        assert len(found) == 2 * len(names)
