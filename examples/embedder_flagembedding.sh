#!/usr/bin/env bash
# Fine-tune an embedding model with FlagEmbedding's own command within a memory budget.
#
#   examples/embedder_flagembedding.sh                                        # a tiny model and data made here
#   MODEL=BAAI/bge-base-en-v1.5 TRAIN_DATA=train.jsonl BUDGET=20GiB RANKS=2 examples/embedder_flagembedding.sh
#
# Needs `pip install memfit FlagEmbedding==1.4.2`. Further arguments go to FlagEmbedding and win over those below.
set -euo pipefail
PYTHON=${PYTHON:-python}
RANKS=${RANKS:-1}
BUDGET=${BUDGET:-min}
WORK=${WORK:-$(mktemp -d)}
MODEL=${MODEL:-$WORK/model}
TRAIN_DATA=${TRAIN_DATA:-$WORK/train.jsonl}
OUTPUT=${OUTPUT:-$WORK/output}
tiny=()

if [ "$MODEL" = "$WORK/model" ]; then
    # Random weights, and a tokenizer trained on the text that it is to read.
    "$PYTHON" - "$MODEL" <<'PYTHON'
import argparse, inspect, sys
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
tokenizer = BertWordPieceTokenizer()
tokenizer.train_from_iterator(inspect.getsource(argparse).split("\n"), vocab_size=1000, show_progress=False)
PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **special).save_pretrained(sys.argv[1])
BertModel(
    BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=256,
    )
).save_pretrained(sys.argv[1])
PYTHON
    tiny=(--max_steps 5 --learning_rate 1e-3)
fi
if [ "$TRAIN_DATA" = "$WORK/train.jsonl" ]; then
    # A query, passages that answer it, passages that do not. Here: names of functions and their documentation.
    "$PYTHON" - "$TRAIN_DATA" <<'PYTHON'
import inspect, json, math, os, random, shutil, statistics, sys, textwrap

random.seed(0)
texts = {}
for module in (math, os, os.path, random, shutil, statistics, textwrap):
    for name, member in inspect.getmembers(module, callable):
        if not name.startswith("_") and len(inspect.getdoc(member) or "") > 40:
            texts[f"{module.__name__}.{name}"] = " ".join(inspect.getdoc(member).split())
with open(sys.argv[1], "w") as file:
    for name, text in texts.items():
        others = [other for other in texts.values() if other != text]
        file.write(json.dumps({"query": name, "pos": [text], "neg": random.sample(others, 7)}) + "\n")
PYTHON
fi

launch=("$PYTHON" -m memfit)
backend=()
if [ "$RANKS" -gt 1 ]; then
    launch=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$RANKS" -m memfit)
    backend=(--negatives_cross_device True)
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || backend+=(--ddp_backend gloo)
fi

"${launch[@]}" run --budget "$BUDGET" --report "$WORK/report.json" -- \
    -m FlagEmbedding.finetune.embedder.encoder_only.base \
    --model_name_or_path "$MODEL" \
    --train_data "$TRAIN_DATA" \
    --cache_path "$WORK/cache" \
    --output_dir "$OUTPUT" \
    --train_group_size 8 \
    --query_max_len 64 \
    --passage_max_len 128 \
    --pad_to_multiple_of 8 \
    --per_device_train_batch_size 8 \
    --dataloader_drop_last True \
    --num_train_epochs 1 \
    --learning_rate 1e-5 \
    --temperature 0.02 \
    --sentence_pooling_method cls \
    --normalize_embeddings True \
    --gradient_checkpointing True \
    --logging_steps 1 \
    --report_to none \
    "${tiny[@]}" "${backend[@]}" "$@"
echo "model in $OUTPUT, report in $WORK/report.json"
