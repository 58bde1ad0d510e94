"""transformers' Trainer, alone and with FSDP.

Source:
    transformers 5.23.0 `training_args.py`, `trainer.py:1503` (`every_n_layers` and `offload` are taken out of the
    kwargs), `modeling_utils.py` (`_set_gradient_checkpointing` counts all layers; `offload` is `save_on_cpu` around the
    checkpoint, on the compute stream). The old names of the arguments also work before 5.23, where the new ones are not
    there. accelerate 1.15.0 `utils/fsdp_utils.py` (`fsdp2_apply_ac` passes `preserve_rng_state=False`).
"""

from __future__ import annotations

from memfit.stacks.entry import Remark, Setting, Stack

_ON = "--gradient_checkpointing True"
WAITS = Remark(text="Copies to the host run on the compute stream: the step waits for each of them.")

TRAINER_SETTINGS = (
    Setting(kind="nothing", lines=("--gradient_checkpointing False",)),
    Setting(kind="full", lines=(_ON,)),
    Setting(
        kind="every_n",
        lines=(_ON, """--gradient_checkpointing_kwargs '{"every_n_layers": {n}}'"""),
        warnings=(
            Remark(
                text="`every_n_layers` counts through all layers of the model, those of encoder and decoder together.",
                tasks=("seq2seq",),
            ),
        ),
    ),
    Setting(
        kind="offload",
        lines=(_ON, """--gradient_checkpointing_kwargs '{"offload": true}'"""),
        in_flight=1,
        overlaps=False,
        warnings=(WAITS,),
    ),
)
"""What every script with `TrainingArguments` has, from transformers 5.17 on."""

TRANSFORMERS = Stack(
    name="transformers",
    versions="transformers 5.17 to 5.23",
    place="arguments of the Trainer",
    settings=TRAINER_SETTINGS,
)

_RANDOM_STATE = Remark(
    text="FSDP2's checkpointing in accelerate does not keep the random state: dropout differs when a layer runs again, "
    "and gradients are wrong. Set every dropout to 0, that of LoRA too.",
    draws=True,
)
_OFFLOAD = (
    "accelerate launch --use_fsdp --fsdp_version 2 --fsdp_activation_checkpointing true "
    "--fsdp_activation_checkpointing_offload true"
)
_NOT_BOTH = "--gradient_checkpointing False"

FSDP = Stack(
    name="fsdp",
    versions="transformers 5.23 and accelerate 1.15 with FSDP2",
    place="arguments of the Trainer, or of `accelerate launch` where a line begins with it",
    settings=(
        Setting(kind="nothing", lines=("""--fsdp_config '{"activation_checkpointing": false}'""", _NOT_BOTH)),
        Setting(
            kind="full",
            lines=("""--fsdp_config '{"activation_checkpointing": true}'""", _NOT_BOTH),
            drops_random_state=True,
            warnings=(_RANDOM_STATE,),
        ),
        Setting(
            kind="offload",
            lines=(_OFFLOAD, _NOT_BOTH),
            in_flight=1,
            overlaps=False,
            drops_random_state=True,
            warnings=(_RANDOM_STATE, WAITS),
        ),
    ),
    warnings=(
        Remark(
            text="`--gradient_checkpointing True` under full sharding gathers every layer's weights once more in the "
            "backward; beside `activation_checkpointing` in `fsdp_config` it is an error."
        ),
    ),
)
