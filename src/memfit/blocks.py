"""The blocks of a model: its repeated modules, and what is known of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from memfit.errors import ModelError
from memfit.partitioned import WHOLE, is_resident, partitioned_in
from memfit.resets import Resets
from memfit.sharding import Modules, is_sharded, shards_inside
from memfit.signature import Signatures, Slots, Watch, parameter_slots, pointers_of, storages_of

if TYPE_CHECKING:
    from memfit.entries import Entry
    from memfit.programs import Program

UNSTEADY = "its program changes from call to call"
_CONTAINERS = (torch.nn.ModuleList, torch.nn.Sequential, torch.nn.ModuleDict)
_MIN_REPEATS = 2
_SAME_PROGRAMS = 4
"""As many recordings that differ in the fields of objects only, and say the same: fields do not count any more."""
_RECORDED_AGAIN = 4
"""How many recordings of new arguments one counts for whose arguments were known."""


@dataclass(slots=True, eq=False)
class Block:
    """One module that Memfit plans for.

    Attributes:
        name: Qualified name in the model.
        mode: ``replay``, ``descent``, ``fallback`` or ``plain``.
        reason: Why not replay.
        parent: The descended block that it belongs to.
        own: Where its parameters and buffers lie, by `storages_of`.
        signatures: Of its last calls.
        reruns: Calls that were to run again as a whole.
        offers: Calls whose output the next block might ask for.
        link_failures: How often what came back through its linked input was wrong.
        unlinked: Whether it keeps its input therefore.
        written: Tensor arguments that the model writes after the block has run: no recipe reads them.
        ignores_fields: Whether objects among its arguments count by their class only.
        above: The modules that it is in, from the model down.
        sharded: Whether its parameters may be gone outside its own forward and backward.
        partitioned: Those of them that are ZeRO-3's.
        resets: Of its parameters, in its forwards.
    """

    name: str
    module: torch.nn.Module
    mode: str = "replay"
    reason: str = ""
    parent: str = ""
    entries: dict[Any, Entry] = field(default_factory=dict)
    watch: Watch | None = None
    watched: int = -1
    slots: Slots = field(default_factory=dict)
    own: dict[int, int] = field(default_factory=dict)
    signatures: Signatures = field(default_factory=Signatures)
    _pointers: list[int] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    recordings_in_a_row: int = 0
    reruns: int = 0
    offers: int = 0
    link_failures: int = 0
    unlinked: bool = False
    written: set[int] = field(default_factory=set)
    ignores_fields: bool = False
    above: Modules = ()
    sharded: bool = False
    partitioned: list[torch.nn.Parameter] = field(default_factory=list)
    resets: Resets = field(default_factory=Resets)

    def look(self, generation: int) -> None:
        """Has it become another one? Where do its parameters lie? Looked at once per forward of the model."""
        self.watched = generation
        if self.watch is None:
            self.watch = Watch(self.module)
        elif not self.watch.unchanged():
            self.watch = Watch(self.module)
            self.slots = parameter_slots(self.module)
            self.entries.clear()
        pointers = pointers_of(self.slots)
        if pointers != self._pointers:
            self._pointers = pointers
            self.own = storages_of(self.slots)
            self.sharded = is_sharded(self.module, self.above)
            self.partitioned = partitioned_in(self.module) if self.sharded else []

    def readable(self) -> tuple[Any, ...]:
        """Of the signature: which arguments recipes may not read, and which partitioned parameters they may."""
        return *sorted(self.written), "and", *(i for i, p in enumerate(self.partitioned) if is_resident(p))

    def unhook(self) -> None:
        """Take its hooks off."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def forget(self, signature: Any) -> None:
        """A call was not what its recording says: the next one is recorded again."""
        self.entries.pop(signature, None)
        self.recordings_in_a_row += _RECORDED_AGAIN - 1

    def compare_fields(self, signature: tuple[Any, ...], entry: Entry) -> None:
        """Recorded again for what an object among its arguments holds: a counter, if the program is always the same."""
        key = entry.state.key
        same = [
            known
            for known, other in self.entries.items()
            if known[:-1] == signature[:-1] and known[-1] != signature[-1] and other.state.key == key
        ]
        if len(same) >= _SAME_PROGRAMS:
            self.ignores_fields = True

    def stop_replaying(self, program: Program, why: str) -> tuple[bool, list[tuple[str, torch.nn.Module]]]:
        """Rule 13: descend, then fall back, else leave it plain.

        Returns:
            Whether the block may run again as a whole, and the children that become blocks instead of it.
        """
        again = program.foreign == "DTensor" and not shards_inside(self.module)  # what a second run gathers is its own
        alike = why == WHOLE or not self.partitioned  # on all ranks, see NOTE [Partitioned parameters]
        safe = not program.writes and not program.python_random and (again or not program.foreign) and alike
        whole = why in (UNSTEADY, WHOLE) or (again and safe)  # the children's would change too; or show DTensors too
        children = [] if whole else replayable_children(self.module)
        if children:
            self.mode, self.reason = "descent", why
            self.unhook()
        elif safe:
            self.mode, self.reason = "fallback", why
        else:
            reason = program.writes or ("draws Python randomness" if program.python_random else why)
            self.mode, self.reason = "plain", f"{why}; {reason}" if reason != why else why
        return safe, children

    def leave(self, why: str) -> None:
        """Run again as a whole, it was not the same: from now on it keeps what it saves."""
        if self.mode == "fallback":
            self.mode, self.reason = "plain", f"{self.reason}; {why}"


