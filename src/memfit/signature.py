"""What a block call looks like from outside: the key under which its recording is found again.

A recording holds for calls with the same signature: tensor arguments by shape, stride, dtype, device and
``requires_grad``, how they alias each other and the parameters, other arguments by value, the training flag, which
parameters train, autocast and numeric flags. Objects count by class and fields, see `flatten`. What the block
*is* (submodules, hooks, plain attributes, configs) is watched separately by `Watch`, once per forward of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch

from memfit.programs import LeafKind

_PLAIN = (torch.Tensor, torch.nn.Parameter)
MAX_DEPTH = 3
SCALARS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, complex, Enum)


def flatten(
    structure: Any, tensors: list[torch.Tensor], key: list[Any], fields: list[Any] | None = None, depth: int = 0
) -> None:
    """Collect the tensors of nested arguments, and a hashable description of the rest.

    Args:
        structure: The arguments.
        tensors: Is added to.
        key: Is added to; of objects, their classes.
        fields: Is added to, where there is one: what objects hold. Of dataclasses and namespaces all, tensors too; of
            others, the plain values among their attributes.
        depth: Of objects inside objects.
    """
    if isinstance(structure, torch.Tensor):
        tensors.append(structure)
        key.append("T")
    elif isinstance(structure, SCALARS):
        key.append(structure)
    elif isinstance(structure, (tuple, list)):
        key.append(len(structure))
        for item in structure:
            flatten(item, tensors, key, fields, depth)
    elif isinstance(structure, dict):
        key.append(len(structure))
        for name, item in structure.items():
            key.append(name if isinstance(name, str) else repr(name))
            flatten(item, tensors, key, fields, depth)
    elif isinstance(structure, (slice, range)):
        key.append((type(structure), structure.start, structure.stop, structure.step))
    else:
        key.append(type(structure))
        if fields is not None and depth < MAX_DEPTH:
            _flatten_fields(structure, tensors, fields, depth + 1)


def _flatten_fields(structure: Any, tensors: list[torch.Tensor], fields: list[Any], depth: int) -> None:
    if is_dataclass(structure) and not isinstance(structure, type):
        whole = {field.name: getattr(structure, field.name, None) for field in dataclass_fields(structure)}
    elif isinstance(structure, SimpleNamespace):
        whole = vars(structure)
    else:
        fields.extend(plain_attributes(structure).items())
        return
    for name, value in whole.items():
        fields.append(name)
        flatten(value, tensors, fields, fields, depth)


def plain_attributes(structure: Any) -> dict[str, Any]:
    """The attributes of an object that are plain values; of a function or class none."""
    attributes = getattr(structure, "__dict__", None)
    if not isinstance(attributes, dict) or callable(structure):
        return {}
    return {name: value for name, value in attributes.items() if isinstance(value, SCALARS)}


def output_tensors(output: Any) -> list[torch.Tensor]:
    """The tensors that a block returned, in order (model outputs of Hugging Face are ordered mappings)."""
    tensors: list[torch.Tensor] = []
    _collect(output, tensors)
    return tensors


def _collect(structure: Any, tensors: list[torch.Tensor]) -> None:
    if isinstance(structure, torch.Tensor):
        tensors.append(structure)
    elif isinstance(structure, (tuple, list)):
        for item in structure:
            _collect(item, tensors)
    elif isinstance(structure, dict):
        for item in structure.values():
            _collect(item, tensors)


_GETTERS = (
    torch.get_num_threads,
    torch.get_default_dtype,
    torch._C._get_deterministic_algorithms,
    torch._C._get_float32_matmul_precision,
    torch._C._get_cudnn_allow_tf32,
    torch._C._get_mkldnn_enabled,
)


def numeric_flags() -> tuple[Any, ...]:
    """Global settings that change what an op computes."""
    return tuple([getter() for getter in _GETTERS])


@contextmanager
def set_numeric_flags(flags: tuple[Any, ...]) -> Iterator[None]:
    """Run with the flags of an earlier `numeric_flags`."""
    before = numeric_flags()
    _set_flags(flags)
    try:
        yield
    finally:
        _set_flags(before)


def _set_flags(flags: tuple[Any, ...]) -> None:
    """Set what differs, and only that: other threads see these too."""
    for flag, value, setter in zip(numeric_flags(), flags, _SETTERS, strict=True):
        if flag != value:
            setter(value)


def _set_deterministic(on: bool) -> None:
    torch.use_deterministic_algorithms(on, warn_only=torch.is_deterministic_algorithms_warn_only_enabled())


def _set_tf32(on: bool) -> None:
    torch.backends.cudnn.allow_tf32 = on


def _set_mkldnn(on: bool) -> None:
    torch.backends.mkldnn.enabled = on  # type: ignore[assignment]  # a property of the module object


_SETTERS: tuple[Callable[[Any], None], ...] = (
    torch.set_num_threads,
    torch.set_default_dtype,
    _set_deterministic,
    torch.set_float32_matmul_precision,
    _set_tf32,
    _set_mkldnn,
)


def autocast_state(device_type: str) -> Any:
    """The dtype that autocast casts to on a device, or ``None`` where it is off."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def call_key(
    arguments: list[Any],
    fields: list[Any],
    tensors: list[torch.Tensor],
    training: bool,
    own: dict[int, int],
    flags: tuple[Any, ...],
) -> tuple[Any, ...]:
    """The signature of a call; its last item is what objects among the arguments hold.

    Args:
        arguments: As `flatten` describes them.
        fields: Likewise, of objects.
        tensors: As `flatten` collects them.
        training: The block's flag.
        own: Where the block's parameters and buffers lie, see `storages_of`.
        flags: See `numeric_flags`.
    """
    device = tensors[0].device.type if tensors else "cpu"
    return tuple(arguments), describe(tensors, own), training, autocast_state(device), flags, tuple(fields)


