"""A reranker trained with sentence-transformers on pairs of questions and answers, in a memory budget.

python examples/reranker_sentence_transformers.py                       # a small model built in place, on the CPU
python examples/reranker_sentence_transformers.py --model BAAI/bge-reranker-base --budget 8GiB

Needs `pip install sentence-transformers datasets accelerate`. The one line of Memfit is the callback.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import CachedMultipleNegativesRankingLoss
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from memfit.integrations.transformers import MemfitCallback

PAIRS = [
    ("What does a budget bound?", "The peak memory of the whole process on the model's device."),
    ("When is recomputing cheap?", "Where the operation is cheap, and nowhere else."),
    ("What is an activation?", "A tensor that the forward pass leaves for the backward pass."),
    ("Why do two runs differ?", "Because the order of a sum decides its last digits."),
] * 16


def save_small_model(folder: str) -> None:
    """A BERT with random weights and a tokenizer whose tokens are bytes, as `CrossEncoder` loads them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_max_length=128,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokens),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            max_position_embeddings=128,
            num_labels=1,
        )
    ).save_pretrained(folder)


def main() -> None:
    """Train, then say what was decided, predicted and measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a reranker or an encoder of the Hugging Face hub, or a folder")
    parser.add_argument("--budget", default="min", help="8GiB, 90%%, auto or min (the default)")
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            save_small_model(folder)
        model = CrossEncoder(options.model or folder, num_labels=1)
        callback = MemfitCallback(budget=options.budget)
        trainer = CrossEncoderTrainer(
            model,
            args=CrossEncoderTrainingArguments(
                folder,
                max_steps=options.steps,
                per_device_train_batch_size=16,
                logging_steps=1,
                learning_rate=5e-4,
                use_cpu=not torch.cuda.is_available(),
                report_to=[],
                save_strategy="no",
            ),
            train_dataset=Dataset.from_dict({"question": [q for q, _ in PAIRS], "answer": [a for _, a in PAIRS]}),
            loss=CachedMultipleNegativesRankingLoss(model, num_negatives=3, mini_batch_size=8),
            callbacks=[callback],
        )
        trainer.train()
        answers = [answer for _, answer in PAIRS[:4]]
        scores = model.predict([(PAIRS[0][0], answer) for answer in answers])
        print(PAIRS[0][0])
        for answer, score in zip(answers, scores, strict=True):
            print(f"{score:.3f}  {answer}")
    print(callback.report())


if __name__ == "__main__":
    main()
