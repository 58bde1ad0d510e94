"""Streams of CUDA, and graphs that capture what they run (rule 16).

Autograd keeps what it saves until the backward, and a model that computes on several streams may rely on that: what is
freed when a block ends, its stream gives to the next op, though another stream still reads it. So all block calls of a
step, and all that happens in them, have to be on one stream; otherwise Memfit drops nothing from then on. It looks when
a step begins, when a block is called, at every op of a recording, and whenever autograd saves something in a block. A
graph that is captured replays without Python: what is captured is the plain step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

SEVERAL = "blocks run on several CUDA streams"

_Key = tuple[int, int, int]
"""Stream, device and kind of device, as torch names a stream."""


class Stream:
    """The stream of one device that work went to when this was made.

    Attributes:
        left: Whether `look` has found work to go to another one.
    """

    __slots__ = ("_key", "index", "left")

    def __init__(self, index: int) -> None:
        """Of the ``index``-th device."""
        self.index = index
        self._key = _current(index)
        self.left = False

    def is_same(self, other: Stream) -> bool:
        """Whether both are one stream, or of different devices."""
        return self._key == other._key or self.index != other.index

    def look(self) -> None:
        """Where does work go now?"""
        if _current(self.index) != self._key:
            self.left = True


class Streams:
    """Of the steps of one model.

    Attributes:
        several: Whether a step has been on more than one.
    """

    __slots__ = ("_first", "several")

    def __init__(self) -> None:
        """None seen yet."""
        self.several = False
        self._first: dict[int, Stream] = {}

    def begin(self, home: torch.device | None) -> None:
        """A step begins, on whichever; ``home`` as for `enter`."""
        stream = here(home)
        self._first = {} if stream is None else {stream.index: stream}

    def enter(self, tensors: Iterable[torch.Tensor], home: torch.device | None) -> Stream | None:
        """A block is called.

        Args:
            tensors: Its arguments.
            home: Where its weights are, if the model is on several devices.

        Returns:
            The stream of its call; ``None`` without CUDA.
        """
        stream = of(tensors, home)
        if stream is not None and not self._first.setdefault(stream.index, stream).is_same(stream):
            self.several = True
        return stream


def here(home: torch.device | None) -> Stream | None:
    """The stream of ``home``, else of the current device."""
    if home is not None:
        return Stream(home.index) if home.type == "cuda" else None
    return Stream(torch.cuda.current_device()) if _initialized() else None


def of(tensors: Iterable[torch.Tensor], home: torch.device | None) -> Stream | None:
    """The stream of ``home``, else of the first tensor on CUDA."""
    if home is not None:
        return here(home)
    for tensor in tensors:
        if tensor.is_cuda:
            return Stream(tensor.device.index)
    return None


def capturing() -> bool:
    """Whether what CUDA is given now is captured into a graph, and does not run."""
    return _initialized() and torch.cuda.is_current_stream_capturing()


def _initialized() -> bool:
    return torch.cuda.is_initialized()  # type: ignore[no-any-return, no-untyped-call]


def _current(index: int) -> _Key:
    found: _Key = torch._C._cuda_getCurrentStream(index)  # a `torch.cuda.Stream` takes microseconds to make
    return found
