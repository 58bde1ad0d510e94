"""Know before you run: what a training step will hold and take, on a device that need not be there."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any, Literal

import torch

from memfit import hardware, host
from memfit.arguments import check_loss, check_positive
from memfit.blocks import find_blocks, replayable_children
from memfit.errors import InfeasibleBudgetError, MemfitError, ModelError, UsageError
from memfit.fingerprints import fingerprint
from memfit.hardware import Hardware
from memfit.offline import Loss, call, scalar_loss
from memfit.plans import Plan
from memfit.predictions import Alternative, Peak, Prediction
from memfit.profiles import StepProfile
from memfit.sharding import class_name, unwrapped
from memfit.simulation import tasks
from memfit.simulation.chunks import NotChunkedError
from memfit.simulation.chunks import chunked_loss as spared_logits
from memfit.simulation.device import CUDA_WORKSPACE_BYTES, SLACK, limit_of, not_counted
from memfit.simulation.fakes import fake_batch, fake_tensors, twin, uncheckpointed
from memfit.simulation.ledger import Ledger
from memfit.simulation.optimizers import make_optimizer
from memfit.simulation.rates import rates
from memfit.simulation.rehearsal import Rehearsal
from memfit.simulation.results import Rehearsed
from memfit.simulation.target import CudaKernels
from memfit.solver.peak import simulate as simulate_plan
from memfit.solver.planner import solve, switched
from memfit.solver.switches import todays
from memfit.units import parse_budget


def simulate(
    model: Any,
    batch: Any = None,
    *,
    budget: int | float | str | None = None,
    device: str | Hardware = "cpu",
    loss: Loss | None = None,
    optimizer: str | None = "adamw",
    accumulate: int = 1,
    num_devices: int = 1,
    batch_size: int = 1,
    length: int = 512,
    task: str | None = None,
    chunked_loss: bool = False,
    **options: Any,
) -> Prediction:
    """Predict one training step on a device, from the model's own code on fake tensors.

    Nothing is allocated on the device, and no weights are needed. Times are those of a roofline over every op.

    Args:
        model: A module, with ``batch``; or a configuration of transformers, or what `configurations.load` takes: a
            folder, a ``config.json``, a known name such as ``llama-3-8b``.
        batch: As for `plan`; of a module.
        budget: What the peak is to fit into; the device's memory by default. ``"min"``: the smallest peak.
        device: A name that `hardware.find` knows, or an entry.
        loss: As for `plan`; of a module.
        optimizer: ``adamw``, ``adamw_fused``, ``adamw_8bit``, ``adafactor``, ``sgd``...; ``None``: no step.
        accumulate: Micro-batches of an optimizer step: with more than one, gradients are there from the start.
        num_devices: That train the same model, each with its own batch; for ``tokens_per_second`` only.
        batch_size, length: Rows and tokens of each device's batch, for a configuration.
        task: One of `tasks.TASKS`; by default what the configuration's architecture is for.
        chunked_loss: As for `fit`. Without it the alternatives say what it would bring, where the loss owns the peak
            of full checkpointing.
        options: As `tasks.build` takes them: ``precision``, ``attention``, ``lora``, ``freeze``...

    Raises:
        UsageError: An argument cannot mean anything.
        ModelError: The model has no blocks, nothing to train, or no scalar loss.
        BudgetError: The budget cannot be read.
    """
    parse_budget(budget)
    forecast = Forecast(
        model,
        batch,
        device=device,
        loss=loss,
        optimizer=optimizer,
        accumulate=accumulate,
        num_devices=num_devices,
        batch_size=batch_size,
        length=length,
        task=task,
        chunked_loss=chunked_loss,
        **options,
    )
    return forecast.within(budget)


class Forecast:
    """A step that was rehearsed once, for predictions under any budget. The arguments are those of `simulate`."""

    def __init__(
        self,
        model: Any,
        batch: Any = None,
        *,
        device: str | Hardware = "cpu",
        loss: Loss | None = None,
        optimizer: str | None = "adamw",
        accumulate: int = 1,
        num_devices: int = 1,
        batch_size: int = 1,
        length: int = 512,
        task: str | None = None,
        chunked_loss: bool = False,
        compares: bool = True,
        **options: Any,
    ) -> None:
        """Rehearse; ``compares``: also with a chunked loss, where that may pay, for the alternatives."""
        self._entry = hardware.find(device) if isinstance(device, str) else device
        check_loss(loss)
        check_positive("accumulate", accumulate)
        check_positive("num_devices", num_devices)
        self._accumulate, self._num_devices = accumulate, num_devices
        self._optimizer = None
        if optimizer is not None:
            self._optimizer = make_optimizer(optimizer, cuda=self._entry.backend == "cuda")
        prepare: Callable[[], tasks.Job]
        if isinstance(model, torch.nn.Module):
            if options or task is not None:
                raise UsageError(f"`{next(iter([*options, 'task']))}` is for configurations; build the module with it.")
            if batch is None:
                raise UsageError("A module needs a batch: `simulate(model, batch)`.")
            prepare = _job_of(unwrapped(model), batch, loss)
        else:
            if batch is not None or loss is not None:
                raise UsageError(
                    "A configuration makes its own batch and loss: give `batch_size=`, `length=` and `task=`."
                )
            prepare = _job_for(_configuration(model), task, batch_size, length, options)
        self._process = host.resident_bytes() if self._entry.backend == "cpu" else 0
        with fake_tensors():
            job = prepare()
            self._own_checkpointing = uncheckpointed(job.model)
            self._name, self._fingerprint = class_name(job.model), fingerprint(job.model)
            self._title = job.title or self._name
            self._tokens = job.tokens
            self._num_parameters = sum(p.numel() for p in job.model.parameters())
            self._num_trainable = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
            self._rehearsed = self._rehearse_with(job, chunked=chunked_loss)
            self._spared: Rehearsed | None = None
            if compares and not chunked_loss and switched(self.profile, policy="full").peak_event == "loss":
                with contextlib.suppress(ModelError):
                    self._spared = self._rehearse_with(job, chunked=True)

    def _rehearse_with(self, job: tasks.Job, *, chunked: bool) -> Rehearsed:
        """The step with its loss as it is, or in chunks.

        Raises:
            ModelError: Its loss is not one that can be computed in chunks.
        """
        if not chunked:
            return self._rehearse(job)
        with spared_logits(job.model, cuda=self._entry.backend == "cuda") as is_one:
            try:
                found = self._rehearse(job) if is_one else None
            except NotChunkedError:
                found = None
        if found is None:
            raise ModelError(f"The loss of {self._name} cannot be predicted in chunks: leave `chunked_loss` out.")
        return found

    def _rehearse(self, job: tasks.Job) -> Rehearsed:
        """The step with the kernels and at the rates of the device; blocks that cannot be replayed are split."""
        blocks = find_blocks(job.model)
        doubles = True
        while True:
            ledger = Ledger(rates(self._entry))
            kernels = CudaKernels() if self._entry.backend == "cuda" else contextlib.nullcontext()
            try:
                with Rehearsal(job.model, blocks, ledger, doubles=doubles) as rehearsal, ledger, kernels:
                    found = rehearsal.run(job.batch, job.loss, self._optimizer, resident=self._accumulate > 1)
            except (MemfitError, NotChunkedError):
                raise
            except Exception as error:
                if doubles:  # a block that was passed over may have left out what others look for
                    doubles = False
                    continue
                what = str(error).splitlines()[0] if str(error) else ""
                raise ModelError(
                    f"{self._name} does not run on tensors without contents: {type(error).__name__}: {what[:200]} "
                    "Plan it on a real batch: `memfit plan FILE.py:FUNCTION`."
                ) from error
            if rehearsal.differs:
                doubles = False
                continue
            if not rehearsal.not_replayable:
                return found
            blocks = [part for block in blocks for part in _split(block, rehearsal.not_replayable)]

    def within(self, budget: int | float | str | None = None) -> Prediction:
        """The fastest plan whose highest peak fits; where none does, the one with the smallest peak."""
        limit = limit_of(budget, self._entry)
        if not isinstance(limit, int):
            return self.of(self.solve("min"))
        try:
            plan = self.solve(max(0, int((limit - self._base) / (1 + self._slack[1]))))
        except InfeasibleBudgetError:
            plan = self.solve("min")
        return self.of(replace(plan, budget_bytes=limit), limit)

    def solve(self, budget: int | Literal["min"]) -> Plan:
        """The fastest plan whose tensors take at most ``budget`` bytes.

        Raises:
            InfeasibleBudgetError: There is none.
        """
        return solve(self.profile, budget=budget, **self.named)

    def frontier(self, count: int = 9) -> list[Prediction]:
        """Predictions from the smallest peak to the plain one, each the fastest for its peak."""
        smallest = self.solve("min")
        low, high = smallest.predicted_peak_bytes, smallest.plain_peak_bytes
        found = []
        for number in range(count):
            size = low + (high - low) * number // max(1, count - 1)
            limit = self._base + int(size * (1 + self._slack[1])) + 1
            found.append(self.of(replace(self.solve(size), budget_bytes=limit), limit))
        return found

    @property
    def profile(self) -> StepProfile:
        """What the step costs, as the solver sees it."""
        return self._rehearsed.profile

    @property
    def named(self) -> dict[str, Any]:
        """Whose plans these are."""
        return {"model": self._name, "fingerprint": self._fingerprint}

    @property
    def _slack(self) -> tuple[float, float]:
        return SLACK[self._entry.backend]

    @property
    def _base(self) -> int:
        return self._process + (CUDA_WORKSPACE_BYTES if self._entry.backend == "cuda" else 0)

    def _seconds(self, plan: Plan) -> float:
        blocks = self._rehearsed.step_seconds - self._rehearsed.optimizer_seconds + plan.recompute_seconds
        return self._accumulate * blocks + self._rehearsed.optimizer_seconds

    def _size(self, plan: Plan) -> int:
        return self._base + int(plan.predicted_peak_bytes * (1 + self._slack[0]))

    def of(self, plan: Plan, limit: int | None = None) -> Prediction:
        """What a plan comes to; ``limit``: bytes that it should fit into."""
        rehearsed = self._rehearsed
        peak = self._peak(plan)
        budget = limit if limit is not None else peak.high
        again = self._recomputed_flops(plan)
        seconds = self._seconds(plan)
        tokens = None if self._tokens is None else self._num_devices * self._accumulate * self._tokens
        return Prediction(
            model=self._title,
            device=self._entry.name,
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
            alternatives=(
                *(
                    Alternative(name=name, peak_bytes=self._size(each), step_seconds=self._seconds(each))
                    for name, each in todays(self.profile, lambda each: self._size(each) <= budget)
                ),
                *self._with_chunked_loss(limit),
            ),
            plan=plan,
            not_counted=(*not_counted(self._entry, rehearsed), *self._own_checkpointing),
            num_parameters=self._num_parameters,
            num_trainable=self._num_trainable,
        )

    def _recomputed_flops(self, plan: Plan) -> float:
        """What a plan computes again: its recomputation, on a device whose seconds are FLOPs."""
        profile = self.profile
        programs = {
            key: replace(
                program,
                nodes=tuple(replace(node, narrow_seconds=0.0) for node in program.nodes),
                ops=tuple(
                    replace(op, seconds=flops)
                    for op, flops in zip(program.ops, self._rehearsed.op_flops[key], strict=True)
                ),
            )
            for key, program in profile.programs.items()
        }
        return simulate_plan(replace(profile, programs=programs), plan).recompute_seconds

    def _with_chunked_loss(self, limit: int | None) -> Iterable[Alternative]:
        """What the chunked loss would bring."""
        if self._spared is None:
            return
        other = copy.copy(self)
        other._rehearsed, other._spared = self._spared, None
        found = other.within(limit if limit is not None else "min")
        yield Alternative(name="memfit, chunked loss", peak_bytes=found.peak.expected, step_seconds=found.step_seconds)

    def _peak(self, plan: Plan) -> Peak:
        """The peak of a plan, and what it consists of."""
        rehearsed, profile = self._rehearsed, self.profile
        found = simulate_plan(profile, plan)
        number = next(i for i, (_, size) in enumerate(found.events) if size == found.peak_bytes)
        event = profile.events[number]
        saved = sum(found.kept_bytes[call] for call in event.live_calls)
        if event.kind == "backward" and event.call is not None:
            saved += found.kept_bytes[event.call]
        static = rehearsed.parameter_bytes + rehearsed.buffer_bytes
        gradients = rehearsed.gradients[number]
        workspace = self._base - self._process
        expected = self._size(plan)
        parts = {
            "weights": static,
            "gradients": gradients,
            "optimizer_state": rehearsed.state_bytes,
            "saved_tensors": saved,
            "outside_blocks": event.outside_bytes - static - rehearsed.state_bytes - gradients,
            "workspace": found.peak_bytes - event.outside_bytes - saved + workspace,
            "process": self._process,
        }
        return Peak(
            low=self._process + found.peak_bytes,
            expected=expected,
            high=self._base + int(found.peak_bytes * (1 + self._slack[1])),
            event=found.event,
            parts={**parts, "allocator_slack": expected - sum(parts.values())},
        )


def _split(block: tuple[str, torch.nn.Module], names: Collection[str]) -> list[tuple[str, torch.nn.Module]]:
    """A block that cannot be replayed is planned for by its children, as a live step does (rule 13)."""
    name, module = block
    if name not in names:
        return [block]
    return [(f"{name}.{child}" if name else child, part) for child, part in replayable_children(module)]


def _configuration(model: Any) -> Any:
    if isinstance(model, str):
        from memfit import configurations

        return configurations.load(model)
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedConfig):
        return model
    raise UsageError(f"`simulate` takes a module, a configuration or a name, not {type(model).__name__}.")


def _job_for(
    config: Any, task: str | None, batch_size: int, length: int, options: dict[str, Any]
) -> Callable[[], tasks.Job]:
    chosen = task if task is not None else tasks.task_of(config)
    return lambda: tasks.build(config, task=chosen, batch_size=batch_size, length=length, **options)


def _job_of(model: torch.nn.Module, batch: Any, loss: Loss | None) -> Callable[[], tasks.Job]:
    def prepare() -> tasks.Job:
        made, given = twin(model).train(), fake_batch(batch)

        def run() -> torch.Tensor:
            return scalar_loss(call(made, given), given, loss)

        return tasks.Job(model=made, batch=given, loss=run, tokens=_tokens(given))

    return prepare


def _tokens(batch: Any) -> int | None:
    ids = batch.get("input_ids") if isinstance(batch, dict) else None
    return int(ids.numel()) if isinstance(ids, torch.Tensor) else None


__all__ = ["Forecast", "simulate"]
