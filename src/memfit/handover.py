"""Compiled blocks: recorded without their compiler, then handed the plan as policies that the compiler obeys.

The first step runs as if nothing were compiled, so that it can be recorded and planned like any other. Before the
second, Memfit's hooks leave the blocks (compiled code runs none), each block's ``forward`` is wrapped into torch's
selective activation checkpointing, and what was compiled is compiled again, with the plan in it. From then on Memfit
looks on: when a tensor exists is torch's affair, and so is its value.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

from memfit.blocks import Block
from memfit.compiled import COMPILED, is_wrapper
from memfit.plans import Policy
from memfit.policies import SelectivePolicy, redraws, table_of, why_unfit

if TYPE_CHECKING:
    from memfit.handle import Handle

_STORY = (
    "compiled blocks run the plan as torch's selective checkpointing; its peak was predicted from a step without "
    "`torch.compile`"
)
_IDLE_FORWARDS = 2
_UNSEEN = "none of its calls could be recorded"
_WHOLE = "was run by a backend or around a graph break that obeys no policies"


def hand_over(handle: Handle, model: torch.nn.Module) -> None:
    """Have a fitted model's compiled blocks recorded and planned for; where that cannot be, they stay as they were."""
    blocks = handle.runtime.blocks
    if not any(block.reason.endswith(COMPILED) for block in blocks) or handle._measures_only:
        return
    why = _why_not(model, blocks)
    if why:
        handle.runtime.note("compiled", f"no policy was handed to a compiler: {why}")
    else:
        Handover(handle, model)


def _why_not(model: torch.nn.Module, blocks: list[Block]) -> str:
    """Why the compiled blocks of a model are left alone, or ""."""
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "its layers are on several devices"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "there is a process group, and that is tried without one only"
    wrapped = [name for name, module in model.named_modules() if is_wrapper(module) and module is not model]
    if wrapped:
        return f"`{wrapped[0]}` is wrapped by `torch.compile(...)`; compile blocks in place, with `block.compile()`"
    replaced = [name for name, module in model.named_modules() if module is not model and "forward" in vars(module)]
    if replaced or (not is_wrapper(model) and "forward" in vars(model)):
        place = f"`{replaced[0]}`" if replaced else f"this {type(model).__name__}"
        return f"the `forward` of {place} was replaced"
    compiled = {name for name, module in model.named_modules() if is_wrapper(module) or _has_compiler(module)}
    for block in blocks:
        parts = block.name.split(".")
        if not any(".".join(parts[:depth]) in compiled for depth in range(len(parts) + 1)):
            return f"`{block.name}` is not compiled as a whole, and the plan is for all blocks"
    return ""


