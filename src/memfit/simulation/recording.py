"""Record a block's program on fake tensors: what `trace` records, less what only values could show.

There are no bits to compare, so an op is trusted if it is on the allow-list; the live recording that comes before a
plan is applied verifies it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from memfit import ops
from memfit.programs import Leaf, ProgramOp
from memfit.signature import Slots
from memfit.simulation.ledger import Ledger
from memfit.storages import Storages
from memfit.trace import Recorder


class FakeStorages(Storages):
    """Storages without contents."""

    plain = (torch.Tensor, torch.nn.Parameter, FakeTensor)

    def constant(self, number: int, tensor: torch.Tensor) -> object:
        return None

    def copy(self, tensor: torch.Tensor) -> torch.Tensor | None:
        return None

    def _finish_node(self, number: int, op: ProgramOp, tensor: torch.Tensor) -> None:
        return

    def _highest(self, tensor: torch.Tensor) -> float:
        return 1.0  # some number: what plans use is that there is only one


class FakeRecorder(Recorder):  # type: ignore[no-untyped-call]
    """A recorder whose ops take as long as the ledger says.

    Attributes:
        flops: Of each op of the program.
    """

    make_storages = FakeStorages

    def __init__(self, leaves: list[tuple[Leaf, torch.Tensor]], ledger: Ledger) -> None:
        super().__init__(leaves)
        self.flops: list[float] = []
        self._ledger = ledger

    def _record(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], site: Any) -> Any:
        num_ops, seconds, flops = len(self.program.ops), self._ledger.seconds, self._ledger.flops
        out = super()._record(func, args, kwargs, site)
        if len(self.program.ops) > num_ops:
            self.program.ops[-1].seconds = self._ledger.seconds - seconds
            self.flops.append(self._ledger.flops - flops)
        return out

    def __enter__(self) -> FakeRecorder:
        TorchDispatchMode.__enter__(self)  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        TorchDispatchMode.__exit__(self, *exc)  # type: ignore[no-untyped-call]
        self.leaves = []

    def _watch(self, device: torch.device) -> None:
        return None  # nothing runs

    def _generator_state(self, device: torch.device) -> torch.Tensor | None:
        return None  # nothing is drawn

    def _verify(self, op: ProgramOp, func: OpOverload, args: Any, kwargs: Any, *rest: Any) -> bool | None:
        op.func, purified, _ = ops.purify(func, args, kwargs)
        if op.func is not func or purified is not args:
            op.args = ops.purify(func, op.args, op.kwargs)[1]
        return True


def leaves_of(
    tensors: Sequence[torch.Tensor], slots: Slots, reads: Callable[[torch.Tensor], bool]
) -> list[tuple[Leaf, torch.Tensor]]:
    """What a block is given and recipes may read: tensors, and parameters and buffers that ``reads`` allows."""
    leaves = [(Leaf("input", i, "", ""), tensor) for i, tensor in enumerate(tensors)]
    for (owner, name), (kind, dictionary) in slots.items():
        if reads(dictionary[name]):
            leaves.append((Leaf(kind, -1, owner, name), dictionary[name]))
    return leaves
