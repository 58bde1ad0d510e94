"""A program's key is that of what it does, wherever it ran."""

from __future__ import annotations

import torch

from memfit.entries import ProgramState, state_of
from memfit.programs import Program, ProgramNode, ProgramOp, Value, seal


def program_on(device: str, *, size: int = 4) -> Program:
    """One that makes positions on ``device``."""
    where = torch.device(device)
    value = Value(0, (size,), (1,), 0, torch.int64)
    node = ProgramNode(0, 8 * size, value, where, producer=0)
    op = ProgramOp(torch.ops.aten.arange.default, (size,), {"device": where, "pin_memory": False}, (), [(None, 0)])
    program = Program(nodes=[node], ops=[op])
    seal(program)
    return program


def key_on(device: str, *, size: int = 4) -> str:
    return program_on(device, size=size).key


def test_ranks_with_devices_of_their_own_run_one_program() -> None:
    """`cuda:0` on one rank is `cuda:1` on the next; another kind of device is another program."""
    assert key_on("cuda:0") == key_on("cuda:1") == key_on("cuda")
    assert len({key_on("cuda:0"), key_on("cuda:0", size=5), key_on("cpu")}) == 3


def test_recipes_of_one_device_are_not_run_on_another() -> None:
    """A model that moves to another device keeps its key, not the recipes that name the device that it was on."""
    states: dict[str, ProgramState] = {}
    first = state_of(states, program_on("cuda:0"))
    assert state_of(states, program_on("cuda:0")) is first
    second = state_of(states, program_on("cuda:1"))
    assert second is not first
    assert [node.device for node in first.program.nodes] == [torch.device("cuda:0")]
    assert [node.device for node in second.program.nodes] == [torch.device("cuda:1")]
