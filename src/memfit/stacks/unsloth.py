"""Unsloth. Read, not run: it wants a GPU.

Source:
    unsloth-zoo ce232d6c `gradient_checkpointing.py`.
"""

from __future__ import annotations

from memfit.stacks.entry import Remark, Setting, Stack

UNSLOTH = Stack(
    name="unsloth",
    versions="unsloth_zoo 2026.10.9",
    place="arguments of `FastLanguageModel.get_peft_model`",
    settings=(
        Setting(kind="nothing", lines=("use_gradient_checkpointing=False",)),
        Setting(kind="full", lines=("use_gradient_checkpointing=True",)),
        Setting(
            kind="offload",
            lines=('use_gradient_checkpointing="unsloth"',),
            warnings=(Remark(text="Below 512 tokens `unsloth` is plain checkpointing: nothing is moved."),),
        ),
    ),
    warnings=(
        Remark(
            text="Unsloth makes all checkpointing reentrant and refuses `context_fn`: torch's selective checkpointing "
            "cannot be added."
        ),
        Remark(text="Peak and time are those of torch's own kernels, not of Unsloth's."),
    ),
)
