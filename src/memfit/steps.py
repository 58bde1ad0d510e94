"""One op of a recipe as a function of an environment: the tensors that are there, by node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memfit import ops
from memfit.programs import Program, ProgramOp, Ref, Value, refs

Environment = dict[int, torch.Tensor]
Step = Callable[[Environment, list[int], torch.Generator | None], None]


def view_of(base: torch.Tensor, value: Value, shown: Value) -> torch.Tensor:
    """The view ``value`` of a storage that ``base`` shows as ``shown``."""
    if value.size == shown.size and value.stride == shown.stride and value.offset == shown.offset:
        return base
    return base.as_strided(value.size, value.stride, base.storage_offset() + value.offset - shown.offset)


def writable(base: torch.Tensor, shared: bool) -> torch.Tensor:
    """What an in-place op of a recipe may write: ``base``, or a copy where somebody else will read it."""
    return base.clone() if shared else base


def compile_step(program: Program, op: ProgramOp, bases: dict[int, Value], kept: dict[int, int]) -> Step:
    """One op as a function of an environment. Decrements the uses of what it reads, and frees at zero."""
    func = ((ops.with_generator(op.func) if op.random else None) or op.func)._op
    flat = all(isinstance(a, Ref) or not refs(a) for a in op.args) and not refs(op.kwargs)
    slots = tuple((i, a.value) for i, a in enumerate(op.args) if isinstance(a, Ref) and a.value.node >= 0)
    outputs = tuple(op.outputs)
    reads = op.inputs
    target = op.target
    kwargs = op.kwargs
    template = list(op.args)

    def build(structure: Any, env: Environment) -> Any:
        if isinstance(structure, Ref):
            if structure.value.node < 0:
                return None  # what the op overwrites: filled in by the step
            return view_of(env[structure.value.node], structure.value, bases[structure.value.node])
        if isinstance(structure, tuple):
            return [build(item, env) for item in structure]
        if isinstance(structure, dict):
            return {key: build(item, env) for key, item in structure.items()}
        return structure

    whole = tuple((i, value.node, None if value == bases[value.node] else value) for i, value in slots)

    def arguments(env: Environment) -> tuple[list[Any], dict[str, Any]]:
        if not flat:
            return [build(a, env) for a in template], build(kwargs, env)
        args = template.copy()
        for i, node, value in whole:
            args[i] = env[node] if value is None else view_of(env[node], value, bases[node])
        return args, kwargs

    def release(env: Environment, uses: list[int]) -> None:
        for n in reads:
            uses[n] -= 1
            if uses[n] <= 0:
                env.pop(n, None)

    made = outputs[0][1]
    simple = target is None and flat and not kwargs and not op.random and len(outputs) == 1 and outputs[0][0] is None
    if simple and all(value is None for _, _, value in whole):

        def simple_step(env: Environment, uses: list[int], generator: torch.Generator | None) -> None:
            args = template.copy()
            for i, node, _ in whole:
                args[i] = env[node]
            result = func(*args)
            del args
            if uses[made] > 0:
                env[made] = result
            for n in reads:
                left = uses[n] = uses[n] - 1
                if left <= 0:
                    env.pop(n, None)

        return simple_step

    if target is None:

        def step(env: Environment, uses: list[int], generator: torch.Generator | None) -> None:
            args, keywords = arguments(env)
            if generator is not None:
                keywords = {**keywords, "generator": generator}
            result = func(*args, **keywords)
            del args
            for position, node in outputs:
                if uses[node] > 0:
                    env[node] = result if position is None else result[position]
            release(env, uses)

        return step

    position = op.target_at
    device = program.nodes[made].device
    owned = target.node not in kept and program.nodes[target.node].leaf is None

    def step_in_place(env: Environment, uses: list[int], generator: torch.Generator | None) -> None:
        # NOTE [Writes of recipes]: only a storage that this recipe made, and that nothing else will read, is written.
        if op.overwrites:
            base = torch.empty_strided(target.size, target.stride, dtype=target.dtype, device=device)
            written = base
        else:
            base = writable(env[target.node], uses[target.node] > 1 or not owned)
            written = view_of(base, target, bases[target.node])
        args, keywords = arguments(env)
        args[position] = written
        if generator is not None:
            keywords = {**keywords, "generator": generator}
        func(*args, **keywords)
        release(env, uses)
        if uses[made] > 0:
            env[made] = base

    return step_in_place
