"""The Trainer of Hugging Face transformers with `MemfitCallback`: as without it, in less memory."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tensorboard")

from torch.utils.checkpoint import CheckpointFunction
from transformers import Trainer, TrainerCallback, TrainingArguments

import memfit
from memfit.errors import BudgetError, InfeasibleBudgetError, ModelError, UsageError
from memfit.integrations.transformers import MemfitCallback
from training import (
    SHORT_RUN,
    assert_example_runs,
    assert_less_is_alive,
    assert_planned,
    assert_same_weights,
    assert_untouched,
    history,
    llama,
    metered,
    rows,
    run_python,
    trainer_state,
    weights,
    written,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*`gradient_checkpointing.*deprecated.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard"),
]


def arguments(folder, **changes):
    return TrainingArguments(folder, **{**SHORT_RUN, **changes})


def trained(folder, callback=None, model=None, data=None, **changes):
    """A Trainer after training, with or without Memfit."""
    data = rows() if data is None else data
    trainer = Trainer(
        model or llama(),
        arguments(folder, **changes),
        train_dataset=data,
        eval_dataset=data[:4],
        callbacks=[callback] if callback is not None else None,
    )
    metered(trainer).train()
    return trainer


def evaluations(trainer):
    return history(trainer, "eval_loss")


def quiet(trainer):
    """Its log, without what differs between any two runs and without our metrics."""
    skipped = ("runtime", "per_second")
    return [
        {k: v for k, v in entry.items() if not k.startswith("memfit/") and not k.endswith(skipped)}
        for entry in trainer.state.log_history
    ]


def test_losses_and_weights_are_the_same(tmp_path):
    plain = trained(tmp_path / "plain")
    callback = MemfitCallback(budget="min")
    fitted = trained(tmp_path / "fitted", callback)
    assert len(history(plain)) == 5
    assert history(fitted) == history(plain)
    assert quiet(fitted) == quiet(plain)
    assert_same_weights(weights(fitted.model), weights(plain.model))
    assert_planned(callback.summary())
    assert_less_is_alive(fitted, plain)
    assert callback.report().startswith("peak ")
    assert callback.plan.predicted_peak_bytes == callback.summary()["predicted_peak_bytes"]
    assert callback.handle is None
    assert_untouched(fitted.model)


def test_dropout_is_on_in_these_runs(tmp_path):
    """Else equal losses would say nothing of random numbers."""
    with_dropout, without = llama(), llama(dropout=0.0)
    assert history(trained(tmp_path / "a", model=with_dropout)) != history(trained(tmp_path / "b", model=without))


def test_a_budget_in_the_middle(tmp_path):
    """Between the smallest peak and the plain one, with activations large enough to be seen beside the process."""
    data = rows(length=48) * 8
    options = {"per_device_train_batch_size": 48, "max_steps": 4}
    build = {"num_layers": 6, "hidden_size": 128, "intermediate_size": 512}
    plain = trained(tmp_path / "plain", model=llama(**build), data=data, **options)
    smallest = MemfitCallback(budget="min")
    trained(tmp_path / "min", smallest, llama(**build), data, **options)
    low, high = smallest.summary()["predicted_peak_bytes"], smallest.summary()["plain_peak_bytes"]
    assert high > low
    callback = MemfitCallback(budget=(low + high) // 2)
    fitted = trained(tmp_path / "fitted", callback, llama(**build), data, **options)
    assert history(fitted) == history(plain)
    assert_same_weights(weights(fitted.model), weights(plain.model))
    summary = callback.summary()
    assert_planned(summary)
    assert summary["saved_bytes"] > 0
    assert_less_is_alive(fitted, plain)
    assert summary["predicted_peak_bytes"] <= summary["budget_bytes"]


def test_evaluation_saving_and_accumulation(tmp_path):
    changes = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 6,
    }
    plain = trained(tmp_path / "plain", **changes)
    callback = MemfitCallback(budget="min")
    fitted = trained(tmp_path / "fitted", callback, **changes)
    assert len(evaluations(plain)) == 3
    assert quiet(fitted) == quiet(plain)
    assert_planned(callback.summary())
    for checkpoint in ("checkpoint-3", "checkpoint-6"):
        before, after = (written(tmp_path / run / checkpoint) for run in ("plain", "fitted"))
        assert before.keys() == after.keys()
        # The arguments name their folder, and the state holds the metrics.
        skipped = {"training_args.bin", "trainer_state.json"}
        assert {n for n in before if before[n] != after[n]} <= skipped
        first, second = (trainer_state(tmp_path / run / checkpoint) for run in ("plain", "fitted"))
        assert first["stateful_callbacks"] == second["stateful_callbacks"]


def test_saving_during_and_after_training_writes_the_same(tmp_path):
    class Saver(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 3:
                model.save_pretrained(args.output_dir + "/during")

    for run, callback in (("plain", None), ("fitted", MemfitCallback(budget="min"))):
        trainer = Trainer(
            llama(),
            arguments("out"),
            train_dataset=rows(),
            callbacks=[Saver(), *([callback] if callback is not None else [])],
        )
        trainer.args.output_dir = str(tmp_path / run)
        trainer.train()
        trainer.args.output_dir = "out"
        trainer.save_model(tmp_path / run / "after")
    plain, fitted = written(tmp_path / "plain"), written(tmp_path / "fitted")
    assert {"during/model.safetensors", "after/model.safetensors", "after/training_args.bin"} <= plain.keys()
    assert plain == fitted


def test_generation_during_and_after_training(tmp_path):
    prompt = torch.tensor([rows()[0]["input_ids"][:6]])

    class Generating(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_step_end(self, args, state, control, model, **kwargs):
            model.eval()
            self.seen.append(model.generate(prompt, max_new_tokens=8, do_sample=False).tolist())
            model.train()

    seen = []
    for callback in (None, MemfitCallback(budget="min")):
        generating = Generating()
        trainer = Trainer(
            llama(),
            arguments(tmp_path, use_cache=True),
            train_dataset=rows(),
            callbacks=[generating, *([callback] if callback is not None else [])],
        )
        trainer.train()
        trainer.model.eval()
        after = trainer.model.generate(prompt, max_new_tokens=8, do_sample=False).tolist()
        assert trainer.model.config.use_cache is True
        seen.append([generating.seen, after, history(trainer)])
    assert seen[0] == seen[1]
    assert_planned(callback.summary())


def test_resuming_from_a_checkpoint(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    plain = trained(tmp_path / "plain", **changes)
    callback = MemfitCallback(budget="min")
    trainer = Trainer(
        llama(seed=7), arguments(tmp_path / "plain", **changes), train_dataset=rows(), callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-3"))
    assert history(trainer) == history(plain)
    assert_same_weights(weights(trainer.model), weights(plain.model))
    assert_planned(callback.summary())


def test_training_twice_fits_twice(tmp_path):
    seen = []
    for callback in (None, MemfitCallback(budget="min")):
        trainer = trained(tmp_path, callback)
        first = history(trainer)
        trainer.train()
        seen.append([first, history(trainer)])
        assert_untouched(trainer.model)
    assert seen[0] == seen[1]
    assert callback.summary()["steps"] == 5


def test_the_model_that_model_init_makes_is_fitted(tmp_path):
    made = []

    def model_init():
        made.append(llama())
        return made[-1]

    callback = MemfitCallback(budget="min")
    trainers = []
    for callbacks in ([], [callback]):
        trainer = Trainer(model_init=model_init, args=arguments(tmp_path), train_dataset=rows(), callbacks=callbacks)
        trainer.train()
        trainers.append(trainer)
    assert len(made) == 4
    assert trainers[1].model is made[3]
    assert history(trainers[1]) == history(trainers[0])
    assert_planned(callback.summary())


def test_a_callback_that_is_added_later(tmp_path):
    callback = MemfitCallback(budget="min")
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=rows())
    trainer.add_callback(callback)
    trainer.train()
    assert_planned(callback.summary())


def test_tensorboard_shows_the_metrics(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    callback = MemfitCallback(budget="min")
    trainer = trained(tmp_path, callback, report_to=["tensorboard"])
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    tags = board.Tags()["scalars"]
    for name in ("measured_peak_bytes", "predicted_peak_bytes", "overhead"):
        assert f"train/memfit/{name}" in tags
        # Nothing is predicted in the first step.
        assert len(board.Scalars(f"train/memfit/{name}")) >= 3
        assert all(event.value > 0 for event in board.Scalars(f"train/memfit/{name}"))
        assert len(history(trainer, f"memfit/{name}")) == len(board.Scalars(f"train/memfit/{name}"))
    assert "train/loss" in tags
    assert history(trainer, "memfit/predicted_peak_bytes")[-1] == callback.summary()["predicted_peak_bytes"]


def test_wandb_shows_the_metrics(tmp_path, monkeypatch):
    """In a run that nothing is sent of."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    callback = MemfitCallback(budget="min")
    trainer = trained(tmp_path, callback, report_to=["wandb"])
    shown = dict(wandb.run.summary)
    wandb.finish()
    for name in ("measured_peak_bytes", "predicted_peak_bytes", "overhead"):
        assert shown[f"train/memfit/{name}"] == pytest.approx(history(trainer, f"memfit/{name}")[-1])
    assert shown["train/loss"] == pytest.approx(history(trainer, "loss")[-1])


