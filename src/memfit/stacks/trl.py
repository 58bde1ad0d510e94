"""TRL's trainers, whose checkpointing is on unless it is switched off.

Source:
    trl 1.16.0 `trainer/base_config.py`, `trainer/sft_trainer.py:881,1085` (`selective`), `models/
    selective_activation_checkpointing.py` (it saves attention and recomputes the rest), `models/
    activation_offloading.py` (`OffloadActivations`: a stream of its own, `max_fwd_stash_size=5`).
"""

from __future__ import annotations

from memfit.stacks.entry import Remark, Setting, Stack

_ON = "--gradient_checkpointing True"

TRL = Stack(
    name="trl",
    versions="trl 1.16 with transformers 5.23",
    place="arguments of `trl sft` and the other trainers",
    settings=(
        Setting(kind="nothing", lines=("--gradient_checkpointing False",)),
        Setting(kind="full", lines=(_ON,)),
        Setting(kind="every_n", lines=(_ON, """--gradient_checkpointing_kwargs '{"every_n_layers": {n}}'""")),
        Setting(
            kind="attention",
            lines=(_ON, """--gradient_checkpointing_kwargs '{"selective": true}'"""),
            tasks=("causal-lm",),
            warnings=(
                Remark(text="Only SFT has `selective`."),
                Remark(text="`selective` is an error with LoRA under ZeRO 3.", lora=True, several=True),
            ),
        ),
        Setting(
            kind="offload",
            lines=(_ON, "--activation_offloading True"),
            in_flight=5,
            warnings=(Remark(text="Only SFT, DPO, KTO and Reward have `activation_offloading`."),),
        ),
    ),
)
