"""Several adapters at once: each is what its own run gives, whoever is beside it."""

import functools
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import loraforge as lf
from loraforge.errors import LoraforgeError, NumericalError, StoreError, TargetError, TrainingError
from loraforge.layers import inject
from loraforge.layers.shared import Rows, Shared
from loraforge.training import Halving, Member, TrainConfig, train, train_many
from loraforge.training.batches import count_labels
from loraforge.training.data.loader import make_loader
from loraforge.training.data.tokens import Row
from loraforge.training.halving import losers
from loraforge.training.step import window_gradient
from loraforge.training.streams import seed_all
from loraforge.training.together import Turn, Way, in_turns, together

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own remarks
VOCABULARY = 64


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors on a busy machine: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, max_position_embeddings=64, **sizes)
    config.use_cache = False
    return LlamaForCausalLM(config)


def rows(seed, count, least=3, most=12):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(least, most + 1, (), generator=generator))
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        found.append(Row(tuple(ids), (-100, *ids[1:])))
    return found


def loader(seed, count=8, size=2, *, pack=False, **lengths):
    dtype = torch.float32 if pack else None
    return make_loader(rows(seed, count, **lengths), size, seed=seed, pad=0, max_length=16, pack_dtype=dtype)


def gap(one, two):
    """``|dW - dW'| / |dW'|`` over all targets."""
    assert one.targets.keys() == two.targets.keys()
    lost = sum(float((pair.delta() - two.targets[name].delta()).square().sum()) for name, pair in one.targets.items())
    return (lost / sum(float(pair.delta().square().sum()) for pair in two.targets.values())) ** 0.5


def same_bits(one, two):
    return all(
        torch.equal(pair.a, two.targets[name].a) and torch.equal(pair.b, two.targets[name].b)
        for name, pair in one.targets.items()
    )


def gradients(model, configs, batches, work):
    """Return each adapter's gradients as one vector, by ``work``; B is drawn, so that A has a gradient too."""
    shared = Shared(model)
    model.requires_grad_(requires_grad=False)
    members = {}
    for number, config in enumerate(configs):
        torch.manual_seed(number)
        members[str(number)] = shared.join(str(number), config)
        with torch.no_grad():
            for name, parameter in members[str(number)].parameters().items():
                if not name.endswith(".a"):
                    parameter.add_(0.1 * torch.randn_like(parameter))
    turns = [Turn(str(number), windowed, 100 + number, 3) for number, windowed in enumerate(batches)]
    model.train()
    try:
        way = Way(model, shared, count_labels, None, getattr(model, "row_losses", None))
        losses = work(way, turns)
        found = {
            name: torch.cat([p.grad.flatten() for p in one.parameters().values()]) for name, one in members.items()
        }
    finally:
        shared.close()
    return found, losses


EIGHT = [
    TrainConfig(rank=4),
    TrainConfig(rank=1, alpha=7.0, rslora=True),
    TrainConfig(rank=6, targets=("q_proj", "down_proj")),
    TrainConfig(rank=3, init="pissa"),
    TrainConfig(rank=2, lora_bias=True),
    TrainConfig(rank=5, dora=True),
    TrainConfig(rank=8, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 1.0}),
    TrainConfig(rank=4, targets="attention", init="gaussian"),
]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("pack", [False, True])
def test_eight_at_once_have_the_gradients_of_eight_alone(dropout, pack):
    configs = [replace(config, dropout=dropout * (number % 4 != 3)) for number, config in enumerate(EIGHT)]
    windows = [list(loader(number, pack=pack).epoch(0))[: 1 + number % 3] for number in range(8)]
    at_once, losses = gradients(llama(), configs, windows, together)
    alone, their_losses = gradients(llama(), configs, windows, in_turns)
    for name, gradient in alone.items():
        assert float((at_once[name] - gradient).norm() / gradient.norm()) < 1e-6, name
        assert losses[name][0] == pytest.approx(their_losses[name][0], rel=1e-6)
        assert losses[name][1] == their_losses[name][1]


