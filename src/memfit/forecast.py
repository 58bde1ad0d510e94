"""Know before you run: what a training step will hold and take, on a device that need not be there."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch

from memfit import hardware, stacks
from memfit.arguments import check_loss, check_positive
from memfit.errors import InfeasibleBudgetError, ModelError, UsageError
from memfit.fingerprints import fingerprint
from memfit.hardware import Hardware
from memfit.offline import Loss, call, scalar_loss
from memfit.parallelism import parallelism
from memfit.plans import Plan
from memfit.predictions import Alternative, Prediction
from memfit.profiles import StepProfile
from memfit.sharding import class_name, unwrapped
from memfit.signature import tensors_in
from memfit.simulation import cached, tasks
from memfit.simulation.device import limit_of, process_bytes
from memfit.simulation.fakes import fake_batch, twin
from memfit.simulation.optimizers import make_optimizer
from memfit.simulation.pricing import Pricing
from memfit.simulation.quantized import num_parameters
from memfit.simulation.settings import best_setting
from memfit.simulation.sizes import sizes_of
from memfit.simulation.stage import Stage
from memfit.simulation.teams import notes_of
from memfit.solver.planner import solve, switched
from memfit.stacks import Situation, Stack
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
    stack: str | None = None,
    cache_rows: int | None = None,
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
        num_devices: That train the same model, each with its own batch, but for those of a tensor parallel group, which
            have one. What they share is said by
        ddp, fsdp, zero, tp: As `parallelism` takes them; with none of them each holds the whole model, and nothing is
            reduced.
        batch_size, length: Rows and tokens of each such batch, for a configuration.
        task: One of `tasks.TASKS`; by default what the configuration's architecture is for.
        chunked_loss: As for `fit`. Without it the alternatives of a language model say what it would bring.
        stack: A training stack of `memfit.stacks`, such as ``trl``: the prediction says the best that it has by itself.
        cache_rows: Of an embedder: rows of the sub-batches whose gradients are cached, as by
            `contrastive.cached_embeddings`. Without it the alternatives say what that would bring.
        options: As `tasks.build` takes them: ``precision``, ``attention``, ``lora``, ``quantize``, ``freeze``...

    Raises:
        UsageError: An argument cannot mean anything.
        ModelError: The model has no blocks, nothing to train, or no scalar loss.
        BudgetError: The budget cannot be read.
    """
    parse_budget(budget)
    known = None if stack is None else stacks.find(stack)
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
        cache_rows=cache_rows,
        ddp=ddp,
        fsdp=fsdp,
        zero=zero,
        tp=tp,
        **options,
    )
    return forecast.within(budget, known)


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
        cache_rows: int | None = None,
        ddp: bool = False,
        fsdp: str | None = None,
        zero: int | None = None,
        tp: int | None = None,
        compares: bool = True,
        **options: Any,
    ) -> None:
        """Rehearse; ``compares``: also with a chunked loss or cached gradients, where they may pay."""
        self._entry = hardware.find(device) if isinstance(device, str) else device
        check_loss(loss)
        check_positive("accumulate", accumulate)
        check_positive("num_devices", num_devices)
        if cache_rows is not None:
            check_positive("cache_rows", cache_rows)
        together = parallelism(num_devices, ddp=ddp, fsdp=fsdp, zero=zero, tp=tp)
        if together.kind == "zero" and str(options.get("precision")).endswith("-mixed"):
            # DeepSpeed's own: weights in half precision, fp32 in the optimizer's partition.
            options["precision"] = options["precision"].removesuffix("-mixed")
        prepare: Callable[[tasks.Split], tasks.Job]
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
            config = _configuration(model)
            task = task if task is not None else tasks.task_of(config)
            prepare = _job_for(config, task, batch_size, length, options)
        self._parallelism = together
        self._stage = stage = Stage(
            self._entry,
            prepare,
            None if optimizer is None else make_optimizer(optimizer, cuda=self._entry.backend == "cuda"),
            together,
            precision=str(options.get("precision", "fp32")),
            accumulates=accumulate > 1,
        )
        with stage.set():
            job = stage.job()
            own_tensors = tensors_in((list(model.parameters()), batch)) if isinstance(model, torch.nn.Module) else ()
            process = process_bytes(own_tensors) if self._entry.backend == "cpu" else 0
            self._name, self._fingerprint = class_name(job.model), fingerprint(job.model)
            if cache_rows is not None:
                rehearsed = stage.in_sub_batches(job, cache_rows)
            else:
                rehearsed = stage.with_chunked_loss(job) if chunked_loss else stage.rehearse(job)
            title = (job.title or self._name) + (f" in sub-batches of {cache_rows}" if cache_rows is not None else "")
            self._pricing = Pricing(
                rehearsed=rehearsed,
                entry=self._entry,
                title=", ".join(filter(None, [title, together.words])),
                accumulate=accumulate,
                num_batches=together.num_batches,
                tokens=job.tokens,
                process_bytes=process,
                num_parameters=num_parameters(job.model),
                num_trainable=sum(p.numel() for p in job.model.parameters() if p.requires_grad),
                notes=(*stage.notes, *job.notes, *notes_of(together, self._entry)),
                sizes=None if stage.splits else sizes_of(job, task),
                parts=not stage.splits,
            )
            if stage.runs_whole:
                whole = replace(self._pricing, rehearsed=stage.rehearse(job, again=True))
                self._pricing = replace(self._pricing, whole=whole)
            self._situation = Situation(
                task=task,
                num_devices=num_devices,
                lora=any("lora_" in name for name, _ in job.model.named_parameters()),
                draws=rehearsed.draws,
            )
            compares = compares and cache_rows is None and not stage.shards and not stage.splits
            self._job = job if compares and job.contrast is not None else None
            self._cached: dict[int, Pricing] = {}
            self._spared: Pricing | None = None
            if compares and not chunked_loss:
                with contextlib.suppress(ModelError):
                    self._spared = replace(self._pricing, rehearsed=stage.with_chunked_loss(job, rehearsed))

    def within(self, budget: int | float | str | None = None, stack: Stack | None = None) -> Prediction:
        """The fastest plan whose highest peak fits; where none does, the one with the smallest peak.

        With a ``stack`` the prediction says what that has by itself for the same budget.
        """
        limit = limit_of(budget, self._entry)
        found = self._within(self._pricing, limit)
        found = replace(found, alternatives=(*found.alternatives, *self._others(limit, found.plan)))
        if stack is None:
            return found
        if self._stage.splits:
            raise UsageError(f"What `{stack.name}` has for split layers is not known: leave `stack` or `tp` out.")
        return replace(found, stack=best_setting(stack, self._pricing.switchable, found, self._situation))

    def solve(self, budget: int | Literal["min"]) -> Plan:
        """The fastest plan whose tensors take at most ``budget`` bytes.

        Raises:
            InfeasibleBudgetError: There is none.
        """
        return self._placed(self._solve(self._pricing, budget))

    def frontier(self, count: int = 9) -> list[Prediction]:
        """Predictions from the smallest peak to the plain one, each the fastest for its peak."""
        smallest = self.solve("min")
        if self._stage.splits:
            return [self.of(smallest)]
        low, high = smallest.predicted_peak_bytes, smallest.plain_peak_bytes
        found = []
        for number in range(count):
            size = low + (high - low) * number // max(1, count - 1)
            limit = self._pricing.limit(size) + 1
            found.append(self.of(replace(self.solve(size), budget_bytes=limit), limit))
        return found

    def of(self, plan: Plan, limit: int | None = None) -> Prediction:
        """What a plan comes to; ``limit``: bytes that it should fit into."""
        return self._pricing.predict(plan, limit, tuple(self._others(limit, plan)))

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
            return pricing.predict(self._placed(self._solve(pricing, "min")), others=others)
        try:
            plan = self._solve(pricing, pricing.tensor_bytes(limit))
        except InfeasibleBudgetError:
            plan = self._solve(pricing, "min")
        return pricing.predict(self._placed(replace(plan, budget_bytes=limit)), limit, others)

    def _solve(self, pricing: Pricing, budget: int | Literal["min"]) -> Plan:
        """What `fit` does: blocks run again as a whole where layers are split, under ZeRO-3 where recipes do not do."""
        if self._stage.splits:
            smallest = switched(pricing.profile, policy="full", **self.named)
        elif pricing.whole is not None:
            smallest = switched(pricing.whole.profile, policy="full", **self.named)
        else:
            return solve(pricing.profile, budget=budget, **self.named)
        if budget == "min":
            return smallest
        if not self._stage.splits:
            with contextlib.suppress(InfeasibleBudgetError):
                return solve(pricing.profile, budget=budget, **self.named)
        if smallest.predicted_peak_bytes > budget:
            raise InfeasibleBudgetError(budget, smallest.predicted_peak_bytes, smallest.peak_event)
        return smallest

    def _others(self, limit: int | str | None, plan: Plan) -> Iterator[Alternative]:
        """What else would bring something, beside today's switches."""
        if self._spared is not None:
            yield self._with_chunked_loss(self._spared, limit)
        sizes = None if self._job is None else cached.sizes_of(self._job)
        if self._job is not None and sizes is not None and sizes.largest > 1 and plan.recomputed_bytes:
            yield self._with_cached_gradients(self._job, sizes, limit)

    def _with_cached_gradients(self, job: tasks.Job, sizes: cached.Sizes, limit: int | str | None) -> Alternative:
        """What sub-batches would bring: the largest whose step saves everything, or twice that, where it was tried."""
        fixed = max(event.outside_bytes for event in self.profile.events if event.name == "optimizer")
        room = self._pricing.tensor_bytes(limit) if isinstance(limit, int) else fixed
        plain = switched(self.profile, policy="plain").predicted_peak_bytes
        tried: set[int] = set()

        def peak_of(rows: int) -> int:
            tried.add(rows)
            return switched(self._in_sub_batches(job, rows).profile, policy="plain").predicted_peak_bytes

        guess = sizes.rows * (room - fixed) / max(1, plain - fixed)
        rows = cached.largest_that_fits(guess, sizes.largest, peak_of, fixed, room)
        chosen = [rows, 2 * rows] if 2 * rows in tried else [rows]
        found = [(self._within(self._in_sub_batches(job, each), limit), each) for each in chosen]
        if isinstance(limit, int):
            best, rows = min(found, key=lambda each: (not each[0].fits, each[0].step_seconds))
        else:
            best, rows = min(found, key=lambda each: (each[0].peak.high, each[0].step_seconds))
        return Alternative(
            name=f"memfit, gradient caching (sub-batches of {rows})",
            peak_bytes=best.peak.expected,
            step_seconds=best.step_seconds,
        )

    def _in_sub_batches(self, job: tasks.Job, rows: int) -> Pricing:
        if rows not in self._cached:
            with self._stage.set():
                self._cached[rows] = replace(self._pricing, rehearsed=self._stage.in_sub_batches(job, rows))
        return self._cached[rows]

    def _with_chunked_loss(self, spared: Pricing, limit: int | str | None) -> Alternative:
        """What the chunked loss would bring."""
        found = self._within(spared, limit)
        return Alternative(name="memfit, chunked loss", peak_bytes=found.peak.expected, step_seconds=found.step_seconds)


def _configuration(model: Any) -> Any:
    if isinstance(model, str):
        from memfit import configurations

        return configurations.load(model)
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedConfig):
        return model
    raise UsageError(f"`simulate` takes a module, a configuration or a name, not {type(model).__name__}.")


def _job_for(
    config: Any, task: str, batch_size: int, length: int, options: dict[str, Any]
) -> Callable[[tasks.Split], tasks.Job]:
    return lambda split: tasks.build(config, task=task, batch_size=batch_size, length=length, split=split, **options)


def _job_of(model: torch.nn.Module, batch: Any, loss: Loss | None) -> Callable[[tasks.Split], tasks.Job]:
    def prepare(split: tasks.Split) -> tasks.Job:
        made, given = twin(model).train(), fake_batch(batch)
        split(made)

        def run() -> torch.Tensor:
            return scalar_loss(call(made, given), given, loss)

        return tasks.Job(model=made, batch=given, loss=run, tokens=_tokens(given))

    return prepare


def _tokens(batch: Any) -> int | None:
    ids = batch.get("input_ids") if isinstance(batch, dict) else None
    return int(ids.numel()) if isinstance(ids, torch.Tensor) else None


__all__ = ["Forecast", "simulate"]
