"""One block call while its forward runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from memfit import canary
from memfit.casts import autocast_dtype
from memfit.entries import Entry
from memfit.errors import RecomputeError
from memfit.fallback import WRITTEN, ReplayOfModule
from memfit.frames import Cell, Frame, Handle, Kept, unpack
from memfit.inputs import Inputs, copied
from memfit.narrowing import narrow_form
from memfit.partitioned import is_partitioned, is_resident, readable
from memfit.plans import Policy
from memfit.programs import Leaf
from memfit.quantized import PLAIN_TYPES
from memfit.replay import CompiledPolicy, States, generator_of
from memfit.sharding import local, place_of
from memfit.storages import is_small
from memfit.streams import Stream

if TYPE_CHECKING:
    from memfit.blocks import Block
    from memfit.links import Tie, Upstream
    from memfit.trace import Recorder

_push = torch._C._autograd._push_saved_tensors_default_hooks
_pop = torch._C._autograd._pop_saved_tensors_default_hooks
_top = torch._C._autograd._top_saved_tensors_default_hooks


def _states(devices: Iterable[torch.device]) -> dict[torch.device, torch.Tensor]:
    return {device: generator_of(device).get_state() for device in devices}


class Call:
    """A block's forward in progress."""

    __slots__ = (
        "alone",
        "args",
        "block",
        "compiled",
        "entry",
        "flags",
        "fresh",
        "handles",
        "hooked",
        "index",
        "kept_frame",
        "kwargs",
        "link",
        "mode",
        "owner",
        "policy",
        "program_key",
        "recorder",
        "residents",
        "rng",
        "signature",
        "started",
        "states",
        "stream",
        "tensors",
        "tie",
        "upstream",
        "versions",
    )

    def __init__(self, block: Block, index: int, tensors: list[torch.Tensor], args: Any, kwargs: Any) -> None:
        """The ``index``-th block call of the step."""
        self.block = block
        self.index = index
        self.tensors = tensors
        self.args = args
        self.kwargs = kwargs
        self.handles: list[Handle] = []
        self.residents = {id(p): p.detach() for p in block.partitioned if is_resident(p)}
        self.entry: Entry | None = None
        self.compiled: CompiledPolicy | None = None
        self.recorder: Recorder | None = None
        self.signature: Any = None
        self.flags: tuple[Any, ...] = ()
        self.fresh = self.alone = False
        self.started = 0.0
        self.hooked: Any = None
        self.states: States | None = None
        self.stream: Stream | None = None
        self.rng: dict[torch.device, torch.Tensor] | None = None
        self.versions: list[int] = []
        self.owner: FrameType | None = None
        self.kept_frame: Frame | ReplayOfModule | Kept | None = None
        self.mode = ""
        self.policy: Policy | None = None
        self.program_key = ""
        self.tie: Tie | None = None
        self.link: Upstream | None = None
        self.upstream: tuple[Cell, ...] | None = None

    # The hooks around the forward

    def open(self, pack: Callable[[torch.Tensor], Handle], *, random: bool = False) -> None:
        """Push the saved-tensor hooks (and the recorder); with ``random``, take the states of all generators."""
        if random:
            self.rng = _states(self._devices())
        if self.compiled is not None and self.compiled.snapshots:
            self.states = {}
            if self.compiled.snapshots[0] == 0:
                self.snapshot(0)
        if self.recorder is not None:
            self.states = {}
            self.snapshot(0)
        if not self.versions:
            self.versions = [t._version for t in self.tensors]
        self.hooked = pack
        _push(pack, unpack)
        if self.recorder is not None:
            self.recorder.__enter__()

    def close(self) -> None:
        """Pop what `open` pushed, if it is still there."""
        if self.recorder is not None:
            self.recorder.__exit__(None, None, None)
        self.owner = None
        pack, self.hooked = self.hooked, None
        if pack is not None:
            top = _top(True)
            if top is not None and top[0] is pack:
                _pop()

    def is_stale(self) -> bool:
        """Whether the call is over although no hook said so: a KeyboardInterrupt went through it (rule 17)."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame is self.owner:
                return False
            frame = frame.f_back
        return True

    def _devices(self) -> Iterable[torch.device]:
        """On which the block may draw: what it is given may come from another than its own."""
        own = [parameter.device for parameter in self.block.module.parameters()]
        return dict.fromkeys([torch.device("cpu"), *(tensor.device for tensor in self.tensors), *own])

    def snapshot(self, packed: int) -> None:
        """Take the generators' states."""
        assert self.states is not None
        self.states[packed] = _states(self.compiled.draws if self.compiled is not None else self._devices())

    # Comparing with the recording

    def differs(self) -> str:
        """What is not as recorded, or ""."""
        assert self.entry is not None
        state = self.entry.state
        starts: dict[int, int] = {}
        for leaf, storage, offset in state.saved_leaves:
            tensor = self._given(leaf)
            if tensor is not None and (pointer := tensor.data_ptr()):
                starts[storage] = pointer - offset
        return state.checks.differs(self.handles, starts)

    def leaves(self) -> list[tuple[Leaf, torch.Tensor]]:
        """What the block is given and recipes may read: tensor arguments, parameters and buffers."""
        written = self.block.written
        found = [(Leaf("input", i, "", ""), tensor) for i, tensor in enumerate(self.tensors) if i not in written]
        for (owner, name), (kind, dictionary) in self.block.slots.items():
            value = readable(dictionary.get(name), self.residents)
            if value is not None:
                found.append((Leaf(kind, -1, owner, name), value))
        return found

    def leaf(self, number: int) -> torch.Tensor | None:
        """The tensor that is leaf ``number`` in this call."""
        assert self.entry is not None
        leaf = self.entry.state.program.nodes[number].leaf
        return self._given(leaf) if leaf is not None else None

    def _given(self, leaf: Leaf) -> torch.Tensor | None:
        if leaf.kind == "input":
            return self.tensors[leaf.index]
        slot = self.block.slots.get((leaf.owner, leaf.name))
        return readable(slot[1].get(leaf.name), self.residents) if slot is not None else None

    def packed_by(self, node: Any) -> set[int]:
        """Which of this call's saved tensors a custom autograd Function saved."""
        found: set[int] = set()
        raw = getattr(node, "_raw_saved_tensors", ()) or ()
        if not raw:
            return found
        seen = {id(h.tensor): h.index for h in self.handles}
        pointers = {h.tensor.data_ptr(): h.index for h in self.handles if h.tensor is not None}
        try:
            saved = node.saved_tensors
        except RuntimeError:
            return set(range(len(self.handles)))
        for tensor in saved:
            if tensor is not None:
                index = seen.get(id(tensor), pointers.get(tensor.data_ptr()))
                if index is not None:
                    found.add(index)
        return found

    # Ending

    def keep_all(self) -> None:
        """Every tensor stays, as plain autograd would have it."""
        self.mode = "kept"

    def frame(self) -> Frame:
        """The frame of this call under its policy, parameters looked up as they are now (rule 8)."""
        compiled = self.compiled
        assert compiled is not None
        frame = Frame(self.block.name, compiled)
        if compiled.dropped or compiled.returned is not None:
            frame.flags = self.flags
            frame.sharded = self.block.sharded
            frame.resets = resets = self.block.resets
            states = self.states or {}
            frame.states = {packed: states[packed] for packed in compiled.snapshots}
            for number in compiled.parameter_nodes:
                tensor = self.leaf(number)
                if tensor is not None:
                    leaf = compiled.program.nodes[number].leaf
                    if leaf is not None and leaf.kind == "buffer" and is_small(tensor):
                        tensor = tensor.detach().clone()
                    place = place_of(tensor) if frame.sharded else tensor.data_ptr()
                    frame.parameters[number] = (tensor, place, resets.version(tensor))
        return frame

    def cells(self, inputs: Inputs | None = None) -> dict[int, tuple[torch.Tensor, int]]:
        """Leaves of recipes: inputs as detached aliases (copies in a recorded call), and kept values."""
        compiled = self.compiled
        assert compiled is not None
        cells: dict[int, tuple[torch.Tensor, int]] = {}
        young = self.fresh or inputs is not None
        for number, index in compiled.inputs.items():
            given, version = self.tensors[index], self.versions[index]
            is_saved = young and any(s.value.node == number for s in compiled.program.saved)
            copy = copied(given) if self.fresh and not is_saved else None
            cell = cells[number] = (given.detach(), version) if copy is None else (copy, copy._version)
            if inputs is not None:
                held = copy is None
                inputs.add(index, cell[0] if held else given, version, saved=is_saved, held=held)
        for number, index in compiled.kept.items():
            saved = self.handles[index].tensor
            assert saved is not None
            cells[number] = (saved, self.handles[index].version)
        return cells

    def save_all(self) -> None:
        """The call is as recorded, and its policy drops nothing."""
        assert self.compiled is not None
        self.mode = "replay"
        self.policy = self.compiled.policy
        self.program_key = self.compiled.program.key

    def apply(self, frame: Frame, *, hashed: bool, inputs: Inputs | None = None) -> None:
        """Drop what the policy drops (the late drop of rule 1); the arguments that recipes read go to ``inputs``."""
        self.save_all()
        compiled, handles = self.compiled, self.handles
        assert compiled is not None
        self.kept_frame = frame
        cells = self.cells(inputs) if compiled.dropped or compiled.returned is not None else {}
        frame.inputs = inputs
        dropped: dict[int, torch.Tensor] = {i: handles[i].tensor for i in compiled.dropped}  # type: ignore[misc]  # parked
        turn = self._turn(self.entry.calls if self.entry is not None else 0)
        frame.samples = canary.Samples(compiled.probes, dropped, turn, hashed=hashed)
        dropped.clear()
        narrow: dict[int, torch.Tensor] = {}
        for index in compiled.narrow:
            handle = handles[index]
            tensor = handle.tensor
            assert tensor is not None
            number = compiled.program.saved[index].value.node
            small = narrow.get(number)
            if small is None:
                small = narrow[number] = narrow_form(tensor, compiled.narrowed[number])
                if number in cells:
                    cells[number] = (small, small._version)
            handle.tensor = small
            handle.version = small._version
            handle.frame = frame
        for index in compiled.custom:
            handles[index].frame = frame
        shared: dict[tuple[int, ...], tuple[Cell, ...]] = {}
        for index in compiled.dropped:
            handle = handles[index]
            handle.frame = frame
            handle.tensor = None
            read = compiled.leaves[index]
            leaves = shared.get(read)
            if leaves is None:
                leaves = shared[read] = tuple([(n, *cells[n]) for n in read])
            handle.leaves = leaves
            if index in compiled.reads_link:
                handle.link = self.link
        if compiled.returned is not None:
            self.upstream = tuple([(n, *cells[n]) for n in compiled.returned.leaves])

    def fall_back(self, *, defer: Callable[[RecomputeError], bool] | None, hashed: bool) -> None:
        """Drop everything; the module's forward runs again in the backward (rule 13)."""
        aliases: dict[int, torch.Tensor] = {}
        saved = {local(h.tensor).data_ptr() for h in self.handles if h.tensor is not None}
        first = self.block.reruns == 0

        def detached(structure: Any) -> Any:
            if isinstance(structure, torch.Tensor):
                alias = aliases.get(id(structure))
                if alias is None:
                    copy = copied(structure) if first and local(structure).data_ptr() not in saved else None
                    alias = (structure.detach() if copy is None else copy).requires_grad_(structure.requires_grad)
                    aliases[id(structure)] = alias
                return alias
            if type(structure) in (tuple, list):
                return type(structure)(detached(item) for item in structure)
            if type(structure) is dict:
                return {name: detached(item) for name, item in structure.items()}
            return structure

        frame = ReplayOfModule(self.block.name, self.block.module, detached(self.args), detached(self.kwargs))
        leave = frame.distrust = self.block.leave
        frame.inputs = Inputs(lambda _: leave(WRITTEN))
        frame.states = dict(self.rng or {})
        cache = torch.is_autocast_cache_enabled()
        frame.autocast = [(kind, autocast_dtype(kind), cache) for kind in {each.type for each in self._devices()}]
        parameters = list(self.block.module.parameters())
        pointers = {local(t).data_ptr() for t in (*parameters, *self.tensors)}
        parked = [h.tensor for h in self.handles if h.tensor is not None]
        frame.partitioned = self.block.partitioned
        frame.foreign = any(local(t) is not t for t in (*parameters, *self.tensors, *parked)) or bool(frame.partitioned)
        for given, version in zip(self.tensors, self.versions, strict=True):
            alias, is_saved = aliases.get(id(given), given), local(given).data_ptr() in saved
            if local(alias).data_ptr() != local(given).data_ptr():
                frame.inputs.add(0, given, version, saved=is_saved, held=False)
                version = alias._version
            frame.versions.append((alias, version, local(alias).data_ptr(), is_saved))
        frame.sharded, frame.defer = self.block.sharded, defer
        for parameter in parameters:
            pointer = local(parameter).data_ptr()
            place = None if is_partitioned(parameter) else place_of(local(parameter)) if frame.sharded else pointer
            frame.versions.append((parameter, parameter._version, place, pointer in saved))
        dropped: dict[int, torch.Tensor] = {}
        for handle in self.handles:
            tensor = handle.tensor
            assert tensor is not None
            frame.metas.append(canary.meta(tensor))
            held = local(tensor)
            if type(held) not in PLAIN_TYPES or held.layout is not torch.strided or not held.numel():
                continue
            if held.data_ptr() in pointers or tensor._version != handle.version:
                continue
            dropped[handle.index] = held
            handle.frame = frame
            handle.tensor = None
        turn = self._turn(self.block.reruns)
        frame.samples = canary.Samples(canary.probes_of(dropped), dropped, turn, hashed=hashed)
        self.block.reruns += 1
        self.kept_frame = frame
        self.mode = "fallback"

    def _turn(self, calls: int) -> int:
        """Where samples are taken: elsewhere in every call."""
        return self.index * 7919 + calls * 104729

    def watch_backward(self, entered: Callable[[], None]) -> None:
        """Call ``entered`` when the backward first asks for a saved tensor of this call."""
        frame: Any = self.kept_frame
        if frame is None:
            frame = self.kept_frame = Kept()
        frame.listener = entered
        for handle in self.handles:
            if handle.frame is None:
                handle.frame = frame

    def settle(self) -> None:
        """The forward is over: let go of everything that the frame does not need."""
        self.handles.clear()  # autograd holds the pack hook, and with it this list, while it holds any tensor
        self.tensors = []
        self.args = self.kwargs = None
        self.states = None
        self.residents = {}
        self.rng = None
        self.kept_frame = None
        self.compiled = None
        self.recorder = None
        self.link = self.upstream = None
        if self.tie is not None:
            self.tie.offer = None