def test_turns_have_the_bits_of_a_plain_injection():
    config, window = TrainConfig(rank=4, dropout=0.2), list(loader(0).epoch(0))[:2]
    alone, _ = gradients(llama(), [config], [window], in_turns)
    torch.manual_seed(0)
    injected = inject(llama(), config)
    with torch.no_grad():
        for name, parameter in injected.parameters().items():
            if not name.endswith(".a"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    seed_all(100, "step", 3)
    window_gradient(llama().train(), window, count_labels, None)
    expected = torch.cat([p.grad.flatten() for p in injected.parameters().values()])
    injected.remove()
    assert torch.equal(alone["0"], expected)


class Zoo(nn.Module):
    """One layer of every kind, in float64; rows are kept apart, and each has its loss."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1, groups=2)
        self.plain = nn.Linear(8, 8, bias=False)
        self.out = nn.Linear(8, 4)

    def each(self, ids):
        x = torch.tanh(self.conv(self.embed(ids).transpose(1, 2))).transpose(1, 2)
        return self.out(torch.tanh(self.plain(x))).mean(1)

    def forward(self, ids, labels):
        return nn.functional.cross_entropy(self.each(ids), labels)

    @staticmethod
    def row_losses(model, batch):
        return nn.functional.cross_entropy(model.each(batch["ids"]), batch["labels"], reduction="none")


def zoo():
    torch.manual_seed(0)
    return Zoo().double()


def zoo_batch(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return {
        "ids": torch.randint(20, (count, 5), generator=generator),
        "labels": torch.randint(4, (count,), generator=generator),
    }


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_every_kind_of_layer_in_float64(dropout):
    everything = ("embed", "conv", "plain", "out")
    configs = [
        TrainConfig(rank=2, targets=everything, dropout=dropout),
        TrainConfig(rank=4, targets=("plain", "conv"), dora=False, lora_bias=True, dropout=dropout),
        TrainConfig(rank=2, targets=("plain", "embed"), dora=True, dropout=dropout),
        TrainConfig(rank=2, targets=("out",), init="olora", dropout=dropout),
    ]
    windows = [[zoo_batch(number, 1 + number)] for number in range(4)]
    at_once, _ = gradients(zoo(), configs, windows, together)
    alone, _ = gradients(zoo(), configs, windows, in_turns)
    for name, gradient in alone.items():
        assert float((at_once[name] - gradient).norm() / gradient.norm()) < 1e-12, name


@settings(max_examples=15, deadline=None)
@given(
    neighbours=st.lists(
        st.tuples(st.integers(0, 99), st.integers(1, 4), st.integers(1, 6), st.booleans()), min_size=1, max_size=4
    ),
    place=st.integers(0, 4),
    dropout=st.sampled_from([0.0, 0.5]),
)
def test_a_gradient_does_not_depend_on_its_neighbours(neighbours, place, dropout):
    place = min(place, len(neighbours))
    mine = (TrainConfig(rank=3, dropout=dropout), list(loader(1).epoch(0))[:2])
    others = [
        (
            TrainConfig(rank=rank, dropout=dropout * drops),
            list(loader(seed, count=size, size=size, most=16).epoch(0))[:1],
        )
        for seed, rank, size, drops in neighbours
    ]
    pairs = [*others[:place], mine, *others[place:]]
    found, losses = gradients(llama(), *zip(*pairs, strict=True), together)
    alone, alone_losses = gradients(llama(), *zip(*pairs, strict=True), in_turns)
    mine_at_once, mine_alone = found[str(place)], alone[str(place)]
    assert float((mine_at_once - mine_alone).norm() / mine_alone.norm()) < 1e-6
    assert losses[str(place)][0] == pytest.approx(alone_losses[str(place)][0], rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_neighbour_that_is_no_number_reaches_nobody(bad):
    def spoil(way, turns):
        with torch.no_grad():
            for name, parameter in way.shared.members["1"].parameters().items():
                if name.endswith(".b"):
                    parameter[0, 0] = bad
        return together(way, turns)

    configs = [TrainConfig(rank=2 + number, dropout=0.1) for number in range(3)]
    windows = [list(loader(number).epoch(0))[:1] for number in range(3)]
    found, losses = gradients(llama(), configs, windows, spoil)
    alone, _ = gradients(llama(), configs, windows, in_turns)
    assert not math.isfinite(losses["1"][0])
    for name in ("0", "2"):
        assert float((found[name] - alone[name]).norm() / alone[name].norm()) < 1e-6


def test_rows_of_the_base_alone_stand_beside_those_of_adapters():
    model, shared = llama().eval(), Shared(llama())
    ids = torch.randint(1, VOCABULARY, (5, 7), generator=torch.Generator().manual_seed(0))
    before = model(input_ids=ids).logits
    trained = alone(model, members(1)["m0"])
    injected = lf.attach(model, trained, trainable=False)
    adapted = model.eval()(input_ids=ids).logits
    injected.remove()
    shared.join("one", TrainConfig(), trained)
    with shared.rows([Rows("one", 2), Rows(None, 2), Rows("one", 1)]), torch.no_grad():
        found = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, before)
    shared.close()
    assert not torch.allclose(adapted, before, atol=1e-3)
    assert torch.allclose(found[2:4], before[2:4], atol=1e-5)
    assert torch.allclose(found[[0, 1, 4]], adapted[[0, 1, 4]], atol=1e-5)


def members(count=4, **changes):
    common = {"lr": 3e-3, "max_steps": 6, "warmup": 1, **changes}
    return {
        f"m{number}": Member(
            loader(number),
            TrainConfig(
                rank=2 + number,
                dropout=0.1 * number,
                seed=number,
                schedule=("linear", "cosine", "constant")[number % 3],
                grad_accum=1 + number % 2,
                max_grad_norm=number % 2,
                loraplus_ratio=1.0 + number,
                **common,
            ),
        )
        for number in range(count)
    }


def alone(model, member, **more):
    return train(model, member.batches, member.config, valid=member.valid, **more)


def test_each_adapter_and_each_metric_is_that_of_its_own_run():
    seen = {}
    found = train_many(llama(), members(), on_step=lambda name, m: seen.setdefault(name, []).append(m))
    assert found.apart is None
    assert list(found) == ["m0", "m1", "m2", "m3"]
    for name, member in members().items():
        steps = []
        expected = alone(llama(), member, on_step=steps.append)
        assert gap(found[name], expected) < 1e-5, name
        for ours, theirs in zip(seen[name], steps, strict=True):
            assert (ours.step, ours.epoch, ours.tokens, ours.lr) == (
                theirs.step,
                theirs.epoch,
                theirs.tokens,
                theirs.lr,
            )
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)


def test_under_autocast_weights_are_cast_once_and_losses_agree():
    several = {
        name: replace(m, config=replace(m.config, precision="bf16"), joins=n)
        for n, (name, m) in enumerate(members(3).items())
    }
    seen = {}
    found = train_many(llama(), several, on_step=lambda name, m: seen.setdefault(name, []).append(m.loss))
    assert found.apart is None
    for name, member in several.items():
        steps = []
        alone(llama(), member, on_step=lambda m, steps=steps: steps.append(m.loss))
        assert seen[name] == pytest.approx(steps, rel=2e-2)
    assert not any({"narrow_weight", "forward"} & module.__dict__.keys() for module in llama().modules())


def test_adapters_join_and_leave():
    several = members(3)
    several["m1"] = replace(several["m1"], joins=2)
    several["m2"] = replace(several["m2"], joins=20, config=replace(several["m2"].config, max_steps=2))
    several["m0"] = replace(several["m0"], config=replace(several["m0"].config, max_steps=3))
    order = []
    found = train_many(
        llama(), several, on_step=lambda name, _: order.append(name), on_end=lambda n, _: order.append(n)
    )
    assert order == [*["m0"] * 4, *["m1"] * 7, *["m2"] * 3]  # each step, and the end
    for name, member in several.items():
        assert gap(found[name], alone(llama(), member)) < 1e-5


def test_only_so_many_go_together():
    found = train_many(llama(), members(3), at_once=2)
    assert same_bits(found["m2"], alone(llama(), members(3)["m2"]))  # it had nobody beside it
    assert gap(found["m0"], alone(llama(), members(3)["m0"])) < 1e-5


def test_the_model_is_left_as_it_was():
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    training, modules = model.training, list(dict(model.named_modules()))
    train_many(model, members(2))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert (model.training, modules) == (training, list(dict(model.named_modules())))
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_one_that_diverges_ends_alone():
    several = members(3)
    several["m1"] = replace(several["m1"], config=replace(several["m1"].config, lr=1e30, max_grad_norm=0, warmup=0))
    found = train_many(llama(), several)
    assert list(found) == ["m0", "m2"]
    assert list(found.failed) == ["m1"]
    assert "m1" not in found
    with pytest.raises(NumericalError, match=r"^m1: "):
        _ = found["m1"]
    for name in found:
        assert gap(found[name], alone(llama(), members(3)[name])) < 1e-5


def test_one_without_labels_ends_alone():
    several = members(2)
    silent = [{"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.full((1, 4), -100)}]
    several["m1"] = replace(several["m1"], batches=silent)
    found = train_many(llama(), several)
    assert list(found) == ["m0"]
    assert "has a label" in str(found.failed["m1"])


class Mixing(nn.Module):
    """A model whose rows see each other."""

    def __init__(self, kind):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 3)
        self.between = nn.BatchNorm1d(8, track_running_stats=False) if kind == "norm" else nn.Dropout(0.3)

    def forward(self, x, labels):
        return nn.functional.cross_entropy(self.outer(self.between(self.inner(x))), labels)

    @staticmethod
    def row_losses(model, batch):
        y = model.outer(model.between(model.inner(batch["x"])))
        return nn.functional.cross_entropy(y, batch["labels"], reduction="none")


def mixing_members():
    generator = torch.Generator().manual_seed(0)

    def batches():
        x = torch.randn(3, 6, 4, generator=generator)
        return [{"x": part, "labels": (part[:, 0] > 0).long()} for part in x]

    return {
        name: Member(
            batches(), TrainConfig(targets=("inner", "outer"), rank=2, lr=1e-2, epochs=2, seed=number, dropout=0.2)
        )
        for number, name in enumerate("ab")
    }


@pytest.mark.parametrize("kind", ["norm", "dropout"])
def test_where_rows_mix_the_adapters_take_turns(kind):
    several = mixing_members()
    torch.manual_seed(0)
    model = Mixing(kind)
    found = train_many(model, several, row_losses=Mixing.row_losses)
    assert "mixes rows" in found.apart
    assert all(same_bits(found[name], alone(model, member)) for name, member in several.items())


def test_a_model_of_one_loss_for_all_rows_takes_turns():
    several = mixing_members()
    torch.manual_seed(0)
    model = Mixing("dropout")
    found = train_many(model, several)
    assert found.apart == "Mixing gives one loss for all rows (give row_losses)"
    assert all(same_bits(found[name], alone(model, member)) for name, member in several.items())


def test_batches_that_cannot_be_put_together_take_turns():
    several = members(2)
    several["m1"] = replace(several["m1"], batches=loader(1, pack=True))
    found = train_many(llama(), several)
    assert "same keys" in found.apart
    assert all(same_bits(found[name], alone(llama(), member)) for name, member in several.items())


def test_rows_without_a_mask_get_one_where_lengths_differ():
    bare = [
        {k: v for k, v in batch.items() if k != "attention_mask"} for batch in (loader(1, least=5, most=5).epoch(0))
    ]
    longer = [
        {k: v for k, v in batch.items() if k != "attention_mask"} for batch in (loader(2, least=9, most=9).epoch(0))
    ]
    config = TrainConfig(rank=2, max_steps=3, dropout=0.1, lr=1e-3)
    found = train_many(llama(), {"short": (bare, config), "long": (longer, config)})
    assert found.apart is None
    assert gap(found["short"], train(llama(), bare, config)) < 1e-5


class Pool(nn.Module):
    """A model that sees a whole row at once: without a mask it would see what the row was filled up with."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 3)

    def each(self, input_ids, labels, attention_mask=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mean = (self.embed(input_ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return nn.functional.cross_entropy(self.out(mean), labels, reduction="none")

    def forward(self, input_ids, labels, attention_mask=None):
        return self.each(input_ids, labels, attention_mask).mean()

    @staticmethod
    def row_losses(model, batch):
        return model.each(**batch)


def test_what_rows_are_filled_up_with_is_seen_by_nobody():
    torch.manual_seed(0)
    model = Pool()

    def batches(*lengths):
        return [
            {"input_ids": torch.randint(1, VOCABULARY, (2, length)), "labels": torch.randint(3, (2,))}
            for length in lengths
        ]

    config = TrainConfig(rank=2, targets=("out",), max_steps=3, lr=1e-2, dropout=0.2)
    several = {"short": (batches(4, 3, 2), config), "long": (batches(4, 9, 5), config)}  # as long in the first step
    found = train_many(model, several, row_losses=Pool.row_losses)
    assert found.apart is None
    for name, (own, _) in several.items():
        assert gap(found[name], train(model, own, config)) < 1e-5


def test_gradient_checkpointing_meets_the_same_masks():
    several = {name: replace(m, config=replace(m.config, dropout=0.3)) for name, m in members(2).items()}
    again = {name: replace(m, config=replace(m.config, grad_checkpoint=True)) for name, m in several.items()}
    plain, checkpointed = train_many(llama(), several), train_many(llama(), again)
    assert checkpointed.apart is None
    assert all(gap(checkpointed[name], plain[name]) < 1e-5 for name in several)


def judged():
    """Members with evaluations, early stops, one that joins late and one that diverges."""
    several = members(4, eval_every=2, patience=2)
    valid = loader(50)
    several = {name: replace(member, valid=valid) for name, member in several.items()}
    several["m3"] = replace(several["m3"], config=replace(several["m3"].config, lr=1e30, max_grad_norm=0, warmup=0))
    several["m0"] = replace(several["m0"], config=replace(several["m0"].config, max_steps=2))
    several["m2"] = replace(several["m2"], joins=2)
    soon = {"lr": 0.3, "warmup": 0, "max_grad_norm": 0, "eval_every": 1, "max_steps": 7}  # best soon, then worse
    several["m1"] = replace(several["m1"], config=replace(several["m1"].config, **soon))
    return several


def test_evaluations_count_as_in_a_run_alone():
    found = train_many(llama(), judged())
    for name in ("m0", "m1", "m2"):
        assert gap(found[name], alone(llama(), judged()[name])) < 1e-5


def _lines(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


@pytest.mark.parametrize("at", range(1, 8))
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, at):
    whole = train_many(llama(), judged(), run=tmp_path / "whole")
    rounds, run = [], tmp_path / "run"
    train_many(llama(), judged(), run=run, should_stop=lambda: rounds.append(1) or len(rounds) == at)
    ended = []
    found = train_many(llama(), judged(), run=run, resume=True, on_end=lambda name, _: ended.append(name))
    assert list(found) == list(whole) == ["m0", "m1", "m2"]
    assert sorted(ended) == ["m0", "m1", "m2"]
    assert str(found.failed["m3"]) == str(whole.failed["m3"])
    assert all(same_bits(found[name], whole[name]) for name in whole)
    assert _lines(run) == _lines(tmp_path / "whole")


def test_the_best_of_what_is_resumed_was_before_the_break(tmp_path):
    whole = train_many(llama(), judged(), run=tmp_path)
    losses = [line["eval_loss"] for line in _lines(tmp_path) if line["name"] == "m1"]
    assert losses.index(min(losses)) < len(losses) - 2
    assert not same_bits(
        whole["m1"],
        alone(
            llama(),
            replace(judged()["m1"], valid=None, config=replace(judged()["m1"].config, eval_every=None, patience=None)),
        ),
    )


def test_a_resumed_run_takes_turns_if_it_did(tmp_path):
    torch.manual_seed(0)
    model, several = Mixing("norm"), mixing_members()
    whole = train_many(model, several, row_losses=Mixing.row_losses)
    train_many(model, several, row_losses=Mixing.row_losses, run=tmp_path, should_stop=lambda: True)
    found = train_many(model, several, row_losses=Mixing.row_losses, run=tmp_path, resume=True)
    assert found.apart == whole.apart
    assert all(same_bits(found[name], whole[name]) for name in several)


def test_a_run_is_resumed_only_as_it_was(tmp_path):
    train_many(llama(), members(2), run=tmp_path)
    with pytest.raises(TrainingError, match="holds a run already"):
        train_many(llama(), members(2), run=tmp_path)
    with pytest.raises(TrainingError, match="begun with the adapters m0, m1, now they are m0, m1, m2"):
        train_many(llama(), members(3), run=tmp_path, resume=True)
    changed = members(2)
    changed["m1"] = replace(changed["m1"], config=replace(changed["m1"].config, lr=1.0))
    with pytest.raises(TrainingError, match=r"lr=0\.003 for m1, now it is 1\.0"):
        train_many(llama(), changed, run=tmp_path, resume=True)
    with pytest.raises(LoraforgeError):
        train(llama(), members(1)["m0"].batches, members(1)["m0"].config, run=tmp_path, resume=True)
    state = next(tmp_path.glob("step-*/state.json"))
    state.write_text("{}")
    with pytest.raises(StoreError, match="no checkpoint of several adapters"):
        train_many(llama(), members(2), run=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"modules_to_save": ("norm",)}, TargetError, "m1: modules_to_save trains tensors of the base"),
        ({"bias": "all"}, TargetError, "m1: bias='all' trains tensors of the base"),
        ({"precision": "bf16"}, TrainingError, "m1 has precision='bf16' and m0 'auto'"),
        ({"grad_checkpoint": True}, TrainingError, "m1 has grad_checkpoint=True"),
        ({"compile": True, "dropout": 0.0}, TrainingError, "m1: compile is for one adapter alone"),
        ({"patience": 1}, TrainingError, "m1: eval_every and patience"),
        ({"targets": ("nothing",)}, TargetError, "match no module"),
    ],
)
def test_what_cannot_share_a_base_is_refused_before_anything_runs(change, error, says):
    several = members(2)
    several["m1"] = replace(several["m1"], config=replace(several["m1"].config, **change))
    ran = []
    with pytest.raises(error, match=says):
        train_many(llama(), several, on_step=lambda *_: ran.append(1))
    assert not ran
    assert not any("forward" in module.__dict__ for module in llama().modules())


def test_nobody_to_train_is_refused():
    with pytest.raises(TrainingError, match="no adapter to train"):
        train_many(llama(), {})


def test_the_rungs_of_halving():
    assert Halving(first=2, eta=3).plan(9, 100) == [(2, 3), (6, 1)]
    assert Halving(first=1, eta=2).plan(5, 3) == [(1, 2), (2, 1)]
    assert Halving(first=10).plan(9, 9) == []
    assert losers({"a": 2.0, "b": math.nan, "c": 1.0, "d": 2.0}, 2) == ["d", "b"]
    for wrong in ({"first": 0}, {"first": 1, "eta": 1}, {"first": True}):
        with pytest.raises(TrainingError, match="halving: "):
            Halving(**wrong)


def test_losers_are_dropped_and_the_winner_is_what_it_is_alone():
    valid = loader(50)
    rates = {"slow": 1e-6, "best": 1e-2, "mild": 1e-4, "wild": 1e30}
    several = {
        name: Member(loader(50), TrainConfig(rank=2, lr=lr, max_steps=6, max_grad_norm=0), valid=valid, contest="all")
        for name, lr in rates.items()
    }
    steps = {}
    found = train_many(
        llama(), several, halving=Halving(first=2, eta=2), on_step=lambda name, m: steps.update({name: m.step})
    )
    assert list(found) == ["best"]
    assert {name: dropped.step for name, dropped in found.dropped.items()} == {"slow": 2, "mild": 4}
    assert list(found.failed) == ["wild"]
    assert steps["slow"] == 2
    assert gap(found["best"], alone(llama(), several["best"])) < 1e-5
    with pytest.raises(KeyError):
        _ = found["slow"]


def test_a_contest_needs_an_evaluation_and_one_start():
    halving = Halving(first=1)
    with pytest.raises(TrainingError, match="m0: a contest is judged by an evaluation"):
        train_many(llama(), {"m0": replace(members(1)["m0"], contest="x")}, halving=halving)
    several = {name: replace(m, contest="x", valid=loader(9)) for name, m in members(2).items()}
    several["m1"] = replace(several["m1"], joins=1)
    with pytest.raises(TrainingError, match="m1 joins later"):
        train_many(llama(), several, halving=halving)


def test_the_public_names():
    assert lf.train_many is train_many
    assert lf.Member is Member
