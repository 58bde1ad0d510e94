"""DeepSpeed-Chat, steps 1 and 2 and DPO; step 3 has a flag for either model.

Source:
    DeepSpeedExamples 83757d9c `applications/DeepSpeed-Chat`: `training/step1_supervised_finetuning/main.py`,
    `training/step3_rlhf_finetuning/main.py`, `dschat/utils/perf.py`, `dschat/utils/module/lora.py`.
"""

from __future__ import annotations

from memfit.stacks.entry import Remark, Setting, Stack

DEEPSPEED_CHAT = Stack(
    name="deepspeed-chat",
    versions="DeepSpeedExamples 83757d9c",
    place="arguments of `main.py` of steps 1 and 2",
    settings=(
        Setting(kind="nothing", lines=()),
        Setting(
            kind="full",
            lines=("--gradient_checkpointing",),
            warnings=(
                Remark(text="Step 3 calls it `--actor_gradient_checkpointing` and `--critic_gradient_checkpointing`."),
                Remark(
                    text="Step 1's README says that it does not go with `--only_optimize_lora`; the code has a hook "
                    "that makes it.",
                    lora=True,
                ),
            ),
        ),
    ),
    warnings=(
        Remark(
            text="`activation_checkpointing` in DeepSpeed's JSON does nothing here: no model calls DeepSpeed's "
            "`checkpoint`."
        ),
        Remark(
            text="The TFLOPs that it prints divide the batch of one device by the number of devices: they are too low "
            "by that factor.",
            several=True,
        ),
    ),
)
