"""Tensor parallelism: transformers' own, with a model's own plan, over torch's fake process group.

What `from_pretrained(distributed_config=DistributedConfig(tp_size=N))` does to a model before its weights are loaded is
done to one without contents. Weights become DTensors; layers call collectives, whose results they wait for. Adapters
come after that, as PEFT has them, and then FSDP2 over the groups of devices that split layers, if there are several.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from memfit.errors import MemfitError, UsageError
from memfit.parallelism import Parallelism
from memfit.sharding import class_name
from memfit.simulation.ledger import Ledger
from memfit.simulation.parallel import Blocks, MakeOptimizer, Sharded, Team
from memfit.simulation.quantized import QuantizedLinear
from memfit.simulation.traffic import Traffic

_WAY_OUT = "`fsdp` (`--fsdp full`) shards parameters, gradients and optimizer state over the same devices."


class Split(Team):
    """Layers are split among devices, which all have the same batch."""

    splits = True
    together = True

    def __init__(self, parallelism: Parallelism, traffic: Traffic, mesh: Any) -> None:
        """Over the axis ``tp`` of ``mesh``."""
        self.traffic = traffic
        self._degree = parallelism.split_size
        self._mesh = mesh

    def split(self, model: torch.nn.Module) -> None:
        """Replace whole parameters by the shards of rank 0, the largest.

        Raises:
            UsageError: The model has no plan, or not one of transformers' models; or transformers cannot do it.
        """
        split, name, degree = self._code(model), class_name(model), self._degree
        with _disable_current_modes():  # ranks are looked up by number
            mesh = self._mesh["tp"]
        _untie(model)
        try:
            split(mesh)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise self.refused(model, f"{type(error).__name__}: {_first_line(error)}") from error
        tie: Callable[[], None] | None = getattr(model, "tie_weights", None)
        if tie is not None:
            tie()  # as after loading
        if not any(hasattr(p, "placements") for p in model.parameters()):
            raise UsageError(f"The tensor parallel plan of {name} splits nothing: leave `tp={degree}` out. {_WAY_OUT}")

    @contextlib.contextmanager
    def around(self, ledger: Ledger) -> Iterator[None]:
        """Shapes that DTensors work out, once for each op, on fake tensors of all devices' size are nobody's memory."""
        module: Any = sys.modules.get("torch.distributed.tensor._sharding_prop")
        kind: Any = getattr(module, "ShardingPropagator", None)
        original = getattr(kind, "_propagate_tensor_meta_non_cached", None)
        if original is None:
            yield
            return

        def unseen(*args: Any) -> Any:
            with _disable_current_modes():
                return original(*args)

        kind._propagate_tensor_meta_non_cached = unseen
        try:
            yield
        finally:
            kind._propagate_tensor_meta_non_cached = original

    def _code(self, model: torch.nn.Module) -> Callable[[Any], Any]:
        """What splits a model over a mesh."""
        name, degree = class_name(model), self._degree
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if any("lora_" in each for each, _ in model.named_parameters()):
            raise UsageError(
                f"Layers are split before they get adapters: give the model's configuration with `lora`, or leave "
                f"`tp={degree}` out. {_WAY_OUT}"
            )
        if any(isinstance(module, QuantizedLinear) for module in model.modules()):
            raise UsageError(
                f"Quantized weights that are split are not predicted: leave `quantize` or `tp={degree}` out. {_WAY_OUT}"
            )
        if kind is None or not hasattr(model, "base_model_prefix"):
            raise UsageError(
                f"`tp={degree}` is predicted as transformers does it, by the plan of its models, and {name} is none of "
                f"them. {_WAY_OUT}"
            )
        if not getattr(model, "tp_plan", None):
            raise UsageError(f"transformers has no tensor parallel plan for `{kind}` ({name}). {_WAY_OUT}")
        try:
            from transformers.distributed.configuration_utils import DistributedConfig
            from transformers.distributed.tensor_parallel import apply_tensor_parallelism
        except ImportError:
            import transformers

            raise UsageError(
                f"transformers {transformers.__version__} splits layers in a way that is not predicted: take one with "
                f"`transformers.distributed.tensor_parallel`, such as 5.23. {_WAY_OUT}"
            ) from None
        apply: Any = apply_tensor_parallelism
        resolve: Any = getattr(model, "_resolve_parallel_plans", None)
        config = DistributedConfig(tp_size=degree)

        def split(mesh: Any) -> None:
            asked: Any = model
            asked._device_mesh, asked._tp_size, asked.config.distributed_config = mesh, degree, config  # for adapters
            if resolve is None:  # 5.17: the model has the plan
                apply(model, mesh)
            else:
                apply(model, mesh, resolve(config)[0])

        return split

    def refused(self, model: torch.nn.Module, what: str) -> MemfitError:
        """Why a model that is split does not run."""
        text = getattr(getattr(model, "config", None), "get_text_config", lambda: None)()
        names = {"num_attention_heads": "attention heads", "num_key_value_heads": "key and value heads"}
        numbers = {said: getattr(text, name, None) for name, said in names.items()}
        odd = [f"{n} {said}" for said, n in numbers.items() if isinstance(n, int) and n % self._degree]
        why = f" `tp={self._degree}` does not divide {' and '.join(odd)}: give one that does." if odd else ""
        rows, columns = (_adapted(model, part) for part in ("lora_A", "lora_B"))
        if rows and not odd:
            why = (
                f" Adapters of {', '.join(rows)}, which are split by rows, fail like that on real devices too: give "
                f"`lora_targets` (`--lora-targets {','.join(columns) or 'q_proj,v_proj'}`) without them."
            )
        return UsageError(
            f"{class_name(model)} does not run as transformers splits it over {self._degree} devices: "
            f"{what[:200].rstrip('.!')}."
            f"{why} {_WAY_OUT}"
        )

    def optimizer(self, make: MakeOptimizer, parameters: Sequence[torch.Tensor]) -> Any:
        """On DTensors and plain tensors, as they are.

        Raises:
            UsageError: It takes no such mix.
        """
        made = make(parameters)
        if not type(made).__module__.startswith("torch.optim") or any(g.get("fused") for g in made.param_groups):
            raise UsageError(
                "This optimizer takes no DTensors beside plain tensors, which is what tensor parallel models have: "
                "leave `optimizer` out, or give one of torch's without `fused`."
            )
        for group in made.param_groups:
            group["foreach"] = False  # torch's default where a parameter is a DTensor
        return made


class Groups(Split):
    """Several groups that split layers: FSDP2 over them, of parts or of whole copies of what a device holds."""

    shards = True

    def __init__(self, parallelism: Parallelism, traffic: Traffic, mesh: Any, param_dtype: torch.dtype | None) -> None:
        """As `Sharded` and `Split`."""
        super().__init__(parallelism, traffic, mesh)
        self._sharded = Sharded(parallelism, traffic, mesh, param_dtype)

    def shard(self, model: torch.nn.Module, blocks: Blocks) -> None:
        """As `Sharded` does it."""
        self._sharded.shard(model, blocks)

    @contextlib.contextmanager
    def around(self, ledger: Ledger) -> Iterator[None]:
        with super().around(ledger), self._sharded.around(ledger), warnings.catch_warnings():
            # Logits are a view of a DTensor's.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
            yield


def _adapted(model: torch.nn.Module, part: str) -> list[str]:
    """Last names of layers whose adapters have this part split."""
    named = ((name.partition(f".{part}.")[0], p) for name, p in model.named_parameters() if f".{part}." in name)
    meshes = ((name, getattr(p, "device_mesh", None)) for name, p in named)
    return sorted({name.rpartition(".")[2] for name, mesh in meshes if mesh and "tp" in mesh.mesh_dim_names})


def _untie(model: torch.nn.Module) -> None:
    """Give every module parameters of its own, as they are before weights are loaded."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                own = torch.nn.Parameter(torch.empty_like(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = own
                seen.add(id(own))
            seen.add(id(parameter))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


__all__ = ["Groups", "Split"]
