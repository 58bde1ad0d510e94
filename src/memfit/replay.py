"""Bring dropped values back: recipes compiled from a program and a policy, run op by op.

`compile_policy` decides once per (program, policy) everything that can be decided without tensors: for each dropped
saved tensor its *closure*, the ops that lead from what is still there to its node, in program order; which leaves they
read; how often each node is used. `Restorer` then runs closures during one backward: each op once, results cached until
their last use. Nothing here is recursive at run time, and no value is derived by calling the model's code.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch

from memfit import canary, ops
from memfit.closures import OutputRecipe, closure, droppable, output_recipe
from memfit.narrowing import form_of
from memfit.plans import Policy
from memfit.programs import Program, Value
from memfit.steps import Environment, Step, compile_step, view_of

SAVE, RECOMPUTE, NARROW = 0, 1, 2

States = dict[int, dict[torch.device, torch.Tensor]]
"""Of generators: after how many packed tensors, and of which device."""

default_generators = threading.RLock()
"""Held by whoever moves one for a while: each device has a backward thread of its own."""


@dataclass(slots=True)
class CompiledPolicy:
    """A policy, ready to run.

    Attributes:
        policy: What was compiled.
        program: For which program.
        values: Per saved tensor: the view that it is.
        actions: Per saved tensor: `SAVE`, `RECOMPUTE` or `NARROW`.
        closures: Per saved tensor: ops to run, in program order (empty where none is needed).
        leaves: Per saved tensor: nodes among inputs and kept values that its closure reads, itself included.
        parameters: Per saved tensor: parameter and buffer nodes that its closure reads.
        inputs: Input nodes that the frame has to hold, with the index of the tensor argument.
        parameter_nodes: All parameter nodes read by any closure.
        kept: Kept saved node -> the saved tensor that shows it to recipes.
        bases: Node -> the geometry of the tensor that stands for it in an environment.
        whole: Per saved tensor: whether it is that tensor itself.
        uses: Per node: how many closure ops and dropped or narrowed saved tensors use it.
        steps: Per op.
        snapshots: Numbers of packed tensors after which the states of generators are taken.
        draws: The devices of these generators.
        dropped: Saved tensors that are recomputed.
        probes: Where the canary samples them.
        narrow: Saved tensors that are kept in narrow form.
        custom: Kept saved tensors of custom autograd Functions.
        narrowed: Kept node -> (narrow dtype or None for a mask, scale).
        reads_link: Saved tensors whose closure reads the linked input.
        returned: The recipe of the output that the next call's linked input is.
    """

    policy: Policy
    program: Program
    values: list[Value]
    actions: list[int]
    closures: list[tuple[int, ...]]
    leaves: list[tuple[int, ...]]
    parameters: list[tuple[int, ...]]
    inputs: dict[int, int]
    parameter_nodes: tuple[int, ...]
    kept: dict[int, int]
    bases: dict[int, Value]
    whole: list[bool]
    uses: list[int]
    steps: dict[int, Step]
    snapshots: tuple[int, ...]
    draws: tuple[torch.device, ...]
    narrowed: dict[int, tuple[torch.dtype | None, float]]
    dropped: tuple[int, ...]
    reads_link: frozenset[int]
    returned: OutputRecipe | None
    probes: canary.Probes
    narrow: tuple[int, ...]
    custom: tuple[int, ...]

    @property
    def saves_all(self) -> bool:
        """Whether every handle keeps its tensor as it is."""
        return not (self.dropped or self.narrow or self.custom or self.returned)


def compile_policy(program: Program, policy: Policy) -> CompiledPolicy:
    """Turn a policy into closures and steps.

    Raises:
        MemfitError: The policy drops a value that nothing can bring back, or narrows one that has no smaller form.
    """
    narrowed = {n: form_of(program, n) for n in policy.narrowed}
    kept_nodes = set(policy.kept) | set(policy.narrowed)
    first_saved: dict[int, int] = {}
    for index, saved in enumerate(program.saved):
        first_saved.setdefault(saved.value.node, index)
    available: dict[int, str] = {}
    for number, node in enumerate(program.nodes):
        if node.leaf is not None:
            if node.leaf.kind != "input":
                available[number] = "parameter"
            elif number == policy.linked:
                available[number] = "link"
            elif number in kept_nodes:
                available[number] = "input"
        elif number in kept_nodes and number in first_saved and not node.custom:
            available[number] = "kept"
    actions: list[int] = []
    closures: list[tuple[int, ...]] = []
    leaves: list[tuple[int, ...]] = []
    parameters: list[tuple[int, ...]] = []
    bases: dict[int, Value] = {}
    kept: dict[int, int] = {}
    inputs: dict[int, int] = {}
    all_ops: set[int] = set()
    reads_link: set[int] = set()
    for saved in program.saved:
        number = saved.value.node
        node = program.nodes[number]
        if number in policy.narrowed:
            actions.append(NARROW)
        elif number in kept_nodes or not droppable(program, number) or available.get(number) == "parameter":
            actions.append(SAVE)
        else:
            actions.append(RECOMPUTE)
        if actions[-1] != RECOMPUTE:
            closures.append(())
            leaves.append(())
            parameters.append(())
            continue
        ops, read = closure(program, number, available)
        closures.append(ops)
        all_ops.update(ops)
        leaves.append(tuple(n for n in read if available[n] in ("kept", "input")))
        parameters.append(tuple(n for n in read if available[n] == "parameter"))
        if any(available[n] == "link" for n in read):
            reads_link.add(len(closures) - 1)
    returned = output_recipe(program, policy.returned, available)
    for n in sorted({n for group in (*leaves, returned.leaves if returned else ()) for n in group}):
        leaf = program.nodes[n].leaf
        if leaf is not None:
            inputs[n] = leaf.index
        else:
            kept[n] = first_saved[n]
    for n, index in kept.items():
        bases[n] = program.saved[index].value
    for number, node in enumerate(program.nodes):
        if number not in kept:
            bases[number] = node.value
    uses = [0] * len(program.nodes)
    for op_index in all_ops:
        for n in program.ops[op_index].inputs:
            uses[n] += 1
    for index, action in enumerate(actions):
        if action != SAVE:
            uses[program.saved[index].value.node] += 1
    if returned is not None:
        all_ops.update(returned.closure)
    dropped = [i for i, action in enumerate(actions) if action == RECOMPUTE]
    return CompiledPolicy(
        policy=policy,
        program=program,
        values=[saved.value for saved in program.saved],
        actions=actions,
        closures=closures,
        leaves=leaves,
        parameters=parameters,
        inputs=inputs,
        parameter_nodes=tuple(
            sorted({n for group in [*parameters, returned.parameters if returned else ()] for n in group})
        ),
        kept=kept,
        bases=bases,
        whole=[saved.value == bases[saved.value.node] for saved in program.saved],
        uses=uses,
        steps={i: compile_step(program, program.ops[i], bases, kept) for i in all_ops},
        snapshots=tuple(sorted({s for i in all_ops if (s := program.ops[i].snapshot) is not None})),
        draws=tuple({drawn_on(program, i): None for i in all_ops if program.ops[i].random}),
        narrowed=narrowed,
        dropped=tuple(dropped),
        reads_link=frozenset(reads_link),
        returned=returned,
        probes=canary.Probes((i, program.saved[i].value, program.saved[i].device) for i in dropped),
        narrow=tuple(i for i, action in enumerate(actions) if action == NARROW),
        custom=tuple(
            i for i, s in enumerate(program.saved) if actions[i] == SAVE and program.nodes[s.value.node].custom
        ),
    )


class Restorer:
    """Runs the closures of one frame during one backward pass.

    Not thread-safe by itself: the frame holds its lock around `restore`.

    Attributes:
        env: What is there, by node.
        same_flags: Whether the pass runs under the numeric flags of the forward.
    """

    __slots__ = ("_bases", "_compiled", "_done", "_given", "_states", "_uses", "_values", "env", "same_flags")

    def __init__(self, compiled: CompiledPolicy, states: States | None) -> None:
        """Start a pass.

        Args:
            compiled: The policy.
            states: Generator states by snapshot, see `CompiledPolicy.snapshots`.
        """
        self._compiled = compiled
        self._bases = compiled.bases
        self._values = compiled.values
        self._uses = compiled.uses.copy()
        self._done: set[int] = set()
        self._given: set[int] = set()
        self._states = states
        self.env: Environment = {}
        self.same_flags = True

    def take(self, index: int) -> torch.Tensor | None:
        """The saved tensor ``index`` if nothing has to run for it, else ``None``."""
        value = self._values[index]
        node = value.node
        base = self.env.get(node)
        if base is None:
            return None
        out = base if self._compiled.whole[index] else view_of(base, value, self._bases[node])
        uses = self._uses
        if index not in self._given:
            self._given.add(index)
            uses[node] -= 1
        if uses[node] <= 0:
            del self.env[node]
        return out

    def wants(self, index: int, node: int) -> bool:
        """Whether bringing ``index`` back reads ``node``, which is not there."""
        if node in self.env:
            return False
        every = self._compiled.closures[index]
        left = [i for i in every if i not in self._done] or every
        return self._values[index].node == node or any(node in self._compiled.program.ops[i].inputs for i in left)

    def restore(self, index: int, leaves: Iterable[tuple[int, torch.Tensor]]) -> torch.Tensor:
        """The saved tensor ``index``, which the policy dropped.

        Args:
            index: Its position in pack order.
            leaves: What its closure may read, as (node, tensor); already checked.
        """
        compiled, env, uses = self._compiled, self.env, self._uses
        node = self._values[index].node
        if node not in env:
            if compiled.program.nodes[node].producer in self._done:
                again = Restorer(compiled, self._states)  # asked for again in the same pass
                again.env.update(env)
                return again.restore(index, leaves)
            closure = [i for i in compiled.closures[index] if i not in self._done]
            for leaf, tensor in leaves:
                env[leaf] = tensor
            if closure:
                run_ops(compiled, closure, env, uses, self._states)
                self._done.update(closure)
            for leaf, _ in leaves:
                if leaf != node and not (leaf in compiled.narrowed and uses[leaf] > 0):
                    env.pop(leaf, None)
        value = self.take(index)
        assert value is not None
        return value


def _undisturbed() -> AbstractContextManager[object]:
    """Below autograd and, where they are on, autocast and dispatch modes."""
    below: AbstractContextManager[object] = torch._C._AutoDispatchBelowAutograd()
    if not torch._C._is_any_autocast_enabled() and not torch._C._len_torch_dispatch_stack():
        return below
    stack = ExitStack()
    for context in (below, torch._C._DisableAutocast(), torch._C._DisableTorchDispatch()):
        stack.enter_context(context)
    return stack


def run_ops(
    compiled: CompiledPolicy,
    closure: Iterable[int],
    env: Environment,
    uses: list[int],
    states: States | None,
) -> None:
    """Run ops in order, below autograd and autocast, outside any mode; random ops from the states of the forward."""
    program = compiled.program
    with _undisturbed():
        for index in closure:
            op = program.ops[index]
            step = compiled.steps[index]
            if not op.random:
                step(env, uses, None)
                continue
            device = drawn_on(program, index)
            assert states is not None
            assert op.snapshot is not None
            state = states[op.snapshot][device]
            if ops.with_generator(op.func) is not None:
                own = torch.Generator(device)  # outside it nothing moves
                own.set_state(state)
                step(env, uses, own)
                continue
            with default_generators:
                generator = generator_of(device)
                before = generator.get_state()
                generator.set_state(state)
                try:
                    step(env, uses, None)
                finally:
                    generator.set_state(before)


def drawn_on(program: Program, index: int) -> torch.device:
    """The device whose generator a random op draws from."""
    return program.nodes[program.ops[index].outputs[0][1]].device


def generator_of(device: torch.device) -> torch.Generator:
    """The default generator of a device."""
    module = getattr(torch, device.type, None)
    generators: Sequence[torch.Generator] = getattr(module, "default_generators", ())
    if not generators or module is None:
        return torch.default_generator
    return generators[module.current_device() if device.index is None else device.index]
