"""A program's key is that of what it does, wherever it ran."""

from __future__ import annotations

import torch

from memfit.programs import Program, ProgramNode, ProgramOp, Value, seal


def key_on(device: str, *, size: int = 4) -> str:
    """Of a program that makes positions on ``device``."""
    where = torch.device(device)
    value = Value(0, (size,), (1,), 0, torch.int64)
    node = ProgramNode(0, 8 * size, value, where, producer=0)
    op = ProgramOp(torch.ops.aten.arange.default, (size,), {"device": where, "pin_memory": False}, (), [(None, 0)])
    program = Program(nodes=[node], ops=[op])
    seal(program)
    return program.key


def test_ranks_with_devices_of_their_own_run_one_program() -> None:
    """`cuda:0` on one rank is `cuda:1` on the next; another kind of device is another program."""
    assert key_on("cuda:0") == key_on("cuda:1") == key_on("cuda")
    assert len({key_on("cuda:0"), key_on("cuda:0", size=5), key_on("cpu")}) == 3
