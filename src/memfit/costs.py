"""What a recorded program costs, as the solver's data.

Seconds come from the recording: each op was run a second time, warm, on the tensors it had read. An op's first touch of
memory looks several times too dear, so the sum is scaled to the measured forward of the block. Bytes are storages,
counted once however many views are saved; parameters and what the block's surroundings hold anyway are free.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Set
from dataclasses import replace

import torch

from memfit.narrowing import NarrowSeconds, narrow_seconds
from memfit.profiles import Node, NodeKind, OpCost, ProgramProfile
from memfit.programs import Program, ProgramNode
from memfit.timeline import backward_timeline


def profile_program(
    program: Program,
    *,
    held: Set[int] = frozenset(),
    owned: Set[int] = frozenset(),
    demoted: Set[int] = frozenset(),
    narrow_seconds: NarrowSeconds = narrow_seconds,
) -> ProgramProfile:
    """Reduce a recording to numbers.

    Args:
        program: A verified recording.
        held: Nodes whose storage something else was seen to keep alive: keeping them is free, dropping them frees
            nothing.
        owned: Inputs without a gradient that nobody else keeps; else they are taken for everybody's, as masks are.
        demoted: Nodes that recipes were seen to bring back with other bits: they are kept, and that costs.
        narrow_seconds: What narrowing a value costs on the device that is planned for.
    """
    measured = sum(op.seconds for op in program.ops)
    scale = min(1.0, program.forward_seconds / measured) if measured > 0 else 1.0
    costs = tuple(
        OpCost(
            name=str(op.func),
            seconds=op.seconds * scale,
            inputs=op.inputs,
            outputs=tuple(n for _, n in op.outputs),
            recomputable=op.recomputable,
        )
        for op in program.ops
    )
    return ProgramProfile(
        key=program.key,
        nodes=nodes_of(program, held=held, owned=owned, demoted=demoted, narrow_seconds=narrow_seconds),
        ops=costs,
        saved=tuple(s.value.node for s in program.saved),
        outputs=tuple(dict.fromkeys(value.node for value in program.outputs)),
        timeline=backward_timeline(program),
        forward_seconds=program.forward_seconds,
        backward_seconds=2.0 * program.forward_seconds,
        forward_bytes=program.peak_bytes,
    )


def nodes_of(
    program: Program,
    *,
    held: Set[int],
    demoted: Set[int],
    owned: Set[int] = frozenset(),
    narrow_seconds: NarrowSeconds | None = None,
) -> tuple[Node, ...]:
    """The values of a recording, and what keeping each costs. The arguments are those of `profile_program`."""
    saved = [s.value.node for s in program.saved]
    counts = {n: saved.count(n) for n in set(saved)}
    nodes = [
        _node(program, i, node, counts.get(i, 0), held=i in held, owned=i in owned, demoted=i in demoted)
        for i, node in enumerate(program.nodes)
    ]
    if narrow_seconds is not None:
        for i, (node, recorded) in enumerate(zip(nodes, program.nodes, strict=True)):
            if node.narrow_bytes is not None:
                to = None if recorded.mask_scale is not None else recorded.narrow_dtype
                seconds = narrow_seconds(recorded.device, node.storage_bytes, recorded.value.dtype, to)
                nodes[i] = replace(node, narrow_seconds=seconds)
    return tuple(nodes)


def _node(
    program: Program, index: int, node: ProgramNode, num_saved: int, *, held: bool, owned: bool, demoted: bool
) -> Node:
    kind: NodeKind = "computed"
    keep: int | None = None
    must_keep = False
    if node.leaf is not None:
        kind = "input" if node.leaf.kind == "input" else "parameter"
        if kind == "input":
            keep = node.storage_bytes if node.requires_grad or owned else 0
    elif node.producer is None:
        kind = "constant"
        keep, must_keep = (0, True) if num_saved else (None, False)
    elif num_saved:
        keep = 0 if node.output or held else node.storage_bytes
        must_keep = not node.recomputable or node.custom or demoted
    narrow = None
    if num_saved and kind == "computed" and not must_keep and _is_whole(program, index):
        if node.mask_scale is not None:
            narrow = node.storage_bytes // node.value.dtype.itemsize
        elif node.narrow_dtype is not None:
            narrow = node.storage_bytes // node.value.dtype.itemsize * node.narrow_dtype.itemsize
    return Node(
        storage_bytes=node.storage_bytes,
        kind=kind,
        producer=node.producer,
        num_saved=num_saved,
        keep_bytes=0 if held and keep is not None else keep,
        narrow_bytes=narrow if narrow and keep else None,
        must_keep=must_keep,
    )


def _is_whole(program: Program, index: int) -> bool:
    """Whether every saved tensor on the node shows all of it in one geometry: a narrow copy can stand for it."""
    node = program.nodes[index]
    return all(s.value == node.value for s in program.saved if s.value.node == index)


_MAX_RUNS = 4
_AHEAD_CYCLES = 200_000  # of a GPU: about 0.1 ms, longer than a launch takes
_LONG_SECONDS = 0.02


def warm_seconds(seconds: float, run: Callable[[], object]) -> float:
    """What an op takes that took ``seconds``: run again on CPU, in memory that has been touched.

    Until that brings no more: where another process has the core, an op of two threads waits for it some milliseconds.
    """
    left = 2 if seconds < _LONG_SECONDS else 1
    for _ in range(_MAX_RUNS):
        started = time.perf_counter()
        run()
        before, seconds = seconds, min(seconds, time.perf_counter() - started)
        left -= seconds > before / 2
        if not left:
            break
    return seconds


class Stopwatch:
    """Two events around an op on CUDA, on that device's own stream: the current device may be another.

    The device is kept waiting until the op has been launched: what that takes is the host's time.
    """

    def __init__(self, device: torch.device) -> None:
        """It runs."""
        self._device = device
        self._begin()

    def _begin(self) -> None:
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._device):
            torch.cuda._sleep(_AHEAD_CYCLES)  # type: ignore[no-untyped-call]
        self._start.record(torch.cuda.current_stream(self._device))

    def again(self, run: Callable[[], object]) -> None:
        """Time another run instead: the memory for it is there."""
        self._begin()
        run()
        self.stop()

    def stop(self) -> None:
        """The op has been launched."""
        self._end.record(torch.cuda.current_stream(self._device))

    @property
    def seconds(self) -> float:
        """Between the two, once the device has got there."""
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) * 1e-3
