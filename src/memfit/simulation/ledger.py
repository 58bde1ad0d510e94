"""What is alive at each moment of a step on fake tensors, and what was computed so far."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.flops import op_flops
from memfit.sharding import local
from memfit.signature import tensors_in
from memfit.simulation.traffic import Traffic

_WAIT = "_c10d_functional::wait_tensor"
OpSeconds = Callable[[str, float, float, torch.dtype], float]
"""Seconds of an op from its aten name, FLOPs, bytes read and written, and dtype."""


class Watcher(Protocol):
    """Somebody who wants to know of storages."""

    def came(self, key: int, size: int) -> None:
        """A storage is there."""

    def went(self, key: int) -> None:
        """A storage is gone."""


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every op. A storage counts from the op that makes it until nothing holds it any more.

    Attributes:
        now: Bytes that are alive.
        peak: The most of them since `reset_peak`.
        flops: Of all ops so far: a multiplication and an addition are two.
        seconds: Of all ops so far.
        looked_at_values: Whether Python asked for a value, which was answered with false, zero or 1.0.
        repeats: How many ops each one stands for.
        watcher: Is told of storages that come and go, by a number and their bytes.
    """

    def __init__(self, op_seconds: OpSeconds, *, traffic: Traffic | None = None) -> None:
        """Begin; ``traffic`` takes down what devices send each other, which takes no seconds here."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self.flops = 0.0
        self.seconds = 0.0
        self.looked_at_values = False
        self.repeats = 1
        self.watcher: Watcher | None = None
        self._op_seconds = op_seconds
        self._traffic = traffic
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._sizes: dict[int, int] = {}

    def see(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count the storages of tensors that were there before."""
        for tensor in tensors:
            self._see(tensor)

    def _see(self, tensor: torch.Tensor) -> bool:
        storage = _inside(tensor).untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return False
        size = storage.nbytes()

        def gone(_: object) -> None:
            del self._alive[key]
            self.now -= self._sizes.pop(key)
            if self.watcher is not None:
                self.watcher.went(key)

        self._alive[key] = weakref.ref(storage, gone)  # torch keeps the Python object as long as the storage lives
        self._sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        if self.watcher is not None:
            self.watcher.came(key, size)
        return True

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage was given other memory: see `resizes_seen`."""
        before = self._sizes.get(storage._cdata)
        if before is not None:
            self._sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes() - before
            self.peak = max(self.peak, self.now)

    def disregard(self, tensors: Iterable[torch.Tensor]) -> int:
        """Count storages that were seen as nothing, as long as they live; returns what they took."""
        before = self.now
        for key in {local(tensor).untyped_storage()._cdata for tensor in tensors} & self._sizes.keys():
            self.now -= self._sizes[key]
            self._sizes[key] = 0
        return before - self.now

    def grow(self, size: int) -> None:
        """Count bytes that are no tensor's here."""
        self.now += size
        self.peak = max(self.peak, self.now)

    def reset_peak(self) -> None:
        """Begin a new peak."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a DTensor: what it does with its local one is seen
        if self._traffic is not None and func._schema.name == _WAIT and isinstance(args[0], FakeTensor):
            return args[0]  # as it does; its fake kernel makes another tensor
        try:
            out = func(*args, **kwargs)
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            return self._value_of(args[0])
        results = [out] if isinstance(out, torch.Tensor) else out if isinstance(out, (tuple, list)) else ()
        made = [self._see(result) for result in results if isinstance(result, torch.Tensor)]
        if self._traffic is not None:
            if func.namespace == "c10d":
                self._traffic.sent(func._schema.name, args, self.seconds)
                return out
            if func.namespace == "_c10d_functional":
                self.seconds += self._traffic.waited(func._schema.name, args, results)
                return out
            if func._schema.name == "fsdp::split_with_sizes_copy":
                self._traffic.wait(args[0].untyped_storage()._cdata, self.seconds)
        if any(made) or func._schema.is_mutable:
            self._count(func, args, kwargs, out)
        return out

    def narrow_seconds(
        self, device: torch.device, num_bytes: int, dtype: torch.dtype, narrow: torch.dtype | None
    ) -> float:
        """Of the device that is predicted, as `narrowing.NarrowSeconds`: two casts, and a mask's product in place."""
        moved = num_bytes + num_bytes // dtype.itemsize * (narrow or torch.bool).itemsize
        seconds = 2 * self._op_seconds("aten::_to_copy", 0.0, moved, dtype)
        return seconds if narrow is not None else seconds + self._op_seconds("aten::mul_", 0.0, 2 * num_bytes, dtype)

    def _value_of(self, tensor: torch.Tensor) -> Any:
        """Nobody knows: false, zero, or 1.0. So a mask does have padding, where a model asks whether it has none."""
        self.looked_at_values = True
        return False if tensor.dtype is torch.bool else 1.0 if tensor.dtype.is_floating_point else 0

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        flops = op_flops(func._overloadpacket, args, kwargs, out)
        tensors = {id(t): t for t in tensors_in((args, kwargs, out))}
        moved = sum(t.numel() * t.element_size() for t in tensors.values())
        dtype = next((t.dtype for t in tensors.values() if t.dtype.is_floating_point), torch.float32)
        self.flops += flops * self.repeats
        self.seconds += self._op_seconds(func._schema.name, flops, moved, dtype) * self.repeats


def _inside(tensor: torch.Tensor) -> torch.Tensor:
    """What a wrapper shows: the shard of a DTensor, what a collective that is under way will give."""
    under_way = getattr(tensor, "elem", None)
    return local(under_way if isinstance(under_way, torch.Tensor) else tensor)


@contextlib.contextmanager
def resizes_seen(ledger: Ledger) -> Iterator[None]:
    """FSDP2 frees and gathers parameters by resizing their storages, which no dispatch mode sees."""
    kind = torch.UntypedStorage
    original, own = kind.resize_, "resize_" in vars(kind)

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        result = original(storage, size)
        ledger.resized(storage)
        return result

    setattr(kind, "resize_", resize_)  # noqa: B010
    try:
        yield
    finally:
        if own:
            setattr(kind, "resize_", original)  # noqa: B010
        else:
            delattr(kind, "resize_")  # inherited
