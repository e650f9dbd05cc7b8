"""``loraforge train``: from a base and JSON lines to a stored adapter, and every way to be refused in one line."""

import json
import os
import random
import signal
import subprocess
import sys

import pytest
import torch

import loraforge as lf
from loraforge_cli.train_settings import targets
from tests.unit.training.test_ranks import torchrun

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own remarks

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors on a busy machine: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_base(folder, rows=259):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=rows, num_key_value_heads=1, max_position_embeddings=64, **sizes)
    LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder


def make_windowed(folder):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=259, num_key_value_heads=1, sliding_window=8, max_position_embeddings=64, **sizes)
    MistralForCausalLM(config).save_pretrained(str(folder))
    return folder


def make_tokenizer(folder, template=TEMPLATE):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<user>", "<assistant>", *"abcdefgh"]
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    extra = words[3:5]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=extra, **names)
    fast.chat_template = template
    fast.save_pretrained(str(folder))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    folder = make_base(tmp_path_factory.mktemp("spoken") / "base", rows=16)
    make_tokenizer(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdef") for _ in range(draw.randint(2, 6))) for _ in range(24)]
    return write(tmp_path / "d.jsonl", *({"prompt": f"{word}>", "completion": word.upper()} for word in words))


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_from_lines_to_a_stored_adapter(base, data, run, tmp_path):
    command = ("train", "--base", base, "--data", data, "--as", "up:v1", "--lr", "1e-2", "--val-split", "0.2")
    more = (
        "--rank",
        "4",
        "--dropout",
        "0.1",
        "--pack",
        "--max-length",
        "40",
        "--epochs",
        "2",
        "--targets",
        "attention",
    )
    done = run(*command, *more, "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found["derivation"]["operation"] == "train"
    parameters = found["derivation"]["parameters"]
    assert {"lr": 0.01, "rank": 4, "pack": True, "targets": "attention"}.items() <= parameters.items()
    assert parameters["base"].startswith("sha256:")
    assert set(found["report"]) == {"loss", "eval_loss", "steps"}
    assert {name.rpartition(".")[2] for name in found["targets"]} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert f"loss {found['report']['loss']:g} after" in run("show", "up:v1").out
    assert run(*command, *more, "--force", "--json").json["digest"] == found["digest"], "the same work, the same digest"
    assert run("pull", "up:v1", "--to", tmp_path / "out").code == 0

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(base)), str(tmp_path / "out"))
    tokens = torch.randint(259, (2, 9))
    plain = AutoModelForCausalLM.from_pretrained(str(base))
    lf.attach(plain.eval(), lf.load(tmp_path / "out"), trainable=False)
    assert torch.allclose(model.eval()(input_ids=tokens).logits, plain(input_ids=tokens).logits, atol=1e-5)


def test_a_dry_run_shows_the_plan_and_the_first_sample_and_stores_nothing(base, data, run):
    command = (
        "train",
        "--base",
        base,
        "--data",
        data,
        "--dry-run",
        "--epochs",
        "3",
        "--grad-accum",
        "2",
        "--rank",
        "2",
    )
    shown = run(*command)
    for fragment in ("trained  ", "of 24.4k", "24 samples", "steps    9", "training state", ">[["):
        assert fragment in shown.out
    found = run(*command, "--json").json
    adapter = lf.inject(_model(base), lf.LoraConfig(rank=2)).adapter()
    assert found["trainable"] == adapter.parameters
    assert found["bytes_of_training_state"] == 16 * adapter.parameters
    assert (found["steps"], found["samples"], found["truncated"]) == (9, 24, 0)
    assert run("ls", "--json").json == []
    assert run(*command, "--max-length", "6", "--json").json["truncated"] > 0


def _model(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(base))


