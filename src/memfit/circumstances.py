"""What a call depends on beside its arguments, so that it can be made again: random numbers, autocast, buffers."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from memfit.policies import default_generators

SMALL_BYTES = 1 << 20
"""Buffers up to here are compared whatever their version says."""

Buffer = tuple[torch.nn.Module, str, torch.Tensor]


class RandomStates:
    """The default generators of torch on all devices, Python's and NumPy's, as they are now."""

    __slots__ = ("_numpy", "_python", "_torch")

    def __init__(self) -> None:
        self._torch = [(generator, generator.get_state()) for generator in default_generators()]
        self._python = random.getstate()
        numpy: Any = sys.modules.get("numpy")
        self._numpy = None if numpy is None else numpy.random.get_state()

    def restore(self) -> None:
        """As they were then."""
        for generator, state in self._torch:
            generator.set_state(state)
        random.setstate(self._python)
        if self._numpy is not None:
            numpy: Any = sys.modules["numpy"]
            numpy.random.set_state(self._numpy)


@contextlib.contextmanager
def same_random_numbers_afterwards() -> Iterator[None]:
    """Whatever is drawn or restored inside, what comes afterwards draws what it would have drawn."""
    states = RandomStates()
    try:
        yield
    finally:
        states.restore()


class Autocast:
    """Autocast as it is now, for the CPU, the accelerator, and more kinds of devices."""

    def __init__(self, kinds: Iterable[str] = ()) -> None:
        accelerator = torch.accelerator.current_accelerator()
        every = {"cpu", *kinds} | ({accelerator.type} if accelerator is not None else set())
        self._states = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted(every)
            if torch.amp.is_autocast_available(kind)
        ]
        self._caches = torch.is_autocast_cache_enabled()

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """As it was then."""
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self._states:
                stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=self._caches))
            yield


class Modules:
    """The modules that are called, and their buffers as they were before that.

    Attributes:
        called: By batch, what was called for it, with all that is inside.
    """

    def __init__(self, num_batches: int) -> None:
        self.called: list[dict[int, torch.nn.Module]] = [{} for _ in range(num_batches)]
        self._before: dict[tuple[int, str], tuple[Buffer, int]] = {}

    @contextlib.contextmanager
    def watch(self, encode: Callable[..., Any], batch: int) -> Iterator[None]:
        """Around a call of ``encode``: a module, or a function that may call some."""
        seen = self.called[batch]
        if isinstance(encode, torch.nn.Module):
            self._see(encode, seen)
            yield
            return
        hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, _: self._see(module, seen))
        try:
            yield
        finally:
            hook.remove()

    def _see(self, module: torch.nn.Module, seen: dict[int, torch.nn.Module]) -> None:
        if id(module) in seen:
            return
        for each in module.modules():
            seen[id(each)] = each
            for name, buffer in each._buffers.items():
                if buffer is not None and not buffer.is_inference():
                    self._before.setdefault((id(each), name), ((each, name, buffer), buffer._version))

    def buffers(self) -> list[Buffer]:
        """The buffers that may have been written to, as they are now.

        Of large ones that is seen by their version, which batch normalization does not raise for its statistics.
        """
        found = []
        for (module, name, before), version in self._before.values():
            now = module._buffers.get(name)
            if now is not None and (now is not before or now._version != version or now.nbytes <= SMALL_BYTES):
                found.append((module, name, now))
        return found


@contextlib.contextmanager
def same_afterwards(buffers: list[Buffer]) -> Iterator[None]:
    """Whatever is written to buffers inside, they are afterwards what they were: running statistics count once."""
    kept = [buffer.detach().clone() for _, _, buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer in buffers:
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer
            by_device: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for (_, _, buffer), before in zip(buffers, kept, strict=True):
                by_device.setdefault(buffer.device, []).append((buffer, before))
            for group in by_device.values():  # one answer from a device: each would wait for it
                differs = torch.stack([(buffer != before).any() for buffer, before in group]).tolist()
                for (buffer, before), differing in zip(group, differs, strict=True):
                    if differing:  # others may be saved in a graph, which a write would break
                        buffer.copy_(before)
