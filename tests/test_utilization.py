"""FLOPs in live reports: against torch's counter around an ordinary step, and its profiler for what recipes run."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import memfit
import zoo
from memfit import flops, hardware
from memfit.calibration import device_name
from memfit.hardware.records import CalibrationRecord, save_record
from memfit.utilization import device_entry

_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: (
        sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(g, q, k, v)
    ),
}
"""CPU's kernel, which torch's counter does not know, by torch's own formulas."""


def counter():
    return FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)


def exact(step):
    """FLOPs of a step, by torch's counter."""
    with counter() as counted:
        step()
    return counted.get_total_flops()


def matmul_flops_of(function):
    """FLOPs of matrix products that really ran, whoever called them, by torch's profiler."""
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activity, record_shapes=True, acc_events=True) as profile:
        function()
    total = 0
    for event in profile.events():
        shapes = event.input_shapes
        if event.name == "aten::addmm":
            total += 2 * shapes[1][0] * shapes[1][1] * shapes[2][1]
        elif event.name == "aten::mm":
            total += 2 * shapes[0][0] * shapes[0][1] * shapes[1][1]
        elif event.name == "aten::bmm":
            total += 2 * shapes[0][0] * shapes[0][1] * shapes[0][2] * shapes[1][2]
    return total


def llama(**more):
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager"}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **more)).train()


def ids(batch=2, length=32):
    return torch.randint(0, 96, (batch, length))


def steps(model, optimizer, batches):
    """Ordinary training, one micro-batch a step."""
    for batch in batches:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def summary_of(model, batches, **options):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with memfit.fit(model, **options) as handle:
        steps(model, optimizer, batches)
        return handle.summary()


# Model FLOPs


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "mixtral", "bert", "t5", "whisper", "vit", "clip", "resnet", "nanogpt", "mamba"]
)
def test_model_flops_are_torchs(name):
    """To the last one, for products, convolutions and attention, in blocks and outside."""
    case = zoo.build(name)
    model, batch = case.model.train(), case.batches(0)

    def step():
        case.loss(zoo.call(model, batch), batch).backward()

    expected = exact(step)
    with memfit.fit(model, budget="min") as handle:
        for _ in range(3):
            step()
            model.zero_grad()
        assert handle.summary()["model_flops"] == expected > 0