def find_blocks(model: torch.nn.Module, wanted: list[str] | None = None) -> list[tuple[str, torch.nn.Module]]:
    """The modules that are planned for, outermost first, in the order of `named_modules`.

    Args:
        model: Any module.
        wanted: Names to use instead: qualified module names, or class names.

    Returns:
        ``(qualified name, module)`` of each block. Hugging Face's ``GradientCheckpointingLayer`` are blocks; so are
        children of containers, and of modules with numbered children, whose class appears at least twice. Layers of
        ``torch.nn`` and norms are none.

    Raises:
        ModelError: Nothing is repeated, or ``wanted`` names nothing.
    """
    if wanted is not None:
        found = [(n, m) for n, m in model.named_modules() if n in wanted or type(m).__name__ in wanted]
        missing = [w for w in wanted if not any(w in (n, type(m).__name__) for n, m in found)]
        if missing:
            raise ModelError(
                f"`blocks` names `{missing[0]}`, which is neither a module nor a class of {type(model).__name__}. "
                "Name modules as `model.named_modules()` does."
            )
        return _outermost(found)
    layers = [(n, m) for n, m in model.named_modules() if _is_layer(m)]
    if layers:
        covered = _outermost([pair for layer in layers for pair in _inside_stage(*layer)])
        return _in_order(model, covered + _repeated(model, [n for n, _ in covered]))
    found = [pair for block in _repeated(model, []) for pair in _inside_stage(*block)]
    found = found or _outermost(_members(model))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no repeated modules to plan for. Name its blocks with `blocks=[...]`, as "
            "`model.named_modules()` does."
        )
    return found


def _is_layer(module: torch.nn.Module) -> bool:
    return any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)


def _in_order(model: torch.nn.Module, found: list[tuple[str, torch.nn.Module]]) -> list[tuple[str, torch.nn.Module]]:
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda pair: order[pair[0]])


