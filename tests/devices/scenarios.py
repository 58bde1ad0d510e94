"""What models on two pretended devices do under Memfit: ``python scenarios.py LIBRARY SCENARIO`` prints it as JSON."""

import gc
import json
import sys
import time
import types
from collections.abc import Callable

import torch
from pretended import FIRST, SECOND, load
from torch import nn

import memfit
from memfit import memory

VOCABULARY, STEPS = 200, 8


def language_model(dropout: float = 0.0) -> nn.Module:
    """Three layers and the embeddings on the first device, three layers and the head on the second."""
    from accelerate import dispatch_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings = {"attn_implementation": "eager", "attention_dropout": dropout}
    config = LlamaConfig(num_hidden_layers=6, vocab_size=VOCABULARY, **sizes, **settings)
    places = {f"model.layers.{i}": FIRST if i < 3 else SECOND for i in range(6)}
    places |= {"model.embed_tokens": FIRST, "model.rotary_emb": FIRST, "model.norm": SECOND, "lm_head": SECOND}
    return dispatch_model(LlamaForCausalLM(config).train(), places, main_device=FIRST)


def batches(number: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, VOCABULARY, (4, 64), generator=generator).to(FIRST) for _ in range(number)]
    return [{"input_ids": each, "labels": each} for each in ids]


def train(model: nn.Module) -> dict:
    """Losses, weights and each device's peak in the last step."""
    for index in (0, 1):
        torch.ops.pretended.generator(index).manual_seed(17 + index)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach=False)
    losses = []
    for batch in batches(STEPS):
        for index in (0, 1):
            torch.ops.pretended.reset(index)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        del loss
    peaks = {device: torch.ops.pretended.highest(index) for index, device in enumerate((FIRST, SECOND))}
    return {"losses": losses, "weights": [p.detach().cpu() for p in model.parameters()], "peaks": peaks}


def compared(make: Callable[[], nn.Module], **options: object) -> dict:
    """The same training plain and fitted."""
    model = make()
    plain = train(model)
    del model
    return fitted(make, plain, **options)


def fitted(make: Callable[[], nn.Module], plain: dict, **options: object) -> dict:
    """A training that is fitted, held to a plain one."""
    gc.collect()  # accelerate ties a model to itself, and the one before should not count
    model = make()
    hooks = count_hooks(model)
    handle = memfit.fit(model, **options)
    seen = train(model)
    kept = {
        str(part._device): sorted({str(state.program.nodes[n].device) for state, n in kept_nodes(part)})
        for part in handle.parts
    }
    found = {
        "plain_peaks": plain["peaks"],
        "peaks": seen["peaks"],
        "same": seen["losses"] == plain["losses"]
        and all(torch.equal(a, b) for a, b in zip(seen["weights"], plain["weights"], strict=True)),
        "summary": handle.summary(),
        "report": handle.report(),
        "kept_on": kept,
    }
    handle.remove()
    return {**found, "hooks": [hooks, count_hooks(model)], "use_cache": getattr(model.config, "use_cache", None)}


def kept_nodes(part: memfit.Handle):
    plan = part.own_plan
    for number, call in enumerate(plan.calls if plan is not None else ()):
        state = part.runtime.states[call.program]
        for node in plan.policy(number).kept:
            if state.nodes[node].keep_bytes:
                yield state, node


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Chain(nn.Module):
    """Blocks between embeddings and a head on the first device; each takes its input to where it is."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(use_cache=True)
        self.embed = nn.Embedding(VOCABULARY, 32).to(FIRST)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(32, VOCABULARY).to(FIRST)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> types.SimpleNamespace:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x.to(FIRST)).flatten(0, 1)
        return types.SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels.flatten()))


def chain(blocks: list[nn.Module]) -> Chain:
    torch.manual_seed(0)
    model = Chain(blocks)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    return model


class Half(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(32, 128).to(device), nn.Linear(128, 32).to(device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.into(x.to(self.into.weight.device))))


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Half(FIRST), Half(SECOND)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(self.first(x)).to(x.device)


class Noisy(nn.Module):
    """Reads its data in Python, and draws."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(32, 32, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.weight.device)
        hidden = torch.tanh(x @ self.weight) if x.sum().item() < 1e9 else x
        return x + nn.functional.dropout(hidden, 0.2)


