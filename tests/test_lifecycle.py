"""A fitted model stays the user's: nothing outlives its use, and everything can be undone, copied and interrupted."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import memfit
from faults import FITS, SMALLEST, WIDTH, Block, Stack, data
from gradients import assert_bitwise_equal, copies, seed
from memfit import blocks
from memfit.calls import Call
from memfit.memory import meter
from memfit.profiler import Profiler
from zoo import bert_model, build, call, gpt2_model, language, llama_model

WAYS = {**FITS, **SMALLEST}
fitted_ways = pytest.mark.parametrize("options", list(WAYS.values()), ids=list(WAYS))


class Probe:
    """Weak references to the storage of everything that the modules of a model return."""

    def __init__(self, model: nn.Module) -> None:
        self.storages: list[StorageWeakRef] = []
        self.lengths: list[int] = []
        for module in model.modules():
            module.register_forward_hook(self.watch)

    def watch(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self.storages.append(StorageWeakRef(output.untyped_storage()))
            self.lengths.append(output.untyped_storage().nbytes())

    def living(self) -> int:
        """Bytes that are still there; storages that several modules returned count once."""
        found = {s.cdata: n for s, n in zip(self.storages, self.lengths, strict=True) if not s.expired()}
        return sum(found.values())

    def clear(self) -> None:
        self.storages.clear()
        self.lengths.clear()


def watched_stack(count: int = 3) -> tuple[Stack, Probe]:
    """A stack with a probe; the probe's hooks are there before the model is fitted."""
    torch.manual_seed(0)
    model = Stack(count=count)
    return model, Probe(model)


def step(model: nn.Module, i: int) -> Tensor:
    """One step of plain gradient descent; returns the loss."""
    loss = model(data(i))
    loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def gradients(model: nn.Module, i: int) -> dict[str, Tensor | None]:
    """Gradients of one step, with a fixed seed; the model is left without any."""
    seed()
    model.zero_grad()
    model(data(i)).backward()
    found = copies((name, p.grad) for name, p in model.named_parameters())
    model.zero_grad()
    return found


# Nothing outlives its use --------------------------------------------------------------------------------------------


@fitted_ways
@pytest.mark.usefixtures("no_garbage_collection")
def test_plan_drops_what_it_says(options: dict[str, Any]) -> None:
    """Between forward and backward less is alive than in the plain step: the plan is no fiction."""
    model, probe = watched_stack()
    loss = model(data(0))
    plain = probe.living()
    loss.backward()
    with memfit.fit(model, **options):
        step(model, 0), step(model, 1)
        probe.clear()
        loss = model(data(2))
        assert probe.living() < plain
        loss.backward()


@fitted_ways
@pytest.mark.usefixtures("no_garbage_collection")
def test_nothing_is_kept_after_backward(options: dict[str, Any]) -> None:
    """Recomputed and saved tensors go when the backward ends, in step one and in any other."""
    model, probe = watched_stack()
    with memfit.fit(model, **options):
        for i in range(4):
            step(model, i)
            assert probe.living() == 0, f"step {i}"


@fitted_ways
@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize("when", [0, 1, 3])
def test_nothing_is_kept_after_dropping_the_loss(options: dict[str, Any], when: int) -> None:
    """A loss that nobody differentiates takes its graph, and everything in it, along."""
    model, probe = watched_stack()
    with memfit.fit(model, **options):
        for i in range(5):
            if i == when:
                loss = model(data(i))
                assert probe.living() > 0
                del loss
                assert probe.living() == 0
            step(model, i)
        assert probe.living() == 0


@fitted_ways
@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", [0, 1, 3])
def test_nothing_is_kept_after_an_exception(options: dict[str, Any], error: type[BaseException], when: int) -> None:
    """An exception in a block's forward; what was alive goes with the traceback, at the latest with the next step."""
    model, probe = watched_stack()
    armed = False

    def strike(module: nn.Module, args: Any) -> None:
        if armed:
            raise error("stop")

    model.blocks[1].down.register_forward_pre_hook(strike)
    with memfit.fit(model, **options):
        for i in range(5):
            armed = i == when
            if armed:
                with pytest.raises(error):
                    model(data(i))
                armed = False
            step(model, i)
            assert probe.living() == 0, f"step {i}"