@pytest.mark.parametrize("budget", [None, "min"])
@pytest.mark.parametrize("frozen", [(), ("layers.0", "layers.1", "embed"), ("lm_head",)], ids=["none", "low", "head"])
def test_frozen_parts(budget, frozen):
    model = llama(tie_word_embeddings=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    batch = ids()
    expected = exact(lambda: model(input_ids=batch, labels=batch).loss.backward())
    assert summary_of(model, [batch] * 3, budget=budget)["model_flops"] == expected


def lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(llama(), config)


def test_lora_is_counted_where_deepspeed_chats_formula_is_off():
    """LoRA, the head, and the batch of one device: DeepSpeed-Chat's numbers for this very step are others."""
    from memfit.formulas import Sizes

    model, batch = lora(), ids(4, 256)
    expected = exact(lambda: model(input_ids=batch, labels=batch).loss.backward())
    found = summary_of(model, [batch] * 3, budget="min")
    assert found["model_flops"] == expected
    sizes = Sizes(batch=4, length=256, num_layers=4, hidden=32, vocabulary=96, lora_rank=4)
    for num_devices in (1, 8):  # what it prints for one device, whose batch this is
        assert abs(sizes.flops(checkpointing=False) / num_devices - expected) > 0.05 * expected


def test_accumulation_and_several_calls_a_step():
    """A step is what one backward is for; two forwards before it are both in it."""
    model, batch = llama(), ids()

    def step():
        first, second = (model(input_ids=part, labels=part).loss for part in (batch, batch[:1]))
        (first + second).backward()

    expected = exact(step)
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with memfit.fit(model, budget="min") as handle:
        for number in range(6):
            step()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
        assert handle.summary()["model_flops"] == expected


def test_other_lengths_have_their_own_count():
    model = llama()
    expected = {length: exact(lambda n=length: forward_backward(model, n)) for length in (32, 16, 24)}
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with memfit.fit(model, budget="min") as handle:
        for length in (32, 32, 16, 24, 32, 16):
            forward_backward(model, length)
            optimizer.step()
            forward_backward(model, length)  # the step before is over when this begins
            assert handle.summary()["model_flops"] == expected[length]


def forward_backward(model, length):
    batch = ids(2, length)
    model(input_ids=batch, labels=batch).loss.backward()


def test_evaluation_is_not_counted():
    model, batch = llama(), ids()
    expected = exact(lambda: model(input_ids=batch, labels=batch).loss.backward())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with memfit.fit(model, budget="min") as handle:
        for _ in range(3):
            steps(model, optimizer, [batch])
            model.eval()
            with torch.no_grad():
                model(input_ids=ids(8), labels=ids(8))
            model.train()
        assert handle.summary()["model_flops"] == expected


def test_the_chunked_loss_is_counted_too():
    """Its gradients are computed in the forward: hidden states' and head's, as the plain loss's in the backward."""
    model, batch = llama(tie_word_embeddings=False), ids()
    expected = exact(lambda: model(input_ids=batch, labels=batch).loss.backward())
    assert summary_of(model, [batch] * 3, budget="min", chunked_loss=True)["model_flops"] == expected


# Hardware FLOPs


@pytest.mark.parametrize("make", [llama, lora], ids=["full", "lora"])
@pytest.mark.parametrize("options", [{"budget": "min"}, {"policy": "full"}, {"policy": "selective"}], ids=str)
def test_hardware_flops_are_what_ran(make, options):
    """Forward, backward and recipes of a planned step, as the profiler sees them."""
    model, batch = make(), ids()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with memfit.fit(model, **options) as handle:
        steps(model, optimizer, [batch] * 8)  # young calls are verified, which runs recipes once more
        ran = matmul_flops_of(lambda: steps(model, optimizer, [batch]))
        found = handle.summary()
    assert found["hardware_flops"] == ran
    assert found["hardware_flops"] > found["model_flops"] or options == {"policy": "selective"}


class Reading(nn.Module):
    """A block that recipes cannot bring back: Python reads its values. It is run again as a whole."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x):
        hidden = torch.tanh(x @ self.weight)
        return hidden * 2 if hidden.sum().item() > 1e9 else hidden @ self.weight


def test_blocks_that_run_again_as_a_whole():
    model, x = nn.Sequential(*(Reading() for _ in range(4))), torch.randn(8, 16)
    with memfit.fit(model, budget="min") as handle:
        for _ in range(8):
            model(x).square().mean().backward()
        found = handle.summary()
    again = {row["name"] for row in found["blocks"] if row["mode"] == "fallback"}
    assert len(again) == 4
    each = 2 * 2 * 8 * 16 * 16
    assert found["model_flops"] == 4 * 3 * each - 2 * 8 * 16 * 16  # the input needs no gradient
    assert found["hardware_flops"] == found["model_flops"] + 4 * each


# Rates


@pytest.fixture
def calibrated(tmp_path, monkeypatch):
    """This machine, as if it reached 1 TFLOP/s in fp32 and 4 in bf16."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    entry = replace(hardware.find("cpu"), name="here", aliases=(), matmul_flops_per_second={"fp32": 1e12, "bf16": 4e12})
    name = device_name(torch.device("cpu"))
    threads = torch.get_num_threads()
    record = CalibrationRecord(date="d", device=name, num_threads=threads, memfit="0", torch="0", hardware=entry)
    save_record(record)
    return record


@pytest.mark.parametrize("budget", [None, "min"])
@pytest.mark.parametrize(("dtype", "rate"), [(torch.float32, 1e12), (torch.bfloat16, 4e12)], ids=["fp32", "bf16"])
def test_utilization_is_the_share_of_the_rate_for_the_dtype(calibrated, budget, dtype, rate):
    found = summary_of(llama().to(dtype), [ids()] * 6, budget=budget)
    assert found["tflops_per_second"] > 0
    assert found["model_flop_utilization"] == pytest.approx(found["tflops_per_second"] * 1e12 / rate)
    again = found["hardware_flops"] / found["model_flops"]
    assert again == 1 if budget is None else again > 1
    assert found["hardware_flop_utilization"] == pytest.approx(again * found["model_flop_utilization"])
    assert found["hardware_tflops_per_second"] == pytest.approx(again * found["tflops_per_second"])
    assert json.loads(json.dumps(found))["model_flops"] == found["model_flops"]


def test_the_rate_is_that_of_the_steps_on_the_clock(calibrated):
    """Equal steps: FLOPs over the median of their seconds."""
    found = summary_of(llama(), [ids()] * 8, budget="min")
    assert found["tflops_per_second"] * 1e12 == pytest.approx(found["model_flops"] / found["step_seconds"])


def test_an_unknown_device_has_no_utilization(calibrated, tmp_path, monkeypatch):
    assert device_entry(torch.device("cpu")) == calibrated.hardware
    save_record(replace(calibrated, num_threads=calibrated.num_threads + 1))
    assert device_entry(torch.device("cpu")) is None, "other threads reach other rates"
    save_record(calibrated)
    save_record(replace(calibrated, device="another machine"))
    assert device_entry(torch.device("cpu")) is None
    found = summary_of(llama(), [ids()] * 6, budget="min")
    assert found["tflops_per_second"] > 0
    assert found["model_flop_utilization"] is None
    (tmp_path / "memfit" / "hardware.json").write_text("{}")  # of no use, and no reason to fail
    assert device_entry(torch.device("cpu")) is None


# Nothing else changes


def test_nothing_is_known_before_the_first_step():
    with memfit.fit(llama(), budget="min") as handle:
        found = handle.summary()
    for key in ("model_flops", "hardware_flops", "tflops_per_second", "model_flop_utilization"):
        assert found[key] is None


def test_a_steady_step_has_no_mode_on_the_stack():
    model, batch, seen = llama(), ids(), []
    model.model.layers[1].register_forward_pre_hook(lambda *_: seen.append(torch._C._len_torch_dispatch_stack()))
    summary_of(model, [batch] * 5, budget="min")
    assert seen[1:] == [0] * 4


def test_a_forward_that_fails_leaves_no_mode_behind():
    model, batch = llama(), ids()
    with memfit.fit(model, budget="min") as handle:
        for error in (ValueError, KeyboardInterrupt):
            hook = model.model.layers[2].mlp.register_forward_pre_hook(raiser(error))
            with pytest.raises(error):
                model(input_ids=batch, labels=batch)
            hook.remove()
            assert error is KeyboardInterrupt or torch._C._len_torch_dispatch_stack() == 0
        expected = 0
        for _ in range(3):
            model(input_ids=batch, labels=batch).loss.backward()
        expected = handle.summary()["model_flops"]
        assert not any("stepped aside" in note for note in handle.summary()["notes"])
    assert torch._C._len_torch_dispatch_stack() == 0
    assert flops.current() is None
    assert expected == exact(lambda: model(input_ids=batch, labels=batch).loss.backward())


def test_a_loop_that_handles_an_error_is_counted():
    """As one that lowers its batch size where memory ran out: the exception is not the forward's."""
    model, batch = llama(), ids()
    expected = exact(lambda: model(input_ids=batch, labels=batch).loss.backward())
    with memfit.fit(model, budget="min") as handle:
        for _ in range(3):
            try:
                raise ValueError
            except ValueError:
                model(input_ids=batch, labels=batch).loss.backward()
        assert handle.summary()["model_flops"] == expected


def raiser(error):
    def hook(*_):
        raise error

    return hook


# What surrounds the forward


class Tail(nn.Module):
    """Blocks, and then something outside them."""

    def __init__(self, tail):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))
        self.head = nn.Linear(8, 8)
        self.tail = tail

    def forward(self, x, extra=None):
        return self.tail(self.head, self.blocks(x.to_padded_tensor(0.0) if x.is_nested else x))


