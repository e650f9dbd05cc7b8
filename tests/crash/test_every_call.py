"""Killed, or refused, at every call of a merge or unmerge that changes the file system: see ``harness``."""

import errno
import shutil
from dataclasses import replace

import pytest

from tests.crash.driver import MUTANTS, Fault
from tests.crash.harness import (
    JOURNAL,
    Command,
    Driver,
    Trial,
    Truth,
    cut_everywhere,
    driver_process,
    fail_everywhere,
    files_of,
    kill_and_go_back,
    kill_everywhere,
    kill_twice,
    loaded,
    make_truth,
    not_durable,
    opened,
)

LEAST = {"merge": 45, "unmerge": 35, "merge_in_place": 40, "unmerge_in_place": 30}
KINDS = {"sharded": {}, "dora": {"dora": True}, "single": {"single": True}}


@pytest.fixture(scope="module")
def driver():
    with driver_process() as found:
        yield found


@pytest.fixture(scope="module")
def truths(driver, tmp_path_factory) -> dict[str, Truth]:
    place = tmp_path_factory.mktemp("truths")
    return {kind: make_truth(driver, place / kind, **options) for kind, options in KINDS.items()}


@pytest.fixture
def trial(driver, truths, tmp_path):
    def make(command: str, kind: str = "sharded", **options: object) -> Trial:
        return Trial(driver, truths[kind], command, tmp_path / "place", options)

    return make


def test_what_is_tried_covers_every_kind_of_tensor(truths):
    base, merged = truths["sharded"].models
    same = {name for name in base if base[name] == merged[name]}
    assert same == {"model.layers.0.norm.weight", "model.embed_tokens.weight"}
    base, merged = truths["dora"].models
    assert {n for n in base if base[n] != merged[n]} == {"model.layers.0.q.weight", "model.layers.0.v.weight"}
    for truth in truths.values():
        assert opened(truth.base) == loaded(truth.base)
        assert opened(truth.merged) == loaded(truth.merged)


@pytest.mark.parametrize("command", LEAST)
def test_every_change_is_heard(command, trial):
    one = trial(command, watched=True)
    run = one.run(one.fresh())
    heard = [name for name, _ in run.places if name in ("mkdir", "open", "rename", "unlink", "rmdir")]
    assert run.done
    assert list(run.audit) == heard
    assert len(heard) > 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", LEAST)
def test_killed_before_each_call(command, kind, trial):
    one = trial(command, kind)
    calls = kill_everywhere(one)
    assert one.problems == []
    assert calls >= LEAST[command] * (0.6 if kind == "dora" else 0.8 if kind == "single" else 1)


@pytest.mark.parametrize("options", [{"poor": True}, {"threads": True}], ids=["poor", "threads"])
@pytest.mark.parametrize("command", ["merge", "merge_in_place"])
def test_killed_where_calls_are_others_or_in_any_order(command, options, trial):
    one = trial(command, **options)
    calls = kill_everywhere(one)
    assert one.problems == []
    assert calls >= LEAST[command]


