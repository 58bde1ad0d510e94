"""Tiny models with random weights, tokenizers trained on real English, and training data: all made here, no network."""

from __future__ import annotations

import importlib
import inspect
import json
import random
import re
from pathlib import Path
from typing import Any

MODULES = "argparse ast asyncio collections csv datetime decimal difflib email enum fractions functools heapq http \
importlib inspect io ipaddress itertools json logging mailbox math os pathlib pickle random re shutil smtplib socket \
statistics string subprocess tarfile tempfile textwrap threading tokenize unittest urllib.request uuid zipfile"
VOCABULARY = 400


def texts() -> list[str]:
    """Paragraphs of the standard library's documentation, in one order, none twice."""
    found: dict[str, None] = {}
    for name in MODULES.split():
        module = importlib.import_module(name)
        for _, member in [("", module), *inspect.getmembers(module)]:
            text = inspect.getdoc(member) if inspect.getmodule(member) is module else None
            for paragraph in (text or "").split("\n\n"):
                # Prose: begins with a capital letter and ends with a full stop; no tables, no code.
                if re.fullmatch(r"[A-Z][^|=>]{40,}\.", paragraph, re.DOTALL):
                    found[" ".join(paragraph.split())] = None
    return sorted(found)


def pairs(path: Path, *, count: int = 64, negatives: int = 3, scores: bool = False, **columns: Any) -> Path:
    """Write queries with a passage that continues them and others that do not, one JSON object a line.

    Args:
        scores: With a teacher's scores, as knowledge distillation wants them.
        columns: Written into every row, such as ``prompt`` or ``type``.
    """
    passages = [text for text in texts() if len(text.split()) >= 20][: count + negatives]
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            words = passages[i].split()
            row: dict[str, Any] = {"query": " ".join(words[:8]), "pos": [" ".join(words[8:])], **columns}
            row["neg"] = chance.sample(passages[:i] + passages[i + 1 :], negatives)
            if scores:
                row["pos_scores"] = [round(chance.uniform(0.5, 1), 3)]
                row["neg_scores"] = [round(chance.uniform(0, 0.5), 3) for _ in range(negatives)]
            file.write(json.dumps(row) + "\n")
    return path


def word_pieces() -> Any:
    """A WordPiece tokenizer as BERT's, trained."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import PreTrainedTokenizerFast

    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(
        texts(), vocab_size=VOCABULARY, special_tokens=list(special.values()), show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **special)


def unigrams() -> Any:
    """A Unigram tokenizer as XLM-RoBERTa's, trained."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=list(special.values()), unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(texts(), trainer=trainer)
    trained.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(name, trained.token_to_id(name)) for name in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        cls_token="<s>",
        sep_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in special.items()},
    )


def byte_pairs() -> Any:
    """A byte-level BPE tokenizer, trained, that begins a text with `<s>` as Llama's and Mistral's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts(), trainer=trainer)
    trained.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", trained.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )


def save(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Write both as `from_pretrained` reads them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def encoder(folder: Path, kind: str = "Bert", head: str = "Model", **changes: Any) -> Path:
    """An encoder, ``Bert`` or ``XLMRoberta``, with dropout, and its tokenizer.

    Args:
        head: The end of the class name: ``Model``, ``ForSequenceClassification``.
        changes: Of its configuration.
    """
    import torch
    import transformers

    tokenizer = word_pieces() if kind == "Bert" else unigrams()
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 520,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    return save(getattr(transformers, f"{kind}{head}")(config), tokenizer, folder)


def decoder(folder: Path, kind: str = "Mistral", head: str = "Model", **changes: Any) -> Path:
    """A decoder such as ``Mistral``, ``Llama`` or ``Gemma``, with grouped key-value heads, and its tokenizer."""
    import torch
    import transformers

    tokenizer = byte_pairs()
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.unk_token_id,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    return save(getattr(transformers, f"{kind}{head}")(config), tokenizer, folder)