def train(model, x, *more, times=3):
    for _ in range(times):
        model(x, *more).square().mean().backward()


non_leaves = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks


@non_leaves
def test_what_is_compiled_outside_blocks_stays_compiled():
    """Dynamo skips for good what it first sees under a mode."""
    from torch._dynamo.testing import CompileCounter

    counts = CompileCounter()
    model = Tail(torch.compile(lambda head, x: torch.tanh(head(x)), backend=counts))
    with memfit.fit(model, budget="min") as handle:
        train(model, torch.randn(4, 8))
        assert not any("stepped aside" in note for note in handle.summary()["notes"])
    assert counts.frame_count == 1


@non_leaves
def test_higher_order_operators():
    """What they run is not shown: then there is no number, rather than a wrong one."""
    from functorch.experimental.control_flow import cond

    def tail(head, x):
        return cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    model = Tail(tail)
    with memfit.fit(model, budget="min") as handle:
        train(model, torch.randn(4, 8))
        assert handle.summary()["model_flops"] is None


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight.T, x.T @ gradient


def test_custom_functions_have_no_number():
    """Their backward does what it likes."""
    model = Tail(lambda head, x: Product.apply(x, head.weight))
    with memfit.fit(model, budget="min") as handle:
        train(model, torch.randn(4, 8))
        assert handle.summary()["model_flops"] is None


