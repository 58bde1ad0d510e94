"""Made-up programs and steps for the planner's tests: small enough to enumerate, or shaped like a real block."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

from memfit.plans import Policy
from memfit.profiles import BlockCall, Node, OpCost, ProgramProfile, StepEvent, StepProfile, TimelineEvent

MIB = 2**20


def release_at_once(saved: tuple[int, ...], temporaries: dict[int, int]) -> tuple[TimelineEvent, ...]:
    """A backward in reverse pack order; ``temporaries[index]`` bytes are there while saved tensor ``index`` is."""
    events = []
    for index in reversed(range(len(saved))):
        size = temporaries.get(index, 0)
        events.append(TimelineEvent(kind="unpack", index=index))
        if size:
            events.append(TimelineEvent(kind="alloc", size=size))
        events.append(TimelineEvent(kind="release", index=index))
        if size:
            events.append(TimelineEvent(kind="free", size=size))
    return tuple(events)


def program(
    nodes: list[Node],
    ops: list[OpCost],
    *,
    key: str = "p",
    timeline: tuple[TimelineEvent, ...] | None = None,
    saved: tuple[int, ...] | None = None,
    forward_bytes: int = 0,
) -> ProgramProfile:
    """A program from its nodes and ops; producers and, unless given, one saved tensor per saved node are filled in."""
    producers = {node: number for number, op in enumerate(ops) for node in op.outputs}
    if saved is None:
        saved = tuple(index for index, node in enumerate(nodes) for _ in range(node.num_saved))
    filled = tuple(
        Node(
            storage_bytes=node.storage_bytes,
            kind=node.kind,
            producer=producers.get(index),
            num_saved=saved.count(index),
            keep_bytes=node.keep_bytes,
            narrow_bytes=node.narrow_bytes,
            narrow_seconds=node.narrow_seconds,
            must_keep=node.must_keep,
        )
        for index, node in enumerate(nodes)
    )
    return ProgramProfile(
        key=key,
        nodes=filled,
        ops=tuple(ops),
        saved=saved,
        outputs=(len(nodes) - 1,),
        timeline=release_at_once(saved, {}) if timeline is None else timeline,
        forward_seconds=sum(op.seconds for op in ops),
        backward_seconds=2 * sum(op.seconds for op in ops),
        forward_bytes=forward_bytes,
    )


def random_program(seed: int, *, num_ops: int = 7, key: str = "p", narrow: bool = True) -> ProgramProfile:
    """A random program with every kind of node, multi-output ops, boundaries and, if asked, narrowing."""
    rng = random.Random(seed)
    nodes = [
        Node(storage_bytes=8, kind="input", num_saved=rng.randint(0, 1), keep_bytes=rng.choice([8, 8, 0])),
        Node(storage_bytes=16, kind="parameter", num_saved=rng.randint(0, 1)),
        Node(storage_bytes=5, kind="input", num_saved=rng.randint(0, 1), keep_bytes=5),
        Node(storage_bytes=3, kind="constant", num_saved=rng.randint(0, 1), keep_bytes=3, must_keep=True),
    ]
    ops = []
    for number in range(num_ops):
        pool = [0, 1, 2, *range(4, len(nodes))]
        inputs = tuple(sorted(set(rng.choices([*pool[-5:], 0], k=rng.randint(1, 3)))))
        recomputable = rng.random() > 0.12
        outputs = []
        for _ in range(rng.choice([1, 1, 1, 2])):
            size = rng.randint(1, 12)
            saved = rng.choice([0, 1, 1, 2])
            narrowed = narrow and saved and size > 3 and rng.random() < 0.4
            nodes.append(
                Node(
                    storage_bytes=size,
                    num_saved=saved,
                    keep_bytes=None if saved == 0 else rng.choice([size, size, size, size, 0]),
                    narrow_bytes=size // 2 if narrowed else None,
                    narrow_seconds=rng.randint(1, 4) * 1e-6 if narrowed else 0.0,
                    must_keep=saved > 0 and not recomputable,
                )
            )
            outputs.append(len(nodes) - 1)
        seconds = rng.randint(1, 9) * 1e-6
        ops.append(
            OpCost(
                name=f"op{number}", seconds=seconds, inputs=inputs, outputs=tuple(outputs), recomputable=recomputable
            )
        )
    saved = [index for index, node in enumerate(nodes) for _ in range(node.num_saved)]
    sizes = {index: rng.randint(0, 9) for index in range(len(saved))}
    return program(
        nodes,
        ops,
        key=key,
        saved=tuple(saved),
        timeline=release_at_once(tuple(saved), sizes),
        forward_bytes=sum(node.storage_bytes for node in nodes if node.kind == "computed"),
    )


def all_policies(profile: ProgramProfile) -> list[Policy]:
    """Every way to keep nodes, sensible or not: the slow, obvious enumeration."""
    choices = []
    for node in profile.nodes:
        ways = [""]
        if node.kind != "parameter" and (node.num_saved or node.kind == "input"):
            ways += ["kept"] if node.keep_bytes is not None else []
            ways += ["narrowed"] if node.narrow_bytes is not None else []
        choices.append(ways)
    return [
        Policy(
            program=profile.key,
            kept=tuple(index for index, way in enumerate(ways) if way == "kept"),
            narrowed=tuple(index for index, way in enumerate(ways) if way == "narrowed"),
        )
        for ways in product(*choices)
    ]


def llama_block(*, batch: int = 2, length: int = 512, hidden: int = 768, key: str = "llama") -> ProgramProfile:
    """The shape of a Llama block: 29 ops, sizes and times in proportion to a real one's."""
    wide, tall = batch * length * hidden * 4, batch * length * 4
    inner = wide * 8 // 3
    nodes: list[Node] = [Node(storage_bytes=wide, kind="input", num_saved=1, keep_bytes=wide)]
    ops: list[OpCost] = []

    def op(name: str, inputs: tuple[int, ...], size: int, saved: int, seconds: float, count: int = 1) -> int:
        made = []
        for _ in range(count):
            nodes.append(Node(storage_bytes=size, num_saved=saved, keep_bytes=size if saved else None))
            made.append(len(nodes) - 1)
        ops.append(OpCost(name=f"aten.{name}", seconds=seconds, inputs=inputs, outputs=tuple(made)))
        return made[0]

    byte, flop = 1e-10, 2e-11 / 100  # seconds per byte moved and per multiply-add
    matmul = batch * length * hidden * hidden * flop

    def norm(x: int) -> int:
        square = op("pow", (x,), wide, 0, wide * byte)
        mean = op("mean", (square,), tall, 0, wide * byte)
        root = op("rsqrt", (mean,), tall, 1, tall * byte)
        scaled = op("mul", (x, root), wide, 1, 2 * wide * byte)
        return op("mul", (scaled,), wide, 1, 2 * wide * byte)

    def rope(x: int) -> int:
        turned = op("cat", (x,), wide, 0, 2 * wide * byte)
        return op("add", (x, turned), wide, 1, 4 * wide * byte)

    normed = norm(0)
    query = rope(op("mm", (normed,), wide, 0, matmul))
    key_ = rope(op("mm", (normed,), wide, 0, matmul))
    value = op("mm", (normed,), wide, 1, matmul)
    attention = op("_scaled_dot_product_flash_attention", (query, key_, value), wide, 1, matmul)
    projected = op("mm", (attention,), wide, 0, matmul)
    middle = op("add", (0, projected), wide, 1, 3 * wide * byte)
    normed = norm(middle)
    gate = op("mm", (normed,), inner, 1, 8 / 3 * matmul)
    active = op("silu", (gate,), inner, 1, 2 * inner * byte)
    up = op("mm", (normed,), inner, 1, 8 / 3 * matmul)
    both = op("mul", (active, up), inner, 1, 3 * inner * byte)
    down = op("mm", (both,), wide, 0, 8 / 3 * matmul)
    op("add", (middle, down), wide, 0, 3 * wide * byte)
    saved = tuple(index for index, node in enumerate(nodes) if node.num_saved)
    timeline = release_at_once(saved, dict.fromkeys(range(len(saved)), wide))
    return program(
        nodes, ops, key=key, saved=saved, timeline=timeline, forward_bytes=sum(n.storage_bytes for n in nodes)
    )


