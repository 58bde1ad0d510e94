"""Tensor parallelism in a rehearsed step: transformers' own code on devices that are not there."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn
from torch.distributed._functional_collectives import all_reduce

import memfit
from memfit import cli, hardware
from memfit.errors import InfeasibleBudgetError, ModelError, UsageError
from memfit.forecast import Forecast
from memfit.parallelism import parallelism
from memfit.simulation.fakes import fake_tensors
from memfit.simulation.ledger import Ledger
from memfit.simulation.parallel import process_group
from memfit.simulation.traffic import Traffic
from memfit.solver.planner import switched
from rehearsing import num_passed_over, rehearse

BLOCKS, WIDTH, INNER, WORDS = 5, 128, 344, 1000
SIZES = {"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": BLOCKS}
CONFIG = transformers.LlamaConfig(
    **SIZES, num_attention_heads=8, num_key_value_heads=8, use_cache=False, architectures=["LlamaForCausalLM"]
)
MATRICES = 4 * WIDTH * WIDTH + 3 * INNER * WIDTH
NORMS = BLOCKS * 2 * WIDTH + WIDTH
HIDDEN, LOGITS = 4 * 2 * 64 * WIDTH, 4 * 2 * 64 * WORDS
"""Bytes of what blocks hand on, and of all logits."""
BATCH_AND_BUFFERS = 2 * 2 * 64 * 8 + 2 * 8 * 4
STEP = {"batch_size": 2, "length": 64, "precision": "fp32", "device": "h100"}
with torch.device("meta"):  # plans of transformers 5.17 leave the embedding whole
    SPLITS_EMBEDDING = "model.embed_tokens" in transformers.LlamaForCausalLM(CONFIG).tp_plan


def forecast(number: int = 2, config=CONFIG, **options) -> Forecast:
    return Forecast(config, num_devices=number, **{**STEP, "tp": number, **options})


@pytest.mark.parametrize("number", [2, 8])
def test_each_device_holds_its_part(number):
    """Of matrices; norms are whole, and so is the gradient of the embedding, which torch does not shard."""
    found = forecast(number)
    parts = found.within("min").peak.parts
    whole, split = NORMS, BLOCKS * MATRICES // number + WORDS * WIDTH // number
    embedding = WORDS * WIDTH // (number if SPLITS_EMBEDDING else 1)
    assert parts["weights"] == 4 * (whole + split + embedding) + BATCH_AND_BUFFERS
    count = len(list(transformers.LlamaForCausalLM(CONFIG).parameters()))
    assert parts["optimizer_state"] == 2 * 4 * (whole + split + embedding) + 4 * count, "a step count for each"
    rehearsed = found._pricing.rehearsed
    assert rehearsed.gradients[-1] == 4 * (whole + split + WORDS * WIDTH)
    trained = found._pricing.num_trainable
    assert trained == found._pricing.num_parameters == BLOCKS * (MATRICES + 2 * WIDTH) + 2 * WORDS * WIDTH + WIDTH


@pytest.mark.parametrize(
    ("how", "copies", "shards"), [({}, 4, 1), ({"fsdp": "full"}, 1, 4), ({"fsdp": "hybrid:2"}, 2, 2)]
)
def test_groups_share_what_each_device_holds(how, copies, shards):
    """Of four groups of two; norms too, which are whole in each device of a group."""
    found = forecast(8, tp=2, **how)
    prediction = found.within("min")
    embedding = WORDS * WIDTH // (2 if SPLITS_EMBEDDING else 1)
    held = (BLOCKS * MATRICES // 2 + WORDS * WIDTH // 2 + embedding + NORMS) // shards
    assert prediction.peak.parts["weights"] == 4 * held + BATCH_AND_BUFFERS
    count = len(list(transformers.LlamaForCausalLM(CONFIG).parameters()))
    assert prediction.peak.parts["optimizer_state"] == 2 * 4 * held + 4 * count
    assert found._pricing.rehearsed.gradients[-1] == 4 * held
    mesh = tuple(size for size in (copies, shards) if size > 1 or copies > 1)
    assert (prediction.plan.world_size, prediction.plan.mesh) == (8, (*mesh, 2))
    assert found._pricing.num_parameters == BLOCKS * MATRICES + NORMS + 2 * WORDS * WIDTH
    assert prediction.tokens_per_second * prediction.step_seconds == pytest.approx(4 * 2 * 64), "a batch for each group"


@pytest.mark.parametrize("number", [2, 8])
def test_blocks_save_their_part(number):
    """What autograd keeps of heads and of the inner layer is split, what is as wide as the model is not."""
    kept = {}
    for n in (1, number):
        found = forecast(n, compares=False)
        program = next(iter(found.profile.programs.values()))
        kept[n] = sum(node.keep_bytes or 0 for node in program.nodes if node.kind == "computed" and node.num_saved)
    heads = 4  # query, key, value and what attention gives
    inner = 4  # gate, its activation, up, and their product
    tokens = 4 * 2 * 64
    gone = tokens * (heads * WIDTH + inner * INNER)
    assert kept[1] - kept[number] == pytest.approx(gone * (number - 1) / number, abs=tokens * 8), "the log-sum-exp"


@pytest.mark.parametrize("number", [2, 8])
def test_what_is_sent(number):
    """Around a ring. Each block reduces twice forward, and once for each of its column-wise layers backward."""
    _, rehearsal, team = rehearse(CONFIG, parallelism(number, tp=number), doubles=False)
    assert num_passed_over(rehearsal) == 0
    reductions = BLOCKS * (2 + 5) + 1 + SPLITS_EMBEDDING
    assert team.traffic.sent_bytes == (number - 1) / number * (2 * reductions * HIDDEN + LOGITS)


@pytest.mark.parametrize("how", [{}, {"fsdp": "full"}])
def test_what_groups_send(how):
    """Over a ring of two in each group, what one group sends; over another, gathers and gradients."""
    *_, alone = rehearse(CONFIG, parallelism(2, tp=2), doubles=False)
    *_, team = rehearse(CONFIG, parallelism(4, tp=2, **how), doubles=False)
    block = MATRICES // 2 + 2 * WIDTH
    outside = WORDS * WIDTH // 2 + WORDS * WIDTH // (2 if SPLITS_EMBEDDING else 1) + WIDTH
    gathered = 3 * BLOCKS * block + 2 * outside  # before the forward and the backward; then gradients are scattered
    reduced = 2 * (BLOCKS * block + outside)
    between = team.traffic.sent_bytes - alone.traffic.sent_bytes
    assert between == 1 / 2 * 4 * (gathered if how else reduced)


@pytest.mark.parametrize("fake", [True, False])
def test_what_a_collective_gives_is_there_once(fake):
    """Waiting makes no other tensor, and what stands for the result until then has no memory."""
    with process_group(parallelism(4, tp=4)), fake_tensors() if fake else nullcontext():
        given = torch.zeros(1000)
        traffic, functional = Traffic(hardware.find("h100"), 8, split_size=4), torch.ops._c10d_functional
        with Ledger(lambda *_: 0.0, traffic=traffic) as ledger:
            reduced = all_reduce(given, "sum", torch.distributed.group.WORLD)
            assert ledger.now == 4000
            assert (reduced + 1).shape == (1000,)  # it is waited for
            assert ledger.now == 4000
            name = torch.distributed.group.WORLD.group_name
            gathered = functional.wait_tensor(functional.all_gather_into_tensor(given, 4, name))
            assert gathered.shape == (4000,)
            assert ledger.now == ledger.peak == 4000 + 16000
            del gathered
            assert ledger.now == 4000
            del reduced
        assert ledger.now == 0
        assert traffic.sent_bytes == 3 / 4 * (2 * 4000 + 16000)


def test_what_a_backward_leaves_and_frees():
    """Watched in the step: gradients of the block's part and of its input stay, all else goes; no op was seen twice."""
    program = next(iter(forecast(2).profile.programs.values()))
    sizes = {event.index: event.size for event in program.timeline if event.kind == "alloc"}
    freed = [event.index for event in program.timeline if event.kind == "free"]
    assert len(freed) == len(set(freed))
    left = sum(size for index, size in sizes.items() if index not in freed)
    assert left == 4 * (MATRICES // 2 + 2 * WIDTH) + HIDDEN
    for kind in ("unpack", "release"):
        seen = [event.index for event in program.timeline if event.kind == kind]
        assert sorted(seen) == list(range(len(program.saved)))


def test_what_is_sent_takes_its_time():
    """All of it: what a layer gives is waited for. And once more where blocks run again."""
    linked = hardware.find("h100")
    slow = replace(linked, interconnect_bytes_per_second=linked.interconnect_bytes_per_second / 1000)
    seconds = {}
    for name, entry in {"linked": linked, "slow": slow}.items():
        found = forecast(2, device=entry)
        seconds[name] = [
            found.of(switched(found.profile, policy=policy, **found.named)).step_seconds for policy in ("plain", "full")
        ]
    rate = linked.interconnect_bytes_per_second * linked.copy_efficiency
    forward = BLOCKS * 2 * HIDDEN
    plain = (BLOCKS * (2 + 5) + 1 + SPLITS_EMBEDDING) * HIDDEN + LOGITS / 2
    assert seconds["slow"][0] - seconds["linked"][0] == pytest.approx(999 * plain / rate, rel=1e-3)
    assert seconds["slow"][1] - seconds["linked"][1] == pytest.approx(999 * (plain + forward) / rate, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "number", "how"), [("llama", 2, {}), ("qwen3", 2, {}), ("llama", 4, {"fsdp": "full"})]
)
def test_equal_blocks_are_passed_over_without_a_trace(kind, number, how):
    """Qwen3's norms of heads reduce their gradients by a hook."""
    config = CONFIG
    if kind == "qwen3":
        config = transformers.Qwen3Config(
            **SIZES,
            num_attention_heads=8,
            num_key_value_heads=8,
            head_dim=16,
            use_cache=False,
            max_window_layers=BLOCKS,
        )
    chosen = parallelism(number, tp=2, **how)
    (first, doubled, _), (second, whole, _) = (rehearse(config, chosen, doubles=each) for each in (True, False))
    assert not any(each.differs for each in (doubled, whole))
    hooked = kind == "qwen3" and not SPLITS_EMBEDDING  # transformers 5.17 hooks modules, which all have to run then
    assert [num_passed_over(each) for each in (doubled, whole)] == [0 if hooked else 2, 0]
    assert first.profile.events == second.profile.events
    assert first.profile.programs.keys() == second.profile.programs.keys()
    assert first.gradients == second.gradients
    assert first.step_seconds == pytest.approx(second.step_seconds, rel=0.02)


