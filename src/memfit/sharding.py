"""Parameters that are there only around a block's own forward and backward: FSDP2, FSDP, ZeRO-3 (design, rule 8).

FSDP2 puts plain parameters into a module before its forward and sharded ones (DTensors) afterwards. The plain ones stay
the same objects; what goes and comes is the memory of their storages. So a recipe may hold the object, as autograd
does, and hold no memory by it; before the backward of the block FSDP gathers into that same storage, at another
address. Nothing here communicates.
"""

from __future__ import annotations

import contextlib
import math
import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from memfit.partitioned import engine_class

Modules = Iterable["weakref.ref[torch.nn.Module]"]


def _fsdp_class() -> type | None:
    """FSDP2's mixin, if somebody has imported it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    found: type | None = getattr(fsdp, "FSDPModule", None)
    return found


def _is_wrapped(module: torch.nn.Module) -> bool:
    if hasattr(module, "_get_fsdp_state") or "_fsdp_wrapped_module" in module._modules:
        return True
    return hasattr(next(module.parameters(recurse=False), None), "ds_id")


def is_sharded(module: torch.nn.Module, above: Modules = ()) -> bool:
    """Whether parameters of a block may be gone outside its own forward and backward.

    Args:
        module: The block.
        above: The modules that it is in: what wraps one of them may shard the block's parameters with its own.
    """
    for reference in above:
        parent = reference()
        if parent is not None and _is_wrapped(parent):
            return True
    return any(_is_wrapped(child) for child in module.modules())


def shards_inside(module: torch.nn.Module) -> bool:
    """Whether parts of a block are gathered and freed on their own while it runs."""
    fsdp = _fsdp_class()
    return fsdp is not None and any(isinstance(c, fsdp) for c in module.modules() if c is not module)


def place_of(tensor: torch.Tensor) -> int:
    """The storage of a parameter that is sharded; 0 while it has no memory.

    Not its address: that changes with every gathering, while the storage stays the one that autograd holds too. A
    parameter that was given other data (``.data = ``) has another.
    """
    storage = tensor.untyped_storage()
    return int(storage._cdata) if storage.nbytes() or not tensor.numel() else 0


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    shard = getattr(tensor, "_local_tensor", None)
    return shard if isinstance(shard, torch.Tensor) else tensor


def as_dtensor(tensor: torch.Tensor, layout: Any) -> torch.Tensor:
    """The DTensor whose local tensor is ``tensor``; ``layout`` as another DTensor has it."""
    from torch.distributed.tensor import DTensor

    made: torch.Tensor = DTensor(tensor, layout, requires_grad=False)  # type: ignore[no-untyped-call]
    return made


def class_name(module: torch.nn.Module) -> str:
    """Of the user's class: `fully_shard` makes a subclass of it, with another name."""
    kind = type(module)
    fsdp = _fsdp_class()
    if fsdp is not None and len(kind.__bases__) == 2 and kind.__bases__[0] is fsdp:
        kind = kind.__bases__[1]
    return kind.__name__


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside `DistributedDataParallel` or DeepSpeed's engine: the same blocks, with the user's names."""
    engine = engine_class()
    while isinstance(model, torch.nn.parallel.DistributedDataParallel) or (engine and isinstance(model, engine)):
        model = model.module  # type: ignore[assignment]
    return model


def owned_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that an optimizer steps and gradients are kept for: under FSDP2 the shards, gathered or not."""
    shards = {id(full): shard for full, shard in _shards(model)}
    return [shards.get(id(parameter), parameter) for parameter in model.parameters()]


def mesh_ranks(model: torch.nn.Module) -> tuple[int, ...]:
    """The ranks among which parameters of ``model`` are sharded or replicated; empty where they are plain tensors."""
    ranks: set[int] = set()
    for parameter in owned_parameters(model):
        mesh: Any = getattr(parameter, "device_mesh", None)
        if mesh is not None:
            ranks.update(mesh.mesh.flatten().tolist())
    return tuple(sorted(ranks))


def mesh_shape(model: torch.nn.Module) -> tuple[int, ...]:
    """The shape of the largest device mesh that parameters lie on; empty where they are plain tensors."""
    meshes: list[Any] = [getattr(parameter, "device_mesh", None) for parameter in owned_parameters(model)]
    shapes = {tuple(mesh.mesh.shape) for mesh in meshes if mesh is not None}
    return max(shapes, key=lambda shape: (math.prod(shape), shape), default=())


def _groups(module: torch.nn.Module) -> list[Any]:
    state: Any = module._get_fsdp_state()  # type: ignore[operator]
    return list(getattr(state, "_fsdp_param_groups", None) or filter(None, [getattr(state, "_fsdp_param_group", None)]))


@contextlib.contextmanager
def unreduced(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Steps whose gradients stay on their rank: DDP's `no_sync`, FSDP2's `set_requires_gradient_sync(False)`.

    Args:
        modules: Of those that `reduces_gradients` says.
    """
    with contextlib.ExitStack() as stack:
        for module in modules:
            if isinstance(module, torch.nn.parallel.DistributedDataParallel):
                stack.enter_context(module.no_sync())
                continue
            for group in _groups(module):
                for name in ("reduce_grads", "all_reduce_grads"):
                    if hasattr(group, name):
                        stack.callback(setattr, group, name, getattr(group, name))
                        setattr(group, name, False)
        yield


def reduces_gradients(module: torch.nn.Module) -> bool:
    """Whether it is DDP, or sharded by FSDP2."""
    fsdp = _fsdp_class()
    ddp = isinstance(module, torch.nn.parallel.DistributedDataParallel)
    return ddp or (fsdp is not None and isinstance(module, fsdp))


def _shards(model: torch.nn.Module) -> Iterator[tuple[Any, torch.nn.Parameter]]:
    """Each gathered parameter of FSDP2 with its shard."""
    fsdp = _fsdp_class()
    if fsdp is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp):
            for group in _groups(module):
                for each in getattr(group, "fsdp_params", ()):
                    yield getattr(each, "_unsharded_param", None), each.sharded_param