def test_a_mode_that_hooks_enter_around_the_forward():
    """It is left after the counter is."""
    model, entered = Tail(lambda head, x: head(x)), []

    def leave(*_):
        entered.pop().__exit__(None, None, None)

    with memfit.fit(model, budget="min") as handle:
        hooks = [
            model.register_forward_pre_hook(lambda *_: entered.append(FlopCounterMode(display=False).__enter__())),
            model.register_forward_hook(leave),
        ]
        model(torch.randn(4, 8)).sum().backward()
        assert torch._C._len_torch_dispatch_stack() == 0
        for hook in hooks:
            hook.remove()
        train(model, torch.randn(4, 8))
        assert {block["mode"] for block in handle.summary()["blocks"]} == {"replay"}


def holding_itself():
    found = {}
    found["self"] = found
    return found


def test_a_formula_that_wants_tensors(monkeypatch):
    """As torch's own for attention of variable lengths: of what recipes run only sizes are known."""

    def formula(x, *, out_val):
        return 8.0 * x.size(0) * x.size(1)

    class Scaled(nn.Sequential):
        def forward(self, x):
            return super().forward(x * torch.nn.functional.softsign(self[0].weight.detach()).sum())

    monkeypatch.setitem(flops.flop_registry, torch.ops.aten.abs, formula)
    model = Tail(lambda head, x: head(x))
    model.blocks = nn.Sequential(*(Scaled(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))
    with memfit.fit(model, budget="min") as handle:
        train(model, torch.randn(4, 8))
        found = handle.summary()
    assert found["model_flops"] > 3 * 8 * 64
    assert found["hardware_flops"] is None


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "batch",
    [
        lambda: (torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)]),),
        lambda: (torch.randn(4, 8), holding_itself()),
    ],
    ids=["nested tensor", "cycle"],
)
def test_arguments_without_a_geometry(batch):
    model = Tail(lambda head, x: head(x))
    with memfit.fit(model, budget="min") as handle:
        train(model, *batch())
        assert handle.summary()["model_flops"] is None


def test_a_forward_in_another_thread_leaves_no_mode_behind():
    """It begins and ends while one of the first thread runs."""
    left = []

    def work():
        model(torch.randn(4, 8)).sum().backward()
        left.append(torch._C._len_torch_dispatch_stack())

    def tail(head, x):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        return head(x)

    model = Tail(tail)
    with memfit.fit(model, budget="min"):
        work()
        assert left == [0, 0]


def test_evaluation_after_an_interrupt_has_no_mode():
    model, seen = Tail(lambda head, x: head(x)), []
    with memfit.fit(model, budget="min"):
        hook = model.head.register_forward_pre_hook(raiser(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model(torch.randn(4, 8))
        hook.remove()
        model.head.register_forward_pre_hook(lambda *_: seen.append(torch._C._len_torch_dispatch_stack()))
        with torch.no_grad():
            model.eval()(torch.randn(4, 8))
    assert seen == [0]
