"""Verify a call: bring every dropped value back while what was saved is still there (design, rule 2)."""

from __future__ import annotations

from typing import Any

import torch

from memfit.bits import max_ulp, same_bits
from memfit.calls import Call
from memfit.frames import Frame
from memfit.host import memory_ran_out
from memfit.links import run_output
from memfit.narrowing import narrow_form, widen
from memfit.replay import CompiledPolicy, Restorer
from memfit.signature import tensors_in


def verify(call: Call, frame: Frame, output: Any) -> str:
    """Compare all bits of every value that the policy drops; demote those that differ and say so, else "".

    Both have to be there at once. Where memory ends first, the hashes of this call are left to find a difference. A
    linked input is taken as it came: its own recipe was verified when the call before it ended, by the very tensor, and
    `links` has compared all bits of that with what came.
    """
    try:
        return _difference(call, frame, output)
    except Exception as error:
        if not memory_ran_out(error):
            raise
        return ""


def _difference(call: Call, frame: Frame, output: Any) -> str:
    compiled = call.compiled
    assert compiled is not None
    assert call.entry is not None
    leaves = call.cells()
    linked = compiled.policy.linked
    given = [] if linked is None or call.link is None else [(linked, _input(call, linked))]
    restorer = Restorer(compiled, frame.states)
    differing: dict[int, float] = {}
    for index in reversed(compiled.dropped):
        found = [(n, _widened(compiled, n, leaves[n][0])) for n in compiled.leaves[index]]
        found += [(n, frame.parameters[n][0]) for n in compiled.parameters[index]]
        if index in compiled.reads_link:
            found += given
        value = restorer.restore(index, found)
        for node in compiled.narrowed:
            restorer.env.pop(node, None)  # a wide copy that a backward would keep for what reads it next
        saved = call.handles[index].tensor
        assert saved is not None
        if not same_bits(value, saved):
            node = compiled.program.saved[index].value.node
            differing[node] = max(differing.get(node, 0.0), max_ulp(value, saved))
    differing = differing or _differing_output(call, frame, output, given)
    for node in differing:
        call.entry.state.demote(node)
    if not differing:
        return ""
    return f"{len(differing)} values are kept from now on: replayed, they differ by {max(differing.values()):.3g} ulp"


def _widened(compiled: CompiledPolicy, node: int, tensor: torch.Tensor) -> torch.Tensor:
    """What a recipe will read for a kept node: for a narrowed one, the widened copy."""
    narrow = compiled.narrowed.get(node)
    if narrow is None:
        return tensor
    return widen(narrow_form(tensor, narrow), tensor.dtype, narrow)


def _differing_output(call: Call, frame: Frame, output: Any, given: list[tuple[int, torch.Tensor]]) -> dict[int, float]:
    """The output that the next block may ask for, if its recipe gives something else."""
    compiled = call.compiled
    assert compiled is not None
    recipe = compiled.returned
    if recipe is None:
        return {}
    leaves = call.cells()
    for shown, tensor in zip(compiled.program.outputs, tensors_in(output), strict=True):
        if shown.node != recipe.node:
            continue
        env = {n: _widened(compiled, n, leaves[n][0]) for n in recipe.leaves}
        env.update((n, frame.parameters[n][0]) for n in recipe.parameters)
        env.update(given if recipe.reads_link else ())
        found = run_output(frame, env, shown)
        if not same_bits(found, tensor.detach()):
            return {shown.node: max_ulp(found, tensor.detach())}
    return {}


def _input(call: Call, node: int) -> torch.Tensor:
    tensor = call.leaf(node)
    assert tensor is not None
    return tensor.detach()
