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
from functools import partial
from numbers import Number
from types import SimpleNamespace
from typing import Any

import torch

from memfit.casts import autocast_state
from memfit.guards import guard_of
from memfit.programs import LeafKind
from memfit.quantized import PLAIN_TYPES, Statistics, statistics_of

Slots = dict[tuple[str, str], tuple[LeafKind, "dict[str, Any] | Statistics"]]
"""By submodule and name: what is there, and where it is looked up."""

MAX_DEPTH = 3
SCALARS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, complex, Enum)
_BY_VALUE = frozenset({str, bytes, type(None), torch.dtype, torch.device})
_NUMBERS = frozenset({bool, int, float, complex})


def read_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], *, objects: bool
) -> tuple[list[torch.Tensor], list[Any], list[Any]]:
    """What a call is given: its tensors, and the rest as `flatten` describes it; ``objects`` by what they hold."""
    tensors: list[torch.Tensor] = []
    key: list[Any] = []
    fields: list[Any] = []
    flatten(args, tensors, key, fields if objects else None)
    if kwargs:
        flatten(kwargs, tensors, key, fields if objects else None)
    return tensors, key, fields


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
    kind = type(structure)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        tensors.append(structure)
        key.append("T")
    elif kind is tuple or kind is list:
        key.append(len(structure))
        for item in structure:
            flatten(item, tensors, key, fields, depth)
    elif kind in _BY_VALUE:
        key.append(structure)
    elif kind in _NUMBERS:
        # Python takes 1, 1.0 and True for equal, and 0.0 and -0.0; recipes do not.
        key.append(kind)
        key.append(structure if structure and structure == structure else repr(structure))
    elif isinstance(structure, torch.Tensor):
        tensors.append(structure)
        key.append("T")
    elif isinstance(structure, (*SCALARS, Number)):  # subclasses, enumerations, numbers of other libraries
        key.append(kind)
        key.append(repr(structure) if isinstance(structure, Number) else structure)
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
        key.append((kind, structure.start, structure.stop, structure.step))
    else:
        key.append(kind)
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


def tensors_in(structure: Any) -> list[torch.Tensor]:
    """The tensors that a block returned or an op was given, in order (Hugging Face's outputs are ordered mappings)."""
    tensors: list[torch.Tensor] = []
    _collect(structure, tensors)
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


_KNOWN_CALLS = 4
"""Of each block: query and passage, chosen and rejected."""