def test_yaml_has_the_flags_names_and_flags_win(base, data, run, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"base: {base}\ndata: {data}\nas: up:v1\nlr: 2e-3\nrank: 4\ngrad-accum: 2\nbatch_size: 8\n"
        "targets: [q_proj, v_proj]\n"
    )
    found = run("train", path, "--rank", "2", "--json").json
    assert found["rank"] == 2
    parameters = found["derivation"]["parameters"]
    assert {"lr": 0.002, "grad_accum": 2, "targets": "q_proj, v_proj", "batch_size": 8}.items() <= parameters.items()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning-rate: 1", "there is no setting 'lerning-rate'"),
        ("wramup: 1", "there is no setting 'wramup'; did you mean 'warmup'?"),
        ("lr: fast", "lr is 'fast', expected a number"),
        ("rank: 2.5", "rank is 2.5, expected a whole number"),
        ("rank: true", "rank is True, expected a whole number"),
        ("pack: 1", "pack is 1, expected true or false"),
        ("schedule: steps", "schedule is 'steps', expected one of constant, linear, cosine"),
        ("- a", "is list, expected settings"),
        ("lr: [1]", "lr is list, expected a number"),
        ("targets: [[q]]", "targets is list, expected text"),
        ("targets: {q: 1}", "targets is dict, expected text"),
        ("lr: 1\nlr: 2", "the setting 'lr' stands twice"),
        ("a: &a [x, x]\nlr: [*a, *a]", "has an alias (*name)"),
        ("lr: !!python/object/apply:os.system ['true']", "not YAML"),
        ("lr: 1\n---\nlr: 2", "not YAML"),
        ("a: [", "not YAML"),
        ("lr: -1", "lr is -1.0, expected a number above 0"),
        ("batch_size: 0", "batch_size is 0, expected a whole number from 1"),
        ("val_split: 1", "val_split is 1.0, expected at least 0 and below 1"),
        ("rank: 4", "say which base"),
    ],
)
def test_settings_that_cannot_be_are_named(text, message, run, tmp_path):
    (tmp_path / "run.yaml").write_text(text if text == "rank: 4" or ":" not in text else f"base: b\ndata: d\n{text}\n")
    done = run("train", tmp_path / "run.yaml", "--as", "x:v1")
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1


