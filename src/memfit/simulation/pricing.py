"""What a plan comes to on a device: a rehearsed step, priced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from memfit.formulas import Comparison, Counted, Sizes, compare
from memfit.hardware import Hardware
from memfit.plans import Plan
from memfit.predictions import Alternative, Peak, Prediction
from memfit.profiles import StepProfile
from memfit.simulation.device import CUDA_WORKSPACE_BYTES, PROCESS_SPREAD_BYTES, not_counted, slack
from memfit.simulation.results import Rehearsed
from memfit.solver.hidden_states import IN_FLIGHT, offload_plan
from memfit.solver.peak import simulate
from memfit.solver.planner import switched
from memfit.solver.switches import todays


@dataclass(frozen=True, slots=True, kw_only=True)
class Pricing:
    """A rehearsed step on a device, for any plan.

    Attributes:
        rehearsed: The step.
        entry: The device.
        title: What the model is called in answers.
        accumulate: Micro-batches of an optimizer step.
        num_batches: Of the devices together.
        parts: Whether a block may keep a part of what it saves.
        tokens: Of a micro-batch, where it has tokens.
        process_bytes: That are no tensors, where the device is the process's own memory.
        num_parameters, num_trainable: Of the model.
        notes: What the numbers leave out, beside what the device does.
        sizes: Of a language model's step, for DeepSpeed-Chat's formula.
        whole: ZeRO-3: the step whose blocks run again as a whole, which recipes that read no gathered weights are not.
    """

    rehearsed: Rehearsed
    entry: Hardware
    title: str
    accumulate: int
    num_batches: int
    tokens: int | None
    process_bytes: int
    num_parameters: int
    num_trainable: int
    notes: tuple[str, ...]
    sizes: Sizes | None = None
    parts: bool = True
    whole: Pricing | None = None

    @property
    def switchable(self) -> Pricing:
        """The step that today's switches are for: they run blocks again as a whole."""
        return self.whole or self

    def owner(self, plan: Plan) -> Pricing:
        """The step that a plan is for: this, or `whole`."""
        mine = all(call.program in self.profile.programs for call in plan.calls)
        return self if mine or self.whole is None else self.whole

    @property
    def profile(self) -> StepProfile:
        """What the step costs, as the solver sees it."""
        return self.rehearsed.profile

    @property
    def base_bytes(self) -> int:
        """On the device, beside tensors and the allocator's slack."""
        return self.process_bytes + (CUDA_WORKSPACE_BYTES if self.entry.backend == "cuda" else 0)

    def tensor_bytes(self, limit: int) -> int:
        """What tensors may take for the highest peak to be within ``limit``."""
        return max(0, int((limit - self._highest_base) / (1 + self._slack[1])))

    def limit(self, tensor_bytes: int) -> int:
        """The highest peak of a plan whose tensors take ``tensor_bytes``."""
        return self._highest_base + int(tensor_bytes * (1 + self._slack[1]))

    def expected(self, plan: Plan) -> int:
        """Bytes of the expected peak."""
        return self.base_bytes + int(plan.predicted_peak_bytes * (1 + self._slack[0]))

    def seconds(self, plan: Plan) -> float:
        """Of an optimizer step."""
        blocks = self.rehearsed.step_seconds - self.rehearsed.optimizer_seconds
        blocks += self.rehearsed.times * plan.recompute_seconds
        return self.accumulate * blocks + self.rehearsed.optimizer_seconds

    def predict(self, plan: Plan, limit: int | None = None) -> Prediction:
        """What a plan comes to, and today's switches beside it.

        Args:
            plan: Of this step.
            limit: Bytes that it should fit into; its own highest peak by default.
        """
        owner = self.owner(plan)
        rehearsed = owner.rehearsed
        peak = owner.peak(plan)
        budget = limit if limit is not None else peak.high
        again = owner._recomputed_flops(plan)
        seconds = owner.seconds(plan)
        tokens = None if self.tokens is None else self.num_batches * self.accumulate * self.tokens
        return Prediction(
            model=self.title,
            device=self.entry.name,
            budget_bytes=budget,
            fits=peak.high <= budget,
            peak=peak,
            step_seconds=seconds,
            tokens_per_second=None if tokens is None else tokens / seconds,
            compute_factor=(rehearsed.forward_flops + rehearsed.backward_flops + again)
            / max(rehearsed.forward_flops, 1.0),
            forward_flops=rehearsed.forward_flops,
            backward_flops=rehearsed.backward_flops,
            recomputed_flops=again,
            alternatives=tuple(self._switches(budget)),
            plan=plan,
            not_counted=(*not_counted(self.entry, rehearsed), *self.notes),
            num_parameters=self.num_parameters,
            num_trainable=self.num_trainable,
            formula=self._comparison(),
        )

    def peak(self, plan: Plan) -> Peak:
        """The peak of a plan, and what it consists of."""
        rehearsed, profile = self.rehearsed, self.profile
        found = simulate(profile, plan)
        number = next(i for i, (_, size) in enumerate(found.events) if size == found.peak_bytes)
        event = profile.events[number]
        saved = sum(found.kept_bytes[call] for call in event.live_calls)
        if event.kind == "backward" and event.call is not None:
            saved += found.kept_bytes[event.call]
        static = rehearsed.parameter_bytes + rehearsed.buffer_bytes
        gradients = rehearsed.gradients[number]
        before = profile.events[number - 1].outside_bytes if number else static + rehearsed.state_bytes + gradients
        loss = max(0, event.outside_bytes - before) if event.name == "loss" else 0
        workspace = self.base_bytes - self.process_bytes
        expected = self.expected(plan)
        parts = {
            "weights": static,
            "gradients": gradients,
            "optimizer_state": rehearsed.state_bytes,
            "saved_tensors": saved,
            "loss": loss,
            "outside_blocks": event.outside_bytes - static - rehearsed.state_bytes - gradients - loss,
            "workspace": found.peak_bytes - event.outside_bytes - saved + workspace,
            "process": self.process_bytes,
        }
        return Peak(
            low=self.process_bytes + found.peak_bytes,
            expected=expected,
            high=self.limit(found.peak_bytes),
            event=found.event,
            parts={**parts, "allocator_slack": expected - sum(parts.values())},
        )

    def offload_plan(self, *, in_flight: int = IN_FLIGHT, overlaps: bool = True) -> Plan | None:
        """Hidden-state offload at the rate of the device's link to the host; ``None`` where there is no such link."""
        link = self.entry.host_link_bytes_per_second
        if link is None:
            return None
        rate = link * self.entry.copy_efficiency
        return offload_plan(self.profile, bytes_per_second=rate, in_flight=in_flight, overlaps=overlaps)

    def _switches(self, budget: int) -> Iterator[Alternative]:
        other = self.switchable
        offload = other.offload_plan()

        def fits(plan: Plan) -> bool:
            return self.limit(plan.predicted_peak_bytes) <= budget

        nothing, *found = todays(other.profile, fits, parts=self.parts)
        if self.whole is not None:
            nothing = nothing[0], switched(self.profile, policy="plain")
        more = [] if offload is None else [("hidden-state offload", offload)]
        for name, plan in [nothing, *found, *more]:
            seconds = self.owner(plan).seconds(plan)
            yield Alternative(name=name, peak_bytes=self.expected(plan), step_seconds=seconds, fits=fits(plan))

    def _comparison(self) -> Comparison | None:
        if self.sizes is None:
            return None
        rehearsed, other = self.rehearsed, self.switchable
        counted = Counted(
            forward=rehearsed.forward_flops,
            backward=rehearsed.backward_flops,
            recomputed=other._recomputed_flops(switched(other.profile, policy="full")),
            head=rehearsed.outside_flops,
            blocks=sum(sum(rehearsed.op_flops[call.program]) for call in self.profile.calls),
        )
        return compare(self.sizes, counted, num_devices=self.num_batches)

    @property
    def _highest_base(self) -> int:
        return self.base_bytes + (PROCESS_SPREAD_BYTES if self.entry.backend == "cpu" else 0)

    @property
    def _slack(self) -> tuple[float, float]:
        return slack(self.entry)

    def _recomputed_flops(self, plan: Plan) -> float:
        """What is computed again, and a plan's recomputation as on a device whose seconds are FLOPs."""
        profile = self.profile
        programs = {
            key: replace(
                program,
                nodes=tuple(replace(node, narrow_seconds=0.0) for node in program.nodes),
                ops=tuple(
                    replace(op, seconds=flops)
                    for op, flops in zip(program.ops, self.rehearsed.op_flops[key], strict=True)
                ),
            )
            for key, program in profile.programs.items()
        }
        again = simulate(replace(profile, programs=programs), plan).recompute_seconds
        return self.rehearsed.times * again + self.rehearsed.again_flops


__all__ = ["Pricing"]
