"""axolotl. Read, not run: it shares no environment with the others.

Source:
    axolotl 0.19.0 and 067b021c: the schema of its configuration, and what reads `activation_offloading` (it tests for
    `offload_disk`, where validation stores `disk`).
"""

from __future__ import annotations

from memfit.stacks.entry import Remark, Setting, Stack

_ON = "gradient_checkpointing: true"

AXOLOTL = Stack(
    name="axolotl",
    versions="axolotl 0.19",
    place="the YAML of `axolotl train`",
    settings=(
        Setting(kind="nothing", lines=("gradient_checkpointing: false",)),
        Setting(kind="full", lines=(_ON,)),
        Setting(
            kind="attention",
            lines=(_ON, "selective_checkpointing: true"),
            warnings=(Remark(text="`selective_checkpointing` passes over layers with sliding-window attention."),),
        ),
        Setting(kind="offload", lines=(_ON, "activation_offloading: hidden_states")),
    ),
    warnings=(
        Remark(
            text="`activation_offloading: true` moves all saved tensors and switches checkpointing off; `disk` acts as "
            "`true` does; `legacy` fails with `selective_checkpointing`."
        ),
    ),
)
