"""Verify a call: bring every dropped value back while what was saved is still there (design, rule 2)."""

from __future__ import annotations

from memfit.bits import max_ulp, same_bits
from memfit.calls import Call
from memfit.frames import Frame
from memfit.host import memory_ran_out
from memfit.replay import Restorer


def verify(call: Call, frame: Frame) -> str:
    """Compare all bits of every value that the policy drops; demote those that differ and say so, else "".

    Both have to be there at once. Where memory ends first, the hashes of this call are left to find a difference.
    """
    try:
        return _difference(call, frame)
    except Exception as error:
        if not memory_ran_out(error):
            raise
        return ""


def _difference(call: Call, frame: Frame) -> str:
    compiled = call.compiled
    assert compiled is not None
    assert call.entry is not None
    leaves = call.cells()
    restorer = Restorer(compiled, frame.states)
    differing: dict[int, float] = {}
    for index in reversed(compiled.dropped):
        found = [(n, call.widened(n, leaves[n][0])) for n in compiled.leaves[index]]
        found += [(n, frame.parameters[n][0]) for n in compiled.parameters[index]]
        value = restorer.restore(index, found)
        saved = call.handles[index].tensor
        assert saved is not None
        if not same_bits(value, saved):
            node = compiled.program.saved[index].value.node
            differing[node] = max(differing.get(node, 0.0), max_ulp(value, saved))
    for node in differing:
        call.entry.state.demote(node)
    if not differing:
        return ""
    return f"{len(differing)} values are kept from now on: replayed, they differ by {max(differing.values()):.3g} ulp"