class Away(nn.Module):
    """Brings its weights to its input."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(32, 32, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(x @ self.weight.to(x.device))


class Towers(nn.Module):
    """Two branches: the backwards of both devices run at the same time, in a thread each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList([Noisy(FIRST) for _ in range(6)])
        self.second = nn.ModuleList([Noisy(SECOND) for _ in range(6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = second = x
        for one, other in zip(self.first, self.second, strict=True):
            first, second = one(first), other(second)
        return (first + second.to(FIRST)).square().mean()


# Scenarios


def budgets() -> dict:
    model = language_model()
    plain = train(model)
    del model
    half = {device: int(0.75 * peak) for device, peak in plain["peaks"].items()}
    return {
        "min": fitted(language_model, plain, budget="min"),
        "none": fitted(language_model, plain),
        "full": fitted(language_model, plain, policy="full"),
        "each": fitted(language_model, plain, budget=half),
        "text": fitted(language_model, plain, budget=f"0={half[FIRST]},{SECOND}={half[SECOND]}"),
        "one": fitted(language_model, plain, budget=max(half.values())),
        "second": fitted(language_model, plain, budget={0: "1GiB", 1: half[SECOND]}),
        "chunked": fitted(language_model, plain, budget="min", chunked_loss=True),
    }


def dropout() -> dict:
    """Each device has a generator of its own; what enters the second's first layer comes from the first."""
    return {"min": compared(lambda: language_model(dropout=0.2), budget="min")}


def whole_blocks() -> dict:
    """Blocks that cannot be replayed: they run again as a whole, with what they drew."""
    return {"min": compared(lambda: chain([Noisy(device) for device in (FIRST, FIRST, SECOND, SECOND)]), budget="min")}


def adapters() -> dict:
    """Nothing on the first device trains."""
    from peft import LoraConfig, get_peft_model

    def make() -> nn.Module:
        model = language_model()
        config = LoraConfig(target_modules=["q_proj", "down_proj"], layers_to_transform=[3, 4, 5], lora_alpha=64)
        model = get_peft_model(model, config)
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape) / 8)
        return model

    return {"min": compared(make, budget="min")}


def planned() -> dict:
    """A plan that was made before, and read from a file."""
    model = language_model()
    plan = memfit.plan(model, batches(1)[0], budget="min")
    clean = all(parameter.grad is None for parameter in model.parameters())
    del model
    plan = memfit.Plan.from_json(plan.to_json())
    return {"clean": clean, "device": plan.device, "applied": compared(language_model, plan=plan)}


def infeasible() -> dict:
    model = language_model()
    hooks = count_hooks(model)
    smallest = 2 * sum(p.nbytes for p in model.parameters() if str(p.device) == SECOND)
    memfit.fit(model, budget={FIRST: "1GiB", SECOND: smallest})
    error = None
    try:
        train(model)
    except memfit.InfeasibleBudgetError as raised:
        error = {"text": str(raised), "budget": raised.budget, "minimum": raised.minimum, "event": raised.event}
    return {"error": error, "given": smallest, "hooks": [hooks, count_hooks(model)], "again": trains_again(model)}


def trains_again(model: nn.Module) -> bool:
    handle = memfit.fit(model, budget="min")
    train(model)
    handle.remove()
    return True


def too_small() -> str:
    """A budget below the weights of one device, before anything runs."""
    try:
        memfit.fit(language_model(), budget={FIRST: "1GiB", SECOND: 10_000})
    except memfit.InfeasibleBudgetError as error:
        return str(error)
    return ""


def split_block() -> dict:
    """Blocks whose halves are on different devices: each half is planned where it is."""
    return {"min": compared(lambda: chain([Both() for _ in range(3)]), budget="min")}


def strays() -> dict:
    """Blocks whose weights are on the second device, and whose activations are on the first."""
    blocks = [FIRST, FIRST, SECOND, SECOND]
    return {"min": compared(lambda: chain([(Half if d == FIRST else Away)(d) for d in blocks]), budget="min")}


def every_second() -> list:
    """Which blocks recompute, of six that change devices in turn."""
    model = chain([Half(device) for device in (FIRST, SECOND) * 3])
    handle = memfit.fit(model, every_n_layers=2)
    train(model)
    return sorted(row["name"] for row in handle.summary()["blocks"] if row["recomputed_bytes"])


def towers() -> dict:
    """Generators after each backward, which draws again what was drawn."""
    model = Towers()
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) / 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    handle = memfit.fit(model, budget="min")
    moved = 0
    for _ in range(80):
        loss = model(torch.randn(64, 32).to(FIRST))
        for device in (FIRST, SECOND):
            torch.empty(5, device=device).bernoulli_(0.5)
        before = states()
        loss.backward()
        moved += any(not torch.equal(a, b) for a, b in zip(before, states(), strict=True))
        optimizer.step()
        optimizer.zero_grad()
    return {"moved": moved, "modes": sorted({row["mode"] for row in handle.summary()["blocks"]})}


def states() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.ops.pretended.generator(index).get_state() for index in (0, 1))]


def nowhere() -> str:
    """Blocks that are on no device as a whole, and have no parts."""

    class Torn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.empty(32, 32, device=FIRST))
            self.second = nn.Parameter(torch.empty(32, 32, device=SECOND))

    try:
        memfit.fit(chain([Torn(), Torn()]), budget="min")
    except memfit.ModelError as error:
        return str(error)
    return ""


