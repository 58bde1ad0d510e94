"""How several devices share one training step, as data. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from memfit.errors import UsageError

Kind = Literal["replicas", "ddp", "fsdp", "zero", "tp"]
FSDP_WORDS = ("full", "grad", "hybrid:N")
ZERO_STAGES = (1, 2, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelism:
    """What devices do together.

    Attributes:
        kind: ``replicas``: nothing, each holds the whole model and reduces nothing; ``ddp``, ``fsdp`` (FSDP2) and
            ``zero`` (DeepSpeed's); ``tp``: tensor parallelism alone, of one group or of several that are kept alike.
        num_devices: That train.
        stage: Of ZeRO.
        reshards: FSDP2: whether a block's parameters are freed after its forward and gathered again for its backward.
        shard_size: FSDP2: devices, or groups, that hold one copy of the model together; fewer than all in hybrid
            sharding.
        split_size: Tensor parallelism: devices of one group, which split layers and have one batch.
    """

    kind: Kind = "replicas"
    num_devices: int = 1
    stage: int = 0
    reshards: bool = True
    shard_size: int = 1
    split_size: int = 1

    @property
    def axes(self) -> dict[str, int]:
        """Of the device mesh that parameters lie on, in its order; empty where they are whole."""
        if self.kind not in ("fsdp", "tp"):
            return {}
        copies = self.num_batches // self.shard_size
        found = {"replicate": copies} if copies > 1 else {}
        if copies > 1 or self.kind == "fsdp":
            found["shard"] = self.shard_size
        if self.split_size > 1:
            found["tp"] = self.split_size
        return found

    @property
    def mesh(self) -> tuple[int, ...]:
        """Its shape, as plans have it."""
        return tuple(self.axes.values())

    @property
    def num_batches(self) -> int:
        """Batches of a step: one for each tensor parallel group, which is one device where there are none."""
        return self.num_devices // self.split_size

    @property
    def words(self) -> str:
        """As a report says it; empty for replicas."""
        if self.kind == "replicas":
            return ""
        if self.kind == "ddp":
            return f"DDP over {self.num_devices} devices"
        if self.kind == "zero":
            return f"ZeRO-{self.stage} over {self.num_devices} devices"
        groups = self.num_batches
        if self.kind == "tp":
            return f"tensor parallel over {self.split_size} devices" + (f" in {groups} groups" if groups > 1 else "")
        hybrid = self.shard_size < groups
        how = f"in groups of {self.shard_size} " if hybrid else "" if self.reshards else "of gradients and state "
        whom = f"{groups} groups of {self.split_size} tensor parallel" if self.split_size > 1 else f"{groups}"
        return f"FSDP2 {how}over {whom} devices"


def parallelism(
    num_devices: int, *, ddp: bool = False, fsdp: str | None = None, zero: Any = None, tp: Any = None
) -> Parallelism:
    """What was asked for.

    Args:
        num_devices: That train.
        ddp: DistributedDataParallel.
        fsdp: FSDP2: ``full``, ``grad`` (parameters stay gathered between forward and backward) or ``hybrid:N``
            (``full`` among N devices, copies of which are kept alike).
        zero: DeepSpeed's ZeRO: stage 1, 2 or 3.
        tp: Tensor parallel degree. What is given beside it is over the groups of so many devices; by default, as with
            ``ddp``, each of them is a copy of the model.

    Raises:
        UsageError: Two that do not go together, one for a single device, or a word or number that means nothing.
    """
    asked = {"ddp": ddp or None, "fsdp": fsdp, "zero": zero, "tp": None if tp == 1 else tp}
    given = [name for name, value in asked.items() if value is not None]
    if tp is not None:
        _check_tp(tp, num_devices)
    beside = [name for name in given if name != "tp"]
    if len(beside) > 1 or {"zero", "tp"} <= set(given):
        raise UsageError(f"`{given[0]}` and `{given[1]}` do not go together in one prediction: give one of them.")
    if not given:
        return Parallelism(num_devices=num_devices)
    if num_devices < 2:
        raise UsageError(
            f"`{given[0]}` needs several devices, and there is {num_devices}: give how many there are, such as "
            "`--gpus 8xh100` (`num_devices=8`)."
        )
    size = tp or 1
    if beside and size == num_devices:
        raise UsageError(
            f"`{beside[0]}` and `tp` do not go together where `tp={size}` takes all {num_devices} devices: give more "
            f"devices, such as `--gpus {2 * size}xh100` (`num_devices={2 * size}`), or one of them."
        )
    if fsdp is not None:
        return _fsdp(fsdp, num_devices, size)
    if size > 1:
        return Parallelism(kind="tp", num_devices=num_devices, split_size=size)
    if ddp:
        return Parallelism(kind="ddp", num_devices=num_devices)
    if isinstance(zero, bool) or zero not in ZERO_STAGES:
        raise UsageError(f"There is no ZeRO stage `{zero}`. Give 1, 2 or 3.")
    return Parallelism(kind="zero", num_devices=num_devices, stage=int(zero), shard_size=num_devices)


def _fsdp(word: Any, num_devices: int, split_size: int) -> Parallelism:
    size = num_devices // split_size
    if word not in ("full", "grad"):
        size = _hybrid(word, size, "devices" if split_size == 1 else f"groups of {split_size} devices")
    return Parallelism(
        kind="fsdp", num_devices=num_devices, reshards=word != "grad", shard_size=size, split_size=split_size
    )


def _hybrid(word: Any, count: int, of: str) -> int:
    """How many of ``count`` hold one copy together."""
    name, _, size = word.partition(":") if isinstance(word, str) else ("", "", "")
    if name != "hybrid" or not size.isascii() or not size.isdigit():
        raise UsageError(f"There is no FSDP strategy `{word}`. Known are {', '.join(f'`{w}`' for w in FSDP_WORDS)}.")
    number = int(size)
    if number < 2 or count % number or number == count:
        raise UsageError(
            f"`fsdp={word}`: {count} {of} do not make several groups of {number}. Give a divisor of {count} between 2 "
            f"and {count // 2}."
        )
    return number


def _check_tp(tp: Any, num_devices: int) -> None:
    if isinstance(tp, bool) or not isinstance(tp, int) or tp < 1:
        raise UsageError(f"`tp={tp}` is no number of devices.")
    if num_devices > 1 and num_devices % tp:
        raise UsageError(f"`tp={tp}` does not divide {num_devices} devices.")


__all__ = ["FSDP_WORDS", "ZERO_STAGES", "Parallelism", "parallelism"]
