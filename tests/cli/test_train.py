"""``loraforge train``: from a base and JSON lines to a stored adapter, and every way to be refused in one line."""

import json
import os
import random
import shutil
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


def _model_of_two_layers():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, num_key_value_heads=1, **sizes))


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
    for fragment in ("trained  ", "of 24.4k", "24 samples", "steps    9", " at the peak: base ", ">[["):
        assert fragment in shown.out
    found = run(*command, "--json").json
    adapter = lf.inject(_model(base), lf.LoraConfig(rank=2)).adapter()
    assert found["trainable"] == adapter.parameters
    assert (found["bytes_of_adapter"], found["bytes_of_moments"]) == (4 * adapter.parameters, 8 * adapter.parameters)
    parts = sum(found[f"bytes_of_{name}"] for name in ("base", "adapter", "moments", "step"))
    assert found["bytes_at_peak"] == parts > found["bytes_of_base"] >= 4 * found["parameters"]
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


@pytest.fixture
def atop(spoken, run, tmp_path):
    """Make a base of 16-bit weights and a parent for it, as a directory and in the store; return the two folders."""
    base, parent = tmp_path / "half", tmp_path / "parent"
    _model(spoken).to(torch.bfloat16).save_pretrained(str(base))
    make_tokenizer(base)
    injected = lf.inject(_model(base), lf.LoraConfig(rank=3, init="gaussian"))
    generator = torch.Generator().manual_seed(5)
    for parameter in injected.parameters().values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    lf.save(injected.adapter(), parent)
    assert run("push", parent, "parent:v1").code == 0
    return base, parent


def words(tmp_path):
    draw = random.Random(1)
    lines = ["".join(draw.choice("abcdefgh") for _ in range(6)) for _ in range(16)]
    return write(tmp_path / "words.jsonl", *({"text": line} for line in lines))


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_atop_a_parent_is_training_on_what_merge_writes(atop, precision, run, tmp_path):
    base, _ = atop
    options = ("--data", words(tmp_path), "--lr", "1e-2", "--dropout", "0.1", "--epochs", "3", "--precision", precision)
    assert run("merge", base, "parent:v1", "--out", tmp_path / "merged").code == 0
    files = {name: (base / name).read_bytes() for name in ("model.safetensors", "config.json")}

    assert (
        run("train", "--base", base, "--parent", "parent:v1", *options, "--as", "a:v1", "--run", tmp_path / "a").code
        == 0
    )
    assert run("train", "--base", tmp_path / "merged", *options, "--as", "b:v1", "--run", tmp_path / "b").code == 0
    assert run("train", "--base", base, *options, "--as", "c:v1", "--run", tmp_path / "c").code == 0

    found = losses(tmp_path / "a")
    assert len(found) == 12
    assert found == losses(tmp_path / "b")
    assert all(mine != other for mine, other in zip(found, losses(tmp_path / "c"), strict=True))
    assert lf.content_id(lf.load("a:v1")) == lf.content_id(lf.load("b:v1"))
    assert lf.load("a:v1").settings.base_name == str(base)
    assert {name: (base / name).read_bytes() for name in files} == files


def test_a_child_names_its_parent_by_artifact_and_resumes_only_with_it(atop, run, tmp_path, monkeypatch):
    base, parent = atop
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    digest = run("show", "parent:v1", "--json").json["digest"]
    settings = tmp_path / "run.yaml"
    folder = tmp_path / "run"
    settings.write_text(f"base: {base}\nparent: parent:v1\ndata: {words(tmp_path)}\nas: child:v1\nrun: {folder}\n")
    done = run("train", settings, "--max-steps", "3", "--json").json
    assert [item["digest"] for item in done["derivation"]["inputs"]] == [digest]
    assert f"parent:v1  sha256:{digest.removeprefix('sha256:')[:12]}" in run("log", "child:v1").out

    # as a directory it is another artifact or the same one, but the same function: the same run, and it is kept
    again = run("train", settings, "--max-steps", "3", "--parent", parent, "--resume", "--as", "twin:v1", "--json").json
    assert again["content_id"] == done["content_id"]
    assert [item["digest"] for item in again["derivation"]["inputs"]] == [digest]
    other = run("train", settings, "--max-steps", "3", "--parent", "child:v1", "--resume", "--as", "x:v1")
    assert (other.code, "was begun with inputs.parent=" in other.err) == (2, True)
    assert list((tmp_path / "scratch").iterdir()) == [], "the merged base is not left behind"


