"""The loop: fifty steps are PEFT's in a plain loop, schedules are transformers', windows are the full batch."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import loraforge as lf
from loraforge.layers import LoraConfig, inject, narrow, widen
from loraforge.training import TrainConfig, train
from loraforge.training.batches import count_labels
from loraforge.training.losses import keeps_logits, loss_of
from loraforge.training.schedule import rate
from loraforge.training.step import window_gradient
from tests.conformance.peft_cases import make

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own remarks about its layers


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors on a busy machine: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama():
    torch.manual_seed(0)
    return make.llama(num_hidden_layers=2)()


def ragged(rows, seed=2, length=12, vocabulary=32):
    """Rows of very different numbers of labels, padded, as one batch."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocabulary, (rows, length), generator=generator)
    used = torch.tensor([2 + (7 * row) % (length - 2) for row in range(rows)])
    mask = torch.arange(length) < used[:, None]
    return {
        "input_ids": tokens.masked_fill(~mask, 0),
        "attention_mask": mask.long(),
        "labels": tokens.masked_fill(~mask, -100),
    }


def split(batch, parts):
    size = len(batch["labels"]) // parts
    return [{key: value[i * size : (i + 1) * size] for key, value in batch.items()} for i in range(parts)]


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1, "loraplus_ratio": 4.0, "lr": 2e-3}], ids=["plain", "loraplus"]
)
def test_fifty_steps_are_pefts_in_a_plain_loop(options, tmp_path):
    from peft import PeftModel

    base = llama()
    donor = copy.deepcopy(base)
    start = inject(donor, LoraConfig(rank=4, alpha=8, task_type="CAUSAL_LM")).adapter()
    lf.save(start, tmp_path / "start")
    batches = [ragged(4, seed=seed) for seed in range(50)]
    options = {"lr": 1e-2, **options}
    config = TrainConfig(rank=4, alpha=8, schedule="cosine", warmup=5, max_grad_norm=0.5, **options)
    ours = []
    train(copy.deepcopy(base), batches, config, adapter=start, on_step=lambda metrics: ours.append(metrics.loss))

    model = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "start"), is_trainable=True).train()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decay, ratio = options.get("weight_decay", 0.0), options.get("loraplus_ratio", 1.0)
    groups = [
        {"params": [p for n, p in named if ("lora_B" in n) == fast], "lr": options["lr"] * (ratio if fast else 1)}
        for fast in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=decay)
    from transformers import get_cosine_schedule_with_warmup

    schedule = get_cosine_schedule_with_warmup(optimizer, 5, 50)
    theirs = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([parameter for _, parameter in named], 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        theirs.append(float(loss.detach()))
    assert len(ours) == len(theirs) == 50
    assert max(abs(one - other) for one, other in zip(ours, theirs, strict=True)) < 1e-5
    assert theirs[-1] != theirs[0]


@pytest.mark.parametrize("accumulation", [2, 4, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_ragged_micro_batches_give_the_gradient_of_the_full_batch(accumulation, checkpointing):
    model = llama()
    injected = inject(model, LoraConfig(rank=4))
    for name, parameter in injected.parameters().items():
        if name.endswith(".b"):
            nn.init.normal_(parameter, std=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    batch, found = ragged(8), []
    counts = {count_labels(model, part) for part in split(batch, accumulation)}
    assert len(counts) > 1, "equal parts, so this shows nothing"
    for parts in (1, accumulation):
        model.zero_grad()
        loss, labels = window_gradient(model, split(batch, parts), count_labels, None)
        found.append((loss, labels, torch.cat([p.grad.flatten() for p in injected.parameters().values()])))
    (full, labels, exact), (parted, again, sums) = found
    assert labels == again == int((batch["labels"][:, 1:] != -100).sum())
    assert abs(full - float(model(**batch).loss)) < 1e-6
    assert abs(full - parted) < 1e-6
    assert float((exact - sums).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("half", [False, True])
def test_the_head_runs_only_where_something_is_learned_and_the_loss_is_the_models_own(half):
    model, batch = llama(), ragged(6)
    batch["labels"][:, :4] = -100
    dtype = torch.bfloat16 if half else None
    rows = []
    hook = model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    injected = inject(model, LoraConfig(rank=4))
    found = []
    for own in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(**batch).loss if own else loss_of(model, batch, dtype)
        loss.backward()
        found.append((float(loss.detach()), torch.cat([p.grad.flatten() for p in injected.parameters().values()])))
    hook.remove()
    assert rows == [int((batch["labels"] != -100).any(0).sum()), 12]
    assert rows[0] == 6
    (ours, gradient), (theirs, other) = found
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert float((gradient - other).norm() / other.norm()) < (2e-2 if half else 1e-6)


def test_a_model_with_a_loss_of_its_own_keeps_it():
    from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

    tiny = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    assert keeps_logits(GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)))
    for routed in (False, True):
        model = MixtralForCausalLM(MixtralConfig(**tiny, **heads, output_router_logits=routed))
        assert keeps_logits(model) is not routed
        batch = ragged(4)
        assert float(loss_of(model, batch, None)) == pytest.approx(float(model(**batch).loss), rel=1e-6)
    assert not keeps_logits(nn.Linear(2, 2))


@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_are_those_of_transformers(warmup):
    from transformers import get_scheduler

    names = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
    for ours, theirs in names.items():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=40)
        for step in range(40):
            assert rate(ours, step, 40, warmup) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "olora"}], ids=["lora", "dora", "olora"])
