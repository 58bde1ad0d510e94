"""The switches for activation checkpointing that training stacks have by themselves, as data. No torch.

Each entry was read in the sources of the versions that it names; what a stack merely documents is not in it. A new
stack is one file, and one line in `catalog`.
"""

from __future__ import annotations

from memfit.stacks.catalog import STACKS, find
from memfit.stacks.entry import Gain, Remark, Setting, Situation, Stack, StackSetting

__all__ = ["STACKS", "Gain", "Remark", "Setting", "Situation", "Stack", "StackSetting", "find"]