@fitted_ways
@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize("when", [0, 1, 3])
def test_nothing_is_kept_after_an_exception_in_backward(options: dict[str, Any], when: int) -> None:
    """The graph of a failed backward goes with the loss."""
    model, probe = watched_stack()
    armed = False

    def strike(gradient: Tensor) -> None:
        if armed:
            raise RuntimeError("stop")

    def arm(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(strike)

    model.blocks[1].up.register_forward_hook(arm)
    with memfit.fit(model, **options):
        for i in range(5):
            armed = i == when
            if armed:
                loss = model(data(i))
                with pytest.raises(RuntimeError, match="stop"):
                    loss.backward()
                del loss
                assert probe.living() == 0
                model.zero_grad()
                armed = False
            step(model, i)
            assert probe.living() == 0, f"step {i}"


@fitted_ways
@pytest.mark.usefixtures("no_garbage_collection")
def test_retained_graph_keeps_only_what_was_saved(options: dict[str, Any]) -> None:
    """After a backward that retains the graph, recomputed values are gone again; after the last one, all are."""
    model, probe = watched_stack()
    with memfit.fit(model, **options):
        step(model, 0), step(model, 1)
        loss = model(data(2))
        before = probe.living()
        loss.backward(retain_graph=True)
        assert probe.living() <= before
        loss.backward()
        del loss
        assert probe.living() == 0


@fitted_ways
@pytest.mark.usefixtures("no_garbage_collection")
def test_model_and_handle_are_collectable(options: dict[str, Any]) -> None:
    """Neither keeps the other, nor the weights: after both names are gone, all is gone, without `remove`."""
    model = Stack()
    weights = [StorageWeakRef(p.untyped_storage()) for p in model.parameters()]
    handle = memfit.fit(model, **options)
    step(model, 0), step(model, 1)
    references = weakref.ref(model), weakref.ref(handle)
    del model, handle
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert all(weight.expired() for weight in weights)


def test_handle_dropped_without_remove() -> None:
    """`memfit.fit(model, ...)` as a statement: the model stays fitted or goes back to plain, and trains right."""
    torch.manual_seed(0)
    model = Stack()
    expected = gradients(model, 0)
    memfit.fit(model, budget="min")
    gc.collect()
    for _ in range(3):
        assert_bitwise_equal(gradients(model, 0), expected)


def test_parameters_that_are_replaced_are_not_kept() -> None:
    """As sharding replaces them before the first step."""
    model = Stack()
    refs = [weakref.ref(parameter) for parameter in model.parameters()]
    handle = memfit.fit(model, budget="min")
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    del module, name, parameter
    gc.collect()
    assert not any(ref() is not None for ref in refs)
    handle.remove()


@pytest.mark.usefixtures("no_garbage_collection")
def test_many_steps_leave_no_trace() -> None:
    """The number of tensors in the process does not grow over twenty steps, nor over shapes seen before."""
    model, _ = watched_stack()

    def tensors() -> int:
        return sum(1 for thing in gc.get_objects() if issubclass(type(thing), Tensor))

    with memfit.fit(model, budget="min"):
        for i in range(6):
            step(model, i)
        before = tensors()
        for i in range(20):
            step(model, i)
        assert tensors() <= before


class ReadsItsData(nn.Module):
    """Run again as a whole; it saves what it computes, which a graph of the second run must not keep."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.softmax(x @ self.weight, -1)
        return torch.tanh(y + float((y > 2).sum())) * x


def test_whole_blocks_leave_no_trace() -> None:
    """Whether or not somebody collects garbage: a cycle through the graph is never found."""
    model = nn.Sequential(ReadsItsData(), ReadsItsData())

    def tensors() -> int:
        gc.collect()
        return sum(1 for thing in gc.get_objects() if issubclass(type(thing), Tensor))

    with memfit.fit(model, policy="full") as handle:
        counts = []
        for _ in range(6):
            model(torch.randn(4, WIDTH)).sum().backward()
            model.zero_grad()
            counts.append(tensors())
        assert {block["mode"] for block in handle.summary()["blocks"]} == {"fallback"}
    assert counts[-1] <= counts[1]


# The model stays the user's ------------------------------------------------------------------------------------------

HOOK_DICTS = [
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
]


def portrait(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that `remove` must put back, compared by identity where that matters."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = {
            "class": type(module),
            "forward": vars(module).get("forward", type(module).forward),
            "attributes": {k: id(v) for k, v in vars(module).items() if k not in HOOK_DICTS},
            "order": list(vars(module)),
            "hooks": {k: list(vars(module)[k].items()) for k in HOOK_DICTS if k in vars(module)},
            "parameters": {k: id(p) for k, p in module._parameters.items()},
            "buffers": {k: id(b) for k, b in module._buffers.items()},
            "training": module.training,
        }
        if hasattr(getattr(module, "config", None), "to_dict"):
            found[name]["config"] = module.config.to_dict()
    found["state"] = list(model.state_dict())
    return found


def process_portrait() -> dict[str, Any]:
    """What Memfit may patch or register in the process while it records."""
    from torch.nn.modules import module as modules
    from torch.optim import optimizer as optimizers

    patched = ["item", "tolist", "numpy", "data_ptr", "__array__", "__dlpack__", "__bool__", "__float__", "__int__"]
    patched += ["backward", "__index__", "__len__", "__iter__", "storage", "untyped_storage", "__contains__"]
    return {
        **{f"Tensor.{name}": getattr(Tensor, name) for name in patched},
        "autograd.backward": torch.autograd.backward,
        "autograd.grad": torch.autograd.grad,
        "Module.__call__": nn.Module.__call__,
        "Optimizer.step": torch.optim.Optimizer.step,
        "modules": [
            dict(getattr(modules, k)) for k in vars(modules) if k.startswith("_global_") and k.endswith("hooks")
        ],
        "optimizers": [
            dict(getattr(optimizers, k)) for k in vars(optimizers) if k.startswith("_global_") and k.endswith("hooks")
        ],
        "threads": threading.active_count(),
    }


def models() -> dict[str, Callable[[], tuple[nn.Module, Callable[[int], Tensor]]]]:
    """Models and how to get their loss at step ``i``."""

    def hugging_face(make: Callable[[], nn.Module]) -> Callable[[], tuple[nn.Module, Callable[[int], Tensor]]]:
        def built() -> tuple[nn.Module, Callable[[int], Tensor]]:
            model = make().train()
            return model, lambda i: call(model, language(i)).loss

        return built

    def stack() -> tuple[nn.Module, Callable[[int], Tensor]]:
        model = Stack()
        model.blocks[0].register_forward_hook(lambda *_: None)
        model.blocks[0].register_forward_pre_hook(lambda *_: None)
        model.blocks[1].register_full_backward_hook(lambda *_: None)
        return model, lambda i: model(data(i))

    def mixture() -> tuple[nn.Module, Callable[[int], Tensor]]:
        case = build("mixtral-loop")
        return case.model, lambda i: case.loss(call(case.model, case.batches(i)), case.batches(i))

    return {
        "stack": stack,
        "gpt2": hugging_face(gpt2_model),
        "llama": hugging_face(llama_model),
        "bert": hugging_face(bert_model),
        "mixtral": mixture,
    }


@pytest.mark.parametrize("name", list(models()))
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_remove_restores(name: str, steps: int) -> None:
    """After `remove`, the model, its modules' hooks, its configuration and the process are exactly what they were."""
    model, loss = models()[name]()
    loss(0).backward()
    before, process = portrait(model), process_portrait()
    handle = memfit.fit(model, budget="min")
    for i in range(steps):
        loss(i).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    handle.remove()
    assert portrait(model) == before
    assert process_portrait() == process


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", [0, 2])
def test_remove_restores_after_an_exception(where: str, error: type[BaseException], when: int) -> None:
    """The same from the middle of a step that ended badly."""
    model = Stack()
    armed = False

    def strike(*_: Any) -> None:
        if armed:
            raise error("stop")

    def arm(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(strike)

    if where == "forward":
        model.blocks[1].down.register_forward_pre_hook(strike)
    else:
        model.blocks[1].down.register_forward_hook(arm)
    before, process = portrait(model), process_portrait()
    handle = memfit.fit(model, budget="min")
    for i in range(when):
        step(model, i)
    armed = True
    with pytest.raises(error):
        model(data(when)).backward()
    handle.remove()
    armed = False
    assert portrait(model) == before
    assert process_portrait() == process
    expected = gradients(model, 5)
    assert_bitwise_equal(gradients(model, 5), expected)


@fitted_ways
def test_remove_between_forward_and_backward(options: dict[str, Any]) -> None:
    """A graph that is open when Memfit leaves still has its gradients."""
    torch.manual_seed(0)
    model = Stack()
    expected = gradients(model, 7)
    handle = memfit.fit(model, **options)
    gradients(model, 0), gradients(model, 1)
    seed()
    loss = model(data(7))
    handle.remove()
    loss.backward()
    assert_bitwise_equal(copies((name, p.grad) for name, p in model.named_parameters()), expected)


def test_fit_changes_nothing_visible() -> None:
    """While fitted: same classes, same ``forward``, same names, same keys, same weights."""
    model = Stack()
    before = portrait(model)
    with memfit.fit(model, budget="min"):
        step(model, 0), step(model, 1)
        during = portrait(model)
    for name, module in before.items():
        if name == "state":
            assert during[name] == module
            continue
        for what in ("class", "forward", "parameters", "buffers", "training"):
            assert during[name][what] == module[what]
        extra = set(during[name]["order"]) - set(module["order"])
        assert not extra, f"attributes added to `{name}`: {extra}"


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "whisper"])
def test_use_cache(name: str) -> None:
    """The key-value cache is off while the model trains, and on whenever it does not."""
    case = build(name)
    case.model.config.use_cache = True
    seen: list[bool] = []
    block = next(m for n, m in case.model.named_modules() if n.endswith(".0"))
    block.register_forward_pre_hook(lambda module, args: seen.append(case.model.config.use_cache))
    handle = memfit.fit(case.model, budget="min")
    batch = case.batches(0)
    case.loss(call(case.model, batch), batch).backward()
    assert not any(seen)
    assert case.model.config.use_cache is True
    seen.clear()
    case.model.eval()
    with torch.no_grad():
        call(case.model, batch)
    assert all(seen)
    handle.remove()
    assert case.model.config.use_cache is True


