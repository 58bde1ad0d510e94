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
            ``zero`` (DeepSpeed's); ``tp``: tensor parallelism over all of them.
        num_devices: That train.
        stage: Of ZeRO.
        reshards: FSDP2: whether a block's parameters are freed after its forward and gathered again for its backward.
        shard_size: FSDP2: devices that hold one copy of the model together; fewer than all of them in hybrid sharding.
    """

    kind: Kind = "replicas"
    num_devices: int = 1
    stage: int = 0
    reshards: bool = True
    shard_size: int = 1

    @property
    def mesh(self) -> tuple[int, ...]:
        """Shape of the device mesh that parameters are sharded over, as plans have it; empty where they are whole."""
        if self.kind == "tp":
            return (self.num_devices,)
        if self.kind != "fsdp":
            return ()
        rest = self.num_devices // self.shard_size
        return (self.shard_size,) if rest == 1 else (rest, self.shard_size)

    @property
    def num_batches(self) -> int:
        """Batches of a step: of tensor parallel devices all have the same."""
        return 1 if self.kind == "tp" else self.num_devices

    @property
    def words(self) -> str:
        """As a report says it; empty for replicas."""
        if self.kind == "replicas":
            return ""
        if self.kind == "ddp":
            return f"DDP over {self.num_devices} devices"
        if self.kind == "zero":
            return f"ZeRO-{self.stage} over {self.num_devices} devices"
        if self.kind == "tp":
            return f"tensor parallel over {self.num_devices} devices"
        hybrid = self.shard_size < self.num_devices
        how = f"in groups of {self.shard_size} " if hybrid else "" if self.reshards else "of gradients and state "
        return f"FSDP2 {how}over {self.num_devices} devices"


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
        tp: Tensor parallel degree: the number of all devices, or 1.

    Raises:
        UsageError: Two of them at once, one for a single device, tensor parallel groups that are not all devices, or a
            word or number that means nothing.
    """
    asked = {"ddp": ddp or None, "fsdp": fsdp, "zero": zero, "tp": None if tp == 1 else tp}
    given = [name for name, value in asked.items() if value is not None]
    if tp is not None:
        _check_tp(tp, num_devices)
    if len(given) > 1:
        raise UsageError(f"`{given[0]}` and `{given[1]}` do not go together in one prediction: give one of them.")
    if not given:
        return Parallelism(num_devices=num_devices)
    if num_devices < 2:
        raise UsageError(
            f"`{given[0]}` needs several devices, and there is {num_devices}: give how many there are, such as "
            "`--gpus 8xh100` (`num_devices=8`)."
        )
    if ddp:
        return Parallelism(kind="ddp", num_devices=num_devices)
    if fsdp is not None:
        return _fsdp(fsdp, num_devices)
    if zero is not None:
        if isinstance(zero, bool) or zero not in ZERO_STAGES:
            raise UsageError(f"There is no ZeRO stage `{zero}`. Give 1, 2 or 3.")
        return Parallelism(kind="zero", num_devices=num_devices, stage=int(zero), shard_size=num_devices)
    if tp < num_devices:
        raise UsageError(
            f"`tp={tp}` on {num_devices} devices makes {num_devices // tp} groups, and what joins groups is not "
            f"predicted: give as many devices as `tp` says, such as `--gpus {tp}xh100` (`num_devices={tp}`), or `fsdp`."
        )
    return Parallelism(kind="tp", num_devices=num_devices)


def _fsdp(word: Any, num_devices: int) -> Parallelism:
    if word in ("full", "grad"):
        return Parallelism(kind="fsdp", num_devices=num_devices, reshards=word == "full", shard_size=num_devices)
    name, _, size = word.partition(":") if isinstance(word, str) else ("", "", "")
    if name != "hybrid" or not size.isascii() or not size.isdigit():
        raise UsageError(f"There is no FSDP strategy `{word}`. Known are {', '.join(f'`{w}`' for w in FSDP_WORDS)}.")
    number = int(size)
    if number < 2 or num_devices % number or number == num_devices:
        raise UsageError(
            f"`fsdp={word}`: {num_devices} devices do not make several groups of {number}. Give a divisor of "
            f"{num_devices} between 2 and {num_devices // 2}."
        )
    return Parallelism(kind="fsdp", num_devices=num_devices, shard_size=number)


def _check_tp(tp: Any, num_devices: int) -> None:
    if isinstance(tp, bool) or not isinstance(tp, int) or tp < 1:
        raise UsageError(f"`tp={tp}` is no number of devices.")
    if num_devices > 1 and num_devices % tp:
        raise UsageError(f"`tp={tp}` does not divide {num_devices} devices.")


__all__ = ["FSDP_WORDS", "ZERO_STAGES", "Parallelism", "parallelism"]
