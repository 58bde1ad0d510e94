"""Which ops a recipe may run, and how.

An allow-list: an op that is not named here is a boundary, its outputs are saved. The names are those of ops that
are pure, whose result depends on nothing but their arguments (and the generator, for random ops), and that are
deterministic where `is_recomputable` says so. Being on the list is necessary, not sufficient: the recorder runs each op
a second time and compares bits before a recipe may use it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch._ops import OpOverload

_ELEMENTWISE = """
abs acos acosh add addcdiv addcmul angle asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or bitwise_xor ceil
celu clamp clamp_max clamp_min copysign cos cosh deg2rad digamma div elu eq erf erfc erfinv exp exp2 expm1 floor
floor_divide fmax fmin fmod frac ge gelu glu gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot isfinite isinf
isnan ldexp le leaky_relu lerp lgamma log log10 log1p log2 logaddexp logaddexp2 log_sigmoid_forward logical_and
logical_not logical_or logical_xor logit lt masked_fill maximum minimum mish mul ne neg nan_to_num pow _prelu_kernel
reciprocal relu relu6 remainder round rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink
sqrt square sub tan tanh threshold trunc where xlogy
"""
_REDUCTIONS = """
_softmax _log_softmax _safe_softmax all amax amin any linalg_vector_norm logsumexp mean norm prod std std_mean sum var
var_mean
"""
_MATMULS = """
mm bmm addmm baddbmm addmv mv dot addbmm addr linear _addmm_activation _grouped_mm convolution _convolution
mkldnn_linear _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu
_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math
_flash_attention_forward _efficient_attention_forward
"""
_NORMS = """
native_layer_norm native_group_norm _fused_rms_norm native_batch_norm _native_batch_norm_legit
_native_batch_norm_legit_no_training _weight_norm_interface
"""
_COPIES = """
_to_copy _pin_memory cat clone constant_pad_nd copy diagonal_copy embedding expand_copy flip gather im2col col2im index
index_select masked_scatter pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d repeat
replication_pad1d replication_pad2d roll rot90 select_scatter slice_scatter stack tril triu unfold_copy
"""
_SPATIAL = """
avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d max_pool2d_with_indices
max_pool3d_with_indices upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
grid_sampler_2d
"""
_QUANTIZED = "bitsandbytes::gemm_4bit bitsandbytes::dequantize_4bit bitsandbytes::dequantize_blockwise"
_POSITIONS = "arange linspace eye tril_indices triu_indices"
_RANDOM = """
bernoulli bernoulli_ native_dropout _fused_dropout rand rand_like randn randn_like normal_ uniform_ exponential_ random_
randint randint_like randperm rrelu_with_noise
"""
_SCANS = "cumsum cumprod logcumsumexp"  # torch documents them as non-deterministic on CUDA

_LISTS = (_ELEMENTWISE, _REDUCTIONS, _MATMULS, _NORMS, _COPIES, _SPATIAL, _QUANTIZED, _POSITIONS)
_PURE = frozenset(" ".join(_LISTS).split())
_RANDOM_NAMES = frozenset(_RANDOM.split())
_SCAN_NAMES = frozenset(_SCANS.split())
_UNINITIALISED = frozenset("empty empty_like empty_strided new_empty new_empty_strided empty_permuted".split())
_CONSTANT = frozenset(
    "zeros zeros_like ones ones_like full full_like new_zeros new_ones new_full scalar_tensor fill_ zero_ fill".split()
)
_OVERWRITING = frozenset("bernoulli_ normal_ uniform_ exponential_ random_ copy_ fill_ zero_".split())
_CONVOLUTIONS = {"convolution", "_convolution"}
_DROPOUT_ATTENTION = "_scaled_dot_product", "_flash_attention_forward", "_efficient_attention_forward"
_UNWRITTEN = {
    "_scaled_dot_product_flash_attention": ((6,), (7,)),
    "_scaled_dot_product_efficient_attention": ((2, 3), ()),
    "_scaled_dot_product_cudnn_attention": ((6, 7), ()),
    "_flash_attention_forward": ((2,), (3,)),
    "_efficient_attention_forward": ((2, 3), ()),
}
"""Outputs that kernels leave as the memory was: without dropout (seeds and offsets of the generator), and always."""
_BATCH_NORMS = {"native_batch_norm": (3, 4), "_native_batch_norm_legit": (3, 4)}
_HIDDEN_WRITERS = _BATCH_NORMS | {"cudnn_batch_norm": (3, 4), "miopen_batch_norm": (3, 4)}


def base_name(func: OpOverload) -> str:
    """``add_`` of ``aten.add_.Tensor``; ops of other namespaces keep theirs, and so are on no list."""
    if func.namespace != "aten":
        return f"{func.namespace}::{func._opname}"
    return str(func._opname)


def is_uninitialised(func: OpOverload) -> bool:
    """Whether it returns memory that nothing has written yet."""
    return base_name(func) in _UNINITIALISED


def is_constant(func: OpOverload) -> bool:
    """Whether it fills memory with one value: proves nothing, and an invisible kernel may fill it afterwards."""
    return base_name(func) in _CONSTANT


def is_overwriting(func: OpOverload) -> bool:
    """Whether it writes all of its first argument without reading it."""
    return base_name(func) in _OVERWRITING


def is_random(func: OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
    """Whether this call draws from a generator (attention draws only where its dropout is on)."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    name = base_name(func)
    if name.startswith(_DROPOUT_ATTENTION):
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.name == "dropout_p":
                return value != 0.0
        return kwargs.get("dropout_p", 0.0) != 0.0
    return True


