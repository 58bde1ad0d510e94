"""Several devices on one machine without any: torch's own wrappers over its fake process group.

FSDP2 and DDP run as they are, on fake tensors, as rank 0 of as many ranks as there are to be. Collectives send nothing;
what is allocated for them, when, and for how long, is the wrappers' own doing. What is sent is taken down (`traffic`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from memfit.errors import MemfitError, ModelError, UsageError
from memfit.parallelism import Parallelism
from memfit.sharding import class_name, local
from memfit.simulation.ledger import Ledger, resizes_seen
from memfit.simulation.traffic import Traffic
from memfit.training import TrainingState

_BUCKET_BYTES = 25 * 2**20
_FIRST_BUCKET_BYTES = 2**20
"""DistributedDataParallel's own, so that the first reduction begins early."""
Blocks = Sequence[tuple[str, torch.nn.Module]]
MakeOptimizer = Callable[[Sequence[torch.Tensor]], Any]


class Team:
    """Devices that have nothing to do with each other: what others add to a step, they leave out.

    Attributes:
        shards: Whether parameters are there only around a block's own forward and backward.
        lasting: Whether `shard` changes the model for good.
        traffic: What is sent; ``None``: nothing is.
        together: Whether they share anything.
        splits: Whether layers are split among devices: their parameters are DTensors, so that a block runs again as a
            whole, if at all.
        moves_gradients: Whether each gradient leaves the parameter as soon as it is there.
        buffered_bytes: Of gradients, in what is there throughout.
    """

    shards = False
    splits = False
    together = False
    moves_gradients = False
    lasting = True
    buffered_bytes = 0
    traffic: Traffic | None = None

    def split(self, model: torch.nn.Module) -> None:
        """Before adapters are put on, once for each model."""

    def shard(self, model: torch.nn.Module, blocks: Blocks) -> None:
        """Before the step, once for each model."""

    @contextlib.contextmanager
    def around(self, ledger: Ledger) -> Iterator[None]:
        """While a step is rehearsed."""
        yield

    def start(self, model: torch.nn.Module, blocks: Blocks, ledger: Ledger) -> int:
        """Make what is there throughout the training; returns how many bytes of it are weights."""
        return 0

    def passed_over(self, block: str, like: str, seconds: float) -> None:
        """The forward of a block was passed over for that of one that is as it, which took so long."""

    def entered(self, block: str, like: str | None = None) -> None:
        """The backward of a block has begun; it is passed over for that of ``like``."""

    def reads(self, tensor: torch.Tensor) -> bool:
        """Whether recipes may read a parameter."""
        return True

    def refers_to(self, tensor: torch.Tensor) -> bool:
        """Whether autograd keeps a tensor as a reference to a parameter, and recipes do not see it."""
        return False

    def ended(self) -> None:
        """The backward has."""

    def transient(self) -> int:
        """The most bytes that reduced gradients and gathered weights took since the last call, beyond those then."""
        return 0

    def gradient_bytes(self, states: TrainingState) -> int:
        """Of gradients that are there now."""
        return states.gradient_bytes()

    def resident_bytes(self, ended: int) -> int:
        """Of gradients that are there from the start where they are accumulated; ``ended``: those of one backward."""
        return ended

    def refused(self, model: torch.nn.Module, what: str) -> MemfitError:
        """Of a model that fails on tensors without contents; ``what`` it says."""
        return ModelError(
            f"{class_name(model)} does not run on tensors without contents: {what[:200]} Plan it on a real batch: "
            "`memfit plan FILE.py:FUNCTION`."
        )

    def optimizer(self, make: MakeOptimizer, parameters: Sequence[torch.Tensor]) -> Any:
        """Of the parameters that train, once their gradients are there: it has ``step()`` and ``state``."""
        return make(parameters)


class Replicas(Team):
    """DistributedDataParallel: whole models, whose gradients are reduced in buckets."""

    together = True

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self._wrapped: Any = None

    @contextlib.contextmanager
    def around(self, ledger: Ledger) -> Iterator[None]:
        try:
            yield
        finally:
            self._end()

    def start(self, model: torch.nn.Module, blocks: Blocks, ledger: Ledger) -> int:
        """Make the reducer with its buckets; calls of the model go through DistributedDataParallel."""
        wrapped = torch.nn.parallel.DistributedDataParallel(model, init_sync=False)
        # The reducer's own hook looks at what a collective returns, which has no contents here.
        wrapped.register_comm_hook(None, lambda state, bucket: _reduced(bucket))
        original, inside = model.forward, False

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return original(*args, **kwargs)
            inside = True
            try:
                return wrapped(*args, **kwargs)
            finally:
                inside = False

        hooks = _buckets(model, ledger, self.traffic)
        own = vars(model).get("forward")
        model.__dict__["forward"] = forward
        self._wrapped = (wrapped, model, own, hooks)
        return 0

    def _end(self) -> None:
        if self._wrapped is None:
            return
        _, model, own, hooks = self._wrapped
        self._wrapped = None
        del model.__dict__["forward"]
        if own is not None:
            model.__dict__["forward"] = own
        for hook in hooks:
            hook.remove()


