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

Pack = Callable[[torch.Tensor], Handle]


def park(call: Call) -> Pack:
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

    return _watched(pack if recorder is None else pack_recorded, call)


def park_and_snapshot(call: Call) -> Pack:
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

    return _watched(pack, call)


def _watched(pack: Pack, call: Call) -> Pack:
    """A pack hook that also minds what the call's surroundings ask for."""
    if call.block.partitioned:
        pack = by_reference(pack, call.block.partitioned)
    if call.stream is None:
        return pack
    look = call.stream.look

    def look_and_pack(tensor: torch.Tensor) -> Handle:
        look()
        return pack(tensor)

    return look_and_pack
