"""FlagEmbedding: embedders and rerankers, through the Trainer's own arguments.

Source:
    FlagEmbedding 1.4.2 `abc/finetune/embedder/AbsArguments.py`, `AbsModeling.py` (`_dist_gather_tensor` keeps gradients
    of its own slice only) and the models' `gradient_checkpointing_enable(**kwargs)`, which hands all arguments on.
"""

from __future__ import annotations

from memfit.stacks.entry import Remark, Stack
from memfit.stacks.huggingface import TRAINER_SETTINGS

_EMBEDDER = ("embedder",)

FLAGEMBEDDING = Stack(
    name="flagembedding",
    versions="FlagEmbedding 1.4.2 with transformers 5.23",
    place="arguments of `python -m FlagEmbedding.finetune...`",
    settings=TRAINER_SETTINGS,
    beside=(
        Remark(text="--negatives_cross_device True", tasks=_EMBEDDER, several=True),
        Remark(text="--pad_to_multiple_of 8"),
    ),
    warnings=(
        Remark(
            text="`--negatives_cross_device` computes the loss of all devices on each and lets DDP average: gradients "
            "come out divided by the number of devices.",
            tasks=_EMBEDDER,
            several=True,
        ),
        Remark(
            text="`--sub_batch_size` keeps the graph of every sub-batch: it saves padding, not activations.",
            tasks=_EMBEDDER,
        ),
        Remark(
            text="A short last batch is cut into groups at the wrong places: `--dataloader_drop_last True`.",
            tasks=("reranker",),
        ),
        Remark(
            text='`{"use_reentrant": true}`, the default before transformers 5, fails under DDP (`marked as ready '
            "twice`).",
            several=True,
        ),
    ),
)