@pytest.mark.parametrize("switch", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
@pytest.mark.parametrize("when", ["before", "after"])
# The old name still works, and says at every use that it will not for long.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_checkpointing_is_taken_over(when: str, switch: str) -> None:
    """The model's own checkpointing is not stacked on the plan; the report says so; `remove` gives it back."""
    case = build("llama")
    if not hasattr(case.model, switch):
        pytest.skip(f"this transformers has no {switch}")
    expected = build("llama")
    if when == "before":
        getattr(case.model, switch)()
    handle = memfit.fit(case.model, budget="min")
    if when == "after":
        getattr(case.model, switch)()
    for i in range(3):
        found = []
        for model in (case.model, expected.model):
            seed()
            batch = case.batches(i)
            model.zero_grad()
            model(**batch).loss.backward()
            found.append(copies((n, p.grad) for n, p in model.named_parameters()))
        assert_bitwise_equal(*found)
    assert {block["mode"] for block in handle.summary()["blocks"]} == {"replay"}
    assert "checkpointing" in handle.report()
    handle.remove()
    assert any(getattr(module, "gradient_checkpointing", False) for module in case.model.modules())


# Copies --------------------------------------------------------------------------------------------------------------


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_copies_are_inert(duplicate: Callable[[nn.Module], nn.Module], steps: int) -> None:
    """A copy of a fitted model trains as a plain one, can be fitted itself, and disturbs nothing."""
    torch.manual_seed(0)
    model = Stack()
    handle = memfit.fit(model, budget="min")
    for i in range(steps):
        step(model, i)
    twin = duplicate(model)
    plain = Stack()
    plain.load_state_dict(model.state_dict())
    expected = gradients(plain, 3)
    assert_bitwise_equal(gradients(twin, 3), expected)
    assert_bitwise_equal(gradients(model, 3), expected)
    calls = len(handle.summary()["blocks"])
    twin(data(4)).backward()
    twin.zero_grad()
    assert len(handle.summary()["blocks"]) == calls
    with memfit.fit(twin, budget="min"):
        for _ in range(3):
            assert_bitwise_equal(gradients(twin, 3), expected)
            assert_bitwise_equal(gradients(model, 3), expected)
    handle.remove()
    assert_bitwise_equal(gradients(twin, 3), expected)
    assert_bitwise_equal(gradients(model, 3), expected)


def test_copies_keep_hooks_of_the_user() -> None:
    """Inert means Memfit's hooks, not the user's."""
    model = Stack()
    model.blocks[0].up.register_forward_hook(double)
    with memfit.fit(model, budget="min"):
        step(model, 0), step(model, 1)
        twin = copy.deepcopy(model)
    assert list(twin.blocks[0].up._forward_hooks.values()) == [double]


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def test_state_dict_of_a_fitted_model() -> None:
    """Saving and loading between steps, as trainers do."""
    torch.manual_seed(0)
    model = Stack()
    with memfit.fit(model, budget="min"):
        step(model, 0), step(model, 1)
        state = {name: t.clone() for name, t in model.state_dict().items()}
        first = gradients(model, 2)
        step(model, 2)
        model.load_state_dict(state)
        assert_bitwise_equal(gradients(model, 2), first)


# Fit and remove, in any order ----------------------------------------------------------------------------------------


def test_fit_twice() -> None:
    """The second `fit` is refused, and the first goes on."""
    torch.manual_seed(0)
    model = Stack()
    expected = gradients(model, 0)
    handle = memfit.fit(model, budget="min")
    with pytest.raises(memfit.ModelError, match=r"fitted already.*remove"):
        memfit.fit(model, budget="min")
    for _ in range(3):
        assert_bitwise_equal(gradients(model, 0), expected)
    handle.remove()


@pytest.mark.parametrize("inner", [True, False])
def test_fit_part_of_a_fitted_model(inner: bool) -> None:
    """A part of a fitted model, or the whole of a model with a fitted part, is fitted already."""
    model = Stack()
    outer = nn.Sequential(model, nn.Identity())
    handle = memfit.fit(outer if inner else model, budget="min")
    with pytest.raises(memfit.ModelError, match="fitted already"):
        memfit.fit(model if inner else outer, budget="min")
    handle.remove()
    memfit.fit(model if inner else outer, budget="min").remove()


def test_remove_twice() -> None:
    """Says so, and does no harm."""
    model = Stack()
    handle = memfit.fit(model, budget="min")
    handle.remove()
    with pytest.raises(memfit.ModelError, match=r"removed.*`memfit.fit`"):
        handle.remove()
    with memfit.fit(model, budget="min"):
        step(model, 0)


def test_fit_again_after_remove() -> None:
    """Any number of times, with any plan."""
    torch.manual_seed(0)
    model = Stack()
    expected = gradients(model, 0)
    for options in [*FITS.values(), {"policy": "full"}, {"budget": None}, {"every_n_layers": 2}]:
        with memfit.fit(model, **options):
            for _ in range(3):
                assert_bitwise_equal(gradients(model, 0), expected)
        assert_bitwise_equal(gradients(model, 0), expected)


def train_into_an_error(model: nn.Module) -> None:
    """Two good steps, and a loss of an impossible shape."""
    step(model, 0), step(model, 1)
    model(data(2)).view(3)


def test_context_manager_removes_after_an_exception() -> None:
    """Leaving by an exception leaves a plain model; the exception is the user's."""
    model = Stack()
    before = portrait(model)
    with pytest.raises(RuntimeError, match="shape"), memfit.fit(model, budget="min"):
        train_into_an_error(model)
    assert portrait(model) == before


def test_remove_inside_the_context() -> None:
    """Removing by hand and leaving the context is not removing twice."""
    with memfit.fit(Stack(), budget="min") as handle:
        handle.remove()


def test_two_fitted_models_in_one_step() -> None:
    """Teacher and student, generator and discriminator: each has its own handle."""
    torch.manual_seed(0)
    first, second = Stack(), Stack()

    def joint(i: int) -> dict[str, Tensor | None]:
        seed()
        first.zero_grad()
        second.zero_grad()
        (first(data(i)) * 2 + second(data(i + 1)) - first(data(i + 2))).backward()
        found = copies((f"first {n}", p.grad) for n, p in first.named_parameters())
        return {**found, **copies((f"second {n}", p.grad) for n, p in second.named_parameters())}

    expected = [joint(i) for i in range(4)]
    with memfit.fit(first, budget="min"), memfit.fit(second, policy="full"):
        for i in range(4):
            assert_bitwise_equal(joint(i), expected[i])


# Reports -------------------------------------------------------------------------------------------------------------

SUMMARY_KEYS = {
    "budget_bytes",
    "predicted_peak_bytes",
    "measured_peak_bytes",
    "plain_peak_bytes",
    "step_seconds",
    "recompute_seconds",
    "saved_bytes",
    "recomputed_bytes",
    "steps",
    "blocks",
}


@fitted_ways
def test_summary(options: dict[str, Any]) -> None:
    """The report as data, at any moment of a handle's life."""
    model = Stack()
    handle = memfit.fit(model, **options)
    assert handle.plan is None
    summary = handle.summary()
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["steps"] == 0
    assert summary["measured_peak_bytes"] is None
    for i in range(3):
        step(model, i)
        assert handle.summary()["steps"] == i + 1
        assert json.loads(json.dumps(handle.summary()))["steps"] == i + 1
        assert isinstance(handle.report(), str)
    assert handle.plan is not None
    summary = handle.summary()
    assert [block["name"] for block in summary["blocks"]] == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(block["mode"] == "replay" for block in summary["blocks"])
    assert summary["recomputed_bytes"] == sum(block["recomputed_bytes"] for block in summary["blocks"])
    assert summary["saved_bytes"] == sum(block["saved_bytes"] for block in summary["blocks"])
    handle.remove()
    assert handle.summary()["steps"] == 3
    assert isinstance(handle.report(), str)


def test_steps_count_optimizer_steps() -> None:
    """Not forwards, not backwards, not steps of somebody else's optimizer."""
    model, other = Stack(), Stack()
    with memfit.fit(model, budget="min") as handle:
        ours = torch.optim.SGD(model.parameters(), lr=0.1)
        theirs = torch.optim.SGD(other.parameters(), lr=0.1)
        for _ in range(2):
            for i in range(3):
                model(data(i)).backward()
            ours.step()
            ours.zero_grad()
            theirs.step()
        assert handle.summary()["steps"] == 2


def test_plan_waits_for_the_second_step() -> None:
    """Nothing is planned before something has been seen."""
    model = Stack()
    with memfit.fit(model, budget="min") as handle:
        assert handle.plan is None
        step(model, 0)
        step(model, 1)
        assert handle.plan is not None
        assert [c.name for c in handle.plan.calls] == ["blocks.0", "blocks.1", "blocks.2"]


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "budget", [0, -1, "22 G", "", "many", "0GiB", "-3GiB", float("nan"), "nan", "nanGiB", "200%", True, [], 1.5]
)
def test_unreadable_budgets(budget: Any) -> None:
    """Each names the value; the model stays plain."""
    model = Stack()
    before = portrait(model)
    with pytest.raises(memfit.BudgetError) as caught:
        memfit.fit(model, budget=budget)
    assert str(budget).strip() in str(caught.value)
    assert portrait(model) == before