def unwritten(func: OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[int, ...]:
    """Positions of the results that this call may leave as the memory was: a second run shows something else there."""
    seeds, never = _UNWRITTEN.get(base_name(func), ((), ()))
    return never if is_random(func, args, kwargs) else (*seeds, *never)


def is_recomputable(func: OpOverload, args: tuple[object, ...], kwargs: dict[str, object], device: str) -> bool:
    """Whether a recipe may run this call on ``device`` (a device type), if it also proves itself when recorded."""
    name = base_name(func)
    if any(argument.is_out for argument in func._schema.arguments):
        return False
    if "nondeterministic_bitwise" in (str(tag).rsplit(".", 1)[-1] for tag in func.tags):
        return False
    if kwargs.get("generator") is not None:
        return False
    if name in _RANDOM_NAMES or name in _CONSTANT:
        return True
    if name == "copy_":
        return True
    if name == "index" or name == "masked_scatter":
        return not any(isinstance(a, torch.Tensor) and a.dtype in (torch.bool, torch.uint8) for a in _flat(args[1:]))
    if name in _SCAN_NAMES or name.removesuffix("_") in _SCAN_NAMES:
        return device == "cpu"
    if name in _CONVOLUTIONS and device == "cuda":
        return _repeats(transposed=bool(args[6]))
    if name in _PURE:
        return True
    return name.endswith("_") and name.removesuffix("_") in _PURE


def _repeats(*, transposed: bool) -> bool:
    """Whether cuDNN's convolutions give the same bits in autograd's threads, each of which tries kernels out itself."""
    chosen = not torch.backends.cudnn.benchmark
    fixed = torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    return fixed or (chosen and not transposed)  # a transposed one is a backward, and may add in any order


def crosses_devices(tensors: Iterable[torch.Tensor], kwargs: dict[str, Any]) -> bool:
    """Whether a call reads one device and writes another; a scalar on the CPU is a number. See NOTE [Devices]."""
    read = {tensor.device for tensor in tensors if tensor.dim() or tensor.device.type != "cpu"}
    if kwargs.get("device") is None:
        return len(read) > 1
    to = torch.device(kwargs["device"])
    index: int | None = to.index
    if index is None and any(device.type == to.type != "cpu" for device in read):
        current: Any = getattr(getattr(torch, to.type, None), "current_device", None)
        index = None if current is None else current()
    return any(device.type != to.type or (index is not None and device.index != index) for device in read)


def purify(
    func: OpOverload, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[OpOverload, tuple[object, ...], dict[str, object]]:
    """The call without its hidden writes: a batch norm that leaves the running statistics alone.

    In training the statistics are written and not read, so the outputs do not depend on them; the recorder checks it.
    """
    positions = _BATCH_NORMS.get(base_name(func))
    if positions is None:
        return func, args, kwargs
    changed = list(args)
    for position in positions:
        changed[position] = None
    if base_name(func) == "_native_batch_norm_legit":
        return torch.ops.aten._native_batch_norm_legit.no_stats, (*changed[:3], *changed[5:]), kwargs
    return func, tuple(changed), kwargs


def is_training_batch_norm(func: OpOverload, args: tuple[object, ...]) -> bool:
    """Whether this call normalises with the statistics of its own batch."""
    return base_name(func) in _BATCH_NORMS and args[5] is True


def written(func: OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> list[torch.Tensor]:
    """The tensors that a call writes, those included that its schema does not admit to."""
    found: list[torch.Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [t for t in _flat((value,)) if isinstance(t, torch.Tensor)]
    for position in _HIDDEN_WRITERS.get(base_name(func), ()):
        value = args[position] if position < len(args) else None
        if isinstance(value, torch.Tensor) and args[5] is True:
            found.append(value)
    return found


def changes_nothing(func: OpOverload, args: tuple[object, ...]) -> bool:
    """A tensor set to itself: no write, though its version counts one (see `resets`)."""
    return func is torch.ops.aten.set_.source_Tensor and args[0] is args[1]


def _flat(values: object) -> list[object]:
    """The leaves of nested tuples and lists."""
    if isinstance(values, (tuple, list)):
        return [leaf for value in values for leaf in _flat(value)]
    return [values]


def indexes_by_integers(func: OpOverload, args: tuple[Any, ...]) -> bool:
    """``index`` is tagged as data-dependent for the sake of masks; with integers its shape is that of its arguments."""
    if base_name(func) != "index":
        return False
    return all(t.dtype not in (torch.bool, torch.uint8) for t in args[1] if isinstance(t, torch.Tensor))


def with_generator(func: OpOverload) -> OpOverload | None:
    """The overload of a random op that draws from a generator it is given, or ``None``."""
    if any(argument.name == "generator" for argument in func._schema.arguments):
        return func
    other = getattr(func.overloadpacket, "generator", None) if func._overloadname == "default" else None
    return other if isinstance(other, OpOverload) else None
