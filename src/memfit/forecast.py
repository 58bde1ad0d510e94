"""Know before you run: what a training step will hold and take, on a device that need not be there."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection
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
from memfit.parallelism import parallelism
from memfit.plans import Plan
from memfit.predictions import Alternative, Prediction
from memfit.profiles import StepProfile
from memfit.sharding import class_name, unwrapped
from memfit.simulation import tasks
from memfit.simulation.chunks import NotChunkedError
from memfit.simulation.chunks import chunked_loss as spared_logits
from memfit.simulation.device import limit_of
from memfit.simulation.fakes import fake_batch, fake_tensors, twin, uncheckpointed
from memfit.simulation.ledger import Ledger
from memfit.simulation.optimizers import make_optimizer
from memfit.simulation.parallel import Team, process_group
from memfit.simulation.pricing import Pricing
from memfit.simulation.rates import rates
from memfit.simulation.rehearsal import Rehearsal
from memfit.simulation.results import Rehearsed
from memfit.simulation.target import CudaKernels
from memfit.simulation.teams import make_team, notes_of
from memfit.solver.planner import solve, switched
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
    ddp: bool = False,
    fsdp: str | None = None,
    zero: int | None = None,
    tp: int | None = None,
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
        num_devices: That train the same model, each with its own batch. What they share is said by one of
        ddp, fsdp, zero, tp: As `parallelism` takes them; with none of them each holds the whole model, and nothing is
            reduced.
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
        ddp=ddp,
        fsdp=fsdp,
        zero=zero,
        tp=tp,
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
        ddp: bool = False,
        fsdp: str | None = None,
        zero: int | None = None,
        tp: int | None = None,
        compares: bool = True,
        **options: Any,
    ) -> None:
        """Rehearse; ``compares``: also with a chunked loss, where that may pay, for the alternatives."""
        self._entry = hardware.find(device) if isinstance(device, str) else device
        check_loss(loss)
        check_positive("accumulate", accumulate)
        check_positive("num_devices", num_devices)
        self._parallelism = parallelism(num_devices, ddp=ddp, fsdp=fsdp, zero=zero, tp=tp)
        if self._parallelism.kind == "zero" and str(options.get("precision")).endswith("-mixed"):
            # DeepSpeed's own: weights in half precision, fp32 in the optimizer's partition.
            options["precision"] = options["precision"].removesuffix("-mixed")
        self._precision = str(options.get("precision", "fp32"))
        self._accumulate = accumulate
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
        process = host.resident_bytes() if self._entry.backend == "cpu" else 0
        self._sharded_models: set[int] = set()
        with process_group(self._parallelism), fake_tensors():
            self._prepare, job = prepare, prepare()
            own_checkpointing = uncheckpointed(job.model)
            self._name, self._fingerprint = class_name(job.model), fingerprint(job.model)
            self._pricing = Pricing(
                rehearsed=self._rehearse_with(job, chunked=chunked_loss),
                entry=self._entry,
                title=", ".join(filter(None, [job.title or self._name, self._parallelism.words])),
                accumulate=accumulate,
                num_devices=num_devices,
                tokens=job.tokens,
                process_bytes=process,
                num_parameters=sum(p.numel() for p in job.model.parameters()),
                num_trainable=sum(p.numel() for p in job.model.parameters() if p.requires_grad),
                notes=(*own_checkpointing, *notes_of(self._parallelism, self._entry)),
            )
            self._spared: Pricing | None = None
            apart = not make_team(self._parallelism, self._entry, self._precision).shards
            if compares and apart and not chunked_loss and switched(self.profile, policy="full").peak_event == "loss":
                with contextlib.suppress(ModelError):
                    self._spared = replace(self._pricing, rehearsed=self._rehearse_with(job, chunked=True))

    def _rehearse_with(self, job: tasks.Job, *, chunked: bool) -> Rehearsed:
        """The step with its loss as it is, or in chunks.

        Raises:
            ModelError: Its loss is not one that can be computed in chunks.
        """
        if not chunked:
            return self._rehearse(job)
        if make_team(self._parallelism, self._entry, self._precision).shards:
            raise ModelError(
                "The chunked loss reads the head's weight, which is sharded and gathered for the head alone: leave "
                "`chunked_loss` out, or shard in another way (`ddp`, `zero` 1 or 2)."
            )
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
            team = make_team(self._parallelism, self._entry, self._precision)
            if team.shards:
                job = self._sharded(team, job)
                blocks = [(name, job.model.get_submodule(name)) for name, _ in blocks]
            ledger = Ledger(rates(self._entry), traffic=team.traffic)
            kernels = CudaKernels() if self._entry.backend == "cuda" else contextlib.nullcontext()
            try:
                with (
                    team.around(ledger),
                    Rehearsal(job.model, blocks, ledger, doubles=doubles, team=team) as rehearsal,
                    ledger,
                    kernels,
                ):
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

    def _sharded(self, team: Team, job: tasks.Job) -> tasks.Job:
        """A model can be sharded once, and rehearsed once then."""
        if id(job.model) in self._sharded_models:
            job = self._prepare()
            uncheckpointed(job.model)
        team.shard(job.model, find_blocks(job.model))
        self._sharded_models.add(id(job.model))
        return job

    def within(self, budget: int | float | str | None = None) -> Prediction:
        """The fastest plan whose highest peak fits; where none does, the one with the smallest peak."""
        limit = limit_of(budget, self._entry)
        others = () if self._spared is None else (self._with_chunked_loss(self._spared, limit),)
        return self._within(self._pricing, limit, others)

    def solve(self, budget: int | Literal["min"]) -> Plan:
        """The fastest plan whose tensors take at most ``budget`` bytes.

        Raises:
            InfeasibleBudgetError: There is none.
        """
        return self._placed(solve(self.profile, budget=budget, **self.named))

    def frontier(self, count: int = 9) -> list[Prediction]:
        """Predictions from the smallest peak to the plain one, each the fastest for its peak."""
        smallest = self.solve("min")
        low, high = smallest.predicted_peak_bytes, smallest.plain_peak_bytes
        found = []
        for number in range(count):
            size = low + (high - low) * number // max(1, count - 1)
            limit = self._pricing.limit(size) + 1
            found.append(self.of(replace(self.solve(size), budget_bytes=limit), limit))
        return found

    def of(self, plan: Plan, limit: int | None = None) -> Prediction:
        """What a plan comes to; ``limit``: bytes that it should fit into."""
        others = () if self._spared is None else (self._with_chunked_loss(self._spared, limit),)
        return self._pricing.predict(plan, limit, others)

    @property
    def profile(self) -> StepProfile:
        """What the step costs, as the solver sees it."""
        return self._pricing.profile

    @property
    def named(self) -> dict[str, Any]:
        """Whose plans these are."""
        return {"model": self._name, "fingerprint": self._fingerprint}

    def _placed(self, plan: Plan) -> Plan:
        """Of so many ranks, as a plan made by them is."""
        if self._parallelism.kind == "replicas":
            return plan
        return replace(plan, world_size=self._parallelism.num_devices, mesh=self._parallelism.mesh)

    def _within(self, pricing: Pricing, limit: int | str | None, others: tuple[Alternative, ...] = ()) -> Prediction:
        if not isinstance(limit, int):
            return pricing.predict(self._placed(solve(pricing.profile, budget="min", **self.named)), others=others)
        try:
            plan = solve(pricing.profile, budget=pricing.tensor_bytes(limit), **self.named)
        except InfeasibleBudgetError:
            plan = solve(pricing.profile, budget="min", **self.named)
        return pricing.predict(self._placed(replace(plan, budget_bytes=limit)), limit, others)

    def _with_chunked_loss(self, spared: Pricing, limit: int | str | None) -> Alternative:
        """What the chunked loss would bring."""
        found = self._within(spared, limit)
        return Alternative(name="memfit, chunked loss", peak_bytes=found.peak.expected, step_seconds=found.step_seconds)


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
