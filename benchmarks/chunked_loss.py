"""What the chunked loss costs and needs, against the plain one.

Both compute a loss from hidden states and a head, and all gradients, in turn, the order reversed in every other
repetition; the plain one holds its logits until the end, as the output of a model does. Time is the median over the
repetitions of a ratio within one repetition. The peak is what operators allocate beyond what was there before: as
`torch.profiler` counts it on CPU, as the allocator does on CUDA. The gradient of the head is left out on both sides;
that of a half-precision head is summed in fp32, and counted so.

    python -m benchmarks.chunked_loss                                       # 32k vocabulary, 2k tokens, hidden size 512
    python -m benchmarks.chunked_loss --vocab 131072 --tokens 8192 --hidden-size 4096 --dtype bfloat16 --device cuda
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import record
from memfit import linear_cross_entropy
from memfit.chunked import choose_chunk_tokens
from memfit.units import format_bytes

Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """The loss, and the logits that a model returns."""
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.float(), labels), logits


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """The loss, and no logits."""
    return linear_cross_entropy(hidden, weight, labels), None


def step(loss: Loss, tensors: tuple[Tensor, Tensor, Tensor]) -> float:
    """Seconds of one loss and its backward."""
    for tensor in tensors[:2]:
        tensor.grad = None
    _synchronize(tensors[0])
    began = time.perf_counter()
    value, logits = loss(*tensors)
    value.backward()
    _synchronize(tensors[0])
    seconds = time.perf_counter() - began
    del logits
    return seconds


def peak_bytes(loss: Loss, tensors: tuple[Tensor, Tensor, Tensor]) -> int:
    """The most that one step allocates at a time, the gradient of the head aside."""
    hidden, weight, _ = tensors
    of_head = weight.numel() * (4 if loss is chunked else weight.element_size())
    for tensor in tensors[:2]:
        tensor.grad = None
    if hidden.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(loss, tensors)
        return torch.cuda.max_memory_allocated() - before - of_head
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step(loss, tensors)
    held = highest = 0
    for event in sorted(_allocations(profile), key=lambda pair: pair[0]):
        held += event[1]
        highest = max(highest, held)
    return highest - of_head


def _allocations(profile: torch.profiler.profile) -> list[tuple[int, int]]:
    """When how many bytes were allocated, or freed."""
    events: Any = profile.profiler
    return [(e.start_ns(), e.nbytes()) for e in events.kineto_results.events() if e.name() == "[memory]"]


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One shape, as JSON."""
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.hidden_size, device=args.device).to(dtype).requires_grad_()
    weight = (torch.randn(args.vocab, args.hidden_size, device=args.device) * 0.02).to(dtype).requires_grad_()
    labels = torch.randint(args.vocab, (args.tokens,), device=args.device)
    tensors = (hidden, weight, labels)
    losses = {"plain": plain, "chunked": chunked}
    for loss in losses.values():
        step(loss, tensors)
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for repetition in range(args.repetitions):
        pairs = list(losses.items())
        for name, loss in pairs if repetition % 2 == 0 else reversed(pairs):
            seconds[name].append(step(loss, tensors))
    ratios = [own / other for own, other in zip(seconds["chunked"], seconds["plain"], strict=True)]
    peaks = {name: peak_bytes(loss, tensors) for name, loss in losses.items()}
    return {
        "vocab": args.vocab,
        "tokens": args.tokens,
        "hidden_size": args.hidden_size,
        "dtype": args.dtype,
        "chunk_tokens": choose_chunk_tokens(args.tokens, args.vocab, args.hidden_size, dtype),
        "seconds": seconds,
        "time_ratio": statistics.median(ratios),
        "peak_bytes": peaks,
        "peak_ratio": peaks["chunked"] / peaks["plain"],
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--output", type=Path, default=None, help="folder of a JSON file; without it, JSON is printed")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print, write the JSON."""
    args = parse()
    origin = record.origin("benchmarks.chunked_loss", sys.argv[1:], device=args.device)
    result = measure(args)
    data = {"origin": origin, **result}
    peaks = result["peak_bytes"]
    print(
        f"time {result['time_ratio']:.3f} of the plain loss's; peak {format_bytes(peaks['chunked'])} of "
        f"{format_bytes(peaks['plain'])} ({100 * result['peak_ratio']:.1f}%), chunks of "
        f"{result['chunk_tokens']} tokens",
        file=sys.stderr,
    )
    if args.output is None:
        print(json.dumps(data, indent=2, ensure_ascii=False))
    else:
        print(f"Written to {record.write(f'chunked-loss-{args.device}', data, folder=args.output)}", file=sys.stderr)


if __name__ == "__main__":
    main()