def test_a_parent_given_as_a_directory_is_stored_with_its_child(atop, run, tmp_path):
    base, parent = atop
    digest = run("show", "parent:v1", "--json").json["digest"]
    assert (run("rm", "parent:v1").code, run("gc", "--yes").code) == (0, 0)
    assert run("show", digest).code == 3
    options = ("--base", base, "--parent", parent, "--data", words(tmp_path), "--max-steps", "1")
    found = run("train", *options, "--as", "child:v1", "--json").json
    assert [item["digest"] for item in found["derivation"]["inputs"]] == [digest]
    assert run("gc", "--yes").code == 0
    assert run("show", digest).code == 0


def test_a_parent_that_cannot_be_merged_is_refused_in_one_line(atop, base, data, run, tmp_path):
    half, parent = atop
    (tmp_path / "scaled").mkdir()
    config = json.loads((parent / "adapter_config.json").read_text())
    (tmp_path / "scaled" / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    (tmp_path / "scaled" / "adapter_model.safetensors").write_bytes((parent / "adapter_model.safetensors").read_bytes())
    deep = lf.inject(_model_of_two_layers(), lf.LoraConfig(rank=2, init="gaussian"))
    lf.save(deep.adapter(), tmp_path / "deep")
    wide = tmp_path / "wide"
    lf.save(
        lf.inject(_model(make_windowed(tmp_path / "w")), lf.LoraConfig(rank=2, targets=("lm_head",))).adapter(), wide
    )
    for source, code, message in [
        ("nobody:v1", 3, "nobody"),
        (
            tmp_path / "deep",
            2,
            f"the parent {tmp_path}/deep does not fit {half}: 7 of 14 keys have no tensor",
        ),
        (wide, 2, f"the parent {wide} does not fit {half}: target 'lm_head' is for a tensor of shape [259, 32]"),
        (tmp_path / "scaled", 2, "was initialised by pissa"),
        (half, 3, "no adapter_model.safetensors there"),
    ]:
        for more in ((), ("--dry-run",)):
            done = run("train", "--base", half, "--parent", source, "--data", words(tmp_path), "--as", "x:v1", *more)
            assert (done.code, message in done.err) == (code, True), (source, done)
            assert done.err.count("\n") == 1
            assert done.out == ""


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


def test_a_base_without_some_of_its_weights_is_refused(base, data, run, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    done = run("train", "--base", tmp_path / "base", "--data", data, "--as", "x")
    assert done.code == 2
    assert "1 weights of the model are not there, the first is 'model.layers.0.self_attn.q_proj.weight'" in done.err


def test_an_ending_that_the_base_cannot_say_is_named(spoken, data, run, tmp_path):
    from safetensors.torch import load_file, save_file

    lines = write(tmp_path / "abc.jsonl", {"prompt": "ab", "completion": "cd"})
    command = ("train", "--data", lines, "--dry-run", "--base")
    assert "never trained" not in run(*command, spoken).err
    shutil.copytree(spoken, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    for other in (None, 9):
        weights["lm_head.weight"][2] = 0.0 if other is None else weights["lm_head.weight"][other]
        save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
        shown = run(*command, tmp_path / "base")
        assert "answers end in token 2 ('</s>'), whose row in the base's head was never trained" in shown.err
    with_head = run(*command, tmp_path / "base", "--modules-to-save", "lm_head", "--json")
    assert "never trained" not in with_head.err
    assert with_head.json["trainable"] > 16 * 32