def test_budget_under_the_weights() -> None:
    """No plan can help, and the error says what is needed and who needs it."""
    model = Stack()
    before = portrait(model)
    with pytest.raises(memfit.InfeasibleBudgetError) as caught:
        memfit.fit(model, budget=1000)
    weights = sum(p.nbytes for p in model.parameters())
    assert caught.value.budget == 1000
    assert caught.value.minimum >= weights
    assert caught.value.event
    assert portrait(model) == before


def test_infeasible_budget() -> None:
    """Weights fit, the step does not: an error before the second step's forward, and an unfitted model."""
    model = Stack()
    before = portrait(model)
    memfit.fit(model, budget=2**20)
    step(model, 0)
    forwards: list[int] = []
    model.blocks[0].norm.register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(memfit.InfeasibleBudgetError, match=r"No plan fits 1\.00 MiB: the smallest peak is"):
        model(data(1))
    assert not forwards
    model.blocks[0].norm._forward_hooks.clear()
    after = portrait(model)
    assert {n: m["hooks"] for n, m in after.items() if n != "state"} == {
        n: m["hooks"] for n, m in before.items() if n != "state"
    }
    step(model, 1)


def test_nothing_to_train() -> None:
    """A frozen model needs no plan."""
    model = Stack().requires_grad_(False)
    with pytest.raises(memfit.ModelError, match=r"Stack has no parameters that train.*requires_grad"):
        memfit.fit(model, budget="min")