class Handover:
    """Of one fitted model, from its first step to `remove`."""

    def __init__(self, handle: Handle, model: torch.nn.Module) -> None:
        """Leave the compiler out until there is a plan."""
        self._handle = handle
        self._model = model
        self._policies: dict[str, SelectivePolicy] = {}
        self._compilers = [(m, vars(m)["_compiled_call_impl"]) for m in model.modules() if _has_compiler(m)]
        self._wrapped = vars(model)["forward"] if is_wrapper(model) else None
        self.recording = True
        for module, compiler in self._compilers:
            vars(module)["_compiled_call_impl"] = _Root(self, compiler) if module is model else None
        if self._wrapped is not None:
            vars(model)["forward"] = _Wrapped(self, self._wrapped)
        runtime = handle.runtime
        blocks = [(block.name, block.module) for block in runtime.blocks]
        runtime.blocks.clear()
        for name, module in blocks:
            runtime.add_block(name, module)
        self._began, runtime.step_began = runtime.step_began, self._step_began
        self._hooks: list[Any] = [
            register_optimizer_step_post_hook(_Stepped(self)),
            model.register_forward_pre_hook(_Look(self)),
            model.register_forward_hook(_Look(self, after=True)),
        ]
        self._idle = 0
        hooks: list[Any] = handle._hooks
        hooks.append(self)

    def remove(self) -> None:
        """The model is compiled as it was, and its blocks have their own ``forward``."""
        if not self.recording:
            self.look()
        self._measure()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._withdraw()
        self._compile(root=True)

    def begin_if_new(self) -> None:
        """A forward of a model that is compiled in place begins."""
        self.look()
        if self.recording and torch.is_grad_enabled() and self._model.training:
            self._handle.runtime.begin_if_new()

    def forward_event(self, *, before: bool) -> None:
        """Hooks of a model that is compiled in place are compiled with it: they do nothing, so this is said here."""
        self._handle.forward_event(self._model, before=before)

    def forward_over(self) -> None:
        """A forward has ended in which blocks should have been recorded: where none was, twice, none will be."""
        if not self.recording or not torch.is_grad_enabled() or not self._model.training:
            return
        self._idle = 0 if self._handle.runtime.calls else self._idle + 1
        if self._idle < _IDLE_FORWARDS:
            return
        self.recording = False
        for block in self._handle.runtime.blocks:
            block.unhook()
            if block.mode != "descent":
                block.mode, block.reason = "plain", f"{block.reason or _UNSEEN}; {COMPILED}"
        self._compile(root=False)

    def look(self) -> None:
        """What has become of the policies?"""
        note = self._handle.runtime.note
        for name, policy in self._policies.items():
            if policy.ran_whole:
                self._withdraw(f"`{name}` {_WHOLE}")
                return
            if policy.unknown:
                others = ", ".join(sorted(policy.unknown))
                note("policy unknown", f"compiled, `{name}` runs what its recording does not: {others}; that is saved")
            if policy.ran_eagerly:
                note(
                    "policy eager",
                    f"`{name}` ran without compiled code, and kept everything (torch's limit of recompilations, or its "
                    "stance)",
                )

    def optimizer_stepped(self) -> None:
        """By now compiled code has run with the policies."""
        if self.recording:
            return
        self.look()
        for name, policy in self._policies.items():
            if not policy.num_traced and not policy.ran_eagerly:
                self._handle.runtime.note("policy unasked", f"torch did not compile `{name}` with its policy")

    def _step_began(self) -> None:
        """A step of the recorded kind begins: once there is a plan, none does any more."""
        self._began()
        if self.recording and self._handle.plan is not None:
            self._give()

    def _give(self) -> None:
        """Hand the plan over."""
        handle, runtime = self._handle, self._handle.runtime
        self.recording = False
        chosen = self._choose()
        programs = [runtime.states[policy.program].program for policy in chosen.values()]
        draws = any(op.random for program in programs for op in program.ops)
        draws_again = draws and redraws(handle._device)
        if draws and not draws_again:
            runtime.note("policy draws", "this torch draws dropout masks anew in compiled code: they are saved")
        shared: dict[tuple[Any, ...], functools.partial[Any]] = {}
        rows: list[dict[str, Any]] = []
        for block in runtime.blocks:
            block.unhook()  # compiled code runs no hooks, but its guards would look at them
            if block.mode != "replay":
                block.mode, block.reason = "plain", f"{block.reason}; {COMPILED}" if block.reason else COMPILED
                continue
            found = chosen.get(block.name)
            why = why_unfit(runtime.states[found.program].program) if found is not None else "it is not in the plan"
            if found is None or why:
                block.mode, block.reason = "plain", f"{why}; {COMPILED}"
                continue
            table = table_of(runtime.states[found.program].program, found, draws_again=draws_again)
            # The same object for equal policies: compiled code is shared by blocks that cannot be told apart.
            contexts = shared.setdefault(tuple(sorted(table.items())), functools.partial(SelectivePolicy(table)))
            policy: SelectivePolicy = contexts.func  # type: ignore[assignment]
            self._policies[block.name] = policy
            block.mode, block.reason = "policy", ""
            vars(block.module)["forward"] = _PolicyForward(block.module, policy, contexts)
            rows.append(
                {"name": block.name, "mode": "policy", "reason": "", "parent": block.parent}
                | {"program": found.program, "policy": found}
            )
        handle._last_calls = rows
        if rows:
            runtime.note("compiled", _STORY)
        self._compile(root=False)

    def _choose(self) -> dict[str, Policy]:
        """The policy of each block: that of its call that keeps least, and not more of them than torch compiles."""
        plan = self._handle.plan
        assert plan is not None
        states = self._handle.runtime.states

        def size(policy: Policy) -> int:
            nodes = states[policy.program].program.nodes
            return sum(nodes[node].storage_bytes for node in {*policy.kept, *policy.narrowed})

        chosen: dict[str, Policy] = {}
        for number, call in enumerate(plan.calls):
            policy = plan.policy(number)
            if call.program in states and (call.name not in chosen or size(policy) < size(chosen[call.name])):
                chosen[call.name] = policy
        if self._wrapped is not None or _has_compiler(self._model):
            return chosen
        smallest: dict[str, list[Policy]] = {}
        for policy in sorted(set(chosen.values()), key=size):
            smallest.setdefault(policy.program, []).append(policy)
        # NOTE [Recompilations]: blocks that are compiled one by one share their code, and torch compiles a code so
        # many times; then it runs it eagerly. So only the smaller policies are used, half as many as that.
        most = max(1, torch._dynamo.config.recompile_limit // 2 // max(1, len(smallest)))
        return {
            name: policy if policy in smallest[policy.program][:most] else smallest[policy.program][most - 1]
            for name, policy in chosen.items()
        }

    def _withdraw(self, why: str = "") -> None:
        """Blocks have their own ``forward`` again."""
        for block in self._handle.runtime.blocks:
            if isinstance(vars(block.module).get("forward"), _PolicyForward):
                del vars(block.module)["forward"]
            if why and block.mode == "policy":
                block.mode, block.reason = "plain", f"{why}; {COMPILED}"
        if why:
            self._policies = {}
            self._handle._last_calls = []
            self._handle.runtime.notes.pop("compiled", None)

    def _compile(self, *, root: bool) -> None:
        """What was compiled is; the model itself only when Memfit is removed: until then it says when steps begin."""
        for module, compiler in self._compilers:
            mine = vars(module).get("_compiled_call_impl")
            if mine is None or (root and isinstance(mine, _Root)):  # else the user has compiled it anew
                vars(module)["_compiled_call_impl"] = compiler
        if root and isinstance(vars(self._model).get("forward"), _Wrapped):
            vars(self._model)["forward"] = self._wrapped

    def _measure(self) -> None:
        """Read the peak of the steps since the plan was handed over."""
        handle = self._handle
        if not self.recording and handle._peak_open:
            peak = handle.runtime.keeper.observe()
            handle._measured = peak if handle._measured is None else max(handle._measured, peak)


class _PolicyForward:
    """A block's ``forward`` that tells a compiler what to save. Copies and pickles as the block's own."""

    def __init__(self, module: torch.nn.Module, policy: SelectivePolicy, contexts: functools.partial[Any]) -> None:
        self._module = module
        self._policy = policy
        self._contexts = contexts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = functools.partial(type(self._module).forward, self._module, **kwargs)
        if not torch.is_grad_enabled():
            return forward(*args)
        if not torch.compiler.is_compiling():
            self._policy.ran_eagerly = True
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=self._contexts)

    def __reduce__(self) -> Any:
        return getattr, (self._module, "forward")