def test_what_cannot_be_trained_is_refused_in_one_line(base, spoken, data, run, tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats = write(tmp_path / "chats.jsonl", {"messages": chat})
    silent = make_base(tmp_path / "silent", rows=16)
    make_tokenizer(silent, template=None)
    forgetful = make_base(tmp_path / "forgetful", rows=16)
    make_tokenizer(forgetful, template="{% for m in messages[-1:] %}{{ m['content'] }}{% endfor %}")
    long = write(tmp_path / "long.jsonl", {"messages": [*chat, *chat]})
    raising = make_base(tmp_path / "raising", rows=16)
    make_tokenizer(raising, template="{{ raise_exception('no system here') }}")
    (tmp_path / "empty").mkdir()
    wide = write(tmp_path / "wide.jsonl", {"text": "a" * 70})
    windowed = make_windowed(tmp_path / "windowed")
    cases = [
        (
            ("--base", windowed, "--data", data, "--as", "x", "--pack"),
            2,
            "packed it would look further; lower max-length",
        ),
        ((), 2, "say which base"),
        (("--base", base, "--data", data), 2, "say what to call the adapter"),
        (("--base", tmp_path / "empty", "--data", data, "--as", "x:v1"), 3, "no config.json there"),
        (("--base", base, "--data", tmp_path / "no.jsonl", "--as", "x:v1"), 3, "there is no such file"),
        (("--base", base, "--data", tmp_path / "empty", "--as", "x:v1"), 3, "no train.jsonl there"),
        (("--base", base, "--data", data, "--as", "x:v1", "--resume"), 2, "say where they are, --run DIR"),
        (("--base", base, "--data", data, "--as", "x:v1", "--targets", "c_attn"), 2, "'c_attn' match no module"),
        (
            ("--base", base, "--data", data, "--as", "x:v1", "--max-length", "3"),
            2,
            "all 24 samples have nothing to learn",
        ),
        (("--base", base, "--data", data, "--as", "Not A Name"), 2, "Not A Name"),
        (("--base", base, "--data", data, "--as", "x:v1", "--patience", "2"), 2, "give valid, the data for it"),
        (("--base", base, "--data", wide, "--as", "x:v1"), 2, "has 71 tokens, the base 64 positions: lower max-length"),
        (
            ("--base", base, "--data", data, "--as", "x", "--valid", data, "--val-split", "0.1"),
            2,
            "leave --val-split out",
        ),
        (("--base", spoken, "--data", write(tmp_path / "t", {"input_ids": [1, 99]}), "--as", "x"), 2, "has token 99"),
        (("--base", silent, "--data", chats, "--as", "x"), 2, "has no chat template"),
        (("--base", forgetful, "--data", long, "--as", "x"), 2, "changes earlier turns"),
        (("--base", raising, "--data", chats, "--as", "x"), 2, "refuses a chat: no system here"),
    ]
    for arguments, code, message in cases:
        done = run("train", *arguments)
        assert (done.code, message in done.err) == (code, True), (arguments, done.err)
        assert done.err.count("\n") == 1
        assert done.out == ""


def test_a_taken_name_is_found_out_before_the_training(base, data, run):
    assert run("train", "--base", base, "--data", data, "--as", "up:v1", "--max-steps", "1").code == 0
    done = run("train", "--base", base, "--data", data, "--as", "up:v1", "--lr", "1e-3")
    assert done.code == 4
    assert "up:v1 means another adapter already" in done.err
    assert "step" not in done.err


def test_a_chat_is_written_by_the_bases_template(spoken, run, tmp_path):
    turns = [("user", "ab"), ("assistant", "cd"), ("user", "e"), ("assistant", "f")]
    lines = write(tmp_path / "c.jsonl", {"messages": [{"role": role, "content": text} for role, text in turns]})
    shown = run("train", "--base", spoken, "--data", lines, "--dry-run", "--json").json["first_sample"]
    assert shown.replace(" ", "") == "<s><user>ab<assistant>[[cd</s>]]<user>e<assistant>[[f</s>]]"
    shown = run("train", "--base", spoken, "--data", lines, "--mask", "last", "--dry-run", "--json").json[
        "first_sample"
    ]
    assert shown.replace(" ", "") == "<s><user>ab<assistant>cd</s><user>e<assistant>[[f</s>]]"


def test_an_interrupt_saves_and_resume_ends_in_the_same_artifact(base, data, run, tmp_path):
    options = ["--base", str(base), "--data", str(data), "--epochs", "200", "--dropout", "0.1", "--batch-size", "2"]
    limit = ["--max-steps", "120", "--val-split", "0.2", "--eval-every", "50"]
    whole = run("train", *options, *limit, "--as", "whole:v1", "--json").json
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "loraforge_cli",
        "train",
        *options,
        *limit,
        "--as",
        "parts:v1",
        "--run",
        str(folder),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while "step 10/120" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert "with --resume goes on" in rest
    again = run("train", *options, *limit, "--as", "parts:v1", "--run", folder)
    assert (again.code, "holds a run already" in again.err) == (2, True)
    parts = run("train", *options, *limit, "--as", "parts:v1", "--run", folder, "--resume", "--json").json
    assert parts["digest"] == whole["digest"]
    write(data, {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"})
    done = run("train", *options, *limit, "--as", "other:v1", "--run", folder, "--resume")
    assert (done.code, "was begun with inputs.data=" in done.err) == (2, True)


def test_resume_ends_in_the_same_artifact(base, data, run, tmp_path):
    options = (
        "--base",
        base,
        "--data",
        data,
        "--dropout",
        "0.1",
        "--val-split",
        "0.2",
        "--eval-every",
        "2",
        "--epochs",
        "2",
    )
    whole = run("train", *options, "--as", "whole:v1", "--json").json
    folder = tmp_path / "run"
    assert run("train", *options, "--as", "first:v1", "--run", folder, "--save-every", "3").code == 0
    last = max(folder.glob("step-*"))
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    parts = run("train", *options, "--as", "parts:v1", "--run", folder, "--resume", "--json").json
    assert parts["digest"] == whole["digest"]


def test_under_torchrun_one_adapter_is_stored(base, data, run):
    options = ("train", "--base", base, "--data", data, "--batch-size", "2", "--lr", "1e-2", "--max-steps", "3")
    assert run(*options, "--grad-accum", "2", "--as", "one:v1").code == 0
    done = torchrun("-m", "loraforge_cli", *options, "--as", "two:v1", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["name"] == "two"
    one, two = lf.load("one:v1"), lf.load("two:v1")
    assert one.targets.keys() == two.targets.keys()
    for name, pair in one.targets.items():
        assert torch.allclose(pair.delta(), two.targets[name].delta(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("all-linear", "all-linear"),
        ("attention", "attention"),
        ("q_proj", ("q_proj",)),
        ("q_proj, mlp.up_proj", ("q_proj", "mlp.up_proj")),
        (r".*\.[qv]_proj", r".*\.[qv]_proj"),
    ],
)
def test_targets_are_names_or_a_pattern(text, meant):
    assert targets(text) == meant
