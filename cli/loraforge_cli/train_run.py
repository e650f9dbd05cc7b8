"""A training run of the command line: data, plan, progress, and the adapter into the store."""

import json
import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click
import torch

import loraforge
from loraforge.adapter import Adapter
from loraforge.errors import ConflictError, NotFoundError, TrainingError
from loraforge.formats import peft
from loraforge.layers import inject
from loraforge.registry import Registry
from loraforge.training import Metrics, ranks, train
from loraforge.training.checkpoints import METRICS
from loraforge.training.data.formats import read_samples
from loraforge.training.data.loader import Loader, make_loader
from loraforge.training.data.tokens import Counted, Tokenizer, show, tokenize
from loraforge.training.loop import make_plan
from loraforge.training.memory import estimate
from loraforge.training.provenance import base_digest, data_digest, trained
from loraforge_cli.describe import Described, describe
from loraforge_cli.options import Session
from loraforge_cli.output import count, emit, facts, note, size
from loraforge_cli.sources import store_sources
from loraforge_cli.summary import line
from loraforge_cli.train_base import check_fits, check_packs, load_tokenizer, untrained
from loraforge_cli.train_parent import Parent, load_atop, open_parent
from loraforge_cli.train_settings import TrainSettings
from loraforge_registry.canonical import Value
from loraforge_registry.digest import Digest
from loraforge_registry.manifest import Derivation
from loraforge_registry.names import DEFAULT_TAG, RefName

_LOG_EVERY = 10


@dataclass(frozen=True)
class Prepared:
    """All that a run needs."""

    settings: TrainSettings
    model: Any
    tokenizer: Tokenizer
    counted: Counted
    loader: Loader
    valid: Loader | None
    files: tuple[Path, ...]
    parent: Parent | None


def prepare(
    session: Session, settings: TrainSettings, beside: Prepared | None = None, *, parent: Parent | None = None
) -> Prepared:
    """Read data, parent (the one given, else the one that the settings name) and base, and put them together.

    ``beside`` has parent and base already.
    """
    files, valid_file = _files(settings)
    if valid_file is not None and settings.val_split:
        raise click.UsageError(f"evaluate on {valid_file} or on a share of the data: leave --val-split out")
    samples = read_samples(files[0])
    if beside is not None:
        parent, tokenizer = beside.parent, beside.tokenizer
    else:
        parent, tokenizer = parent or open_parent(session, settings.parent), load_tokenizer(settings.base)
    counted = tokenize(samples, tokenizer, settings.max_length, settings.mask)
    rows, held_out = _split(counted, settings)
    if valid_file is not None:
        held_out = tokenize(read_samples(valid_file), tokenizer, settings.max_length, settings.mask).rows
    model = load_atop(settings.base, parent, settings.config.precision) if beside is None else beside.model
    every = (*rows, *held_out)
    check_fits(model, max(len(row.ids) for row in every), max(max(row.ids) for row in every), tokenizer)
    _warn_of_untrained(session, model, counted, tokenizer, settings)
    if settings.pack:
        check_packs(model, max(len(row.ids) for row in every))
    dtype = next(model.parameters()).dtype if settings.pack else None

    def loader(chosen: Any) -> Loader:  # noqa: ANN401 - rows
        return make_loader(
            chosen,
            settings.batch_size,
            seed=settings.config.seed,
            pad=tokenizer.pad,
            max_length=settings.max_length,
            pack_dtype=dtype,
            grouped=settings.group_by_length,
        )

    read = files if valid_file is None else (*files, valid_file)
    valid = loader(held_out) if held_out else None
    return Prepared(settings, model, tokenizer, counted, loader(rows), valid, read, parent)


def _warn_of_untrained(
    session: Session,
    model: Any,  # noqa: ANN401 - a model of transformers
    counted: Counted,
    tokenizer: Tokenizer,
    settings: TrainSettings,
) -> None:
    """Say when what ends the answers is a token that the base never learned to say: LoRA leaves the head as it is."""
    if settings.config.modules_to_save:
        return
    ends = (next((label for label in reversed(row.labels) if label >= 0), None) for row in counted.rows)
    for number in untrained(model, (end for end in ends if end is not None)):
        note(
            f"data: answers end in token {number} ({tokenizer.decode([number])!r}), whose row in the base's head was "
            "never trained: the model may not learn to stop; train the head too with --modules-to-save lm_head",
            quiet=session.quiet,
        )