@pytest.mark.parametrize(
    "model", [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)), Block()], ids=["layer", "list", "block"]
)
def test_no_blocks(model: nn.Module) -> None:
    """Nothing is repeated; `blocks=` is the way out."""
    with pytest.raises(memfit.ModelError, match=r"no repeated modules.*blocks="):
        memfit.fit(model, budget="min")


def test_empty_model() -> None:
    """No parameters at all."""
    with pytest.raises(memfit.ModelError):
        memfit.fit(nn.Sequential(nn.ReLU(), nn.ReLU()), budget="min")


@pytest.mark.parametrize("model", [None, "gpt2", torch.zeros(3), Stack])
def test_not_a_model(model: Any) -> None:
    """A name, a tensor, a class."""
    with pytest.raises(memfit.MemfitError, match=r"torch\.nn\.Module"):
        memfit.fit(model, budget="min")


def test_unknown_block_name() -> None:
    """`blocks=` that names nothing."""
    with pytest.raises(memfit.ModelError, match=r"`transformer\.h`.*named_modules"):
        memfit.fit(Stack(), budget="min", blocks=["transformer.h"])


@pytest.mark.parametrize("blocks", [["blocks.1"], ["Block"], ["blocks.0", "blocks.2"]])
def test_chosen_blocks(blocks: list[str]) -> None:
    """By qualified name or by class; the others are left alone."""
    torch.manual_seed(0)
    model = Stack()
    expected = gradients(model, 0)
    with memfit.fit(model, budget="min", blocks=blocks) as handle:
        for _ in range(3):
            assert_bitwise_equal(gradients(model, 0), expected)
        names = [block["name"] for block in handle.summary()["blocks"]]
    assert names == (["blocks.0", "blocks.1", "blocks.2"] if blocks == ["Block"] else blocks)