class _Root:
    """In the place of a model's compiled call: steps begin and end around it."""

    def __init__(self, handover: Handover, compiled: Any) -> None:
        self._handover = handover
        self._compiled = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        handover = self._handover
        handover.begin_if_new()
        if handover.recording:
            return handover._model._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        handover.forward_event(before=True)
        try:
            return self._compiled(*args, **kwargs)
        finally:
            handover.forward_event(before=False)


class _Wrapped:
    """In the place of the ``forward`` of what `torch.compile` returned for a model."""

    def __init__(self, handover: Handover, compiled: Any) -> None:
        self._handover = handover
        self._compiled = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        handover = self._handover
        called: Any = handover._model._orig_mod if handover.recording else self._compiled
        return called(*args, **kwargs)


class _Stepped:
    """A global hook: it must not keep the model alive."""

    def __init__(self, handover: Handover) -> None:
        self._handover = weakref.ref(handover)

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        handover = self._handover()
        if handover is not None:
            handover.optimizer_stepped()


class _Look:
    """A hook of the model. Copies and pickles as inert."""

    def __init__(self, handover: Handover | None = None, *, after: bool = False) -> None:
        self._handover = handover
        self._after = after

    def __call__(self, module: torch.nn.Module, args: Any, output: Any = None) -> None:
        if torch.compiler.is_compiling() or self._handover is None:
            return
        if self._after:
            self._handover.forward_over()
        elif not self._handover.recording:
            self._handover.look()

    def __deepcopy__(self, memo: Any) -> _Look:
        return _Look()

    def __reduce__(self) -> Any:
        return _Look, ()


def _has_compiler(module: torch.nn.Module) -> bool:
    return vars(module).get("_compiled_call_impl") is not None