@pytest.mark.parametrize("command", LEAST)
def test_killed_and_the_second_run_as_well(command, trial):
    one = trial(command)
    recorded = one.recorded()
    writes = [
        number for number, (name, path) in enumerate(recorded.places) if name == "pwrite" and ".safetensors" in path
    ]
    half = writes[len(writes) // 2]
    assert kill_twice(one, half) >= LEAST[command] / 3
    firsts = range(0, len(recorded.calls) - (0 if one.in_place else 1), 4)
    tried = sum(kill_twice(one, first, every=7) for first in firsts)
    assert one.problems == []
    assert len(firsts) >= LEAST[command] / 4
    assert tried > len(firsts) * 10


@pytest.mark.parametrize("command", ["merge_in_place", "unmerge_in_place"])
def test_killed_in_place_and_taken_back(command, trial):
    one = trial(command)
    calls, possible = kill_and_go_back(one)
    assert one.problems == []
    assert calls >= LEAST[command]
    assert 15 < possible < calls


def test_killed_in_place_before_the_journal_then_merged_elsewhere(trial, tmp_path):
    one = trial("merge_in_place")
    recorded, wrong = one.recorded(), []
    begun = [path for _, path in recorded.places].index("loraforge.journal.new")
    journal = next(n for n, call in enumerate(recorded.calls) if call.get("target", "").endswith(JOURNAL))
    assert journal > begun > 5
    for number in range(journal + 1):
        command = one.fresh()
        assert one.run(command, Fault("kill", number)).killed
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        assert one.run(Command("merge", command.model, command.adapters, out)).done
        surplus = files_of(out).keys() - files_of(one.truth.merged).keys()
        if surplus:
            wrong.append((recorded.places[number], surplus))
    assert wrong == []


@pytest.mark.parametrize("command", LEAST)
def test_a_write_that_is_cut_off(command, trial):
    one = trial(command)
    cuts = cut_everywhere(one)
    assert one.problems == []
    assert cuts > 15


@pytest.mark.parametrize(("number", "lasting"), [(errno.ENOSPC, True), (errno.EIO, False)], ids=["full", "broken"])
@pytest.mark.parametrize("command", LEAST)
def test_each_call_raises(command, number, lasting, trial):
    one = trial(command)
    calls = fail_everywhere(one, number, lasting=lasting)
    assert one.problems == []
    assert calls >= LEAST[command]


@pytest.mark.parametrize("command", LEAST)
def test_writes_that_stop_half_way_go_on(command, trial):
    one = trial(command, short=True)
    assert len(one.recorded().calls) > 2 * LEAST[command]
    assert one.problems == []


def test_what_a_killed_merge_left_is_swept_by_another(driver, truths, tmp_path):
    other = make_truth(driver, tmp_path / "other", weight=0.5)
    assert other.models[1] != truths["sharded"].models[1]
    one = Trial(driver, truths["sharded"], "merge", tmp_path / "place")
    two = Trial(driver, replace(other, models=(*other.models, *truths["sharded"].models)), "merge", tmp_path / "place")
    recorded = one.recorded()
    calls = 0
    for first in (len(recorded.calls) // 2, len(recorded.calls) - 2):  # shards under other names, and under their own
        assert one.run(one.fresh(), Fault("kill", first)).killed
        saved = tmp_path / f"saved-{first}"
        shutil.copytree(one.place, saved)
        sweeping = two.run(two.back_to(saved))
        two.check_finished("swept")
        for number in range(len(sweeping.calls)):
            command = two.back_to(saved)
            two.check_killed(f"swept, killed at {number}", two.run(command, Fault("kill", number)), sweeping, number)
            two.finish(f"swept, killed at {number}", command)
        calls += len(sweeping.calls)
    assert two.problems == []
    assert calls > 2 * LEAST["merge"]


@pytest.mark.parametrize("command", LEAST)
def test_nothing_gets_its_last_name_before_it_is_durable(command, trial):
    one = trial(command)
    recorded, wrong = one.recorded(), not_durable([one.recorded()])
    for number in range(len(recorded.calls) - 1):
        again = one.fresh()
        killed = one.run(again, Fault("kill", number))
        wrong += [f"killed before {number}: {each}" for each in not_durable([killed, one.run(again)])]
    assert wrong == []


@pytest.mark.parametrize(
    ("mutant", "command", "kind", "expected"),
    [
        ("shards stay under their names", "merge_in_place", "sharded", "is taken for a model"),
        ("shards stay under their names", "unmerge_in_place", "dora", "is taken for a model"),
        ("shards are made under their names", "merge", "single", "is taken for a model"),
        ("the output appears first", "merge", "sharded", "not complete"),
        ("nothing is put away", "merge", "sharded", "other files"),
        ("written pages are written again", "merge_in_place", "sharded", "the second run"),
    ],
)
def test_a_mistake_is_seen(mutant, command, kind, expected, trial):
    one = trial(command, kind, mutant=mutant)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trial, "recorded", lambda trial: trial.run(trial.fresh()))
        kill_everywhere(one)
    assert any(expected in problem for problem in one.problems), one.problems


def test_a_missing_fsync_is_seen(trial):
    for command in LEAST:
        one = trial(command, mutant="nothing is made durable")
        assert any("before an fsync" in problem for problem in not_durable([one.run(one.fresh())]))


def test_a_change_past_the_disk_is_seen(trial):
    one = trial("merge", watched=True)
    command = one.fresh()
    run = one.run(replace(command, out=one.place / "deeper" / "model"))
    assert run.done
    assert "mkdir" in run.audit


def test_every_mutant_is_used():
    assert len(MUTANTS) == 6
    assert isinstance(Driver, type)