def show_plan(session: Session, prepared: Prepared) -> None:
    """Print what a run would do: parameters, steps, memory at its peak, the first sample with its mask."""
    settings, model = prepared.settings, prepared.model
    total = sum(parameter.numel() for parameter in model.parameters())
    injected = inject(model, settings.config)
    trainable = sum(parameter.numel() for parameter in injected.parameters().values())
    injected.remove()
    plan = make_plan(prepared.loader, settings.config)
    counted = prepared.counted
    found: dict[str, Any] = {
        "dry_run": True,
        "targets": len(injected.targets),
        "trainable": trainable,
        "parameters": total,
        "samples": len(counted.rows),
        "truncated": counted.truncated,
        "skipped": counted.skipped,
        "steps": plan.total,
        **_memory(prepared),
        "first_sample": show(prepared.loader.rows[0], prepared.tokenizer),
    }
    if session.as_json:
        emit(found)
        return
    click.echo(
        facts(
            {
                "trained": f"{count(trainable)} parameters, {100 * trainable / total:.3g}% of {count(total)}, "
                f"on {len(injected.targets)} targets",
                "data": data_line(counted),
                "steps": str(plan.total),
                "memory": _memory_line(found),
            }
        )
    )
    click.echo(f"\nThe first sample; [[ ]] is learned:\n{found['first_sample']}")


def _memory(prepared: Prepared) -> dict[str, Any]:
    """The bytes at the peak of a run and what they are of, or why that cannot be said."""
    settings, valid = prepared.settings, prepared.valid
    judged = () if valid is None else valid.heaviest()
    try:
        memory = estimate(
            prepared.model, prepared.loader.heaviest(settings.config.epochs), settings.config, valid=judged
        )
    except TrainingError as error:
        return {"bytes_at_peak": None, "why_not": str(error)}
    return {
        "bytes_at_peak": memory.total,
        "bytes_of_base": memory.base + memory.copy,
        "bytes_of_adapter": memory.adapter,
        "bytes_of_moments": memory.moments,
        "bytes_of_step": memory.step + memory.batches,
    }


def _memory_line(found: Mapping[str, Any]) -> str:
    if found["bytes_at_peak"] is None:
        return str(found["why_not"])
    base, adapter, moments, step = (size(found[f"bytes_of_{n}"]) for n in ("base", "adapter", "moments", "step"))
    whole = size(found["bytes_at_peak"])
    return f"{whole} at the peak: base {base}, adapter {adapter}, moments {moments}, a step on the largest batch {step}"


@dataclass(frozen=True)
class RunResult:
    """What a run made: the adapter, how, and what came out of it."""

    adapter: Adapter
    derivation: Derivation
    report: dict[str, Value]


def run_training(session: Session, prepared: Prepared, name: RefName, *, resume: bool, force: bool) -> None:
    """Train, store, and print what was made."""
    registry = Registry(session.store_path)
    check_free(registry, name, force=force)
    made = train_once(session, prepared, resume=resume)
    if ranks.rank() > 0:
        return
    described = store_trained(registry, prepared.parent, made, name, force=force)
    if session.as_json:
        emit(described.as_json())
    else:
        click.echo(line(described))


def train_once(session: Session, prepared: Prepared, *, resume: bool) -> RunResult:
    """Train, and show how it goes; nothing is stored."""
    settings, counted = prepared.settings, prepared.counted
    if counted.truncated or counted.skipped:
        note(f"data: {data_line(counted)}", quiet=session.quiet)
    inputs = inputs_of(prepared, base_digest(settings.base))
    seen: list[Metrics] = []
    total = make_plan(prepared.loader, settings.config).total
    with interruptible(session) as interrupted, _progress(session, total) as show_step:

        def on_step(metrics: Metrics) -> None:
            seen.append(metrics)
            show_step(metrics)

        with memory_named():
            adapter = train(
                prepared.model,
                prepared.loader,
                settings.config,
                valid=prepared.valid,
                inputs=inputs,
                run=settings.run,
                resume=resume,
                on_step=on_step,
                should_stop=interrupted,
            )
    if interrupted() and seen and seen[-1].step != total:
        _say_how_to_go_on(settings, seen[-1].step)
    start = None if prepared.parent is None else prepared.parent.adapter
    derivation = trained(settings.config, inputs, start, version=loraforge.__version__)
    return RunResult(adapter, derivation, report_of(_history(settings, seen)) if ranks.rank() == 0 else {})


def store_trained(
    registry: Registry, parent: Parent | None, made: RunResult, name: RefName, *, force: bool
) -> Described:
    """Store an adapter, and with it a parent that was given as a directory."""
    with registry.store.session():  # no collection between the parent, which may have no name, and what needs it
        located = made.derivation.located(store_sources(registry, [] if parent is None else [parent.source]))
        incoming = peft.encode(made.adapter)
        put = registry.store.put(incoming, derivation=located, report=made.report, name=name, force=force)
        return describe(registry.store, put.digest, name)


def inputs_of(prepared: Prepared, base: Digest) -> dict[str, Value]:
    """What a run depends on beside its configuration: base, parent and data by content, and how data is batched."""
    said = prepared.settings.said
    found: dict[str, Value] = {"base": str(base)}
    found["data"] = str(data_digest(prepared.files))
    if prepared.parent is not None:
        found["parent"] = str(prepared.parent.content_id)
    own = ("batch_size", "max_length", "pack", "mask", "val_split", "group_by_length")
    return found | {key: said[key] for key in own if key in said}