def chain_step(programs: list[ProgramProfile], *, outside: int = 0, loss: int = 0, gradients: int = 0) -> StepProfile:
    """One step through these blocks in order: forwards, loss, backwards in reverse, optimizer.

    ``gradients`` bytes outside the blocks are born in each block's backward.
    """
    count = len(programs)
    names = [f"layers.{number}" for number in range(count)]
    events = [
        StepEvent(
            name=f"forward of {names[number]}",
            kind="forward",
            call=number,
            live_calls=tuple(range(number)),
            outside_bytes=outside,
        )
        for number in range(count)
    ]
    events.append(StepEvent(name="loss", kind="outside", live_calls=tuple(range(count)), outside_bytes=outside + loss))
    for number in reversed(range(count)):
        born = (count - number) * gradients
        events.append(
            StepEvent(
                name=f"backward of {names[number]}",
                kind="backward",
                call=number,
                live_calls=tuple(range(number)),
                outside_bytes=outside + born,
            )
        )
    events.append(StepEvent(name="optimizer", kind="outside", outside_bytes=outside + count * gradients))
    return StepProfile(
        device="cpu",
        programs={each.key: each for each in programs},
        calls=tuple(BlockCall(name=name, program=each.key) for name, each in zip(names, programs, strict=True)),
        events=tuple(events),
    )


def micro_batches(step: StepProfile) -> StepProfile:
    """Two forwards and backwards of a step, one after the other, and one optimizer step."""
    count = len(step.calls)
    moved = [
        replace(
            event,
            call=None if event.call is None else event.call + count,
            live_calls=tuple(call + count for call in event.live_calls),
        )
        for event in step.events
    ]
    return replace(step, calls=step.calls * 2, events=(*step.events[:-1], *moved))
