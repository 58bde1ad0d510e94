"""FLOPs of a forward and of the backward that it asks for, counted while the forward runs.

A multiplication and an addition are two; what is counted, and how, is what torch's flop counter counts. The backward of
an op follows from the op: a matrix product has one more for each operand that needs a gradient. So nothing has to be
watched while the backward runs, and what a plan recomputes there is not part of the count.

NOTE [Counting beside blocks]: a fitted block steps aside where a dispatch mode is active, and a recorder runs every op
twice. So the counter is taken off the stack of modes around the hooks of a block, and while a recorder is on it: then
the recorder shows it each op once.

NOTE [Unseen by torch.compile]: Dynamo compiles nothing while a mode is entered, and a function that it has skipped once
stays uncompiled. So the counter is put on the stack, and taken off it, without what `TorchDispatchMode` does beside.
"""

from __future__ import annotations

import math
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils.flop_counter import flop_registry

from memfit.programs import Program, ProgramOp, Ref

_aten = torch.ops.aten
_OPERANDS = {_aten.mm: (0, 1), _aten.addmm: (1, 2), _aten.bmm: (0, 1), _aten.baddbmm: (1, 2)}
"""Of products of two matrices: which arguments are multiplied."""
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention: _aten._scaled_dot_product_flash_attention_backward,
    _aten._scaled_dot_product_efficient_attention: _aten._scaled_dot_product_efficient_attention_backward,
    _aten._scaled_dot_product_cudnn_attention: _aten._scaled_dot_product_cudnn_attention_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention_backward,
}
_ALIKE = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _aten._scaled_dot_product_flash_attention_backward,
}
"""CPU's kernels have no formulas of their own in torch."""
_QUANTIZED = "bitsandbytes.gemm_4bit"
"""A product inside a custom autograd Function, whose backward is one with the gradient of its output."""
_CONVOLUTION = _aten.convolution
_is_forward: dict[CodeType, bool] = {}
_local = threading.local()


@dataclass(slots=True)
class Count:
    """What one forward of a model showed.

    Attributes:
        forward, backward: FLOPs by the dtype of the operands.
        by_place: FLOPs of the forward by block, under its name; under "" what lies outside the blocks.
        exact: Whether all of it could be counted.
    """

    forward: dict[torch.dtype, float] = field(default_factory=dict)
    backward: dict[torch.dtype, float] = field(default_factory=dict)
    by_place: dict[str, float] = field(default_factory=dict)
    exact: bool = True

    @property
    def flops(self) -> float:
        """Of forward and backward."""
        return sum(self.forward.values()) + sum(self.backward.values())


def formula_of(packet: Any) -> Any:
    """The formula for an op, mostly torch's; ``None`` where there is none."""
    if packet not in flop_registry and str(packet) == _QUANTIZED:
        return _quantized_flops
    return flop_registry.get(_ALIKE.get(packet, packet))