def _repeated(model: torch.nn.Module, covered: list[str]) -> list[tuple[str, torch.nn.Module]]:
    """Members of lists of modules, where a class with parameters appears more than once in the model's lists."""
    count: dict[type, int] = {}
    candidates: list[tuple[str, torch.nn.Module]] = []
    for name, module in model.named_modules():
        if any(name == c or name.startswith(f"{c}.") or (c.startswith(f"{name}.") and name) for c in covered):
            continue
        if not isinstance(module, _CONTAINERS) and not _numbered(module):
            continue
        for child_name, child in module.named_children():
            if not _is_candidate(module, child):
                continue
            if not any(True for _ in child.parameters()):
                continue
            full = f"{name}.{child_name}" if name else child_name
            if any(c == full or c.startswith(f"{full}.") for c in covered):
                continue
            count[type(child)] = count.get(type(child), 0) + 1
            candidates.append((full, child))
    return _outermost([(n, m) for n, m in candidates if count[type(m)] >= _MIN_REPEATS])


def _is_candidate(parent: torch.nn.Module, child: torch.nn.Module) -> bool:
    """A module with children, a recurrent layer, a sequence in a list of sequences, or a user's own layer in a list."""
    if isinstance(child, torch.nn.Sequential):
        return isinstance(parent, _CONTAINERS) and len(child) > 1
    if isinstance(child, _CONTAINERS):
        return False
    if any(True for _ in child.children()) or isinstance(child, (torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN)):
        return True
    return isinstance(parent, (torch.nn.ModuleList, torch.nn.Sequential)) and _is_own_layer(child)


def _is_own_layer(module: torch.nn.Module) -> bool:
    """A class that is not torch's and holds its matrices itself: a block of einsums. Norms have no matrix."""
    torchs = any(b.__module__.startswith("torch.nn.") and b is not torch.nn.Module for b in type(module).__mro__)
    return not torchs and any(p.ndim > 1 for p in module.parameters(recurse=False))


def _members(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Members of module lists, single ones too: one layer may be called many times (ALBERT)."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList):
            for child_name, child in module.named_children():
                if _is_candidate(module, child) and any(True for _ in child.parameters()):
                    found += _inside_group(f"{name}.{child_name}" if name else child_name, child)
    return found


def _inside_group(name: str, module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The members of a module that is little more than a list of them; else the module itself."""
    for child_name, child in module.named_children():
        if isinstance(child, torch.nn.ModuleList) and len(child) and _size(child) == _size(module):
            return [(f"{name}.{child_name}.{i}", member) for i, member in enumerate(child)]
    return [(name, module)]


def _inside_stage(name: str, module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """A stage of a vision model (Swin, ResNet) is a list of blocks, and a change of resolution."""
    if not type(module).__name__.endswith("Stage"):
        return [(name, module)]
    found: list[tuple[str, torch.nn.Module]] = []
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}"
        if isinstance(child, _CONTAINERS):
            found += [(f"{full}.{i}", member) for i, member in child.named_children() if _is_candidate(child, member)]
        elif any(True for _ in child.parameters()):
            found.append((full, child))
    return found or [(name, module)]


def _size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _numbered(module: torch.nn.Module) -> bool:
    """A module whose children bear numbers, or one class several times under its own names."""
    kinds = [type(child) for child in module.children() if any(True for _ in child.children())]
    return len(kinds) > len(set(kinds))


def _outermost(found: list[tuple[str, torch.nn.Module]]) -> list[tuple[str, torch.nn.Module]]:
    """Without modules inside others of the list, and each module once."""
    kept: list[tuple[str, torch.nn.Module]] = []
    seen: set[int] = set()
    for name, module in found:
        if id(module) in seen or any(name.startswith(f"{k}.") for k, _ in kept if k):
            continue
        seen.add(id(module))
        kept.append((name, module))
    return kept


def replayable_children(module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The children that become blocks when ``module`` cannot be replayed: those with parameters, through containers."""
    found: list[tuple[str, torch.nn.Module]] = []
    for name, child in module.named_children():
        if isinstance(child, _CONTAINERS):
            if isinstance(child, torch.nn.Sequential):
                found.append((name, child))
            continue
        if any(True for _ in child.parameters()):
            found.append((name, child))
    return found
