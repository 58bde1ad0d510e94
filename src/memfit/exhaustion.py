"""When memory runs out: how far the step got, what it held, and what would help.

The error stays the allocator's own, so that whoever catches it (a trainer that halves its batch) still does; the
explanation is a note on it, and in the report. An error in the forward is seen by a hook of the model. One in the
backward passes no hook: while a first step is under way, `torch.autograd.backward` and `grad` are wrapped, and only
then. One between them (a loss of the training loop, the optimizer) is seen where it leaves the fitted region: at the
end of a ``with`` statement, or of the script under `memfit run`.
"""

from __future__ import annotations

import functools
import re
import sys
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, ClassVar

import torch

from memfit.holdings import Holdings, weight_bytes
from memfit.host import memory_ran_out
from memfit.memory import Meter
from memfit.profiler import CallReading, Profiler
from memfit.profiles import StepProfile
from memfit.request import Request
from memfit.runtime import Runtime
from memfit.summaries import bytes_of, describe
from memfit.training import TrainingState
from memfit.units import format_bytes

_SIGN = "Memfit: memory ran out "


class Exhaustion:
    """Explains the out-of-memory errors of one fitted model.

    Attributes:
        story: What the last one was, in sentences; "" if there was none.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        runtime: Runtime,
        meter: Meter,
        training: TrainingState,
        blocks: Sequence[str],
        request: Request,
        budget: int | str | None,
        device: torch.device | None = None,
    ) -> None:
        """Of ``model``, whose ``blocks`` are planned for in this order; of several devices those on ``device``."""
        self.story = ""
        self._model = weakref.ref(model)
        self._runtime = runtime
        self._meter = meter
        self._training = training
        self._blocks = list(blocks)
        self._request = request
        self._budget = budget
        self._device = device
        self._first_step = True

    def begin(self) -> None:
        """A step is profiled: see what its backward raises."""
        self._first_step = True
        _watching.add(self)
        _Watched.install()

    def end(self) -> None:
        """It is over."""
        self._first_step = False
        _watching.discard(self)
        if not _watching:
            _Watched.remove()

    # What is seen

    def forward_failed(self, error: BaseException) -> None:
        """An exception leaves the model's forward."""
        if not self._ran_out(error):
            return
        for call in self._runtime.calls:
            call.settle()
        self._over()
        self._explain(error, self._place_in_forward(error.__traceback__))

    def backward_failed(self, error: BaseException) -> None:
        """An exception leaves a backward while the step is profiled."""
        if self._ran_out(error) and self._runtime.calls:
            self._explain(error, self._place_in_backward())
            self._over()

    def _ran_out(self, error: BaseException) -> bool:
        """Whether the memory of this device did. CUDA's allocator says which one it was."""
        if not memory_ran_out(error):
            return False
        named = re.search(r"\bGPU (\d+) has", str(error))
        return self._device is None or named is None or int(named[1]) == self._device.index

    def _over(self) -> None:
        """The step has ended, even if its caller keeps the error and all it holds; smaller shapes will be tried."""
        self._runtime.backward_seen = True
        for block in self._runtime.blocks:
            block.recordings_in_a_row = 0

    def passing(self, error: BaseException | None) -> None:
        """An exception leaves the region in which the model is fitted."""
        if error is not None and self._ran_out(error) and not _is_explained(error):
            self._explain(error, self._place_outside())

    def advice_below(self, profile: StepProfile, budget: int) -> str | None:
        """What to do about a budget that is used up before any activation is kept; ``None`` if it is not."""
        floor = min((event.outside_bytes for event in profile.events), default=0)
        if budget >= floor:
            return None
        state = self._training.state_bytes() if self._training.born else self._training.reserved_bytes()
        held = self._holdings(floor, state=state, saved=0)
        return (
            f"Before any activation {format_bytes(floor)} are held: weights {format_bytes(held.weight_bytes)}, "
            f"gradients {format_bytes(held.gradient_bytes)}, optimizer state {format_bytes(held.state_bytes)}, the "
            f"process itself {format_bytes(held.other_bytes)}. Raise `budget`, or train fewer parameters."
        )

    # Where it was

    def _place_in_forward(self, traceback: TracebackType | None) -> str:
        model = self._model()
        names = {} if model is None else {id(module): name for name, module in model.named_modules()}
        deepest = ""
        while traceback is not None:
            deepest = names.get(id(traceback.tb_frame.f_locals.get("self")), "") or deepest
            traceback = traceback.tb_next
        total = self._num_calls()
        for number, block in enumerate(self._blocks, start=1):
            if deepest == block or deepest.startswith(f"{block}."):
                inside = f" (in its `{deepest.removeprefix(block)[1:]}`)" if deepest != block else ""
                return (
                    f"in the forward of `{block}`{inside}, block call {len(self._runtime.calls) or number} of {total}"
                )
        done = len(self._runtime.calls)
        where = f" in `{deepest}`" if deepest else ""
        if done == 0:
            return f"in the forward{where}, before block call 1 of {total}"
        return f"in the forward{where}, after block call {done} of {total}"

    def _place_in_backward(self) -> str:
        entered = self._entered()
        total = self._num_calls()
        if not entered:
            return f"in the backward of the loss, after {total} block calls forward and none back"
        last = max(entered, key=lambda call: call.backward_order)
        return f"in the backward of `{last.name}`, {len(entered)} of {total} block calls on the way back"

    def _place_outside(self) -> str:
        profiler = self._runtime.listener
        total = self._num_calls()
        if isinstance(profiler, Profiler) and profiler.reading.end_peak:
            return "in the optimizer's step, after forward and backward"
        if self._runtime.backward_seen:
            return "in the backward or after it"
        if not self._runtime.calls:
            return "outside the model's forward"
        return f"after the forward ({len(self._runtime.calls)} of {total} block calls) and before the backward"

    def _entered(self) -> list[CallReading]:
        """Block calls whose backward has begun, while the step is profiled."""
        profiler = self._runtime.listener
        if not isinstance(profiler, Profiler):
            return []
        return [call for call in profiler.reading.calls if call.backward_start is not None]

    def _num_calls(self) -> int:
        return max(len(self._blocks), len(self._runtime.calls))

    # What is said

    def _explain(self, error: BaseException, place: str) -> None:
        step = "the first training step" if self._first_step else "a training step"
        held = self._holdings(self._meter.now(), state=self._training.state_bytes(), saved=self._saved())
        sentences = [
            f"{_SIGN}in {step}, {place}.",
            f"{format_bytes(held.held_bytes)} were held: {held.sentence()}.",
            *self._advice(place, held),
        ]
        self.story = " ".join(sentences).removeprefix("Memfit: ")
        if not _is_explained(error):
            error.add_note(" ".join(sentences))

    def _advice(self, place: str, held: Holdings) -> list[str]:
        advice: list[str] = []
        if self._budget is None and not self._request.decides:
            advice.append("Memfit only measures here: a `budget`, such as `min`, makes the step smaller.")
        elif self._request.policy not in (None, "full") or self._request.every_n_layers > 1:
            advice.append('This step keeps what was asked for: `budget="min"` keeps less.')
        elif self._first_step:
            advice.append("The first step recomputes all it can already: another `budget` changes nothing in it.")
        elif self._budget == "min":
            advice.append("The plan is the smallest already.")
        else:
            advice.append("The budget is more than this machine gives the process: lower it.")
        if "optimizer" in place:
            advice.append("The optimizer's state is born there: use a smaller one, such as SGD or Adafactor.")
        elif held.static_bytes > held.held_bytes // 2:
            advice.append("Weights, gradients and optimizer state are most of it: train adapters, or shard the model.")
        if "after the forward" in place or "of the loss" in place or f"after block call {self._num_calls()} " in place:
            advice.append(
                "It was behind the last block: if the loss has many classes, compute it in chunks, as "
                "`chunked_loss=True` does."
            )
        advice.append(
            "A smaller batch (with gradient accumulation) or shorter sequences need less; the model can go on training."
        )
        return advice

    def _holdings(self, held: int, *, state: int, saved: int) -> Holdings:
        model = self._model()
        return Holdings(
            held_bytes=held,
            weight_bytes=0 if model is None else weight_bytes(model, self._device),
            gradient_bytes=self._training.gradient_bytes(),
            state_bytes=state,
            saved_bytes=saved,
        )

    def _saved(self) -> int:
        """By block calls whose backward has not begun; the one that it is in still holds its own."""
        entered = self._entered()
        profiler = self._runtime.listener
        gone: set[int] = set()
        if entered and isinstance(profiler, Profiler):
            last = max(call.backward_order for call in entered)
            readings = profiler.reading.calls
            gone = {i for i, call in enumerate(readings) if 0 <= call.backward_order < last}
        living = [describe(call) for i, call in enumerate(self._runtime.calls) if i not in gone]
        return sum(bytes_of(call, self._runtime.states)["saved_bytes"] or 0 for call in living)