def test_meta_model() -> None:
    """A model without weights cannot train."""
    with torch.device("meta"):
        model = Stack()
    with pytest.raises(memfit.ModelError, match="meta"):
        memfit.fit(model, budget="min")


@pytest.mark.parametrize(
    "options",
    [
        {"budget": "min", "policy": "full"},
        {"policy": "fastest"},
        {"every_n_layers": 0},
        {"every_n_layers": -2},
        {"every_n_layers": True},
        {"every_n_layers": 1.5},
        {"budget": "min", "every_n_layers": 2},
        {"optimizer": "gradient descent by hand"},
    ],
    ids=str,
)
def test_contradictory_options(options: dict[str, Any]) -> None:
    """One decision at a time, and only those that there are."""
    model = Stack()
    before = portrait(model)
    with pytest.raises(memfit.MemfitError):
        memfit.fit(model, **options)
    assert portrait(model) == before


@pytest.mark.parametrize(
    "loss",
    [lambda output, batch: output.expand(3), lambda output, batch: 1.0, lambda output, batch: output.detach()],
    ids=["vector", "number", "detached"],
)
def test_loss_is_no_scalar_tensor(loss: Any) -> None:
    """`memfit.plan` must go backward from it."""
    model = Stack()
    before = portrait(model)
    with pytest.raises(memfit.ModelError, match=r"[Ll]oss"):
        memfit.plan(model, data(0), budget="min", loss=loss)
    assert portrait(model) == before