def _history(settings: TrainSettings, seen: list[Metrics]) -> list[Metrics]:
    """All steps of a run, those before it was resumed too."""
    if settings.run is None:
        return seen
    lines = (Path(settings.run).expanduser() / METRICS).read_text().splitlines()
    return [Metrics(**json.loads(text)) for text in lines]


def report_of(steps: list[Metrics]) -> dict[str, Value]:
    """The last loss and the best evaluation, six digits of each."""
    found: dict[str, Value] = {"loss": _six(steps[-1].loss), "steps": steps[-1].step}
    judged = [m.eval_loss for m in steps if m.eval_loss is not None and math.isfinite(m.eval_loss)]
    return found | ({"eval_loss": _six(min(judged))} if judged else {})


def _six(number: float) -> float:
    return float(f"{number:.6g}")


def _files(settings: TrainSettings) -> tuple[tuple[Path, ...], Path | None]:
    """The file to train on and the one to evaluate on."""
    data, valid = settings.data.expanduser(), settings.valid
    if not data.is_dir():
        return (data,), valid
    if not (data / "train.jsonl").is_file():
        raise NotFoundError(f"{data}: no train.jsonl there; expected train.jsonl and, to evaluate on, valid.jsonl")
    beside = data / "valid.jsonl"
    return (data / "train.jsonl",), valid or (beside if beside.is_file() else None)


def _split(counted: Counted, settings: TrainSettings) -> tuple[Any, Any]:
    """Set a share of the rows aside, chosen by the seed."""
    if not settings.val_split:
        return counted.rows, ()
    number = max(1, round(len(counted.rows) * settings.val_split))
    if number >= len(counted.rows):
        raise TrainingError(f"{len(counted.rows)} samples are too few to set {number} aside: lower val_split")
    generator = torch.Generator().manual_seed(settings.config.seed)
    aside = set(torch.randperm(len(counted.rows), generator=generator)[:number].tolist())
    rows = tuple(row for place, row in enumerate(counted.rows) if place not in aside)
    return rows, tuple(counted.rows[place] for place in sorted(aside))


def data_line(counted: Counted) -> str:
    """Say how many samples there are, and what became of the others."""
    cut = f", {counted.truncated} cut to max-length" if counted.truncated else ""
    left = f", {counted.skipped} left out with nothing to learn" if counted.skipped else ""
    return f"{len(counted.rows)} samples{cut}{left}"


def check_free(registry: Registry, name: RefName, *, force: bool) -> None:
    """Find out before hours of training that the name is taken."""
    taken = any(found.ref == name for found in registry.ls())
    if taken and not force and name.tag != DEFAULT_TAG:
        raise ConflictError(f"{name} means another adapter already: choose another tag, or move it with --force")


@contextmanager
def memory_named() -> Iterator[None]:
    """Say what helps where the device's memory is not enough."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "the device is out of memory: lower batch-size (and raise grad-accum) or max-length, or give "
            "--grad-checkpoint"
        ) from error


@contextmanager
def interruptible(session: Session) -> Iterator[Callable[[], bool]]:
    """Turn the first interrupt into a question that is answered after the step; a second one interrupts at once."""
    asked: list[int] = []

    def ask(number: int, _: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, before)
        note("finishing this step; interrupt again to stop at once", quiet=session.quiet)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def _say_how_to_go_on(settings: TrainSettings, step: int) -> NoReturn:
    kept = f"it is kept in {settings.run}: the same command with --resume goes on"
    note(f"stopped after step {step}; {kept if settings.run else 'nothing was kept (with --run DIR checkpoints are)'}")
    raise click.exceptions.Exit(130)


@contextmanager
def _progress(session: Session, total: int | None) -> Iterator[Callable[[Metrics], object]]:
    """A bar on a terminal, else a line every so many steps; both on stderr."""
    if session.quiet:
        yield lambda _: None
    elif not sys.stderr.isatty():
        yield lambda metrics: _log(metrics, total)
    else:
        from tqdm import tqdm

        with tqdm(desc="training", total=total, unit="step", leave=False, file=sys.stderr) as bar:

            def step(metrics: Metrics) -> None:
                bar.set_postfix_str(_line(metrics), refresh=False)
                bar.update(metrics.step - bar.n)

            yield step


def _log(metrics: Metrics, total: int | None) -> None:
    if metrics.step % _LOG_EVERY == 0 or metrics.step in (1, total) or metrics.eval_loss is not None:
        note(f"step {metrics.step}{f'/{total}' if total else ''}  {_line(metrics)}")


def _line(metrics: Metrics) -> str:
    judged = "" if metrics.eval_loss is None else f"  eval {metrics.eval_loss:.4f}"
    speed = metrics.tokens / max(metrics.seconds, 1e-9)
    return f"loss {metrics.loss:.4f}{judged}  lr {metrics.lr:.3g}  |g| {metrics.grad_norm:.3g}  {speed:.0f} tok/s"