def half_made() -> dict:
    """The second device cannot be measured, which shows when the first has its handle."""
    model = language_model()
    hooks = count_hooks(model)
    meter = memory._METERS["pretended"]

    def only_first(device: torch.device) -> memory.Meter:
        if device.index:
            raise memfit.BudgetError("no meter")
        return meter(device)

    memory._METERS["pretended"] = only_first
    try:
        memfit.fit(model)
    except memfit.BudgetError as error:
        text = str(error)
    memory._METERS["pretended"] = meter
    return {"error": text, "hooks": [hooks, count_hooks(model)], "again": trains_again(model)}


class Heads(nn.Module):
    """A tower on each device, of which batches of one kind use the second only."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.ModuleList([Half(FIRST) for _ in range(3)])
        self.used = chain([Half(SECOND) for _ in range(3)])

    def forward(self, **batch: torch.Tensor) -> types.SimpleNamespace:
        return self.used(**batch)


def one_never_called() -> dict:
    """The blocks of the first device."""
    model = Heads()
    handle = memfit.fit(model, budget="min")
    train(model)
    planned = handle.plan is not None
    handle.remove()
    return {"planned": planned, "summary": handle.summary(), "offline": memfit.plan(model, batches(1)[0]).device}


def counted() -> list:
    """FLOPs of a step, and how long it took, where nothing trains on the first device: after one run and after two."""
    model = chain([Half(device) for device in (FIRST, FIRST, SECOND, SECOND)])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("blocks.2", "blocks.3")))
    handle = memfit.fit(model)
    found = []
    for _ in range(2):
        train(model)
        summary = handle.summary()
        found.append([summary["model_flops"], summary["step_seconds"] is not None, summary["steps"]])
    return found


class Crossing(nn.Module):
    """Its weights are on the second device, half of its work is on the first."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32).to(SECOND)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.cat([torch.sin(x * k) for k in range(1, 17)], -1).tanh()
        narrow = wide.view(*x.shape[:-1], 16, 32).mean(-2)
        return x + torch.tanh(self.linear(narrow.to(SECOND))).to(FIRST)


def crossing() -> dict:
    """What is split in the second step keeps on the first device what the first step did not."""
    return {"min": compared(lambda: chain([Half(FIRST), Half(FIRST), *(Crossing() for _ in range(4))]), budget="min")}


def memory_ran_out() -> list[bool]:
    """Which device's handle explains an error of the allocator of the second."""
    handle = memfit.fit(language_model(), budget="min")
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 1 has a total capacity of 8 GiB.")
    handle.failed(error)
    return [bool(part.exhaustion.story) for part in handle.parts]


FACTOR = [1.0]


class Hidden(Half):
    """Scales by what only its values show."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.detach().new_full((), FACTOR[0])
        return super().forward(x) + torch.tanh(x.to(scale.device) * scale).to(self.out.weight.device)


def canary() -> dict:
    """How often a backward waits for a device, and what comes of a value that is another one."""
    model = chain([Hidden(device) for device in (FIRST, FIRST, SECOND, SECOND)])
    handle = memfit.fit(model, policy="full")
    train(model)
    asked = []
    waits = {"equal": (torch, torch.equal)}
    waits |= {name: (torch.Tensor, getattr(torch.Tensor, name)) for name in ("item", "tolist", "__bool__", "cpu")}
    for name, (owner, function) in waits.items():

        def counting(*args, _function=function, _name=name):
            if torch._C._current_graph_task_id() != -1:
                asked.append(_name)
            return _function(*args)

        setattr(owner, name, counting)
    steps, errors = [], []
    for batch in batches(4):
        loss = model(**batch).loss
        asked.clear()
        loss.backward()
        steps.append(list(asked))
    recomputed = handle.summary()["recomputed_bytes"]
    FACTOR[0] = 1.5
    for batch in batches(8):
        loss = model(**batch).loss
        try:
            loss.backward()
            errors.append("")
        except memfit.RecomputeError as error:
            errors.append(str(error))
    again = compared(lambda: chain([Hidden(device) for device in (FIRST, SECOND)]), policy="full")["same"]
    return {"steps": steps, "recomputed": recomputed, "errors": errors, "same": again}


def canary_before_optimizers() -> dict:
    """Weights that have moved when a wrong value is found, where each is stepped as soon as its gradient is there."""
    model = chain([Hidden(FIRST) for _ in range(4)])
    memfit.fit(model, policy="full")
    train(model)
    moved = []
    for name, parameter in model.named_parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.1)

        def step(_, name=name, optimizer=optimizer):
            optimizer.step()
            moved.append(name)

        parameter.register_post_accumulate_grad_hook(step)
    FACTOR[0] = 1.5
    raised = False
    try:
        model(**batches(1)[0]).loss.backward()
    except memfit.RecomputeError:
        raised = True
    before = list(moved)
    model(**batches(1)[0]).loss.backward()
    return {"raised": raised, "moved": before, "again": len(moved) - len(before) == len(list(model.parameters()))}


if __name__ == "__main__":
    load(sys.argv[1])
    print(json.dumps(globals()[sys.argv[2]]()), flush=True)
    time.sleep(0.2)  # a device's thread lets go of the last backward after us, and needs Python for its callback