def test_plan_leaves_the_model_alone() -> None:
    """Weights, gradients, buffers, training flags and random state are what they were."""
    case = build("residual-net")
    model = case.model.eval()
    model(case.batches(9)["args"][0]).sum().backward()
    before = copies([*model.named_parameters(), *model.named_buffers()])
    gradients_before = copies((n, p.grad) for n, p in model.named_parameters())
    identities = {n: id(p.grad) for n, p in model.named_parameters()}
    portrait_before = portrait(model)
    seed()
    state = torch.get_rng_state()
    plan = memfit.plan(model, case.batches(0)["args"], budget="min", loss=lambda output, batch: output.square().mean())
    assert torch.equal(torch.get_rng_state(), state)
    assert_bitwise_equal(copies([*model.named_parameters(), *model.named_buffers()]), before)
    assert_bitwise_equal(copies((n, p.grad) for n, p in model.named_parameters()), gradients_before)
    assert {n: id(p.grad) for n, p in model.named_parameters()} == identities
    assert portrait(model) == portrait_before
    assert plan.calls


@pytest.mark.parametrize("name", ["gpt2", "bert", "unet"])
def test_plan_and_apply(name: str) -> None:
    """A plan made from one batch holds for the next ones, and through JSON."""
    case, plain = build(name), build(name)
    batch = case.batches(0)
    loss = case.loss if "args" not in batch else lambda output, args: case.loss(output, {"args": args})
    plan = memfit.plan(case.model, batch.get("args", batch), budget="min", loss=loss)
    plan = memfit.Plan.from_json(plan.to_json())
    with memfit.apply(case.model, plan) as handle:
        for i in range(3):
            found = []
            for model in (case.model, plain.model):
                seed()
                model.zero_grad()
                case.loss(call(model, case.batches(i)), case.batches(i)).backward()
                found.append(copies((n, p.grad) for n, p in model.named_parameters()))
            assert_bitwise_equal(*found)
        assert handle.summary()["recomputed_bytes"] == plan.recomputed_bytes > 0