def _reduced(bucket: Any) -> torch.futures.Future[torch.Tensor]:
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _buckets(model: torch.nn.Module, ledger: Ledger, traffic: Traffic | None) -> list[Any]:
    """From its second step on the reducer fills buckets in the order in which gradients come; these stand for them.

    In the first one, which is rehearsed, all gradients are one bucket: as many bytes.
    """
    waiting, limit = 0, _FIRST_BUCKET_BYTES
    parameters = [p for p in model.parameters() if p.requires_grad]
    missing = len(parameters)

    def ready(parameter: torch.Tensor) -> None:
        nonlocal waiting, limit, missing
        waiting += parameter.numel() * parameter.element_size()
        missing -= 1
        if (waiting >= limit or not missing) and traffic is not None:
            traffic.send(waiting, ledger.seconds, rounds=2)
            waiting, limit = 0, _BUCKET_BYTES

    return [p.register_post_accumulate_grad_hook(ready) for p in parameters]  # type: ignore[no-untyped-call]


class Sharded(Team):
    """FSDP2: `fully_shard` on every block and on the model, as torch's documentation has it."""

    shards = True
    together = True

    def __init__(self, parallelism: Parallelism, traffic: Traffic, mesh: Any, param_dtype: torch.dtype | None) -> None:
        """Over the axes of ``mesh`` that are of data; ``param_dtype`` as `MixedPrecisionPolicy` has it."""
        self.traffic = traffic
        self._parallelism = parallelism
        self._mesh = mesh
        self._dtype = param_dtype

    def shard(self, model: torch.nn.Module, blocks: Blocks) -> None:
        """Replace whole parameters by the shards of rank 0, the largest.

        Raises:
            ModelError: FSDP2 does not take the model: it says why.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        axes = tuple(name for name in self._parallelism.axes if name != "tp")
        policy = MixedPrecisionPolicy()
        if self._dtype is not None:  # as accelerate sets it
            policy = MixedPrecisionPolicy(param_dtype=self._dtype, reduce_dtype=self._dtype, output_dtype=self._dtype)
        reshards = self._parallelism.reshards
        try:
            with _disable_current_modes(), _own_chunks():  # ranks are looked up by number
                mesh = self._mesh[axes]
                for _, block in blocks:
                    fully_shard(block, mesh=mesh, reshard_after_forward=reshards, mp_policy=policy)
                if all(block is not model for _, block in blocks):
                    fully_shard(model, mesh=mesh, mp_policy=policy)
        except (ValueError, NotImplementedError, AssertionError) as error:
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError(f"FSDP2 does not shard {type(model).__name__}: {what[:200]}") from error

    @contextlib.contextmanager
    def around(self, ledger: Ledger) -> Iterator[None]:
        with resizes_seen(ledger):
            yield

    def optimizer(self, make: MakeOptimizer, parameters: Sequence[torch.Tensor]) -> Any:
        """Of the shards: what it does to DTensors it does to these."""
        return make(shards_of(parameters))


def shards_of(parameters: Sequence[torch.Tensor]) -> list[torch.nn.Parameter]:
    """What this device holds of them, with the gradients that it holds."""
    shards = []
    for parameter in parameters:
        shard = torch.nn.Parameter(local(parameter), requires_grad=True)
        shard.grad = None if parameter.grad is None else local(parameter.grad)
        shards.append(shard)
    return shards


@contextlib.contextmanager
def _own_chunks() -> Iterator[None]:
    """FSDP2 cuts a parameter into a tensor for every rank, of which it takes that of its own, here the first.

    Making 1024 fake tensors for each parameter takes minutes. Where torch names this otherwise, all are made.
    """
    module: Any = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_param")
    original = getattr(module, "_chunk_with_empty", None)
    if original is None:
        yield
        return

    def first(tensor: torch.Tensor, num_chunks: int, dim: int) -> list[torch.Tensor]:
        length = tensor.size(dim)
        return [tensor.narrow(dim, 0, min(length, -(-length // num_chunks)))]

    module._chunk_with_empty = first
    try:
        yield
    finally:
        module._chunk_with_empty = original


@contextlib.contextmanager
def process_group(parallelism: Parallelism) -> Iterator[Any]:
    """Be rank 0 of many that are not there, where torch's wrappers need ranks.

    Yields:
        The device mesh that parameters are to lie on; ``None`` where they are whole.

    Raises:
        UsageError: The process is a rank already.
    """
    if parallelism.kind not in ("ddp", "fsdp", "tp"):
        yield None
        return
    if not dist.is_available():
        raise UsageError("This torch is built without `torch.distributed`: predict one device, or with another torch.")
    if dist.is_initialized():
        raise UsageError(
            "This process is a rank of a process group already. Predict several devices in one of its own, such as "
            "`memfit plan`."
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    axes = parallelism.axes
    shown = sys.excepthook  # torch puts the rank before what it shows from then on
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=parallelism.num_devices)
    try:
        with _disable_current_modes():
            mesh = init_device_mesh("cpu", parallelism.mesh, mesh_dim_names=tuple(axes)) if axes else None
        yield mesh
    finally:
        dist.destroy_process_group()
        sys.excepthook = shown
        _forget_groups()


def _forget_groups() -> None:
    """DTensors remember how ops went on equal meshes, with the groups that those had."""
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import debug

        getattr(debug, "_clear_sharding_prop_cache", lambda: None)()


__all__ = ["Blocks", "MakeOptimizer", "Replicas", "Sharded", "Team", "process_group", "shards_of"]