def test_blocks_run_again_as_a_whole():
    """That is what `fit` does with DTensors, whatever the budget; switches that keep parts are not shown."""
    found = forecast(2)
    full = switched(found.profile, policy="full", **found.named)
    prediction = found.within("60GiB")
    assert prediction.plan.predicted_peak_bytes == full.predicted_peak_bytes
    assert prediction.plan.recompute_seconds == full.recompute_seconds > 0
    assert (prediction.plan.world_size, prediction.plan.mesh) == (2, (2,))
    names = [each.name for each in prediction.alternatives]
    assert names[:2] == ["nothing", "full checkpointing"]
    assert not [name for name in names if "selective" in name or "chunked" in name]
    assert any("runs each block again as a whole" in note for note in prediction.not_counted)
    assert all(len(program.ops) == 1 for program in found.profile.programs.values())
    assert [each.plan.policies for each in found.frontier()] == [full.policies]
    with pytest.raises(InfeasibleBudgetError, match="No plan fits"):
        found.solve(full.predicted_peak_bytes - 1)
    forwards = 1 + prediction.recomputed_flops / prediction.forward_flops
    assert prediction.compute_factor == pytest.approx(2 + forwards, rel=0.01)
    assert 1.5 < forwards < 2, "all but the head"


def test_the_devices_have_one_batch():
    for options in ({}, {"accumulate": 4}):
        found = forecast(8, **options).within("min")
        assert found.tokens_per_second * found.step_seconds == pytest.approx(2 * 64 * options.get("accumulate", 1))


