"""Well-known models: the configuration that their `config.json` has, and how many parameters that makes.

The table is `models.json`: facts, one entry a model, read when first asked for. `num_parameters` is the published count
of the model that its task trains, and the tests build every model to compare. No torch, no transformers: what a
configuration means is for `configurations` to say.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from memfit.errors import UnknownNameError
from memfit.names import nearest, plain

Task = Literal["causal-lm", "embedder", "reranker", "seq2seq-lm", "image-classification", "speech-to-text"]

AUTO_CLASSES: dict[Task, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "embedder": "AutoModel",
    "reranker": "AutoModelForSequenceClassification",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
    "speech-to-text": "AutoModelForSpeechSeq2Seq",
}
"""The class of transformers that builds the model for its task. An embedder is an encoder without a head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """One well-known model.

    Attributes:
        id: As the Hub names it: ``meta-llama/Meta-Llama-3-8B``.
        aliases: Short names, and other ids with the same configuration.
        task: What it is trained for.
        num_parameters: Of the model that the task's class builds, tied weights counted once.
        config: The fields of its `config.json`; ``dtype`` is that of the published weights.
        note: What the entry leaves out.
    """

    id: str
    aliases: tuple[str, ...]
    task: Task
    num_parameters: int
    config: dict[str, Any]
    note: str | None = None

    def names(self) -> Iterator[str]:
        """Every name of the model: ids with and without their organisation, and aliases."""
        for name in (self.id, *self.aliases):
            yield name
            if "/" in name:
                yield name.rpartition("/")[2]


@functools.cache
def models() -> tuple[KnownModel, ...]:
    """All of them, in the order of the table."""
    table = json.loads(resources.files("memfit").joinpath("models.json").read_text(encoding="utf-8"))
    return tuple(KnownModel(**{**entry, "aliases": tuple(entry["aliases"])}) for entry in table)


@functools.cache
def _by_name() -> dict[str, KnownModel]:
    return {plain(name): model for model in models() for name in model.names()}


def find(name: str) -> KnownModel:
    """The model of that name: ``meta-llama/Meta-Llama-3-8B``, ``llama-3-8b``, ``Qwen2.5-7B``.

    Raises:
        UnknownNameError: There is none; carries the nearest names.
    """
    found = _by_name().get(plain(name))
    if found is None:
        raise UnknownNameError("model", name, nearest_names(name))
    return found


def nearest_names(name: str) -> tuple[str, ...]:
    """Short names of the models that look most like ``name``."""
    return nearest(name, (short for model in models() for short in model.names() if "/" not in short))
