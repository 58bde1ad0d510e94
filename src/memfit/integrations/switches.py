"""What a training stack was told about activation checkpointing, and what becomes of it under Memfit.

A plan replaces these switches; the two are never stacked. Each switch that was set is explained by one line of the
report. Without a budget they still say what is wanted: every n-th block recomputes all it can.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from memfit.errors import UsageError

if TYPE_CHECKING:
    import torch

_FLAGS = ("activation_checkpointing", "gradient_checkpointing")
_DECISIONS = ("budget", "policy", "every_n_layers", "plan")
_OFFLOADING = "maybe_activation_offload_context"


class Switches:
    """The switches of one model.

    Attributes:
        flag: How checkpointing was asked for; "" if it was not.
        kwargs: What came with it, as `activation_checkpointing_enable` and the arguments of a Trainer take it.
    """

    def __init__(self, flag: str = "", kwargs: Mapping[str, Any] | None = None) -> None:
        self.flag = flag
        self.kwargs = dict(kwargs or {})

    @classmethod
    def of_arguments(cls, arguments: Any) -> Switches:
        """As a Trainer's arguments have them. transformers 5 knows each under two names."""
        for flag in _FLAGS:
            if getattr(arguments, flag, False) is True:
                return cls(f"{flag}=True", getattr(arguments, f"{flag}_kwargs", None))
        return cls()

    @classmethod
    def of_call(cls, flag: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Switches:
        """As a model's `gradient_checkpointing_enable` or `activation_checkpointing_enable` was called."""
        given = dict(kwargs)
        names = ("_kwargs", "every_n_layers", "offload")
        given.update(zip(names, args, strict=False))
        inner: dict[str, Any] = {}
        for name in [name for name in given if name.endswith("_kwargs")]:
            inner.update(given.pop(name) or {})
        return cls(flag, {**inner, **given})

    def notes(self, *, decided: bool) -> list[str]:
        """One line for each switch that was set.

        Args:
            decided: Whether Memfit was told what to do, by a budget or otherwise.
        """
        if not self.flag:
            return []
        instead = "the plan decides for each saved tensor instead" if decided else "blocks recompute all they can"
        lines = [f"`{self.flag}` was taken over: {instead}"]
        for name, value in self.kwargs.items():
            why = _explain(name, value, decided=decided)
            if why:
                lines.append(f"`{name}{_shown(value)}` was taken over: {why}")
        return lines

    def taken_over(self, name: str, *, decided: bool) -> list[str]:
        """The same of a model of class ``name`` that was told by itself."""
        return [
            f"`{name}` was told to checkpoint its activations: taken over by the plan.",
            *self.notes(decided=decided)[1:],
        ]

    def options(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Options of `fit`: the user's own, and what the switches ask for where those decide nothing."""
        options = dict(own)
        if self.flag and not decides(own):
            options["policy"] = "selective" if self.kwargs.get("selective") else "full"
            every = self.kwargs.get("every_n_layers", 1)
            if isinstance(every, int) and every > 1:
                options["every_n_layers"] = every
        return options


def decides(options: Mapping[str, Any]) -> bool:
    """Whether options of `fit` say what to do, rather than to measure only."""
    return any(options.get(name) is not None for name in _DECISIONS)


def _shown(value: Any) -> str:
    return f"={value!r}" if isinstance(value, bool | int | float | str) else ""


def _explain(name: str, value: Any, *, decided: bool) -> str:
    if value is None or (value is False and name != "use_reentrant"):
        return ""
    return {
        "use_reentrant": "blocks do not run again as a whole, so neither way of doing that applies",
        "every_n_layers": "the plan chooses block by block" if decided else "the same blocks recompute",
        "offload": "nothing is copied to the host, what is not saved is recomputed",
        "selective": "the plan chooses operation by operation" if decided else "the policy is `selective`",
        "context_fn": "the plan chooses operation by operation",
        "preserve_rng_state": "random numbers are always the same again",
        "determinism_check": "recomputed values are always checked",
        "early_stop": "only what is missing is recomputed",
    }.get(name, "it is an option of torch's checkpoint, which does not run")


class Held:
    """A model whose own checkpointing is switched off, and its trainer's offloading, until `restore`.

    Not only while the model's forward runs: a loss may call a part of the model.
    """

    def __init__(self, model: torch.nn.Module, trainer: Any = None) -> None:
        """Switch off."""
        self.notes: list[str] = []
        self._flagged: list[tuple[weakref.ref[torch.nn.Module], bool | str]] = []
        self._undo: Callable[[], None] = lambda: None
        for module in model.modules():
            value = getattr(module, "gradient_checkpointing", None)
            if isinstance(value, bool | str) and value:  # Unsloth's is a word
                module.gradient_checkpointing = False  # type: ignore[assignment]
                self._flagged.append((weakref.ref(module), value))
        context = getattr(trainer, _OFFLOADING, None)
        if context is not None and not isinstance(context, contextlib.nullcontext):
            self._set_offloading(trainer, contextlib.nullcontext())
            self._undo = lambda: self._set_offloading(trainer, context)
            self.notes.append(
                "`activation_offloading=True` was taken over: nothing is copied to the host, what is not saved is "
                "recomputed"
            )

    @property
    def was_on(self) -> bool:
        """Whether any module was to be checkpointed."""
        return bool(self._flagged)

    def restore(self) -> None:
        """As the user had it."""
        self._undo()
        self._undo = lambda: None
        for reference, value in self._flagged:
            module: Any = reference()
            if module is not None:
                module.gradient_checkpointing = value
        self._flagged = []

    @staticmethod
    def _set_offloading(trainer: Any, context: Any) -> None:
        setattr(trainer, _OFFLOADING, context)


def check_sharding(arguments: Any, accelerator: Any = None) -> None:
    """Refuse a second mechanism around the same blocks.

    Args:
        arguments: Of a Hugging Face Trainer.
        accelerator: Of accelerate, once there is one: its own configuration counts too.

    Raises:
        UsageError: FSDP is to checkpoint activations as well.
    """
    config = getattr(arguments, "fsdp_config", None)
    asked: list[tuple[str, object]] = []
    if getattr(arguments, "fsdp", None) and isinstance(config, Mapping):
        names = ("activation_checkpointing", "fsdp_activation_checkpointing")
        asked += [(f"fsdp_config[{name!r}]", config.get(name)) for name in names]
    plugin = getattr(getattr(accelerator, "state", None), "fsdp_plugin", None)
    asked.append(("fsdp_activation_checkpointing", getattr(plugin, "activation_checkpointing", None)))
    for name in _true(asked):
        raise UsageError(
            f"`{name}` is on: FSDP would wrap every block in a checkpoint of its own, around what Memfit plans. Remove "
            "it to keep Memfit, or remove Memfit to keep it."
        )


def before_sharding(trainer: Any) -> contextlib.AbstractContextManager[None]:
    """In which a Hugging Face Trainer's model is fitted: FSDP and DeepSpeed shard it only when its loop prepares it."""
    if not any(getattr(trainer, name, False) for name in ("is_fsdp_enabled", "is_deepspeed_enabled")):
        return contextlib.nullcontext()
    from memfit import arguments

    return arguments.before_sharding()


def _true(asked: Iterable[tuple[str, object]]) -> Iterable[str]:
    return (name for name, value in asked if str(value).lower() in ("true", "1", "yes"))
