"""Run a function in several processes that are ranks of one job, and read what each returns.

`run` starts one Python process a rank, as `torchrun` does: the parent keeps the store, the ranks find it through the
environment. No rank outlives the deadline, whatever it waits for. A rank that raises is reported, not hidden: its
`Outcome` has the error and the traceback, and the others' go on.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

DEADLINE_SECONDS = 120.0
WIDTH = 32
CLASSES = 16


@dataclass(kw_only=True)
class Outcome:
    """What became of one rank.

    Attributes:
        value: What the function returned.
        error: Class and message of what it raised, or "".
        trace: The traceback of that.
        seconds: From the start of the function to its end.
        killed: Whether it was still running at the deadline.
        text: What it printed, on both streams.
    """

    value: Any = None
    error: str = ""
    trace: str = ""
    seconds: float = 0.0
    killed: bool = False
    text: str = ""


def run(
    function: Callable[..., Any],
    *args: Any,
    ranks: int = 2,
    deadline: float = DEADLINE_SECONDS,
    environment: Mapping[str, str] | None = None,
) -> list[Outcome]:
    """Call ``function(*args)`` in every rank, the process group being there (gloo).

    Args:
        function: Of a module that can be imported by name; what it is given and returns can be saved by torch.
        ranks: How many.
        deadline: Seconds after which ranks that still run are killed.
        environment: Added to that of the ranks.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=deadline))
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        torch.save(
            (Path(sys.modules[function.__module__].__file__ or "").stem, function.__name__, args), f"{folder}/in"
        )
        processes = []
        for rank in range(ranks):
            own = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": path,
            }
            with open(f"{folder}/text{rank}", "wb") as text:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-W", "ignore", __file__, folder],
                        env={**os.environ, **own, **(environment or {})},
                        stdout=text,
                        stderr=subprocess.STDOUT,
                    )
                )
        end = time.monotonic() + deadline
        late = set()
        for rank, process in enumerate(processes):
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                late.add(rank)
        for process in processes:
            process.kill()
            process.wait()
        return [_outcome(folder, rank, killed=rank in late) for rank in range(ranks)]


def in_turn(scenarios: Mapping[str, Callable[[], Any]], names: Iterable[str]) -> dict[str, Outcome]:
    """Several scenarios in the same processes, which takes less than starting them for each."""
    found = {}
    for name in names:
        began = time.monotonic()
        outcome = found[name] = Outcome()
        try:
            outcome.value = scenarios[name]()
        except Exception as error:
            outcome.error, outcome.trace = f"{type(error).__name__}: {error}", traceback.format_exc()
        outcome.seconds = time.monotonic() - began
        print(f"{name}: {outcome.seconds:.1f} s {outcome.error}", flush=True)
    return found


def _outcome(folder: str, rank: int, *, killed: bool) -> Outcome:
    text = Path(folder, f"text{rank}").read_text(errors="replace")
    try:
        found: Outcome = torch.load(f"{folder}/out{rank}", weights_only=False)
    except FileNotFoundError:
        return Outcome(error="it ended without a result", killed=killed, text=text)
    found.text = text
    return found


def values(outcomes: list[Outcome]) -> list[Any]:
    """What the ranks returned; fails with the first error."""
    for rank, outcome in enumerate(outcomes):
        assert not outcome.killed, f"rank {rank} hangs:\n{outcome.text}"
        assert not outcome.error, f"rank {rank}: {outcome.error}\n{outcome.trace}\n{outcome.text}"
    return [outcome.value for outcome in outcomes]


def _main(folder: str) -> None:
    module, name, args = torch.load(f"{folder}/in", weights_only=False)
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    function = getattr(importlib.import_module(module), name)
    dist.init_process_group("gloo", timeout=timedelta(seconds=DEADLINE_SECONDS))
    outcome = Outcome()
    began = time.monotonic()
    try:
        outcome.value = function(*args)
    except BaseException as error:
        outcome.error = f"{type(error).__name__}: {error}"
        outcome.trace = traceback.format_exc()
    outcome.seconds = time.monotonic() - began
    torch.save(outcome, f"{folder}/writing{rank}")
    os.replace(f"{folder}/writing{rank}", f"{folder}/out{rank}")
    sys.stdout.flush()
    os._exit(0)  # a rank whose peers have gone does not wait for them


# What the ranks train -------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A decoder layer: attention and a gated MLP, with dropout."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.1) -> None:
        super().__init__()
        self.first = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.second = nn.LayerNorm(width)
        self.gate = nn.Linear(width, 2 * width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.first(x)).chunk(3, -1))
        weights = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1)
        x = x + self.dropout(self.out((weights @ v).transpose(1, 2).flatten(2)))
        h = self.second(x)
        return x + self.dropout(self.down(nn.functional.silu(self.gate(h)) * self.up(h)))


class Model(nn.Module):
    """Embedding, blocks, head; a buffer that distributed training broadcasts, and a head that may stay unused."""

    def __init__(self, num_blocks: int = 3, width: int = WIDTH, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, width)
        self.register_buffer("scale", torch.ones(width))
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(num_blocks))
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.head = nn.Linear(width, CLASSES)
        self.other = nn.Linear(width, CLASSES)
        self.uses_other = False

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * self.scale
        for block in self.blocks:
            x = block(x)
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return (self.head(x) + self.other(x)) if self.uses_other else self.head(x)


def make_model(**options: Any) -> Model:
    """The same weights in every rank and run."""
    torch.manual_seed(7)
    model = Model(**options)
    model.uses_other = True
    return model


def make_batch(step: int, length: int = 12, rank: int | None = None) -> Tensor:
    """Another one in every rank and step."""
    rank = dist.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(0, CLASSES, (3, length), generator=generator)


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Of the next token."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def whole(tensor: Tensor | None) -> Tensor | None:
    """A copy of what this rank holds."""
    if tensor is None:
        return None
    return getattr(tensor, "_local_tensor", tensor).detach().clone()


def equal(first: list[Mapping[str, Tensor | None]], second: list[Mapping[str, Tensor | None]]) -> str:
    """The first difference of two runs, in bits, or ""."""
    if len(first) != len(second):
        return f"{len(first)} steps, {len(second)} steps"
    for step, (mine, theirs) in enumerate(zip(first, second, strict=True)):
        if mine.keys() != theirs.keys():
            return f"step {step}: other names"
        for name, tensor in mine.items():
            other = theirs[name]
            if tensor is None or other is None:
                if tensor is not other:
                    return f"step {step}: {name} is there only once"
            elif tensor.dtype != other.dtype or not torch.equal(tensor, other):
                return f"step {step}: {name} differs"
    return ""


@contextlib.contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    """Counts the calls of the functions that gather and scatter."""
    count: Counter[str] = Counter()
    names = ("all_gather_single", "reduce_scatter_single", "all_reduce")  # what FSDP2 calls

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            return original(*args, **kwargs)

        return call

    originals = {name: getattr(dist, name) for name in names}
    for name, original in originals.items():
        setattr(dist, name, counting(name, original))
    try:
        yield count
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


if __name__ == "__main__":
    sys.modules["ranks"] = sys.modules["__main__"]  # results name their class by it
    Outcome.__module__ = "ranks"
    _main(sys.argv[1])
