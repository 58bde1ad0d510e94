"""Embedders, rerankers and sparse encoders under their own trainers with `MemfitCallback`, cached losses included."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

pytest.importorskip("sentence_transformers")

from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.cross_encoder import losses as rerankings
from sentence_transformers.sentence_transformer import losses as embeddings
from sentence_transformers.sparse_encoder import losses as sparse

import memfit
from memfit.forecast import Forecast
from memfit.integrations.transformers import MemfitCallback
from memfit.solver.planner import switched
from runs import report, tail
from training import (
    SHORT_RUN,
    TEXT,
    assert_example_runs,
    assert_less_is_alive,
    assert_planned,
    assert_same_weights,
    assert_script_is_fitted,
    assert_untouched,
    bert,
    history,
    metered,
    save_tokenizer,
    weights,
    written,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*gather.*:UserWarning"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models on disk, with their tokenizers, as `from_pretrained` wants them."""
    kinds = {"embedder": "BertModel", "reranker": "BertForSequenceClassification", "sparse": "BertForMaskedLM"}
    found = {}
    for name, kind in kinds.items():
        found[name] = str(tmp_path_factory.mktemp(name))
        bert(kind, **({"num_labels": 1} if name == "reranker" else {})).save_pretrained(found[name])
        save_tokenizer(found[name])
    return found