def test_tied_weights_are_tied_again():
    config = transformers.LlamaConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": True})
    tied, apart = (forecast(2, each).within("min").peak.parts["weights"] for each in (config, CONFIG))
    assert apart - tied == 4 * WORDS * WIDTH // (2 if SPLITS_EMBEDDING else 1)


def test_modules_and_frozen_parts():
    """A module of transformers is split as its configuration is, and stays as it was."""
    model = transformers.LlamaForCausalLM(CONFIG)
    model.get_input_embeddings().requires_grad_(False)
    ids = torch.zeros(2, 64, dtype=torch.long)
    found = Forecast(model, {"input_ids": ids, "labels": ids}, num_devices=2, tp=2)
    same = forecast(2, device="cpu", freeze=["embed"])
    assert found.profile.events == same.profile.events
    assert found._pricing.rehearsed.gradients[-1] == 4 * (
        BLOCKS * (MATRICES // 2 + 2 * WIDTH) + WORDS * WIDTH // 2 + WIDTH
    )
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert all("forward" not in vars(module) for module in model.modules())


def test_nothing_is_left_behind():
    propagation = pytest.importorskip("torch.distributed.tensor._sharding_prop").ShardingPropagator
    before = dict(vars(propagation))
    shown = sys.excepthook
    forecast(2)
    assert vars(propagation) == before
    assert not torch.distributed.is_initialized()
    assert sys.excepthook is shown


def test_what_cannot_be_split():
    plain = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)))
    few = transformers.LlamaConfig(**SIZES, num_attention_heads=8, num_key_value_heads=2)
    with pytest.raises(UsageError, match=r"invalid for input.*`tp=4` does not divide 2 key and value heads.*`fsdp`"):
        forecast(4, few)
    with pytest.raises(UsageError, match=r"no tensor parallel plan for `gpt2` \(GPT2LMHeadModel\)"):
        forecast(2, transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, architectures=["GPT2LMHeadModel"]))
    with pytest.raises(UsageError, match="Sequential is none of"):
        memfit.simulate(plain, torch.zeros(2, 64), num_devices=2, tp=2)
    with pytest.raises(UsageError, match="takes no DTensors beside plain tensors"):
        forecast(2, optimizer="adamw_8bit")
    with pytest.raises(UsageError, match="takes no DTensors beside plain tensors"):
        forecast(2, optimizer="adamw_fused")
    with pytest.raises(ModelError, match="head's weight, which is split among devices"):
        forecast(2, chunked_loss=True)
    with pytest.raises(ModelError, match="Cached gradients"):
        forecast(2, task="embedder", cache_rows=1)
    with pytest.raises(UsageError, match="`transformers` has for split layers"):
        memfit.simulate(CONFIG, num_devices=2, tp=2, stack="transformers", **STEP)