def _quantized_flops(x: Any, weight: Any, shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Of ``x`` with a weight of ``shape``, which is packed."""
    rows, columns = shape
    size = x.shape if isinstance(x, torch.Tensor) else x
    return 2 * math.prod(size[:-1]) * rows * columns


def op_flops(packet: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> float:
    """FLOPs of an op, a multiplication and an addition being two; 0 where there is no formula.

    Args:
        packet: The op.
        args, kwargs, out: Of its call: tensors, or their sizes.
    """
    formula = formula_of(packet)
    if formula is None:
        return 0.0
    shaped = _as_many_heads(args) if "scaled_dot_product" in str(packet) else args
    return float(formula(*shaped, **kwargs, out_val=out))


def _as_many_heads(args: Sequence[Any]) -> list[Any]:
    """Shapes of attention with a head of keys and values for each of its queries: not every formula knows groups."""
    shapes = [arg.shape if isinstance(arg, torch.Tensor) else arg for arg in args]
    found = [i for i, shape in enumerate(shapes) if isinstance(shape, torch.Size) and len(shape) == 4]
    heads = max((shapes[i][1] for i in found), default=0)
    for i in found:
        batch, own, *rest = shapes[i]
        shapes[i] = torch.Size((batch, own if own == 1 else heads, *rest))
    return shapes


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what one forward does. On the stack of modes from `begin` to `end`, but around blocks' hooks.

    Attributes:
        count: What was seen so far.
        place: Name of the block whose forward runs, or "".
        owner: Who began it, if that is still there.
    """

    supports_higher_order_operators = True

    def __init__(self, owner: object) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = Count()
        self.place = ""
        self.owner = weakref.ref(owner)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """See NOTE [Unseen by torch.compile]."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.see(func, args, kwargs, out)
        return out

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """An op has run."""
        packet = getattr(func, "_overloadpacket", None)
        if packet is None:  # a higher-order operator: what it runs is not shown
            self.count.exact = False
            return
        if formula_of(packet) is None:
            return
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if any(hasattr(tensor, "placements") for tensor in tensors):
            self.count.exact = False  # a DTensor: its shape is that of all ranks together
            return
        try:
            flops = op_flops(packet, args, kwargs, out)
            backward = self._backward(packet, args, out, flops) if torch.is_grad_enabled() else None
        except Exception:  # a formula that does not know this case is no reason to stop a training step
            self.count.exact = False
            return
        dtype = tensors[0 if str(packet) == _QUANTIZED else -1].dtype
        _add(self.count.forward, dtype, flops)
        _add(self.count.by_place, self.place, flops)
        if str(packet) == _QUANTIZED:
            _add(self.count.backward, dtype, flops if tensors[0].requires_grad else 0.0)
        elif backward is not None:
            _add(self.count.backward, dtype, backward)
        elif _is_inside_function():
            self.count.exact = False  # its backward is its own

    def _backward(self, packet: Any, args: tuple[Any, ...], out: Any, flops: float) -> float:
        """FLOPs of the gradients that an op's arguments ask for."""
        if packet in _OPERANDS:
            return flops * sum(bool(args[place].requires_grad) for place in _OPERANDS[packet])
        needed = [isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args[:3]]
        if not any(needed):
            return 0.0
        if packet in _ATTENTION:
            return op_flops(_ATTENTION[packet], (args[0], *args[:3]), {}, None)
        if packet is _CONVOLUTION:
            x, weight, bias, *rest = args
            mask = [needed[0], needed[1], False]
            return float(
                flop_registry[_aten.convolution_backward](
                    out, x, weight, bias, *rest, mask, out_val=(x if mask[0] else None, weight if mask[1] else None)
                )
            )
        self.count.exact = False
        return 0.0


def _is_inside_function() -> bool:
    """Whether a custom autograd Function's forward runs, compiled code's too; those of Memfit count themselves.

    Told by the code that runs: from torch 2.14 on `Function.apply` is no Python frame.
    """
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    if any(each.f_code not in _is_forward for each in frames):
        codes = set(_forwards(torch.autograd.Function))
        for each in frames:
            _is_forward.setdefault(each.f_code, each.f_code in codes)
    inside = next((each for each in frames if _is_forward[each.f_code]), None)
    return inside is not None and not str(inside.f_globals.get("__name__")).startswith("memfit.")


def _forwards(base: type[Any]) -> Iterator[CodeType]:
    """Of all classes derived from ``base``, the code of their forwards."""
    for kind in base.__subclasses__():
        code = getattr(getattr(kind, "forward", None), "__code__", None)
        if code is not None:
            yield code
        yield from _forwards(kind)


def _add(counts: dict[Any, float], key: Any, flops: float) -> None:
    counts[key] = counts.get(key, 0.0) + flops


# While a forward is counted


def current() -> FlopCounter | None:
    """The counter of the forward that runs in this thread."""
    counter: FlopCounter | None = getattr(_local, "counter", None)
    return counter


def begin(owner: object) -> None:
    """A forward begins, and is counted for ``owner``."""
    end()  # of one that a KeyboardInterrupt ended
    counter = _local.counter = FlopCounter(owner)
    _push_mode(counter)


def end() -> Count | None:
    """The forward is over: what it showed, or ``None`` if none was counted."""
    counter = current()
    if counter is None:
        return None
    _local.counter = None
    above = []
    if counter in _get_current_dispatch_mode_stack():
        while (mode := _pop_mode()) is not counter:  # that somebody entered and did not leave
            above.append(mode)
    for mode in reversed(above):
        _push_mode(mode)
    return counter.count


def suspend() -> None:
    """Take the counter off the stack of modes, if it is on top. See NOTE [Counting beside blocks]."""
    counter = current()
    if counter is not None and _top() is counter:
        _pop_mode()


def enter(block: str) -> None:
    """The hook before a block's forward is over: what comes is the block's."""
    counter = current()
    if counter is not None:
        counter.place = counter.place or block
        _resume(counter)


def leave(block: str) -> None:
    """The hook after a block's forward is over."""
    counter = current()
    if counter is not None:
        counter.place = "" if counter.place == block else counter.place
        _resume(counter)


def _resume(counter: FlopCounter) -> None:
    stack = _get_current_dispatch_mode_stack()
    if counter not in stack and not any(getattr(mode, "shows_flops", False) for mode in stack):
        _push_mode(counter)


def _top() -> Any:
    stack = _get_current_dispatch_mode_stack()
    return stack[-1] if stack else None


# What recipes run again


def program_flops(program: Program) -> list[float] | None:
    """FLOPs of each op of a recorded program; ``None`` where a formula wants more than sizes."""
    try:
        return [_flops_of(program, op) for op in program.ops]
    except Exception:  # anybody's formula
        return None


def _flops_of(program: Program, op: ProgramOp) -> float:
    packet = op.func._overloadpacket
    if formula_of(packet) is None:
        return 0.0
    made = torch.Size(program.nodes[op.outputs[0][1]].value.size)
    return op_flops(packet, _shapes(op.args), _shapes(op.kwargs), made)


def _shapes(template: Any) -> Any:
    """An argument template with sizes in the place of tensors, as flop formulas take them."""
    if isinstance(template, Ref):
        return torch.Size(template.value.size)
    if isinstance(template, (tuple, list)):
        return [_shapes(item) for item in template]
    if isinstance(template, dict):
        return {key: _shapes(item) for key, item in template.items()}
    return template