def describe(tensors: list[torch.Tensor], own: dict[int, int]) -> tuple[Any, ...]:
    """Shapes, strides, dtypes, devices, ``requires_grad`` and the alias pattern of tensor arguments."""
    pointers: dict[int, int] = {}
    parts: list[Any] = []
    for i, t in enumerate(tensors):
        parts.append((t.shape, t.stride(), t.dtype, t.device, t.requires_grad, type(t)))
        if type(t) not in _PLAIN:
            continue  # a block that is given one is not replayed
        storage = storage_start(t)
        first = pointers.setdefault(storage, i)
        if first != i:
            parts.append((first, t.storage_offset() - tensors[first].storage_offset()))
        elif storage in own:
            parts.append(("own", own[storage], t.storage_offset()))
    return tuple(parts)


def storage_start(tensor: torch.Tensor) -> int:
    """Where the storage of a strided tensor begins."""
    start: int = tensor.data_ptr() - tensor.storage_offset() * tensor.element_size()  # type: ignore[assignment]  # no SymInt
    return start


def storages_of(slots: dict[tuple[str, str], tuple[LeafKind, dict[str, Any]]]) -> dict[int, int]:
    """Where parameters and buffers lie now, to be compared with arguments."""
    found: dict[int, int] = {}
    for number, ((_, name), (_, dictionary)) in enumerate(slots.items()):
        tensor = dictionary.get(name)
        if tensor is not None and type(tensor) in _PLAIN and tensor.layout is torch.strided and tensor.numel():
            found.setdefault(storage_start(tensor), number)
    return found


class Watch:
    """Notices that a block is no longer what it was: a submodule, hook, patched forward or plain attribute changed.

    `unchanged` compares dictionaries by their items, which Python does in C and, for the usual identical values, by
    identity. Configs (objects with a ``__dict__`` among the attributes) are watched one level deep.
    """

    __slots__ = ("_configs", "_copies", "_nested", "_trainable", "trainable")

    def __init__(self, module: torch.nn.Module) -> None:
        """Take the snapshot of ``module`` and its submodules."""
        self._copies: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._nested: list[tuple[Any, Any]] = []  # dictionaries and lists among the attributes, and their copies
        self._configs: list[tuple[dict[str, Any], dict[str, Any]]] = []
        seen: set[int] = set()
        for child in module.modules():
            attributes = child.__dict__
            self._copies.append((attributes, dict(attributes)))
            for name in _NESTED:
                nested = attributes.get(name)
                if isinstance(nested, dict):
                    self._nested.append((nested, dict(nested)))
            for value in attributes.values():
                inner = getattr(value, "__dict__", None)
                if (
                    isinstance(inner, dict)
                    and not isinstance(value, (torch.nn.Module, torch.Tensor, type))
                    and id(inner) not in seen
                ):
                    if not callable(value):
                        seen.add(id(inner))
                        self._configs.append((inner, dict(inner)))
                elif isinstance(value, (dict, list)) and value is not attributes and id(value) not in seen:
                    seen.add(id(value))
                    if not any(value is n for n, _ in self._nested):
                        self._nested.append((value, value.copy()))
        self._trainable = list(module.parameters())
        self.trainable = tuple(p.requires_grad for p in self._trainable)

    def unchanged(self) -> bool:
        """Whether the block is still what it was when the snapshot was taken."""
        try:
            for now, then in self._copies:
                if now != then:
                    return False
            for now, then in self._nested:
                if now != then:
                    return False
            for now, then in self._configs:
                if now != then:
                    return False
        except (RuntimeError, ValueError, TypeError):
            return False  # a tensor attribute was exchanged: its comparison is no bool
        return self.trainable == tuple([p.requires_grad for p in self._trainable])


_NESTED = ("_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def parameter_slots(module: torch.nn.Module) -> dict[tuple[str, str], tuple[LeafKind, dict[str, Any]]]:
    """By submodule and name, every parameter and buffer: its kind, and the dictionary where a forward looks it up."""
    slots: dict[tuple[str, str], tuple[LeafKind, dict[str, Any]]] = {}
    for owner, child in module.named_modules(remove_duplicate=True):
        for name, value in child._parameters.items():
            if value is not None:
                slots[owner, name] = ("parameter", child._parameters)
        for name, value in child._buffers.items():
            if value is not None:
                slots[owner, name] = ("buffer", child._buffers)
    return slots
