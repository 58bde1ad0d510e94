"""LLaMA-Factory, whose checkpointing is on unless it is switched off.

Source:
    llamafactory 0.9.5 `hparams/model_args.py`, `model/model_utils/checkpointing.py` (`UnslothGradientCheckpointing`
    saves no random state; its copies go to memory that is not pinned, on the compute stream).
"""

from __future__ import annotations

from memfit.stacks.entry import Remark, Setting, Stack

_ON = "disable_gradient_checkpointing: false"

LLAMAFACTORY = Stack(
    name="llamafactory",
    versions="llamafactory 0.9.5",
    place="the YAML of `llamafactory-cli train`",
    settings=(
        Setting(kind="nothing", lines=("disable_gradient_checkpointing: true",)),
        Setting(kind="full", lines=(_ON, "use_reentrant_gc: false")),
        Setting(
            kind="offload",
            lines=(_ON, "use_unsloth_gc: true"),
            in_flight=1,
            overlaps=False,
            drops_random_state=True,
            warnings=(
                Remark(
                    text="`use_unsloth_gc` does not keep the random state: dropout differs when a layer runs again, "
                    "and gradients are wrong. Set every dropout to 0, `lora_dropout` too.",
                    draws=True,
                ),
                Remark(text="`use_unsloth_gc` is for CUDA only, and the step waits for its copies."),
            ),
        ),
    ),
    warnings=(Remark(text="`gradient_checkpointing: true`, the Trainer's own switch, changes nothing here."),),
)