def _is_explained(error: BaseException) -> bool:
    return any(note.startswith(_SIGN) for note in getattr(error, "__notes__", ()))


class ExhaustionHook:
    """On the model's forward, called on exceptions too. Copies and pickles as inert."""

    __slots__ = ("_exhaustion",)

    def __init__(self, exhaustion: Exhaustion | None = None) -> None:
        self._exhaustion = exhaustion

    def __call__(self, module: torch.nn.Module, args: Any, output: Any = None) -> None:
        if torch.compiler.is_compiling() or output is not None:
            return
        error = sys.exc_info()[1]
        if error is not None and self._exhaustion is not None:
            self._exhaustion.forward_failed(error)

    def __deepcopy__(self, memo: Any) -> ExhaustionHook:
        return ExhaustionHook()

    def __reduce__(self) -> Any:
        return ExhaustionHook, ()


_watching: weakref.WeakSet[Exhaustion] = weakref.WeakSet()


class _Watched:
    """`torch.autograd.backward` and `grad` while a step is profiled: they pass everything on."""

    _installed: ClassVar[dict[str, tuple[Callable[..., Any], Callable[..., Any]]]] = {}

    @classmethod
    def install(cls) -> None:
        if cls._installed:
            return
        for name in ("backward", "grad"):
            original = getattr(torch.autograd, name)
            replacement = _seen(original)
            cls._installed[name] = (original, replacement)
            setattr(torch.autograd, name, replacement)

    @classmethod
    def remove(cls) -> None:
        """Somebody else's replacement is left alone: ours does nothing inside it."""
        for name, (original, replacement) in cls._installed.items():
            if getattr(torch.autograd, name) is replacement:
                setattr(torch.autograd, name, original)
        cls._installed = {}


def _seen(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except Exception as error:
            for exhaustion in list(_watching):
                exhaustion.backward_failed(error)
            raise
        finally:
            if not _watching:  # the handle was dropped
                _Watched.remove()

    return run
