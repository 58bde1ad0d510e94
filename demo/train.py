"""Fine-tune a sentence-transformers model on pairs: an ordinary training script.

It knows nothing of Memfit. Its only unusual habit is to write one JSON line per event to stdout, so that another
program can show the progress of several runs and compare their losses to the last digit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-untyped]
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import PrinterCallback, TrainerCallback, set_seed


def emit(event: str, **values: Any) -> None:
    """Write one event to stdout."""
    print(json.dumps({"event": event, **values}), flush=True)


class Events(TrainerCallback):  # type: ignore[misc]
    """Times every step and passes on every loss, with all its digits."""

    def __init__(self) -> None:
        self.started = 0.0
        self.step_seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_seconds.append(time.perf_counter() - self.started)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])
            emit("step", step=state.global_step, loss=logs["loss"], seconds=self.step_seconds[-1])


def recall_at_10(model: SentenceTransformer, pairs: list[tuple[str, str]]) -> float:
    """How many of the queries find their own body among the ten nearest."""
    # Small batches: the evaluation should not be what peaks.
    queries, bodies = (
        model.encode(list(texts), batch_size=8, convert_to_tensor=True, normalize_embeddings=True)
        for texts in zip(*pairs, strict=True)
    )
    nearest = (queries @ bodies.T).topk(min(10, len(pairs)), dim=1).indices
    return float((nearest == torch.arange(len(pairs))[:, None]).any(dim=1).float().mean())


def digest(model: torch.nn.Module) -> str:
    """SHA-256 of all weights: equal only if every bit is."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def main() -> None:
    """Train, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a sentence-transformers model")
    parser.add_argument(
        "--pairs", required=True, type=Path, help='JSON: {"train": [[query, body], …], "held_out": […]}'
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate-first", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    args = parser.parse_args()

    set_seed(args.seed)
    pairs = json.loads(args.pairs.read_text(encoding="utf-8"))
    model = SentenceTransformer(args.model, device="cpu", local_files_only=True)
    model.max_seq_length = args.max_tokens
    model[0].processing_kwargs = {"text": {"pad_to_multiple_of": 64}}  # few shapes
    if args.evaluate_first:
        emit("before", recall=recall_at_10(model, pairs["held_out"]))

    train = Dataset.from_dict({"query": [q for q, _ in pairs["train"]], "body": [b for _, b in pairs["train"]]})
    events = Events()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=folder,
                num_train_epochs=1,
                per_device_train_batch_size=args.batch_size,
                learning_rate=args.learning_rate,
                warmup_steps=2,
                activation_checkpointing=args.gradient_checkpointing,
                dataloader_drop_last=True,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                seed=args.seed,
            ),
            train_dataset=train,
            loss=MultipleNegativesRankingLoss(model),
            callbacks=[events],
        )
        trainer.remove_callback(PrinterCallback)  # stdout is for events
        trainer.train()
    emit(
        "after",
        recall=recall_at_10(model, pairs["held_out"]),
        losses=events.losses,
        step_seconds=events.step_seconds,
        weights_sha256=digest(model),
    )


if __name__ == "__main__":
    main()