def halves():
    words = [text.split() for text in TEXT]
    return [" ".join(w[: len(w) // 2]) for w in words], [" ".join(w[len(w) // 2 :]) for w in words]


def pairs():
    first, second = halves()
    return Dataset.from_dict({"anchor": first, "positive": second})


def triplets():
    first, second = halves()
    return Dataset.from_dict({"anchor": first, "positive": second, "negative": second[1:] + second[:1]})


def scored():
    first, second = halves()
    return Dataset.from_dict(
        {"sentence1": first * 2, "sentence2": second + second[1:] + second[:1], "label": [1.0] * 12 + [0.0] * 12}
    )


def cached_gist(model, **options):
    """With a guide that is the model as it begins."""
    return embeddings.CachedGISTEmbedLoss(model, guide=copy.deepcopy(model), **options)


EMBEDDERS = {
    "in-batch negatives": (embeddings.MultipleNegativesRankingLoss, pairs, {}),
    "triplets": (embeddings.MultipleNegativesRankingLoss, triplets, {}),
    "cached": (embeddings.CachedMultipleNegativesRankingLoss, triplets, {"mini_batch_size": 2}),
    "cached by tokens": (
        embeddings.CachedMultipleNegativesRankingLoss,
        pairs,
        {"mini_batch_num_tokens": 128},
    ),
    "cached, uneven": (embeddings.CachedMultipleNegativesRankingLoss, pairs, {"mini_batch_size": 3}),
    "cached, gathered": (
        embeddings.CachedMultipleNegativesRankingLoss,
        pairs,
        {"mini_batch_size": 2, "gather_across_devices": True},
    ),
    "cached, symmetric": (
        embeddings.CachedMultipleNegativesSymmetricRankingLoss,
        pairs,
        {"mini_batch_size": 3},
    ),
    "cached, guided": (cached_gist, triplets, {"mini_batch_size": 2}),
    "gathered": (embeddings.MultipleNegativesRankingLoss, pairs, {"gather_across_devices": True}),
    "cosine": (embeddings.CosineSimilarityLoss, scored, {}),
}


def arguments(kind, folder, **changes):
    options = {**SHORT_RUN, "per_device_eval_batch_size": 4, "eval_strategy": "steps", "eval_steps": 2}
    return kind(folder, **{**options, **changes})


def trained(kinds, folder, model, loss, data, callback=None, **changes):
    trainer_class, arguments_class = kinds
    trainer = trainer_class(
        model,
        args=arguments(arguments_class, folder, **changes),
        train_dataset=data,
        eval_dataset=data,
        loss=loss(model),
        callbacks=[callback] if callback is not None else [],
    )
    metered(trainer).train()
    return trainer


def assert_the_same(plain, fitted, callback):
    assert len(history(plain)) == 5
    assert history(fitted) == history(plain)
    assert history(fitted, "grad_norm") == history(plain, "grad_norm")
    assert history(fitted, "eval_loss") == history(plain, "eval_loss")
    assert len(history(plain, "eval_loss")) == 3
    assert_same_weights(weights(fitted.model), weights(plain.model))
    assert_planned(callback.summary())
    assert_less_is_alive(fitted, plain)
    assert_untouched(fitted.model)
    assert history(fitted, "memfit/predicted_peak_bytes")


EMBEDDER = (SentenceTransformerTrainer, SentenceTransformerTrainingArguments)
RERANKER = (CrossEncoderTrainer, CrossEncoderTrainingArguments)
SPARSE = (SparseEncoderTrainer, SparseEncoderTrainingArguments)


@pytest.mark.parametrize("name", EMBEDDERS)
def test_embedders(folders, tmp_path, name):
    loss, data, options = EMBEDDERS[name]

    def run(callback):
        model = SentenceTransformer(folders["embedder"], device="cpu")
        return trained(EMBEDDER, tmp_path, model, lambda m: loss(m, **options), data(), callback)

    callback = MemfitCallback(budget="min")
    assert_the_same(run(None), run(callback), callback)


def test_dropout_is_on_in_these_runs(folders):
    """Else equal losses would say nothing of random numbers."""
    model = SentenceTransformer(folders["embedder"], device="cpu").train()
    features = model.preprocess(TEXT[:2])
    first, second = (model(dict(features))["sentence_embedding"] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("flags", [{"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.parametrize("name", ["in-batch negatives", "cached"])
def test_embedders_with_the_trainers_own_switches(folders, tmp_path, name, flags):
    loss, data, options = EMBEDDERS[name]

    def run(callback, **changes):
        model = SentenceTransformer(folders["embedder"], device="cpu")
        return trained(EMBEDDER, tmp_path, model, lambda m: loss(m, **options), data(), callback, **changes)

    callback = MemfitCallback(budget="min")
    plain = run(None, **{k: v for k, v in flags.items() if k != "gradient_checkpointing"})
    assert_the_same(plain, run(callback, **flags), callback)
    notes = callback.summary()["notes"]
    assert any("_checkpointing=True` was taken over" in note for note in notes) == ("gradient_checkpointing" in flags)


def test_embeddings_and_files_after_training(folders, tmp_path):
    seen = []
    for run, callback in (("plain", None), ("fitted", MemfitCallback(budget="min"))):
        model = SentenceTransformer(folders["embedder"], device="cpu")
        trainer = trained(EMBEDDER, tmp_path, model, embeddings.MultipleNegativesRankingLoss, pairs(), callback)
        model.save_pretrained(tmp_path / run, create_model_card=False)
        seen.append((model.encode(TEXT), written(tmp_path / run)))
        assert trainer.model is model
    assert (seen[0][0] == seen[1][0]).all()
    assert "model.safetensors" in seen[0][1]
    assert seen[0][1] == seen[1][1]


RERANKERS = {
    "pointwise": (rerankings.BinaryCrossEntropyLoss, scored, {}),
    "in-batch negatives": (rerankings.MultipleNegativesRankingLoss, pairs, {"num_negatives": 2}),
    "cached": (
        rerankings.CachedMultipleNegativesRankingLoss,
        pairs,
        {"num_negatives": 2, "mini_batch_size": 3},
    ),
}


@pytest.mark.parametrize("name", RERANKERS)
def test_rerankers(folders, tmp_path, name):
    loss, data, options = RERANKERS[name]

    def run(callback):
        model = CrossEncoder(folders["reranker"], device="cpu", num_labels=1)
        return trained(RERANKER, tmp_path, model, lambda m: loss(m, **options), data(), callback)

    callback = MemfitCallback(budget="min")
    plain, fitted = run(None), run(callback)
    assert_the_same(plain, fitted, callback)
    questions = list(zip(*halves(), strict=True))
    assert (fitted.model.predict(questions) == plain.model.predict(questions)).all()


def splade(model, **options):
    return sparse.SpladeLoss(
        model,
        loss=sparse.SparseMultipleNegativesRankingLoss(model, **options),
        document_regularizer_weight=1e-3,
        query_regularizer_weight=1e-3,
    )


def cached_splade(model):
    return sparse.CachedSpladeLoss(
        model,
        loss=sparse.SparseMultipleNegativesRankingLoss(model),
        document_regularizer_weight=1e-3,
        query_regularizer_weight=1e-3,
        mini_batch_size=2,
    )


@pytest.mark.parametrize("loss", [splade, cached_splade], ids=lambda loss: loss.__name__)
def test_sparse_encoders(folders, tmp_path, loss):
    def run(callback):
        model = SparseEncoder(folders["sparse"], device="cpu")
        return trained(SPARSE, tmp_path, model, loss, pairs(), callback)

    callback = MemfitCallback(budget="min")
    plain, fitted = run(None), run(callback)
    assert_the_same(plain, fitted, callback)
    first, second = (trainer.model.encode(TEXT).to_dense() for trainer in (plain, fitted))
    assert torch.equal(first, second)


def padded(rows, length):
    """Two columns of features; of every other row the end is padding."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2):
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[1::2, -5:] = 0
        found.append({"input_ids": torch.randint(5, 200, (rows, length), generator=generator), "attention_mask": mask})
    return found


@pytest.mark.parametrize("policy", ["plain", "full"])
def test_a_prediction_in_sub_batches_is_that_of_mini_batches(tmp_path, policy):
    """`cache_rows` before the run, `mini_batch_size` in it: the peak, counted in live tensors."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    encoder = bert("BertModel", **sizes)
    encoder.save_pretrained(tmp_path)
    save_tokenizer(str(tmp_path))
    step = {"task": "embedder", "batch_size": 16, "group": 1, "length": 96, "precision": "fp32", "cache_rows": 4}
    forecast = Forecast(encoder.config, **step)
    plan = switched(forecast.profile, policy=policy, **forecast.named)
    model = SentenceTransformer(str(tmp_path), device="cpu").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    inner = next(module for module in model.modules() if type(module) is type(encoder))
    handle = memfit.fit(inner, plan=plan, optimizer=optimizer) if policy != "plain" else None
    loss, features = embeddings.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4), padded(16, 96)

    def train():
        loss([dict(column) for column in features], None).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(5):
        train()  # states are born, programs are verified
    tensors = [*model.parameters(), *model.buffers(), *(tensor for column in features for tensor in column.values())]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    before = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    peaks = []
    for _ in range(2):
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            train()
        events = profile.profiler.kineto_results.events()
        found = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        peaks.append(before + max(itertools.accumulate((size for _, size in found), initial=0)))
    assert plan.predicted_peak_bytes == pytest.approx(min(peaks), rel=0.02)
    if handle is not None:
        assert handle.summary()["recomputed_bytes"] == plan.recomputed_bytes > 0
        handle.remove()


def test_the_example_runs_as_it_stands(tmp_path):
    assert_example_runs(tmp_path, "reranker_sentence_transformers.py")


SCRIPT = """
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

torch.set_num_threads(1)
model = SentenceTransformer(%r, device="cpu")
arguments = SentenceTransformerTrainingArguments(
    "out", max_steps=4, per_device_train_batch_size=4, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
    save_strategy="no", gradient_checkpointing=True,
)
trainer = SentenceTransformerTrainer(
    model,
    args=arguments,
    train_dataset=Dataset.from_dict({"anchor": %r, "positive": %r}),
    loss=CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
)
trainer.train()
print([entry["loss"].hex() for entry in trainer.state.log_history if "loss" in entry])
"""


def test_an_unmodified_script(folders, tmp_path):
    summary = assert_script_is_fitted(tmp_path, SCRIPT % (folders["embedder"], *halves()))
    assert any("was told to checkpoint its activations" in note for note in summary["notes"])


RANKS = """
import sys
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses

torch.set_num_threads(1)
folder, which, gathers = sys.argv[1], sys.argv[2], sys.argv[3] == "gathered"
callbacks = []
if "callback" in sys.argv:
    from memfit.integrations.transformers import MemfitCallback
    callbacks = [MemfitCallback(budget="min")]
model = SentenceTransformer(%r, device="cpu")
options = {"mini_batch_size": 2} if which.startswith("Cached") else {}
arguments = SentenceTransformerTrainingArguments(
    folder, max_steps=5, per_device_train_batch_size=3, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
    save_strategy="no", learning_rate=1e-2, seed=3, average_tokens_across_devices=False,
)
trainer = SentenceTransformerTrainer(
    model,
    args=arguments,
    train_dataset=Dataset.from_dict({"anchor": %r, "positive": %r}),
    loss=getattr(losses, which)(model, gather_across_devices=gathers, **options),
    callbacks=callbacks,
)
seen = []
model.register_forward_hook(lambda module, args, output: seen.append(output["sentence_embedding"].detach().clone()))
trainer.train()
rank = trainer.accelerator.process_index
logged = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
weights = {name: value.clone() for name, value in model.state_dict().items()}
world = torch.distributed.get_world_size()
torch.save({"world": world, "seen": seen, "logged": logged, "weights": weights}, f"{folder}/result{rank}")
if callbacks:
    torch.save(callbacks[0].summary(), f"{folder}/summary{rank}")
"""


@pytest.mark.parametrize("loss", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_negatives_of_other_processes(folders, tmp_path, runs, loss):
    """`gather_across_devices` on two: losses, embeddings and weights, under the callback and an unmodified script."""
    (tmp_path / "train.py").write_text(RANKS % (folders["embedder"], *halves()))

    def results(folder, *command, gathered="gathered"):
        (tmp_path / folder).mkdir()
        head, tail_ = command[: command.index("train.py")], command[command.index("train.py") + 1 :]
        done = runs.torchrun(2, *head, "train.py", folder, loss, gathered, *tail_, PYTHONWARNINGS="ignore")
        assert done.status == 0, tail(done.output)
        return [torch.load(tmp_path / folder / f"result{rank}", weights_only=True) for rank in range(2)]

    plain = results("plain", "train.py")
    alone = results("alone", "train.py", gathered="alone")
    options = ["--budget", "min", "--report", "report.json"]
    fitted = results("fitted", "-m", "memfit", "run", *options, "--", "train.py")
    called = results("called", "train.py", "callback")
    for rank in range(2):
        assert plain[rank]["world"] == 2
        assert plain[rank]["logged"] != alone[rank]["logged"]  # the other process's negatives count
        for other in (fitted[rank], called[rank]):
            assert other["logged"] == plain[rank]["logged"]
            assert len(other["seen"]) == len(plain[rank]["seen"]) > 0
            assert all(map(torch.equal, other["seen"], plain[rank]["seen"]))
            assert_same_weights(other["weights"], plain[rank]["weights"])
        assert_planned(report(tmp_path / ("report.rank1.json" if rank else "report.json")))
        assert_planned(torch.load(tmp_path / "called" / f"summary{rank}", weights_only=False))
    assert any(not torch.equal(*pair) for pair in zip(plain[0]["seen"], plain[1]["seen"], strict=True))
