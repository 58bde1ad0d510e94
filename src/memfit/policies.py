"""A block's policy as torch's compiler takes it: selective activation checkpointing, operation by operation.

A plan names nodes of a recorded program. Compiled code does not run the block's operations one by one, but it is traced
from them, and the partitioner that splits forward from backward obeys a `CheckpointPolicy` for each. So an operation is
named by what both see, its overload and how many of that overload came before it in the block. What the recording does
not know is saved.

NOTE [Dropout of compiled code]: on CPU eager dropout is ``empty_like``, ``bernoulli_``, ``div_``, ``mul``; traced, it
is one ``native_dropout``, and a recording counts as if it had run that. What a compiler runs again draws with the seed
or the generator's state of its forward; `redraws` tries whether this torch does so. Where a backend runs the block
eagerly, torch keeps no state at all (``preserve_rng_state=False``), so the contexts given then do.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from memfit.ops import base_name
from memfit.plans import Policy
from memfit.programs import Program, ProgramOp, TapeOp

_DROPOUT = ["empty_like", "bernoulli_", "div_", "mul"]
_NATIVE_DROPOUT = "aten.native_dropout.default"
_PROBE = {"aten.sin.default": (False, False), _NATIVE_DROPOUT: (False,)}


class SelectivePolicy:
    """What compiled code saves of one block.

    Attributes:
        table: By operation, whether the result of the n-th is saved.
        num_traced: How often a compiler has asked.
        ran_whole: Whether the block was run by something that obeys no policy.
        ran_eagerly: Whether the block ran without compiled code.
        unknown: Operations that the recording does not have, or not as often.
    """

    def __init__(self, table: dict[str, tuple[bool, ...]]) -> None:
        """Of a table that `table_of` made."""
        self.table = table
        self.num_traced = 0
        self.ran_whole = False
        self.ran_eagerly = False
        self.unknown: set[str] = set()

    def __call__(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """The two contexts that `torch.utils.checkpoint.checkpoint` asks for."""
        if not _is_traced():
            # Torch's eager selective checkpointing would draw dropout masks anew where it saved those before them.
            # Without a policy the block runs again as a whole, under the generators' states of its forward.
            self.ran_whole = True
            draws = _Draws()
            return draws, _Again(draws)
        self.num_traced += 1
        counts: dict[str, int] = {}

        def decide(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            name = str(op)
            count = counts[name] = counts.get(name, -1) + 1
            known = self.table.get(name, ())
            if count < len(known):
                save = known[count]
            else:
                save = not _is_view(op)
                if save:
                    self.unknown.add(name)
            return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

        make: Any = create_selective_checkpoint_contexts
        made: tuple[AbstractContextManager[Any], AbstractContextManager[Any]] = make(decide)
        return made


class _Draws(AbstractContextManager[None]):
    """Around a forward: which random numbers it begins with."""

    def __init__(self) -> None:
        self.states: list[tuple[torch.Generator, torch.Tensor]] = []

    def __enter__(self) -> None:
        self.states = [(generator, generator.get_state()) for generator in default_generators()]

    def __exit__(self, *error: object) -> None:
        pass


class _Again(AbstractContextManager[None]):
    """Around the same forward, run again: it draws the same numbers, and outside nothing moves."""

    def __init__(self, first: _Draws) -> None:
        self._first = first
        self._before: list[tuple[torch.Generator, torch.Tensor]] = []

    def __enter__(self) -> None:
        self._before = [(generator, generator.get_state()) for generator in default_generators()]
        for generator, state in self._first.states:
            generator.set_state(state)

    def __exit__(self, *error: object) -> None:
        for generator, state in self._before:
            generator.set_state(state)


def default_generators() -> list[torch.Generator]:
    """Of the CPU, and of every GPU once CUDA is in use."""
    cuda = list(torch.cuda.default_generators) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return [torch.default_generator, *cuda]


def table_of(program: Program, policy: Policy, *, draws_again: bool) -> dict[str, tuple[bool, ...]]:
    """By operation, whether the result of the n-th is saved: what the policy keeps, and what no recipe may run again.

    A block's inputs are always there: a policy that drops one (``linked``) cannot say so to a compiler.

    Args:
        program: What the block ran.
        policy: What to keep of it.
        draws_again: Whether random operations may be run again, as `redraws` says.
    """
    kept = {*policy.kept, *policy.narrowed}
    table: dict[str, list[bool]] = {}
    for name, ops in _operations(program):
        save = any(
            not op.recomputable or (op.random and not draws_again) or any(node in kept for _, node in op.outputs)
            for op in ops
        )
        table.setdefault(name, []).append(save)
    return {name: tuple(saves) for name, saves in table.items()}


def why_unfit(program: Program) -> str:
    """Why a compiled block can have no policy, or ""."""
    if program.writes:
        return program.writes
    for name, ops in _operations(program):
        if any(op.target is not None for op in ops) and name != _NATIVE_DROPOUT:
            return f"{name.split('.')[1]} writes in place"
    return ""


def redraws(device: torch.device) -> bool:
    """Whether compiled code that runs a dropout again draws the same mask: tried on a small one, without a trace."""

    def block(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x.sin(), 0.5).sin()

    policy = SelectivePolicy(_PROBE)
    contexts = functools.partial(policy)

    def step(x: torch.Tensor) -> torch.Tensor:
        again: torch.Tensor = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return again

    x = torch.linspace(0.1, 1.0, 64, device=device)
    found: list[torch.Tensor] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        for run in (block, torch.compile(step, backend="aot_eager", fullgraph=True)):
            torch.manual_seed(0)
            leaf = x.clone().requires_grad_()
            try:
                loss = run(leaf).sum()
            except RuntimeError:
                return False  # it may not be compiled here and now, so nothing is known
            torch.rand(3, device=device)
            found += torch.autograd.grad(loss, leaf)
    return policy.num_traced > 0 and torch.equal(*found)


def _operations(program: Program) -> Iterator[tuple[str, list[ProgramOp]]]:
    """The calls of a recording as a tracer counts them, each with the ops of the program that it is; views have none.

    See NOTE [Dropout of compiled code].
    """
    ops = iter(program.ops)
    waiting = next(ops, None)
    pairs: list[tuple[TapeOp, list[ProgramOp]]] = []
    for entry in program.tape:
        found: list[ProgramOp] = []
        if waiting is not None and waiting.func.overloadpacket is entry.func.overloadpacket:
            found, waiting = [waiting], next(ops, None)
        pairs.append((entry, found))
    place = 0
    while place < len(pairs):
        size = len(_DROPOUT)
        group = pairs[place : place + size]
        if [base_name(entry.func) for entry, _ in group] == _DROPOUT:
            yield _NATIVE_DROPOUT, [op for _, found in group for op in found if base_name(op.func) != "empty_like"]
            place += size
            continue
        entry, found = pairs[place]
        yield str(entry.func), found
        place += 1


def _is_traced() -> bool:
    """Whether AOTAutograd is at work: only its partitioner obeys policies."""
    return torch._guards.detect_fake_mode() is not None


def _is_view(op: Any) -> bool:
    schema = getattr(op, "_schema", None)
    return schema is not None and any(value.alias_info is not None for value in schema.returns)
