"""Pack hooks: while a block's forward runs, what autograd saves is only parked (design, rule 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from memfit.frames import Handle
from memfit.partitioned import by_reference
from memfit.quantized import PLAIN_TYPES

if TYPE_CHECKING:
    from memfit.calls import Call


def park(call: Call) -> Callable[[torch.Tensor], Handle]:
    """The pack hook: a handle for each tensor, nothing more."""
    handles = call.handles
    recorder = call.recorder

    def pack(tensor: torch.Tensor) -> Handle:
        handle = Handle(tensor.detach(), len(handles))
        handles.append(handle)
        return handle

    def pack_recorded(tensor: torch.Tensor) -> Handle:
        assert recorder is not None
        if type(tensor) in PLAIN_TYPES:
            with torch._C._DisableTorchDispatch():
                alias = tensor.detach()
        else:
            alias = tensor.detach()  # only its class knows how: below it there may be no memory
        if recorder.is_stale():
            return Handle(alias, -1)
        handle = Handle(alias, len(handles))
        handles.append(handle)
        recorder.pack(alias)
        assert call.states is not None
        call.snapshot(len(handles))
        return handle

    chosen = pack if recorder is None else pack_recorded
    return by_reference(chosen, call.block.partitioned) if call.block.partitioned else chosen


def park_and_snapshot(call: Call) -> Callable[[torch.Tensor], Handle]:
    """`park`, taking the generators' states where recipes need them."""
    handles = call.handles
    assert call.compiled is not None
    wanted = frozenset(call.compiled.snapshots)

    def pack(tensor: torch.Tensor) -> Handle:
        handle = Handle(tensor.detach(), len(handles))
        handles.append(handle)
        if len(handles) in wanted:
            call.snapshot(len(handles))
        return handle

    return by_reference(pack, call.block.partitioned) if call.block.partitioned else pack