def test_adapters_of_split_layers():
    """PEFT's own: of layers that are split by columns B is split, of the embedding A; the rest is whole."""
    pytest.importorskip("peft")
    targets = ["q_proj", "v_proj", "gate_proj", "embed_tokens"]
    found, apart = forecast(2, lora=4, lora_targets=targets), forecast(1, lora=4, lora_targets=targets)
    assert found._pricing.num_trainable == apart._pricing.num_trainable
    assert found._pricing.num_parameters == apart._pricing.num_parameters
    whole, split = BLOCKS * 3 * 4 * WIDTH + 4 * WIDTH, BLOCKS * 4 * (2 * WIDTH + INNER)
    base = NORMS + (BLOCKS * MATRICES + WORDS * WIDTH) // 2
    if SPLITS_EMBEDDING:
        split, base = split + 4 * WORDS, base + WORDS * WIDTH // 2
    else:
        whole, base = whole + 4 * WORDS, base + WORDS * WIDTH
    assert found._pricing.num_trainable == whole + split
    parts = found.within("min").peak.parts
    assert parts["weights"] == 4 * (base + whole + split // 2) + BATCH_AND_BUFFERS
    assert parts["optimizer_state"] == 2 * 4 * (whole + split // 2) + 4 * (BLOCKS * 6 + 2)
    sharded = forecast(8, tp=2, fsdp="full", lora=4, lora_targets=["q_proj"]).within("min").peak.parts["weights"]
    adapters = BLOCKS * (4 * WIDTH + 4 * WIDTH // 2)
    assert sharded == 4 * (base + adapters) // 4 + BATCH_AND_BUFFERS


def test_adapters_that_do_not_run():
    """What PEFT 0.21 and transformers 5.23 do of layers that are split by rows fails as it does on real devices."""
    peft = pytest.importorskip("peft")
    if SPLITS_EMBEDDING:
        with pytest.raises(UsageError, match=r"invalid for input.*of down_proj, o_proj, which are split by rows"):
            forecast(2, lora=4)
    with pytest.raises(UsageError, match="Quantized weights that are split are not predicted"):
        forecast(2, lora=4, quantize="4bit", precision="bf16")
    model = transformers.LlamaForCausalLM(CONFIG)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    ids = torch.zeros(2, 64, dtype=torch.long)
    with pytest.raises(UsageError, match="Layers are split before they get adapters"):
        Forecast(adapted, {"input_ids": ids, "labels": ids}, num_devices=2, tp=2)


def test_groups_after_groups():
    """DTensors remember collectives of equal meshes, which are no more."""
    for how in ({}, {"fsdp": "full"}, {"fsdp": "hybrid:2"}, {}):
        found = forecast(8, tp=2, **how)
        assert found.profile.events == forecast(8, tp=2, **how).profile.events


def test_the_command_line(capsys, tmp_path):
    CONFIG.save_pretrained(tmp_path)
    assert cli.main(["plan", str(tmp_path), "--gpus", "2xh100", "--tp", "2", "--seq", "64"]) == 0
    shown = capsys.readouterr().out
    assert "tensor parallel over 2 devices" in shown
    assert cli.main(["frontier", str(tmp_path), "--gpus", "2xh100", "--tp", "2", "--seq", "64"]) == 0
    assert cli.main(["plan", str(tmp_path), "--gpus", "8xh100", "--tp", "2", "--seq", "64"]) == 0
    shown = capsys.readouterr().out
    assert "tensor parallel over 2 devices in 4 groups" in shown
    assert "as transformers' `dp_replicate_size` does it" in shown
    words = ["--gpus", "64xh100", "--tp", "8", "--fsdp", "full", "--seq", "64"]
    assert cli.main(["plan", str(tmp_path), *words]) == 0
    assert "FSDP2 over 8 groups of 8 tensor parallel devices" in capsys.readouterr().out