def test_gradient_checkpointing_changes_nothing(options):
    batches = [ragged(4, seed=seed) for seed in range(5)]
    config = TrainConfig(rank=4, lr=1e-2, dropout=0.2, **options)
    plain, again = (train(llama(), batches, replace(config, grad_checkpoint=on)) for on in (False, True))
    for name, pair in plain.targets.items():
        assert torch.allclose(pair.delta(), again.targets[name].delta(), rtol=1e-4, atol=1e-7), name


def test_what_is_trained_is_loaded_by_peft_and_computes_the_same(tmp_path):
    from peft import PeftModel

    base, batches = llama(), [ragged(4, seed=seed) for seed in range(6)]
    config = TrainConfig(rank=4, lr=1e-2, init="pissa", dropout=0.1, bias="none", task_type="CAUSAL_LM")
    before = copy.deepcopy(base.state_dict())
    adapter = train(base, batches, config)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    lf.save(adapter, tmp_path / "out")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "out")).eval()
    with torch.no_grad():
        want = theirs(**batches[0]).logits
        from loraforge.layers import attach

        attach(base.eval(), adapter, trainable=False)
        assert torch.allclose(base(**batches[0]).logits, want, atol=1e-5)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, use_cache=False))


@pytest.mark.parametrize("make_model", [make.llama(), gpt2], ids=["Llama", "GPT-2"])
@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"dora": True}, {"bias": "all"}, {"init": "pissa"}], ids=str)
def test_weights_that_are_cast_once_give_the_bits_of_weights_that_are_cast_each_time(make_model, options):
    tokens = torch.randint(3, 32, (2, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for once in (False, True):
        torch.manual_seed(0)
        model = make_model()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        injected = inject(model, LoraConfig(rank=4, targets=_some(model), **options))
        for name, parameter in injected.parameters().items():
            if name.endswith("lora.b"):
                torch.nn.init.normal_(parameter, std=0.2)
        copies = narrow(model, torch.bfloat16 if once else None)
        assert bool(copies) == once
        plain = model(input_ids=tokens, labels=tokens).loss  # outside of autocast nothing changes
        torch.manual_seed(1)
        loss, _ = window_gradient(model, [{"input_ids": tokens, "labels": tokens}], count_labels, torch.bfloat16)
        gradients = {name: parameter.grad.clone() for name, parameter in injected.parameters().items()}
        widen(model)
        injected.remove()
        assert all("forward" not in module.__dict__ for module in model.modules())
        if options.get("bias") is None:
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        found.append((float(plain.detach()), loss, gradients))
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(gradient, found[1][2][name]) for name, gradient in found[0][2].items())


def _some(model):
    """Some linear layers, so that others stay frozen as they are."""
    return tuple(
        end for end in ("q_proj", "down_proj", "c_attn") if any(n.endswith(end) for n, _ in model.named_modules())
    )