def test_evaluation_logs_are_left_alone(tmp_path):
    trainer = trained(tmp_path, MemfitCallback(budget="min"), eval_strategy="steps", eval_steps=1)
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated
    assert not any(key.startswith("memfit/") for entry in evaluated for key in entry)


@pytest.fixture
def checkpoint_calls(monkeypatch):
    """How often torch's own checkpointing runs, reentrant or not."""
    from transformers import modeling_utils

    calls = []
    original = modeling_utils.checkpoint

    def counting(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(modeling_utils, "checkpoint", counting)
    reentrant = CheckpointFunction.apply
    monkeypatch.setattr(CheckpointFunction, "apply", lambda *a: calls.append("reentrant") or reentrant(*a))
    return calls


FLAGS = [
    ({"activation_checkpointing": True}, []),
    ({"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}, ["use_reentrant"]),
    ({"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}}, ["every_n_layers"]),
    (
        {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"offload": True, "use_reentrant": False},
        },
        ["offload", "use_reentrant"],
    ),
    ({"gradient_checkpointing": True}, []),
]


@pytest.mark.parametrize(("flags", "explained"), FLAGS, ids=lambda value: str(value)[:60])
def test_switches_of_the_trainer_are_taken_over(tmp_path, checkpoint_calls, flags, explained):
    plain = trained(tmp_path / "plain")
    callback = MemfitCallback(budget="min")
    model = llama()
    fitted = trained(tmp_path / "fitted", callback, model, **flags)
    assert checkpoint_calls == []
    assert history(fitted) == history(plain)
    assert_planned(callback.summary())
    notes = callback.summary()["notes"]
    assert sum("_checkpointing=True` was taken over" in note for note in notes) == 1
    for name in explained:
        assert sum(note.startswith(f"`{name}=") and "was taken over: " in note for note in notes) == 1
    # The model has its switches back.
    assert model.is_activation_checkpointing
    if "offload" not in explained:  # which needs a GPU
        model.train()(**{key: torch.tensor(value)[None] for key, value in rows()[0].items()}).loss.backward()
        assert checkpoint_calls


def test_switches_say_what_to_do_where_no_budget_does(tmp_path):
    callback = MemfitCallback()
    trained(tmp_path, callback, activation_checkpointing=True, activation_checkpointing_kwargs={"every_n_layers": 2})
    recomputed = [block["recomputed_bytes"] > 0 for block in callback.summary()["blocks"]]
    assert recomputed == [True, False, True, False]
    assert any("the same blocks recompute" in note for note in callback.summary()["notes"])


def test_without_budget_and_switches_it_measures(tmp_path):
    callback = MemfitCallback()
    trainer = trained(tmp_path, callback)
    assert callback.summary()["measured_peak_bytes"] > 0
    assert not callback.summary()["recomputed_bytes"]
    assert history(trainer, "memfit/measured_peak_bytes")


def test_checkpointing_that_the_model_was_told_is_taken_over(tmp_path, checkpoint_calls):
    model = llama()
    model.activation_checkpointing_enable()
    callback = MemfitCallback(budget="min")
    trainer = trained(tmp_path, callback, model)
    assert checkpoint_calls == []
    assert model.is_activation_checkpointing
    assert any("gradient_checkpointing_enable()` was taken over" in note for note in callback.summary()["notes"])
    assert history(trainer) == history(trained(tmp_path))


def test_a_loss_that_calls_a_part_of_the_model(tmp_path, checkpoint_calls):
    """The forward of the model itself never runs, so nothing could switch its checkpointing off there."""

    class Parts(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            hidden = model.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            scores = model.lm_head(hidden.last_hidden_state).flatten(0, 1)
            return torch.nn.functional.cross_entropy(scores, inputs["labels"].flatten())

    callback = MemfitCallback(budget="min")
    seen = []
    for callbacks, on in (([], False), ([callback], True)):
        trainer = Parts(
            llama(), arguments(tmp_path, activation_checkpointing=on), train_dataset=rows(), callbacks=callbacks
        )
        trainer.train()
        seen.append(history(trainer))
    assert checkpoint_calls == []
    assert seen[0] == seen[1]
    assert_planned(callback.summary())


def test_an_error_in_training_leaves_the_model_unfitted(tmp_path):
    class Failing(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise ZeroDivisionError

    callback = MemfitCallback(budget="min")
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=rows(), callbacks=[callback, Failing()])
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert_untouched(trainer.model)
    assert callback.summary()["steps"] == 1
    trainer.remove_callback(Failing)
    trainer.train()
    assert_planned(callback.summary())


def test_smaller_batches_after_memory_ran_out(tmp_path):
    """`auto_find_batch_size` enters the loop again."""
    pytest.importorskip("accelerate")

    class Failing(Trainer):
        def training_step(self, model, inputs, *args):
            if len(inputs["input_ids"]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate.")
            return super().training_step(model, inputs, *args)

    callback = MemfitCallback(budget="min")
    trainer = Failing(
        llama(), arguments(tmp_path, auto_find_batch_size=True), train_dataset=rows(), callbacks=[callback]
    )
    trainer.train()
    assert len(history(trainer)) == 5
    assert_planned(callback.summary())


def test_a_plan_of_one_training_is_applied_in_the_next(tmp_path):
    first = MemfitCallback(budget="min")
    trained(tmp_path, first)
    first.plan.save(tmp_path / "plan.json")
    second = MemfitCallback(plan=memfit.Plan.load(tmp_path / "plan.json"))
    assert history(trained(tmp_path, second)) == history(trained(tmp_path))
    assert_planned(second.summary())
    assert second.summary()["recomputed_bytes"] == first.summary()["recomputed_bytes"]
    assert not any("does not know" in note for note in second.summary()["notes"])


@pytest.mark.parametrize("optim", ["sgd", "adafactor"])
def test_the_optimizer_is_known_by_its_name(tmp_path, optim):
    """Nothing is reserved that this optimizer will not take."""
    seen = []

    class Looking(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append(callback.handle.training.reserved_bytes())

    callback = MemfitCallback(budget="min")
    trainer = Trainer(llama(), arguments(tmp_path, optim=optim), train_dataset=rows(), callbacks=[callback, Looking()])
    trainer.train()
    trainable = sum(parameter.numel() * parameter.element_size() for parameter in trainer.model.parameters())
    assert seen == [int({"sgd": 0.0, "adafactor": 0.1}[optim] * trainable)]
    assert history(trainer) == history(trained(tmp_path, optim=optim))


def test_budgets_that_cannot_be_read_are_refused_at_once():
    with pytest.raises(BudgetError):
        MemfitCallback(budget="22 gigs")


def test_budgets_that_nothing_fits_stop_the_training(tmp_path):
    with pytest.raises(InfeasibleBudgetError):
        trained(tmp_path, MemfitCallback(budget="1KiB"))


def test_a_budget_below_the_smallest_peak_stops_the_second_step(tmp_path):
    callback = MemfitCallback(budget="8MiB")
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=rows(), callbacks=[callback])
    with pytest.raises(InfeasibleBudgetError):
        trainer.train()
    assert_untouched(trainer.model)
    assert trainer.state.global_step == 1


def test_a_model_that_is_fitted_already_is_refused(tmp_path):
    model = llama()
    with memfit.fit(model, budget="min"), pytest.raises(ModelError, match="fitted already"):
        trained(tmp_path, MemfitCallback(budget="min"), model)


def test_two_callbacks_are_refused(tmp_path):
    trainer = Trainer(
        llama(), arguments(tmp_path), train_dataset=rows(), callbacks=[MemfitCallback(), MemfitCallback()]
    )
    with pytest.raises(UsageError, match="2 callbacks"):
        trainer.train()


def test_a_training_loop_of_its_own_is_refused(tmp_path):
    class Own(Trainer):
        def _inner_training_loop(self, *args, **kwargs):
            self.callback_handler.on_train_begin(self.args, self.state, self.control)

    trainer = Own(llama(), arguments(tmp_path), train_dataset=rows(), callbacks=[MemfitCallback()])
    with pytest.raises(UsageError, match=r"memfit\.fit"):
        trainer.train()


def test_nothing_to_report_before_training():
    with pytest.raises(UsageError, match="no training has begun"):
        MemfitCallback(budget="min").report()


def test_callbacks_copy_and_pickle_as_their_options(tmp_path):
    callback = MemfitCallback(budget="min", blocks=["LlamaDecoderLayer"])

    class Copying(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            self.copies = [copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))]

    copying = Copying()
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=rows(), callbacks=[callback, copying])
    trainer.train()
    assert callback.summary()["steps"] == 5
    for other in copying.copies:
        assert other.options == callback.options
        assert other.handle is None
        trained(tmp_path, other)
        assert_planned(other.summary())
    trainer.state.save_to_json(tmp_path / "state.json")


def test_trainers_without_the_callback_do_not_notice(tmp_path):
    MemfitCallback()
    MemfitCallback()
    assert not hasattr(Trainer._inner_training_loop.__wrapped__, "tells_memfit")
    trainer = trained(tmp_path)
    assert not any(key.startswith("memfit/") for entry in trainer.state.log_history for key in entry)


def test_memfit_does_not_import_transformers():
    code = "import memfit, memfit.integrations.switches, memfit.integrations.catches, sys; memfit.fit; "
    code += "sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


RANKS = """
import sys
import torch

sys.path.insert(0, {folder!r})
torch.set_num_threads(1)
from training import assert_planned, history, llama, rows
from transformers import Trainer, TrainingArguments
from memfit.integrations.transformers import MemfitCallback

def run(callback, **changes):
    arguments = TrainingArguments(
        "out", max_steps=4, per_device_train_batch_size=2, logging_steps=1, report_to=[], disable_tqdm=True,
        use_cpu=True, save_strategy="no", seed=3, learning_rate=1e-2, **changes,
    )
    trainer = Trainer(llama(), arguments, train_dataset=rows(), callbacks=[callback] if callback else [])
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    return [history(trainer), history(trainer, "grad_norm")]

callback = MemfitCallback(budget="min")
{run}
"""


def two_ranks(folder, run):
    (folder / "train.py").write_text(RANKS.format(folder=str(Path(__file__).parent), run=run))
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def test_two_ranks_with_ddp(tmp_path):
    done = two_ranks(
        tmp_path,
        """
assert run(None) == run(callback)
assert torch.distributed.get_world_size() == 2
assert_planned(callback.summary())
sys.stdout.write("the same\\n")
""",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the same") == 2


def test_checkpointing_by_fsdp_is_refused(tmp_path):
    done = two_ranks(tmp_path, "run(callback, fsdp=True, fsdp_config={'activation_checkpointing': True})")
    assert done.returncode != 0
    assert "memfit.errors.UsageError: `fsdp_config['activation_checkpointing']` is on" in done.stderr
    assert "Remove it to keep Memfit, or remove Memfit to keep it." in done.stderr


def test_the_model_is_fitted_before_it_is_wrapped(tmp_path):
    """Accelerate compiles and shards in `prepare`."""
    callback = MemfitCallback(budget="min")
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=rows(), callbacks=[callback])
    prepare, seen = trainer.accelerator.prepare, []

    def watched(*args, **kwargs):
        seen.append((callback.handle is not None, [type(a).__name__ for a in args]))
        return prepare(*args, **kwargs)

    trainer.accelerator.prepare = watched
    trainer.train()
    assert (True, ["LlamaForCausalLM", "AdamW"]) in seen


def test_a_model_that_the_trainer_compiles(tmp_path):
    """`torch_compile=True`: compiled before it is fitted, so that the compiler obeys the plan; then as it was."""
    compiling = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    plain = trained(tmp_path / "plain", **compiling)
    callback = MemfitCallback(budget="min")
    fitted = trained(tmp_path / "fitted", callback, **compiling)
    assert history(fitted) == history(plain)
    assert_same_weights(weights(fitted.model), weights(plain.model))
    summary = callback.summary()
    assert {block["mode"] for block in summary["blocks"]} == {"policy"}
    assert summary["recomputed_bytes"] > 0
    assert any("`torch_compile=True` was taken over" in note for note in summary["notes"])
    assert fitted.model._compiled_call_impl is None
    assert not any("forward" in vars(module) for module in fitted.model.modules())
    assert fitted.accelerator.state.dynamo_plugin.backend.value == "AOT_EAGER"
    assert_untouched(fitted.model)


COMPILING = """
import sys
sys.path[:0] = [{tests!r}]
from test_transformers import history, trained

trainer = trained("output", torch_compile=True, torch_compile_backend="aot_eager")
print(history(trainer))
"""


def test_a_script_whose_trainer_compiles(tmp_path):
    (tmp_path / "train.py").write_text(COMPILING.format(tests=str(Path(__file__).parent)))
    plain = run_python(tmp_path, "train.py")
    options = ["--budget", "min", "--report", "report.json"]
    fitted = run_python(tmp_path, "-m", "memfit", "run", *options, "--", "train.py")
    assert fitted.returncode == 0, fitted.stderr[-3000:]
    assert fitted.stdout.splitlines()[-1] == plain.stdout.splitlines()[-1]
    summary = json.loads((tmp_path / "report.json").read_text())
    assert {block["mode"] for block in summary["blocks"]} == {"policy"}
    assert any("`torch_compile=True` was taken over" in note for note in summary["notes"])


def test_the_example_runs_as_it_stands(tmp_path):
    assert_example_runs(tmp_path, "plain_loop.py")
