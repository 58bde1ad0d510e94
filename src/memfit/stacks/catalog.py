"""Names to stacks."""

from __future__ import annotations

from memfit.errors import UnknownNameError
from memfit.names import nearest, plain
from memfit.stacks.axolotl import AXOLOTL
from memfit.stacks.deepspeed_chat import DEEPSPEED_CHAT
from memfit.stacks.entry import Stack
from memfit.stacks.flagembedding import FLAGEMBEDDING
from memfit.stacks.huggingface import FSDP, TRANSFORMERS
from memfit.stacks.llamafactory import LLAMAFACTORY
from memfit.stacks.trl import TRL
from memfit.stacks.unsloth import UNSLOTH

STACKS = {
    stack.name: stack
    for stack in (TRANSFORMERS, FSDP, FLAGEMBEDDING, DEEPSPEED_CHAT, LLAMAFACTORY, TRL, AXOLOTL, UNSLOTH)
}
"""By name."""


def find(name: str) -> Stack:
    """The stack of that name: ``deepspeed-chat``, ``DeepSpeed-Chat``.

    Raises:
        UnknownNameError: There is none; carries the nearest names.
    """
    for stack in STACKS.values():
        if plain(stack.name) == plain(name):
            return stack
    raise UnknownNameError("stack", name, nearest(name, STACKS), f"Known are {', '.join(STACKS)}.")
