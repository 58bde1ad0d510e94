"""ZeRO-3: parameters that DeepSpeed gathers around a module's forward and backward, and takes away in between.

NOTE [Partitioned parameters]: other than FSDP2, which gathers into the storage that was there before, ZeRO-3 gives a
parameter another storage each time (``.data = ``), or the empty one. So

- autograd's reference to such a parameter stays one to the parameter, as it is without hooks. An alias of what it
  showed in the forward would keep the gathered weights of all blocks alive;
- recipes read none. A module's parameters are there when the backward comes to that module, not when it comes to the
  block. What a matrix product made is therefore saved, and what follows from it is recomputed;
- small ones that DeepSpeed leaves in place (``stage3_param_persistence_threshold``) are read where they were there
  when the block began, as the tensors they were then: a block whose norms are there has another signature than one
  whose norms are not;
- whether a block runs again as a whole, which gathers its parameters again, follows from what `fit` was given, or from
  what all ranks decided together: a rank that gathers alone waits for ever.

Nothing here imports DeepSpeed; parameters and modules tell by the attributes that it gave them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from memfit.frames import Handle

WHOLE = "ZeRO-3 gathers its parameters again"
_PURE = {("deepspeed.runtime.zero.linear", "LinearFunctionForZeroStage3")}
_RUNNING_AGAIN = -1  # numbers of modules begin at 0
_data_ptr = torch._C.TensorBase.data_ptr


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether ZeRO-3 has made it one of its own, gathered or not."""
    return hasattr(tensor, "ds_tensor")


def partitioned_in(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The partitioned parameters of a block."""
    return [parameter for parameter in module.parameters() if is_partitioned(parameter)]


def is_resident(tensor: torch.Tensor) -> bool:
    """Whether a partitioned parameter is there, and is of those that DeepSpeed leaves in place."""
    status = getattr(tensor, "ds_status", None)
    return getattr(tensor, "ds_persist", False) is True and getattr(status, "name", "") == "AVAILABLE"


def readable(tensor: torch.Tensor | None, residents: Mapping[int, torch.Tensor]) -> torch.Tensor | None:
    """A parameter or buffer as recipes read it; of partitioned ones only the ``residents``, by identity."""
    return residents.get(id(tensor)) if tensor is not None and is_partitioned(tensor) else tensor


def whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of a tensor, of a partitioned parameter that of all its parts together."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def only_reads(node: Any) -> bool:
    """Whether a custom autograd Function is known to leave what it saved as it is (rule 7)."""
    function = getattr(type(node), "_forward_cls", None)
    return (getattr(function, "__module__", ""), getattr(function, "__name__", "")) in _PURE


class ByReference:
    """What autograd keeps instead of a partitioned parameter: the parameter, whatever it shows when it is asked for."""

    __slots__ = ("parameter", "version")

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        self.parameter = parameter
        self.version: int = parameter._version

    @property
    def frame(self) -> ByReference:
        """As of a `Handle`."""
        return self

    def unpack(self, handle: object) -> torch.Tensor:
        """The parameter, if nothing was written to it: gathering gives it other memory, and no other version."""
        parameter = self.parameter
        if parameter._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"parameter {list(whole_shape(parameter))} is at version {parameter._version}; expected version "
                f"{self.version} instead."
            )
        return parameter.detach()


def by_reference(
    pack: Callable[[torch.Tensor], Handle], parameters: Iterable[torch.nn.Parameter]
) -> Callable[[torch.Tensor], Any]:
    """A pack hook that gives partitioned parameters to autograd as they are, and all else to ``pack``."""
    own = list(parameters)

    def pack_partitioned(tensor: torch.Tensor) -> Handle | ByReference:
        parameter = shown_by(tensor, own)
        return pack(tensor) if parameter is None else ByReference(parameter)

    return pack_partitioned


def shown_by(tensor: torch.Tensor, parameters: Iterable[torch.nn.Parameter]) -> torch.nn.Parameter | None:
    """The gathered parameter that ``tensor`` is all of, if it is one."""
    pointer = _data_ptr(tensor)
    if not pointer:
        return None
    for parameter in parameters:
        if _data_ptr(parameter) == pointer and parameter.shape == tensor.shape:
            if parameter.stride() == tensor.stride() and parameter.dtype is tensor.dtype:
                return parameter
    return None


@contextmanager
def staying(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """A block runs again within its backward: what the backward has gathered stays when the modules' forwards end."""
    there: list[tuple[Any, set[int]]] = [(p, set(users)) for p in parameters if (users := _users(p))]
    for parameter, _ in there:
        parameter.ds_active_sub_modules.add(_RUNNING_AGAIN)
    try:
        yield
    finally:
        for parameter, users in there:
            parameter.ds_active_sub_modules.update(users)
            parameter.ds_active_sub_modules.discard(_RUNNING_AGAIN)


def _users(parameter: Any) -> set[int]:
    """The modules for which a gathered parameter is there now."""
    users: set[int] = parameter.ds_active_sub_modules if parameter.ds_status.name == "AVAILABLE" else set()
    return users


# DeepSpeed's engine ---------------------------------------------------------------------------------------------------


def engine_class() -> type | None:
    """DeepSpeed's engine, if somebody has imported it."""
    found: type | None = getattr(sys.modules.get("deepspeed.runtime.engine"), "DeepSpeedEngine", None)
    return found


def engine_around(model: torch.nn.Module) -> Any:
    """The engine whose forward is running, if ``model`` is its module or in it; else ``None``."""
    kind = engine_class()
    frame = sys._getframe(1) if kind is not None else None
    while frame is not None:
        engine = frame.f_locals.get("self")
        if kind is not None and isinstance(engine, kind) and frame.f_code.co_name == "forward":
            found: Any = engine
            return found if any(module is model for module in found.module.modules()) else None
        frame = frame.f_back
    return None


def stepping(engine: Any) -> torch.optim.Optimizer | None:
    """The optimizer of torch's that an engine steps: of parameters of its own, which stand for the model's."""
    optimizer = getattr(engine, "optimizer", None)
    for _ in range(4):
        if optimizer is None or isinstance(optimizer, torch.optim.Optimizer):
            break
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
