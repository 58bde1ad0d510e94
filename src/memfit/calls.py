"""One block call while its forward runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from memfit import canary
from memfit.bits import hash_on_device
from memfit.entries import Entry
from memfit.fallback import ReplayOfModule
from memfit.frames import Cell, Frame, Handle, Kept, unpack
from memfit.plans import Policy
from memfit.programs import Program
from memfit.replay import NARROW, RECOMPUTE, CompiledPolicy, generator_of, narrow_form, widen
from memfit.signature import numeric_flags

if TYPE_CHECKING:
    from memfit.blocks import Block
    from memfit.links import Tie, Upstream
    from memfit.trace import Recorder

_push = torch._C._autograd._push_saved_tensors_default_hooks
_pop = torch._C._autograd._pop_saved_tensors_default_hooks
_top = torch._C._autograd._top_saved_tensors_default_hooks


class Call:
    """A block's forward in progress."""

    __slots__ = (
        "args",
        "block",
        "compiled",
        "entry",
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
        "rng",
        "signature",
        "started",
        "states",
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
        self.entry: Entry | None = None
        self.compiled: CompiledPolicy | None = None
        self.recorder: Recorder | None = None
        self.signature: Any = None
        self.fresh = False
        self.started = 0.0
        self.hooked: Any = None
        self.states: dict[int, dict[Any, torch.Tensor]] | None = None
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

    def open(self, pack: Callable[[torch.Tensor], Handle], random: Any) -> None:
        """Push the saved-tensor hooks (and the recorder)."""
        if random is not None:
            self.rng = {device: generator_of(device).get_state() for device in random.devices}
        if self.compiled is not None and self.compiled.snapshots:
            self.states = {}
            if self.compiled.snapshots[0] == 0:
                self.states[0] = self._generators()
        if self.recorder is not None:
            self.states = {0: self._generators()}
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

    def _generators(self) -> dict[Any, torch.Tensor]:
        devices = {t.device.type: t.device for t in self.tensors} or {"cpu": torch.device("cpu")}
        devices.setdefault("cpu", torch.device("cpu"))
        return {kind: generator_of(device).get_state() for kind, device in devices.items()}

    def snapshot(self, packed: int) -> None:
        """Take the generators' states."""
        assert self.states is not None
        self.states[packed] = self._generators()

    # Comparing with the recording

    def differs(self) -> str:
        """What is not as recorded, or ""."""
        assert self.entry is not None
        state = self.entry.state
        checks, handles = state.checks, self.handles
        if len(handles) != len(checks):
            return f"{len(handles)} saved tensors instead of {len(checks)}"
        storages = self._leaf_storages(state.program)
        for handle, (size, stride, dtype, version, offset, storage, constant, device) in zip(
            handles, checks, strict=True
        ):
            tensor = handle.tensor
            assert tensor is not None
            if (
                tensor.shape != size
                or tensor.stride() != stride
                or tensor.dtype is not dtype
                or tensor.device != device
            ):
                return f"saved tensor {handle.index} is {canary.meta(tensor)[:3]}"
            if version is not None and handle.version != version:
                return f"saved tensor {handle.index} was written {handle.version} times instead of {version}"
            if storage >= 0:
                pointer = tensor.data_ptr()
                if pointer and storages.setdefault(storage, pointer - offset) != pointer - offset:
                    return f"saved tensor {handle.index} views another storage"
            elif constant is not None and tensor.item() != constant and constant == constant:
                return f"the number {constant} became {tensor.item()}"
        if len(set(storages.values())) != len(storages):
            return "saved tensors that were apart share a storage"
        return ""

    def _leaf_storages(self, program: Program) -> dict[int, int]:
        """Where the storages of saved leaves must begin."""
        found: dict[int, int] = {}
        for number in {s.value.node for s in program.saved if s.is_leaf}:
            node = program.nodes[number]
            tensor = self.leaf(number)
            if tensor is not None and tensor.numel():
                found[node.storage] = tensor.data_ptr() - node.value.offset * node.value.dtype.itemsize
        return found

    def leaf(self, number: int) -> torch.Tensor | None:
        """The tensor that is leaf ``number`` in this call."""
        assert self.entry is not None
        leaf = self.entry.state.program.nodes[number].leaf
        if leaf is None:
            return None
        if leaf.kind == "input":
            return self.tensors[leaf.index]
        for _, owner, name, dictionary in self.block.slots:
            if owner == leaf.owner and name == leaf.name:
                found: torch.Tensor | None = dictionary.get(name)
                return found
        return None

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
            frame.flags = numeric_flags()
            states = self.states or {}
            frame.states = {packed: states[packed] for packed in compiled.snapshots}
            for number in compiled.parameter_nodes:
                tensor = self.leaf(number)
                if tensor is not None:
                    frame.parameters[number] = (tensor, tensor.data_ptr(), tensor._version)
        return frame

    def cells(self) -> dict[int, tuple[torch.Tensor, int]]:
        """Leaves of recipes: inputs as detached aliases, and kept values."""
        compiled = self.compiled
        assert compiled is not None
        cells: dict[int, tuple[torch.Tensor, int]] = {}
        for number, index in compiled.inputs.items():
            tensor = self.tensors[index].detach()
            cells[number] = (tensor, self.versions[index])
        for number, index in compiled.kept.items():
            saved = self.handles[index].tensor
            assert saved is not None
            cells[number] = (saved, self.handles[index].version)
        return cells

    def widened(self, node: int, tensor: torch.Tensor) -> torch.Tensor:
        """What a recipe will read for a kept node: for a narrowed one, the widened copy."""
        assert self.compiled is not None
        narrow = self.compiled.narrowed.get(node)
        if narrow is None:
            return tensor
        return widen(narrow_form(tensor, narrow), tensor.dtype, narrow)

    def apply(self, frame: Frame, *, hashed: bool) -> None:
        """Drop what the policy drops (the late drop of rule 1)."""
        compiled = self.compiled
        assert compiled is not None
        handles = self.handles
        self.kept_frame = frame
        self.mode = "replay"
        self.policy = compiled.policy
        self.program_key = compiled.program.key
        actions = compiled.actions
        nodes = compiled.program.nodes
        cells = self.cells() if compiled.dropped or compiled.returned is not None else {}
        if compiled.dropped:
            self._sample(frame, compiled)
            if hashed:
                frame.hashes = {}
                for index in compiled.dropped:
                    tensor = handles[index].tensor
                    assert tensor is not None
                    frame.hashes[index] = hash_on_device(tensor)
        narrow: dict[int, torch.Tensor] = {}
        for handle in handles:
            action = actions[handle.index]
            tensor = handle.tensor
            assert tensor is not None
            if action == NARROW:
                number = compiled.program.saved[handle.index].value.node
                small = narrow.get(number)
                if small is None:
                    small = narrow[number] = narrow_form(tensor, compiled.narrowed[number])
                    if number in cells:
                        cells[number] = (small, small._version)
                handle.tensor = small
                handle.version = small._version
                handle.frame = frame
        for handle in handles:
            action = actions[handle.index]
            if action == RECOMPUTE:
                handle.frame = frame
                handle.tensor = None
                handle.leaves = tuple([(n, *cells[n]) for n in compiled.leaves[handle.index]])
                if handle.index in compiled.reads_link:
                    handle.link = self.link
            elif action != NARROW:
                if nodes[compiled.program.saved[handle.index].value.node].custom:
                    handle.frame = frame

        if compiled.returned is not None:
            self.upstream = tuple([(n, *cells[n]) for n in compiled.returned.leaves])

    def _sample(self, frame: Frame, compiled: CompiledPolicy) -> None:
        """Take the canary's samples: one stack per dtype and device."""
        groups: dict[Any, tuple[list[tuple[int, int]], list[torch.Tensor]]] = {}
        turn = self.index * 7919 + (self.entry.calls if self.entry is not None else 0) * 104729
        for index, (step, room) in zip(compiled.dropped, compiled.patterns, strict=True):
            tensor = self.handles[index].tensor
            assert tensor is not None
            if not room or not tensor.numel():
                continue
            offset = turn % room
            which, views = groups.setdefault((tensor.dtype, tensor.device), ([], []))
            which.append((index, step << 32 | offset))
            views.append(canary.take(tensor, step, offset))
        for which, views in groups.values():
            rows = torch.stack(views).unbind(0)
            for (index, where), row in zip(which, rows, strict=True):
                frame.samples[index] = (row, where)

    def fall_back(self) -> None:
        """Drop everything; the module's forward runs again in the backward (rule 13)."""
        aliases: dict[int, torch.Tensor] = {}

        def detached(structure: Any) -> Any:
            if isinstance(structure, torch.Tensor):
                alias = aliases.get(id(structure))
                if alias is None:
                    alias = structure.detach().requires_grad_(structure.requires_grad)
                    aliases[id(structure)] = alias
                return alias
            if type(structure) in (tuple, list):
                return type(structure)(detached(item) for item in structure)
            if type(structure) is dict:
                return {name: detached(item) for name, item in structure.items()}
            return structure

        frame = ReplayOfModule(self.block.name, self.block.module, detached(self.args), detached(self.kwargs))
        frame.states = dict(self.rng or {})
        device = self.tensors[0].device.type if self.tensors else "cpu"
        if torch.is_autocast_enabled(device):
            frame.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled())
        else:
            frame.autocast = (device, None, True)
        parameters = list(self.block.module.parameters())
        pointers = {p.data_ptr() for p in parameters} | {t.data_ptr() for t in self.tensors}
        for given, version in zip(self.tensors, self.versions, strict=True):
            frame.versions.append((aliases.get(id(given), given), version, given.data_ptr()))
        for parameter in parameters:
            frame.versions.append((parameter, parameter._version, parameter.data_ptr()))
        for handle in self.handles:
            tensor = handle.tensor
            assert tensor is not None
            frame.metas.append(canary.meta(tensor))
            if tensor.data_ptr() in pointers or not tensor.numel() or tensor._version != handle.version:
                continue
            step = max(0, tensor.numel() // canary.NUM_SAMPLES)
            if tensor.is_contiguous():
                frame.samples[handle.index] = (canary.take(tensor, step, 0).clone(), step << 32)
            handle.frame = frame
            handle.tensor = None
        self.kept_frame = frame
        self.mode = "fallback"

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
        self.rng = None
        self.kept_frame = None
        self.compiled = None
        self.recorder = None
        self.link = self.upstream = None
        if self.tie is not None:
            self.tie.offer = None