def test_plan_for_another_model() -> None:
    """Refused, with both names."""
    plan = memfit.plan(Stack(), data(0), budget="min")

    class Other(Stack):
        pass

    other = Other(count=4)
    before = portrait(other)
    with pytest.raises(memfit.PlanError, match=r"(?s)Stack.*Other"):
        memfit.apply(other, plan)
    assert portrait(other) == before


# After trouble -------------------------------------------------------------------------------------------------------


def test_out_of_memory_is_passed_on() -> None:
    """What torch raises when memory runs out reaches the user, and the next, smaller step works."""
    torch.manual_seed(0)
    model = Stack()
    expected = gradients(model, 0)

    def strike(module: nn.Module, args: Any) -> None:
        if len(args[0]) > 100:
            torch.empty(2**60, dtype=torch.uint8)

    model.blocks[1].down.register_forward_pre_hook(strike)
    for first in (True, False):
        with memfit.fit(model, budget="min"):
            if not first:
                assert_bitwise_equal(gradients(model, 0), expected)
            with pytest.raises(RuntimeError, match="memory"):
                model(torch.randn(200, WIDTH))
            for _ in range(3):
                assert_bitwise_equal(gradients(model, 0), expected)


def test_exception_in_the_loss() -> None:
    """Between the blocks' forward and any backward."""
    torch.manual_seed(0)
    model = Stack()
    expected = gradients(model, 0)
    with memfit.fit(model, budget="min"):
        for _ in range(3):
            value = model(data(1))
            with pytest.raises(RuntimeError, match="shape"):
                (value + torch.ones(3)).view(2)
            del value
            assert_bitwise_equal(gradients(model, 0), expected)


def test_fitted_inside_a_thread() -> None:
    """Fitted there, trained here, removed there."""
    torch.manual_seed(0)
    model = Stack()
    expected = gradients(model, 0)
    handles: list[memfit.Handle] = []
    thread = threading.Thread(target=lambda: handles.append(memfit.fit(model, budget="min")))
    thread.start()
    thread.join()
    for _ in range(3):
        assert_bitwise_equal(gradients(model, 0), expected)
    thread = threading.Thread(target=handles[0].remove)
    thread.start()
    thread.join()
    assert_bitwise_equal(gradients(model, 0), expected)


def test_a_reading_does_not_mind_what_began_before_it() -> None:
    """A block that another thread was inside of when the reading began, and blocks that end in another order."""
    reader = Profiler(meter("cpu"), lambda: 0, lambda: 0)
    before, first, second = (
        Call(blocks.Block(name=name, module=torch.nn.Identity()), 0, [], (), {})
        for name in ("before", "first", "second")
    )
    reader.block_left(before)
    reader.block_entered(first)
    reader.block_entered(second)
    first.mode, second.mode = "replay", "fallback"
    reader.block_left(first)
    reader.block_left(second)
    assert [(read.name, read.mode) for read in reader.reading.calls] == [("first", "replay"), ("second", "fallback")]
    given = torch.ones(3)
    gone = weakref.ref(given)
    reader.block_entered(Call(blocks.Block(name="failed", module=torch.nn.Identity()), 2, [given], (), {}))
    del given
    reader.backward_ended()
    assert gone() is None


def test_frozen_blocks_under_a_head_have_a_plan() -> None:
    """They save nothing, and no backward reaches them: that is no reason to profile every step."""
    torch.manual_seed(0)
    model = Stack(count=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    with memfit.fit(model, budget="min") as handle:
        for i in range(3):
            step(model, i)
        found = handle.summary()
    assert found["measured_peak_bytes"] is not None
    assert [row["saved_bytes"] for row in found["blocks"]] == [0, 0, 0]


def test_an_evaluation_is_no_part_of_the_peak() -> None:
    """What is held between an optimizer's step and the next forward is not the step's."""
    torch.manual_seed(0)
    model = Stack(count=3)
    with memfit.fit(model, budget="min") as handle:
        for i in range(4):
            step(model, i)
        before = handle.summary()["measured_peak_bytes"]
        with torch.no_grad():
            torch.ones(512 * 2**20, dtype=torch.uint8)
        for i in range(2):
            step(model, i)
        assert handle.summary()["measured_peak_bytes"] < before + 256 * 2**20
