"""`fit`: the first step measured, the plan kept true.

Step one runs the smallest plan while the runtime records and a `Profiler` reads memory. When the next step begins, what
the coming steps will look like is known (gradients resident or fresh, optimizer state born or to be reserved), and the
solver picks the fastest plan. Afterwards predicted and measured peak are compared, and the plan is corrected. A
sequence of block calls that was not seen before (another shape, another number of forwards) runs the smallest plan and
is profiled like step one.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any, Literal

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from memfit import host
from memfit.blocks import find_blocks
from memfit.calls import ProgramState
from memfit.costs import profile_program
from memfit.errors import InfeasibleBudgetError, ModelError, PlanError, UsageError
from memfit.memory import Meter, allocator, meter, resolve_budget
from memfit.plans import Plan, Policy
from memfit.profiler import Now, Profiler, step_profile
from memfit.profiles import ProgramProfile, StepProfile
from memfit.report.text import render
from memfit.runtime import Runtime
from memfit.solver.frontier import block_options
from memfit.solver.peak import simulate
from memfit.solver.planner import make_plan, solve
from memfit.solver.special import full_policy, plain_policy, selective_policy

PolicyChoice = str | Callable[[ProgramProfile], Policy] | None
STATE_FACTORS = {"adamw": 2.0, "adam": 2.0, "sgd": 0.0, "adagrad": 1.0, "rmsprop": 1.0, "lion": 1.0, "adafactor": 0.1}
"""Optimizer state per trainable parameter byte, reserved until the first `optimizer.step()`."""
MAX_SEQUENCES = 64
MAX_CORRECTIONS = 4
SLACK_SHARE = {"tcmalloc": 0.12, "jemalloc": 0.15, "glibc": 0.15}
"""Of what a plan moves, for what an allocator cannot use again; learnt from the first planned steps afterwards."""
SLACK_FLOOR = 6 * 2**20
SETTLED_STEPS = 3
RELEASED_STEPS = 6
ROOM_SHARE = 0.025
"""After so many planned steps, a plan that left more than this share of the budget unused is made again."""
TRIM_SHARE = 0.8
"""Under glibc, which hands nothing back by itself: trim where the plan comes this near to the budget."""


class Handle:
    """A fitted model. Also a context manager: leaving it removes Memfit from the model."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        budget: int | Literal["min"] | None,
        policy: PolicyChoice,
        every_n_layers: int,
        blocks: list[str] | None,
        optimizer: Any,
        plan: Plan | None,
        device: torch.device,
    ) -> None:
        """Use `fit`."""
        self.plan: Plan | None = None
        self._model = weakref.ref(model)
        self._name = type(model).__name__
        self._device = device
        self._budget = budget
        self._policy = policy
        self._every = every_n_layers
        self._optimizer = optimizer
        self._given = plan
        self._meter: Meter = meter(device)
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        self._identities = {id(p) for p in self._trainable}
        self._fingerprint = fingerprint(model)
        self._programs: dict[str, tuple[int, ProgramProfile]] = {}
        self._plans: dict[tuple[tuple[str, str], ...], _Fitted] = {}
        self._active: _Fitted | None = None
        self._unplanned = False
        self._profiler: Profiler | None = None
        self._pending: tuple[Profiler, list[tuple[str, str]]] | None = None
        self._removed = False
        self._steps = 0
        self._measured: int | None = None
        self._peak_open = False
        self._corrections = 0
        self._slack = 0
        self._clock = 0.0
        self._seconds: list[float] = []
        self._state_born = False
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._own: dict[int, bool] = {}
        self._planned_step = False
        self._last_calls: list[dict[str, Any]] = []
        self._recompute = False
        self._modes = _Modes(model)
        self._measures_only = budget is None and policy is None and plan is None
        found = find_blocks(model, blocks)
        self._block_names = [name for name, _ in found]
        self.runtime = Runtime(model, [] if self._measures_only else found)
        self.runtime.choose = self._choose
        self.runtime.has_room = self._has_room
        self.runtime.step_began = self._step_began
        self._layer_of = {name: i for i, name in enumerate(self._block_names)}
        self._hooks = [
            register_optimizer_step_pre_hook(_OptimizerHook(self, before=True)),
            register_optimizer_step_post_hook(_OptimizerHook(self, before=False)),
            model.register_forward_pre_hook(_ModelHook(self, before=True)),
            model.register_forward_hook(_ModelHook(self, before=False), always_call=True),
        ]
        _fitted[model] = weakref.ref(self)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._removed:
            self.remove()

    def __repr__(self) -> str:
        state = "removed" if self._removed else "planned" if self.plan is not None else "waiting for its first step"
        return f"<memfit.Handle of {self._name}: {state}>"

    def remove(self) -> None:
        """Make the model exactly what it was.

        Raises:
            ModelError: It has been removed already.
        """
        if self._removed:
            raise ModelError(f"Memfit was removed from this {self._name} before. Call `memfit.fit` to fit it again.")
        self._removed = True
        self._finish_step()
        self.runtime.remove()
        for hook in self._hooks:
            hook.remove()
        self._modes.restore()
        self._profiler = None
        self._pending = None
        model = self._model()
        if model is not None:
            _fitted.pop(model, None)

    # Choosing

    def _choose(self, state: ProgramState, index: int, name: str) -> Policy | None:
        fitted = self._active
        if fitted is not None and not self._unplanned:
            policy = fitted.policies.get(index)
            if policy is not None and policy.program == state.key and fitted.names[index] == name:
                return policy
            for other in self._plans.values():
                policy = other.policies.get(index)
                if policy is not None and policy.program == state.key and other.names.get(index) == name:
                    self._active = other
                    return policy
        if index == 0:
            self._active = None
            for other in self._plans.values():
                policy = other.policies.get(0)
                if policy is not None and policy.program == state.key and other.names.get(0) == name:
                    self._active = other
                    self._unplanned = False
                    return policy
        self._unplanned = True
        return self._first(state, name)

    def _first(self, state: ProgramState, name: str) -> Policy:
        """The policy of a call that no plan knows: what was asked for, else the smallest."""
        profile = self._profile(state)
        if self._given is not None:
            for call in self._given.calls:
                if call.name == name and call.program == state.key:
                    return self._given.policies[call.policy]
        if self._policy is not None:
            return self._forced(profile, name)
        return full_policy(profile)

    def _has_room(self, index: int) -> bool:
        """Whether a block call's values may be held twice while they are verified."""
        if not isinstance(self._budget, int):
            return self._budget is None
        fitted = self._active
        return fitted is not None and fitted.forward_bytes.get(index, self._budget) <= self._budget - self._slack

    def _forced(self, profile: ProgramProfile, name: str) -> Policy:
        if callable(self._policy):
            return self._policy(profile)
        if self._layer_of.get(name, 0) % self._every:
            return plain_policy(profile)
        named = {"full": full_policy, "selective": selective_policy, "plain": plain_policy}
        return named[self._policy or "full"](profile)

    def _profile(self, state: ProgramState) -> ProgramProfile:
        known = self._programs.get(state.key)
        if known is None or known[0] != state.version:
            known = (state.version, profile_program(state.program, state.held | frozenset(state.demoted)))
            self._programs[state.key] = known
        return known[1]

    # Steps

    def _step_began(self) -> None:
        """The first block call after a backward (or at all) is about to run."""
        self._finish_step()
        self._settle_plan()
        self._unplanned = False
        self._active = None
        now = time.perf_counter()
        if self._clock:
            self._seconds.append(now - self._clock)
            del self._seconds[:-64]
        self._clock = now
        needed = not self._plans or self._last_was_unplanned
        if needed and not self._measures_only:
            self._profiler = Profiler(self._meter, self._gradient_bytes, self._state_bytes)
            self.runtime.listener = self._profiler
            self._clock = 0.0
        else:
            if self._device.type == "cpu" and self._steps <= RELEASED_STEPS:
                self._meter.release()  # what recording, verifying and solving took
            self._meter.reset_peak()
            self._peak_open = True
        self._planned_step = bool(self._plans) or self._measures_only

    _last_was_unplanned = False

    def _finish_step(self) -> None:
        """What the step that ended has shown."""
        if not self.runtime.calls and not self._measures_only:
            return
        profiler, self._profiler = self._profiler, None
        self.runtime.listener = None
        if self.runtime.calls:
            self._last_calls = [self._describe(call) for call in self.runtime.calls]
        sequence = [(c.block.name, c.program_key) for c in self.runtime.calls]
        self._last_was_unplanned = self._unplanned
        if profiler is not None:
            profiler.backward_ended()
            if profiler.complete:
                self._pending = (profiler, sequence)
                self._last_was_unplanned = False
        elif self._peak_open and not self._unplanned:
            self._peak_open = False
            peak = self._meter.peak()
            if self._planned_step:
                self._measured = peak if self._measured is None else max(self._measured, peak)
                self._correct(peak)
        self._peak_open = False

    def _correct(self, peak: int) -> None:
        """Compare with the prediction; a plan that broke its budget is made again with what was learnt."""
        fitted, plan = self._active, self.plan
        if fitted is None or plan is None or not isinstance(self._budget, int) or self._corrections >= MAX_CORRECTIONS:
            return
        raw = fitted.raw_peak
        fitted.peak = max(fitted.peak, peak)
        fitted.steps += 1
        if peak > self._budget:
            self._corrections += 1
            self._slack = max(self._slack, peak - raw) + SLACK_FLOOR
            fitted.stale = True
        elif (
            fitted.steps == SETTLED_STEPS
            and plan.recompute_seconds > 0
            and self._budget - fitted.peak > ROOM_SHARE * self._budget
        ):
            self._corrections += 1
            self._slack = max(0, fitted.peak - raw) + max(SLACK_FLOOR, int(0.01 * self._budget))
            fitted.stale = True

    def _settle_plan(self) -> None:
        """Solve for what the last step showed, and again when the optimizer's state has been born."""
        if self._pending is not None:
            profiler, sequence = self._pending
            self._pending = None
            self._fit_sequence(profiler, tuple(sequence))
        for key, fitted in list(self._plans.items()):
            if fitted.stale or (fitted.state_reserved and self._state_born):
                self._fit_sequence(fitted.profiler, key)

    def _fit_sequence(self, profiler: Profiler, sequence: tuple[tuple[str, str], ...]) -> None:
        reading = profiler.reading
        states = self.runtime.states
        programs = {key: self._profile(states[key]) for _, key in sequence if key in states}
        resident = self._gradient_bytes()
        if not self._plans:
            self._warm_up(programs)
        self._meter.release()
        now = Now(
            gradients_start=resident,
            settled_bytes=self._meter.now() if self._device.type == "cpu" else self._meter.allocated(),
            born_bytes=self._state_bytes(),
            state_bytes=self._state_bytes() if self._state_born else self._reserved(),
            gradients_end=max(resident, reading.gradients_end),
        )
        profile, indices = step_profile(
            reading, programs, now, device=self._device, step_seconds=self._step_seconds() or 0.0
        )
        plan = self._plan(profile, sequence)
        base = self._meter.now()
        dynamic = max(0, plan.predicted_peak_bytes - base)
        if isinstance(self._budget, int) and self._policy is None and self._given is None:
            share = SLACK_SHARE.get(allocator(), 0.1) if self._device.type == "cpu" else 0.05
            self._slack = max(self._slack, int(share * dynamic) + SLACK_FLOOR)
            plan = self._within_budget(profile, self._budget)
            near = plan.predicted_peak_bytes > TRIM_SHARE * self._budget
            self.runtime.trim = host.release if near and allocator() == "glibc" and self._device.type == "cpu" else None
        raw = plan.predicted_peak_bytes
        predicted = raw + (self._slack if self._budget is not None else 0)
        if isinstance(self._budget, int):
            predicted = max(raw, min(predicted, self._budget))
        self.plan = _with_peak(plan, predicted, self._budget)
        fitted = _Fitted(self.plan, raw, indices, profiler, profile, not self._state_born)
        if len(self._plans) >= MAX_SEQUENCES:
            self._plans.pop(next(iter(self._plans)))
        self._plans[sequence] = fitted
        self._recompute = True

    def _warm_up(self, programs: dict[str, ProgramProfile]) -> None:
        """Let the solver's code and workspaces grow the process before it is measured."""
        for program in list(programs.values())[:1]:
            block_options(program)

    def _plan(self, profile: StepProfile, sequence: tuple[tuple[str, str], ...]) -> Plan:
        if self._given is not None or callable(self._policy):
            policies = [self._first(self.runtime.states[c.program], c.name) for c in profile.calls]
            return make_plan(profile, policies, budget_bytes=None, model=self._name, fingerprint=self._fingerprint)
        if self._policy is not None:
            policies = [self._forced(profile.programs[c.program], c.name) for c in profile.calls]
            return make_plan(profile, policies, budget_bytes=None, model=self._name, fingerprint=self._fingerprint)
        if self._budget == "min":
            return solve(profile, budget="min", model=self._name, fingerprint=self._fingerprint)
        policies = [plain_policy(profile.programs[c.program]) for c in profile.calls]
        return make_plan(profile, policies, budget_bytes=None, model=self._name, fingerprint=self._fingerprint)

    def _within_budget(self, profile: StepProfile, budget: int) -> Plan:
        """The fastest plan that leaves room for the allocator's slack; where that is too much, as much as there is."""
        try:
            return self._solve(profile, budget, self._slack)
        except InfeasibleBudgetError as error:
            smallest = error.minimum - self._slack
            if smallest > budget:
                self.remove()
                raise InfeasibleBudgetError(budget, smallest, error.event, error.advice) from None
            self._slack = budget - smallest
            return self._solve(profile, budget, self._slack)

    def _solve(self, profile: StepProfile, budget: int, slack: int) -> Plan:
        return solve(profile, budget=budget, margin_bytes=slack, model=self._name, fingerprint=self._fingerprint)

    # Reading

    def _gradient_bytes(self) -> int:
        return sum(p.grad.untyped_storage().nbytes() for p in self._trainable if p.grad is not None)

    def _state_bytes(self) -> int:
        total = 0
        seen: set[int] = set()
        for optimizer in self._optimizers:
            for values in optimizer.state.values():
                for value in values.values() if isinstance(values, dict) else ():
                    if isinstance(value, torch.Tensor) and value.device.type == self._device.type:
                        storage = value.untyped_storage()
                        if storage._cdata not in seen:
                            seen.add(storage._cdata)
                            total += storage.nbytes()
        return total

    def _reserved(self) -> int:
        """Optimizer state before the first step: of the optimizer that was named, else AdamW's."""
        optimizer = self._optimizer
        name = "adamw" if optimizer is None else optimizer if isinstance(optimizer, str) else type(optimizer).__name__
        factor = STATE_FACTORS.get(name.lower(), 2.0)
        if isinstance(optimizer, torch.optim.SGD) and any(g.get("momentum") for g in optimizer.param_groups):
            factor = 1.0
        return int(factor * sum(p.numel() * p.element_size() for p in self._trainable))

    def optimizer_event(self, optimizer: torch.optim.Optimizer, *, before: bool) -> None:
        """Any torch optimizer is about to step, or has stepped."""
        if not self._owns(optimizer):
            return
        if before:
            if self._profiler is not None:
                self._profiler.backward_ended()
            return
        self._steps += 1
        self._optimizers.add(optimizer)
        self._state_born = True
        if self._profiler is not None:
            self._profiler.optimizer_stepped(self._state_bytes())
        self.runtime.generation += 1

    def _owns(self, optimizer: torch.optim.Optimizer) -> bool:
        known = self._own.get(id(optimizer))
        if known is None:
            known = any(id(p) in self._identities for group in optimizer.param_groups for p in group["params"])
            self._own[id(optimizer)] = known
        return known

    def _step_seconds(self) -> float | None:
        if not self._seconds:
            return None
        return sorted(self._seconds)[len(self._seconds) // 2]

    def _describe(self, call: Any) -> dict[str, Any]:
        return {
            "name": call.block.name,
            "mode": {"kept": "plain", "": "plain"}.get(call.mode, call.mode),
            "reason": call.block.reason or ("kept this time" if call.mode == "kept" else ""),
            "parent": call.block.parent,
            "program": call.program_key,
            "policy": call.policy,
        }

    # Reporting

    def report(self) -> str:
        """What was decided, predicted and measured, as text."""
        return render(self.summary())

    def summary(self) -> dict[str, Any]:
        """The report as data that `json.dumps` takes: raw bytes and seconds, ``None`` where unknown."""
        self._read_open_peak()
        plan = self.plan
        blocks = []
        saved = recomputed = 0
        for call in self._last_calls or []:
            entry = {key: call[key] for key in ("name", "mode", "reason", "parent")}
            entry.update(self._bytes_of(call))
            saved += entry["saved_bytes"] or 0
            recomputed += entry["recomputed_bytes"] or 0
            blocks.append(entry)
        called = {entry["name"] for entry in blocks}
        for block in self.runtime.blocks:
            if block.name not in called and block.mode in ("descent", "plain"):
                blocks.append(
                    {"name": block.name, "mode": block.mode, "reason": block.reason, "parent": block.parent}
                    | {"saved_bytes": 0, "recomputed_bytes": 0, "offloaded_bytes": 0}
                )
        if self._measures_only:
            blocks = [
                {"name": name, "mode": "plain", "reason": "no budget", "parent": ""}
                | {"saved_bytes": None, "recomputed_bytes": 0, "offloaded_bytes": 0}
                for name in self._block_names
            ]
        plain_peak = self._measured if self._measures_only else None
        if plan is not None:
            plain_peak = plan.plain_peak_bytes
        return {
            "model": self._name,
            "device": str(self._device),
            "budget_bytes": self._budget if isinstance(self._budget, int) else None,
            "budget": self._budget if isinstance(self._budget, str) else None,
            "predicted_peak_bytes": plan.predicted_peak_bytes if plan is not None else None,
            "measured_peak_bytes": self._measured,
            "plain_peak_bytes": plain_peak,
            "peak_event": plan.peak_event if plan is not None else None,
            "step_seconds": self._step_seconds(),
            "recompute_seconds": plan.recompute_seconds if plan is not None else None,
            "saved_bytes": saved if self._last_calls else None,
            "recomputed_bytes": recomputed if self._last_calls else None,
            "context_bytes": self._meter.outside() if self._device.type == "cuda" else None,
            "steps": self._steps,
            "notes": [*self._modes.notes, *self.runtime.notes.values()],
            "blocks": blocks,
        }

    def _read_open_peak(self) -> None:
        """Include the step that is just over in the measurement."""
        if self._peak_open and self._planned_step and not self._unplanned and not self._removed:
            peak = self._meter.peak()
            self._measured = peak if self._measured is None else max(self._measured, peak)

    def _bytes_of(self, call: dict[str, Any]) -> dict[str, int | None]:
        known = self._programs.get(call["program"])
        policy = call["policy"]
        if known is None or policy is None:
            return {"saved_bytes": None, "recomputed_bytes": None, "offloaded_bytes": 0}
        nodes = known[1].nodes
        kept = set(policy.kept) | set(policy.narrowed)
        saved = set(known[1].saved)
        here = sum((nodes[n].narrow_bytes if n in policy.narrowed else nodes[n].keep_bytes) or 0 for n in kept)
        gone = sum(nodes[n].keep_bytes or 0 for n in saved - kept)
        gone += sum((nodes[n].keep_bytes or 0) - (nodes[n].narrow_bytes or 0) for n in policy.narrowed)
        return {"saved_bytes": here, "recomputed_bytes": gone, "offloaded_bytes": 0}


class _Fitted:
    """A plan in force for one sequence of block calls."""

    __slots__ = (
        "forward_bytes",
        "names",
        "peak",
        "plan",
        "policies",
        "profile",
        "profiler",
        "raw_peak",
        "stale",
        "state_reserved",
        "steps",
    )

    def __init__(
        self,
        plan: Plan,
        raw_peak: int,
        indices: list[int],
        profiler: Profiler,
        profile: StepProfile,
        state_reserved: bool,
    ) -> None:
        self.plan = plan
        self.raw_peak = raw_peak
        self.profiler = profiler
        self.profile = profile
        self.policies = {index: plan.policy(place) for place, index in enumerate(indices)}
        events = simulate(profile, plan).events
        plain = {
            key: sum(n.storage_bytes for n in p.nodes if n.num_saved and n.kind == "computed")
            for key, p in profile.programs.items()
        }
        self.forward_bytes = {
            indices[event.call]: size + plain[profile.calls[event.call].program]
            for event, (_, size) in zip(profile.events, events, strict=True)
            if event.kind == "forward" and event.call is not None
        }
        self.names = {index: plan.calls[place].name for place, index in enumerate(indices)}
        self.stale = False
        self.peak = 0
        self.steps = 0
        self.state_reserved = state_reserved


class _Modes:
    """Switches of the model that training under Memfit holds still: ``use_cache``, and its own checkpointing."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.notes: list[str] = []
        self._configs: list[Any] = list(
            {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "use_cache")}.values()
        )
        self._switched = [
            weakref.ref(m) for m in model.modules() if isinstance(getattr(m, "gradient_checkpointing", None), bool)
        ]
        self._taken: list[weakref.ref[torch.nn.Module]] = []
        self._caches: list[tuple[Any, Any]] = []

    def enter(self) -> None:
        """A training forward begins."""
        for reference in self._switched:
            module: Any = reference()
            if module is not None and module.gradient_checkpointing:
                module.gradient_checkpointing = False
                self._taken.append(reference)
                note = "the model's own gradient checkpointing was taken over: the plan decides instead"
                if note not in self.notes:
                    self.notes.append(note)
        for config in self._configs:
            if config.use_cache:
                self._caches.append((config, config.use_cache))
                config.use_cache = False

    def leave(self) -> None:
        """It is over."""
        while self._caches:
            config, value = self._caches.pop()
            config.use_cache = value

    def restore(self) -> None:
        """As the user had it."""
        self.leave()
        for reference in self._taken:
            module: Any = reference()
            if module is not None:
                module.gradient_checkpointing = True
        self._taken = []


class _Hook:
    """Copies and pickles as inert."""

    __slots__ = ("_before", "_handle")

    def __init__(self, handle: Handle | None = None, *, before: bool = True) -> None:
        self._handle: Callable[[], Handle | None] = lambda: handle
        self._before = before

    def handle(self) -> Handle | None:
        """The handle, if it is still there."""
        return self._handle()

    def __deepcopy__(self, memo: Any) -> _Hook:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()


class _OptimizerHook(_Hook):
    """A global hook: it must not keep the model alive."""

    __slots__ = ()

    def __init__(self, handle: Handle | None = None, *, before: bool = True) -> None:
        super().__init__(None, before=before)
        if handle is not None:
            self._handle = weakref.ref(handle)

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        handle = self.handle()
        if handle is not None:
            handle.optimizer_event(optimizer, before=self._before)


class _ModelHook(_Hook):
    __slots__ = ()

    def __call__(self, module: torch.nn.Module, args: Any, output: Any = None) -> None:
        if torch.compiler.is_compiling():
            return
        handle = self.handle()
        if handle is None:
            return
        if not self._before:
            handle._modes.leave()
        elif torch.is_grad_enabled() and module.training:
            handle._modes.enter()
            handle.runtime.begin_if_new()


_fitted: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[Handle]] = weakref.WeakKeyDictionary()


def fit(
    model: torch.nn.Module,
    *,
    budget: int | float | str | None = None,
    policy: PolicyChoice = None,
    every_n_layers: int | None = None,
    blocks: Iterable[str] | None = None,
    optimizer: Any = None,
    plan: Plan | None = None,
) -> Handle:
    """Fit a model's training step into a budget; then train as before.

    The first training step records and measures with the smallest plan; from the second on the best plan holds.

    Args:
        model: Any module with repeated blocks; it stays the user's own, nothing but hooks is added.
        budget: Limit on the peak of the whole process on the model's device: bytes, ``"6GiB"``, ``"6.5 GB"``,
            ``"90%"``, ``"auto"``, ``"min"``; ``None`` saves everything and only measures.
        policy: Without a budget: ``"full"`` or ``"selective"``, today's switches (or a function from a program's
            profile to its policy).
        every_n_layers: Without a budget: ``policy`` (``"full"`` unless given) for every n-th block only.
        blocks: Names of modules or classes to plan for, instead of what is found.
        optimizer: The optimizer, or its name; ``None`` reserves AdamW's state until the first ``optimizer.step()``.
        plan: A plan made before, by `plan`.

    Raises:
        BudgetError: The budget cannot be read.
        ModelError: The model cannot be fitted: no blocks, nothing to train, meta device, fitted already.
        InfeasibleBudgetError: Raised when the second step begins; the model is unfitted then.
        PlanError: The plan is for another model.
    """
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"`fit` takes a torch.nn.Module, not {type(model).__name__}.")
    parts = set(model.modules())
    if any(fitted in parts or model in set(fitted.modules()) for fitted in list(_fitted)):
        raise ModelError(f"This {type(model).__name__} is fitted already. Call `handle.remove()` on its handle first.")
    chosen = sum(x is not None for x in (budget, policy if policy is not None else every_n_layers, plan))
    if chosen > 1:
        raise UsageError("Give one of `budget`, `policy` (with `every_n_layers`) and `plan`: each decides everything.")
    if isinstance(policy, str) and policy not in ("full", "selective", "plain"):
        raise UsageError(f"There is no policy `{policy}`. Write `full` or `selective`, or give a `budget`.")
    if every_n_layers is not None and (
        isinstance(every_n_layers, bool) or not isinstance(every_n_layers, int) or every_n_layers < 1
    ):
        raise UsageError(f"`every_n_layers={every_n_layers}` is not a positive integer.")
    if isinstance(optimizer, str) and optimizer.lower() not in STATE_FACTORS:
        raise UsageError(
            f"`optimizer={optimizer}` is not known. Give the optimizer itself, or one of: {', '.join(STATE_FACTORS)}."
        )
    device = _device_of(model)
    limit = resolve_budget(budget, device)
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(f"{type(model).__name__} has no parameters that train. Set `requires_grad` before `fit`.")
    if isinstance(limit, int):
        static = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
        if limit < static:
            raise InfeasibleBudgetError(limit, static, "weights", "Shard the model, or raise `budget`.")
    if plan is not None:
        check_plan(model, plan)
    if every_n_layers is not None and policy is None:
        policy = "full"
    return Handle(
        model,
        budget=limit,
        policy=policy,
        every_n_layers=every_n_layers or 1,
        blocks=list(blocks) if blocks is not None else None,
        optimizer=optimizer,
        plan=plan,
        device=device,
    )


def apply(model: torch.nn.Module, plan: Plan) -> Handle:
    """Fit a model with a plan that was made before.

    Raises:
        PlanError: The plan is for another model.
        ModelError: As `fit`.
    """
    return fit(model, plan=plan)


def plan(
    model: torch.nn.Module,
    batch: Any,
    *,
    budget: int | float | str | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    policy: PolicyChoice = None,
    every_n_layers: int | None = None,
    blocks: Iterable[str] | None = None,
    optimizer: Any = None,
) -> Plan:
    """Profile one training step on a batch and solve for a budget; the model is left as it was.

    Weights, gradients, buffers and the state of torch's generators are the same afterwards.

    Args:
        model: As for `fit`.
        batch: A mapping calls ``model(**batch)``, a tuple ``model(*batch)``, anything else ``model(batch)``.
        budget: As for `fit`. ``None``: save everything.
        loss: ``loss(output, batch)``; by default ``output.loss``, else the output if it is a scalar.
        policy, every_n_layers, blocks, optimizer: As for `fit`.

    Raises:
        InfeasibleBudgetError: No plan fits.
        ModelError: As `fit`; or the loss is not a scalar tensor.
    """
    if budget is None and policy is None and every_n_layers is None:
        policy = "plain"
    handle = fit(model, budget=budget, policy=policy, every_n_layers=every_n_layers, blocks=blocks, optimizer=optimizer)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad for p in parameters]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    training = model.training
    cuda = [handle._device] if handle._device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            for parameter in parameters:
                parameter.grad = None
            model.train()
            with torch.enable_grad():
                value = scalar_loss(_call(model, batch), batch, loss)
                value.backward()  # type: ignore[no-untyped-call]
            del value
            handle._finish_step()
            if handle._pending is None:
                raise ModelError(f"No block of {type(model).__name__} took part in the backward of this loss.")
            handle.runtime.calls = []
            for parameter in parameters:
                parameter.grad = None
            handle._settle_plan()
    finally:
        model.train(training)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        if not handle._removed:
            handle.remove()
    assert handle.plan is not None
    return handle.plan


def scalar_loss(output: Any, batch: Any, loss: Callable[[Any, Any], torch.Tensor] | None) -> torch.Tensor:
    """The loss of one forward.

    Raises:
        ModelError: It is not a scalar tensor.
    """
    value: Any
    if loss is not None:
        value = loss(output, batch)
    else:
        value = getattr(output, "loss", None)
        if value is None:
            value = output["loss"] if isinstance(output, Mapping) and "loss" in output else output
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        what = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            what = "a scalar that needs no gradient"
        raise ModelError(
            f"The loss is {what}, not a scalar tensor with a gradient. Give `loss=lambda output, batch: ...`."
        )
    return value


def fingerprint(model: torch.nn.Module) -> str:
    """Equal for models of equal structure: names, shapes and dtypes of parameters and buffers, and which train."""
    digest = sha256(type(model).__name__.encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}\n".encode())
    return digest.hexdigest()[:16]


def check_plan(model: torch.nn.Module, plan: Plan) -> None:
    """Refuse a plan for another model.

    Raises:
        PlanError: With both names.
    """
    mine = fingerprint(model)
    if plan.fingerprint != mine:
        raise PlanError(
            f"The plan is for {plan.model} ({plan.fingerprint}), the model is {type(model).__name__} ({mine}): names, "
            "shapes or dtypes of parameters differ. Make a plan for this model with `memfit.plan`."
        )


def _with_peak(plan: Plan, predicted: int, budget: int | str | None) -> Plan:
    return replace(plan, predicted_peak_bytes=predicted, budget_bytes=budget if isinstance(budget, int) else None)


def _device_of(model: torch.nn.Module) -> torch.device:
    devices = list(dict.fromkeys(p.device for p in model.parameters()))
    if any(d.type == "meta" for d in devices):
        raise ModelError(f"{type(model).__name__} is on the meta device. Load its weights before `fit`.")
    if not devices:
        raise ModelError(f"{type(model).__name__} has no parameters.")
    if len(devices) > 1:
        raise ModelError(
            f"{type(model).__name__} lies on several devices: {', '.join(map(str, devices))}. Fit one device's model."
        )
    return devices[0]


def _call(model: torch.nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


__all__ = ["Handle", "apply", "fit", "plan"]