_PRECISIONS = tuple((backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn"))
"""What `torch.backends.fp32_precision` and its kin come to. The older getters (`get_float32_matmul_precision`) raise
where somebody has used the newer setters, as transformers does for ``tf32=True``; these know of both."""

_GETTERS: tuple[Callable[[], Any], ...] = (
    torch.get_num_threads,
    torch.get_default_dtype,
    torch._C._get_deterministic_algorithms,
    torch._C._get_mkldnn_enabled,
    torch._C._get_cudnn_benchmark,
    torch._C._get_cudnn_deterministic,
    *(partial(torch._C._get_fp32_precision_getter, *place) for place in _PRECISIONS),
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


def _set_mkldnn(on: bool) -> None:
    torch.backends.mkldnn.enabled = on  # type: ignore[assignment]  # a property of the module object


_SETTERS: tuple[Callable[[Any], object], ...] = (
    torch.set_num_threads,
    torch.set_default_dtype,
    _set_deterministic,
    _set_mkldnn,
    torch._C._set_cudnn_benchmark,
    torch._C._set_cudnn_deterministic,
    *(partial(torch._C._set_fp32_precision_setter, *place) for place in _PRECISIONS),
)


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
    autocast = autocast_state()
    return tuple(arguments), describe(tensors), aliases(tensors, own), training, autocast, flags, tuple(fields)


class Signatures:
    """`call_key` of the calls of one block; those of the last few calls are found again without being built."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        """No call yet."""
        self._known: list[tuple[Any, list[Any], list[Any], tuple[Any, ...], tuple[Any, ...]]] = []

    def of(
        self,
        arguments: list[Any],
        fields: list[Any],
        tensors: list[torch.Tensor],
        training: bool,
        own: dict[int, int],
        flags: tuple[Any, ...],
    ) -> tuple[Any, ...]:
        """The signature; arguments as those of `call_key`."""
        autocast = autocast_state()
        pattern = aliases(tensors, own)
        state = (training, autocast, flags, pattern)
        for guard, known_arguments, known_fields, known_state, signature in self._known:
            if (
                arguments == known_arguments
                and fields == known_fields
                and state == known_state
                and guard.check(*tensors)
            ):
                return signature
        signature = call_key(arguments, fields, tensors, training, own, flags)
        if len(self._known) >= _KNOWN_CALLS:
            self._known.pop(0)
        self._known.append((guard_of(tensors), arguments, fields, state, signature))
        return signature


def describe(tensors: list[torch.Tensor]) -> tuple[Any, ...]:
    """Shapes, strides, dtypes, devices, ``requires_grad`` and classes of tensor arguments."""
    return tuple([(t.shape, t.stride(), t.dtype, t.device, t.requires_grad, type(t)) for t in tensors])


def aliases(tensors: list[torch.Tensor], own: dict[int, int]) -> tuple[Any, ...]:
    """Which tensor arguments share storage, with one another or with what the block owns."""
    seen: dict[int, int] = {}
    parts: list[Any] = []
    for i, t in enumerate(tensors):
        if type(t) not in PLAIN_TYPES:
            continue  # a block that is given one is not replayed
        storage = storage_start(t)
        first = seen.setdefault(storage, i)
        if first != i:
            parts.append((i, first, t.storage_offset() - tensors[first].storage_offset()))
        elif storage in own:
            parts.append((i, "own", own[storage], t.storage_offset()))
    return tuple(parts)


def storage_start(tensor: torch.Tensor) -> int:
    """Where the storage of a strided tensor begins."""
    start = tensor.data_ptr()
    offset: int = tensor.storage_offset()  # type: ignore[assignment]  # no SymInt
    return start - offset * tensor.element_size() if offset else start


def storages_of(slots: Slots) -> dict[int, int]:
    """Where parameters and buffers lie now, to be compared with arguments."""
    found: dict[int, int] = {}
    for number, ((_, name), (_, dictionary)) in enumerate(slots.items()):
        tensor = dictionary.get(name)
        if tensor is not None and type(tensor) in PLAIN_TYPES and tensor.layout is torch.strided and tensor.numel():
            found.setdefault(storage_start(tensor), number)
    return found


def pointers_of(slots: Slots) -> list[int]:
    """What `storages_of` depends on."""
    found: list[Any] = [dictionary.get(name) for (_, name), (_, dictionary) in slots.items()]
    return [t.data_ptr() if type(t) in PLAIN_TYPES and t.layout is torch.strided else 0 for t in found]


class Watch:
    """Notices that a block is no longer what it was: a submodule, hook, patched forward or plain attribute changed.

    `unchanged` compares dictionaries by their keys and values, which Python does in C and, for the usual identical
    values, by identity. Configs (objects with a ``__dict__`` among the attributes) are watched one level deep.
    """

    __slots__ = ("_empty", "_lists", "_tables", "_trainable", "trainable")

    def __init__(self, module: torch.nn.Module) -> None:
        """Take the snapshot of ``module`` and its submodules."""
        # NOTE [Snapshots]: tuples, not copies of dictionaries. A step touches so much memory that looking at a copy
        # means waiting for it; keys are shared between blocks, and of what is empty there is no copy at all.
        self._tables: list[tuple[dict[str, Any], tuple[Any, ...], tuple[Any, ...]]] = []
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._empty: list[Any] = []
        seen: set[int] = set()
        for child in module.modules():
            attributes = child.__dict__
            self._add(attributes, seen)
            for name in _NESTED:
                nested = attributes.get(name)
                if isinstance(nested, dict):
                    self._add(nested, seen)
            for name, value in attributes.items():
                if name in _OF_HOOKS:
                    continue
                inner = getattr(value, "__dict__", None)
                if isinstance(inner, dict) and not isinstance(value, (torch.nn.Module, torch.Tensor, type)):
                    if not callable(value):
                        self._add(inner, seen)
                elif isinstance(value, (dict, list)):
                    self._add(value, seen)
        self._trainable = list(module.parameters())
        self.trainable = tuple(p.requires_grad for p in self._trainable)

    def _add(self, container: dict[str, Any] | list[Any], seen: set[int]) -> None:
        if id(container) in seen:
            return
        seen.add(id(container))
        if not container:
            self._empty.append(container)
        elif isinstance(container, list):
            self._lists.append((container, container.copy()))
        else:
            names = tuple(container)
            if len(_shared) < _MAX_SHARED:
                names = _shared.setdefault(names, names)
            self._tables.append((container, names, tuple(container.values())))

    def unchanged(self) -> bool:
        """Whether the block is still what it was when the snapshot was taken."""
        if any(self._empty):
            return False
        try:
            for table, names, values in self._tables:
                if tuple(table.values()) != values or tuple(table) != names:
                    if table != dict(zip(names, values, strict=True)):  # order does not count
                        return False
            for now, then in self._lists:
                if now != then:
                    return False
        except (RuntimeError, ValueError, TypeError):
            return False  # a tensor attribute was exchanged: its comparison is no bool
        return self.trainable == tuple([p.requires_grad for p in self._trainable])


_shared: dict[tuple[Any, ...], tuple[Any, ...]] = {}
_MAX_SHARED = 4096  # dictionaries whose keys change would fill it
_NESTED = ("_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_HOOKS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
"""Flags of hooks, by their numbers: they change when hooks do."""


def parameter_slots(module: torch.nn.Module) -> Slots:
    """By submodule and name, every parameter and buffer: its kind, and the dictionary where a forward looks it up."""
    slots: Slots = {}
    for owner, child in module.named_modules(remove_duplicate=True):
        for name, value in child._parameters.items():
            if value is not None:
                slots[owner, name] = ("parameter", child._parameters)
                for place, key, found in statistics_of(child._parameters, name):
                    slots[f"{owner}.{place}", key] = ("parameter", found)
        for name, value in child._buffers.items():
            if value is not None:
                slots[owner, name] = ("buffer", child._buffers)
    return slots
