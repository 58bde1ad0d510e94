"""What devices send each other in a step, and how much of it the step waits for.

One queue of transfers beside the computation, as a communication stream has it. A transfer of n devices around a ring
moves (n-1)/n of the whole buffer over each link, an all-reduce twice that (Patarasuk and Yuan 2009, "Bandwidth optimal
all-reduce algorithms for clusters of workstations"). Where it leaves a machine, as many rings share the buffer as the
machine has devices in it, each over the network link of another, as NCCL lays them. Gathered parameters are waited for
where they are copied out; what is reduced, at the end of the backward; the results of functional collectives, as tensor
parallelism has them, at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from memfit.hardware import Hardware
from memfit.signature import tensors_in

_ALL = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moment:
    """A transfer that is handed in, or that is waited for.

    Attributes:
        clock: Seconds of the computation until then.
        window: Block calls whose backward had begun.
        seconds: That the transfer takes; ``None``: it is waited for.
        key: Which transfer, where something waits for it before the end.
        early: Whether it may begin when the last wait was over: it needs nothing that was computed since.
    """

    clock: float
    window: int
    seconds: float | None
    key: int = 0
    early: bool = False


class Traffic:
    """Takes down the collectives of a step.

    Attributes:
        window: Block calls whose backward has begun, so far.
        sent_bytes: Over each link, so far; what blocks that are passed over would send themselves is not in it.
    """

    def __init__(self, entry: Hardware, num_devices: int, *, split_size: int = 1) -> None:
        """Of devices that are ``entry``; those that split layers, ``split_size``, do it by functional collectives."""
        self.window = 0
        self.sent_bytes = 0.0
        self._all: Sequence[int] = range(num_devices)
        self._group: Sequence[int] = range(split_size) if split_size > 1 else self._all
        self._entry = entry
        self._launch = entry.launch_seconds
        self._moments: list[_Moment] = []

    def sent(self, name: str, args: Sequence[Any], clock: float) -> None:
        """A collective of torch's was called."""
        tensors = tensors_in(args)
        if not tensors or "barrier" in name:
            return
        largest = max(tensors, key=lambda t: t.numel() * t.element_size())
        size = largest.numel() * largest.element_size()
        gathers = "gather" in name
        self.send(
            size,
            clock,
            rounds=2 if "allreduce" in name or "all_reduce" in name else 1,
            ranks=_ranks(args),
            key=largest.untyped_storage()._cdata if gathers else 0,
            early=gathers,
        )

    def send(
        self,
        size: float,
        clock: float,
        *,
        rounds: int = 1,
        ranks: Sequence[int] | None = None,
        key: int = 0,
        early: bool = False,
    ) -> None:
        """Hand a transfer in.

        Args:
            size: Of the whole buffer, in bytes.
            clock: Seconds of the computation until now.
            rounds: Around the ring: 2 for an all-reduce, else 1.
            ranks: In the ring; all of them by default.
            key: For `wait`.
            early: Whether it needs nothing that was computed since the last wait.
        """
        ring = ranks or self._all
        if len(ring) < 2:
            return
        seconds = self._seconds(size, rounds, ring)
        self._moments.append(_Moment(clock=clock, window=self.window, seconds=seconds, key=key, early=early))

    def waited(self, name: str, args: Sequence[Any], results: Sequence[Any]) -> float:
        """A functional collective of torch's was called, whose result the computation asks for at once.

        Returns:
            Seconds that it waits.
        """
        if not any(word in name for word in ("reduce", "gather", "all_to_all", "broadcast", "permute")):
            return 0.0  # waiting, and wrapping what is waited for
        size = max((t.numel() * t.element_size() for t in tensors_in((args, results))), default=0)
        return self._seconds(size, 2 if "all_reduce" in name else 1, self._group)

    def _seconds(self, size: float, rounds: int, ring: Sequence[int]) -> float:
        moved = rounds * size * (len(ring) - 1) / len(ring)
        self.sent_bytes += moved
        rate = self._entry.link_bytes_per_second(ring)
        return 0.0 if rate is None else moved / (rate * self._entry.copy_efficiency) + rounds * self._launch

    def wait(self, key: int, clock: float) -> None:
        """The computation needs a transfer."""
        self._moments.append(_Moment(clock=clock, window=self.window, seconds=None, key=key))

    def settle(self, clock: float) -> None:
        """The computation needs all transfers."""
        self.wait(_ALL, clock)

    def exposed_seconds(self, extra: Sequence[float]) -> float:
        """How much longer the step takes than its computation.

        Args:
            extra: Seconds that the clock lacks in the backward of each block call, in the order of the backwards.
        """
        late = [0.0]
        for each in extra:
            late.append(late[-1] + each)
        lag = free = ready = 0.0  # behind the clock; when the link, and the last wait, are over
        done: dict[int, float] = {}
        for moment in self._moments:
            now = moment.clock + late[min(moment.window, len(extra))] + lag
            if moment.seconds is not None:
                free = max(free, min(ready, now) if moment.early else now) + moment.seconds
                done[moment.key] = free
            else:
                wait = max(0.0, (free if moment.key == _ALL else done.get(moment.key, 0.0)) - now)
                lag += wait
                ready = now + wait
        return lag


def _ranks(args: Sequence[Any]) -> list[int] | None:
    for each in args:
        if isinstance(each, torch.ScriptObject):
            try:
                return dist.get_process_group_ranks(dist.ProcessGroup.unbox(each))
            except (RuntimeError, TypeError, AttributeError):
                continue  # another object, such as the operation
    return None


__all__ = ["Traffic"]
