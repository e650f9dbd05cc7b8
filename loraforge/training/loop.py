"""``train``: an adapter from a model and batches; a run that was cut off goes on to the same bits."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from loraforge.adapter import Adapter
from loraforge.errors import NumericalError, TrainingError
from loraforge.layers import Injected, attach, inject, narrow, widen
from loraforge.training import checkpoints, ranks
from loraforge.training.batches import Batch, Count, Window, count_labels, steps_per_epoch, windows
from loraforge.training.checkpoints import Progress, Setting
from loraforge.training.compiled import compiled
from loraforge.training.config import TrainConfig
from loraforge.training.schedule import rate
from loraforge.training.shard import check_shardable, shard
from loraforge.training.step import check_reached, clip, evaluate, make_optimizer, set_rate, window_gradient
from loraforge.training.streams import apart, seed_all
from loraforge_registry.paths import AnyPath, expand


@dataclass(frozen=True)
class Metrics:
    """What one step did. ``loss`` and ``tokens`` are of its window, ``grad_norm`` is before clipping."""

    step: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    eval_loss: float | None = None


@dataclass(frozen=True)
class Plan:
    """What the data and the configuration say together: steps in all, and when an epoch is enough."""

    total: int | None
    epochs: int | None


@dataclass
class Run:
    """What changes while a run goes on."""

    injected: Injected
    optimizer: torch.optim.Optimizer
    parameters: dict[str, nn.Parameter]
    fixed: dict[str, Tensor]
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Tensor] = field(default_factory=dict)


def train(  # noqa: PLR0913 - the first three are the call, the rest are options
    model: nn.Module,
    batches: Iterable[Batch],
    config: TrainConfig | None = None,
    *,
    valid: Iterable[Batch] | None = None,
    adapter: Adapter | None = None,
    inputs: Mapping[str, object] | None = None,
    run: AnyPath | None = None,
    resume: bool = False,
    count: Count = count_labels,
    on_step: Callable[[Metrics], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Adapter:
    """Train an adapter for ``model``, whose forward gives a loss, and return it; the model is then as it was.

    ``batches`` are micro-batches, read again for each epoch: mappings of keyword arguments, tuples, or tensors.
    ``valid`` are those of the evaluation, after which the best adapter is returned instead of the last. ``adapter`` is
    one to train on from; its targets, ranks and scales then count, not those of ``config``. In the directory ``run``
    checkpoints and metrics are kept; with ``resume`` the run goes on from the last one, to the bits it would have had
    without a break; ``inputs`` are texts and numbers that name model and data, which must then be the same. ``count``
    says how many labels the mean in the loss of a batch is over. ``should_stop`` is asked after each step; a run that
    stops saves first.

    Where ``torch.distributed`` is set up, each process takes ``grad_accum`` of a window's micro-batches, and the first
    one writes; the adapter is then that of one process with as many more.

    Numerics: AdamW on float32 factors. The loss of a step is the mean over all labels of its window.

    Raises:
        TargetError: the modules cannot be adapted as asked.
        TrainingError: the run cannot start, or a trained tensor got no gradient.
        NumericalError: a loss, gradient or factor is not finite: nothing of that is saved.
    """
    config = config or TrainConfig()
    if valid is None and (config.patience, config.eval_every) != (None, None):
        raise TrainingError("eval_every and patience are about an evaluation: give valid, the data for it")
    if config.shard:
        check_shardable()
    plan = make_plan(batches, config)
    folder = None if run is None else expand(run)
    with apart(), placed(model, config) as device, compiled(model, wanted=config.compile):
        seed_all(config.seed, "start")
        injected = inject(model, config) if adapter is None else attach(model, adapter, dropout=config.dropout)
        try:
            setting = Setting(config, inputs or {})
            state = _begin(injected, setting, folder, resume=resume)
            autocast = autocast_of(config, device)
            narrow(model, narrow_type(config, device))
            if config.shard:
                shard(model, injected.parameters().values(), device)
            model.train()
            coming = windows(batches, config.grad_accum * ranks.size(), config.seed, state.progress.cursor)
            while not is_done(state.progress, plan, config):
                window = next(coming)
                metrics = _step(state, model, window, config, plan, count, autocast)
                if valid is not None and is_due(state.progress.step, config.eval_every, window, plan):
                    metrics = judge(state, metrics, evaluate(model, valid, count, autocast))
                stop = _agree(should_stop is not None and should_stop(), device)
                _record(state, metrics, setting, folder, last=stop or is_done(state.progress, plan, config))
                if on_step is not None:
                    on_step(metrics)
                if stop:
                    break
            return result(state)
        finally:
            widen(model)
            injected.remove()


def make_plan(batches: Iterable[Batch], config: TrainConfig) -> Plan:
    """Say how long a run is.

    Raises:
        TrainingError: a schedule that needs the number of steps, which neither the data nor max_steps gives.
    """
    per_epoch = steps_per_epoch(batches, config.grad_accum * ranks.size())
    if config.max_steps is not None:
        return Plan(config.max_steps, None)
    if per_epoch == 0:
        raise TrainingError("the data gives no batch")
    total = None if per_epoch is None else per_epoch * config.epochs
    if total is None and (config.schedule != "constant" or 0 < config.warmup < 1):
        raise TrainingError(
            f"the data does not say its length, which a {config.schedule} schedule needs: give max_steps, or "
            "schedule='constant' and warm-up in steps"
        )
    return Plan(total, config.epochs)


def make_run(injected: Injected, config: TrainConfig) -> Run:
    """Return a run that has not begun."""
    parameters = injected.parameters()
    return Run(injected, make_optimizer(parameters, injected.b_factors(), config), parameters, injected.buffers())


def _begin(injected: Injected, setting: Setting, folder: Path | None, *, resume: bool) -> Run:
    state = make_run(injected, setting.config)
    parameters, fixed = state.parameters, state.fixed
    ranks.align({**parameters, **fixed})
    if folder is None:
        return state
    folder.mkdir(parents=True, exist_ok=True)
    found = checkpoints.checkpoints(folder)
    if found and not resume:
        raise TrainingError(
            f"{folder} holds a run already, up to {found[-1].name}: resume it, or name another directory"
        )
    if found:
        state.progress, tensors = checkpoints.load(found[-1], setting)
        state.best = checkpoints.scatter(tensors, parameters, state.optimizer, fixed)
    ranks.wait()  # nobody reads any more
    if ranks.rank() == 0:
        checkpoints.tidy(folder, state.progress.step)
    return state


def _agree(stop: bool, device: torch.device) -> bool:  # noqa: FBT001 - an answer
    """Whether any process was asked to stop."""
    return ranks.total(float(stop), device=device)[0] > 0


def _step(
    state: Run,
    model: nn.Module,
    window: Window,
    config: TrainConfig,
    plan: Plan,
    count: Count,
    autocast: torch.dtype | None,
) -> Metrics:
    start, number = time.perf_counter(), state.progress.step
    seed_all(config.seed, "step", number, *([ranks.rank()] if ranks.size() > 1 else []))
    state.optimizer.zero_grad(set_to_none=True)
    loss, tokens = window_gradient(model, window.batches, count, autocast)
    metrics = update(state, window, config, plan, loss, tokens)
    return replace(metrics, seconds=time.perf_counter() - start)


def update(state: Run, window: Window, config: TrainConfig, plan: Plan, loss: float, tokens: int) -> Metrics:
    """Take the step that the gradients say, once they are found to be finite and clipped.

    Raises:
        TrainingError: a trained tensor has no gradient in the first step.
        NumericalError: the loss or a gradient is not finite.
    """
    number = state.progress.step
    if number == 0:
        check_reached(state.parameters)
    norm = clip(state.parameters, config.max_grad_norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NumericalError(
            f"step {number + 1}: the loss is {loss:g} and the gradient's norm {norm:g}; nothing of it was saved. Lower "
            "lr, raise warmup, or look at this step's data"
        )
    lr = config.lr * rate(config.schedule, number, plan.total, config.warmup)
    set_rate(state.optimizer, lr)
    state.optimizer.step()
    state.progress = replace(state.progress, step=number + 1, cursor=window.after)
    epoch = window.after.epoch - (window.after.taken == 0)
    return Metrics(number + 1, epoch, loss, lr, norm, tokens, 0.0)


def judge(state: Run, metrics: Metrics, loss: float) -> Metrics:
    """Keep the parameters where an evaluation is the best yet; NaN never is."""
    best = state.progress.best
    better = math.isfinite(loss) and (best is None or loss < best)
    if better:
        state.best = {name: parameter.detach().clone() for name, parameter in state.parameters.items()}
        state.progress = replace(state.progress, best=loss, stale=0)
    else:
        state.progress = replace(state.progress, stale=state.progress.stale + 1)
    return replace(metrics, eval_loss=loss)


def _record(state: Run, metrics: Metrics, setting: Setting, folder: Path | None, *, last: bool) -> None:
    if folder is None or ranks.rank() > 0:
        return
    checkpoints.log(folder, {k: v for k, v in metrics.__dict__.items() if v is not None})
    every = setting.config.save_every
    if last or (every is not None and metrics.step % every == 0):
        now = checked(state.injected.adapter())
        tensors = checkpoints.gather(state.parameters, state.optimizer, state.fixed, state.best)
        checkpoints.save(folder, state.progress, setting, now, tensors)


def result(state: Run) -> Adapter:
    """Return the best adapter, or the last where nothing was evaluated."""
    with torch.no_grad():
        for name, tensor in state.best.items():
            state.parameters[name].copy_(tensor)
    return checked(state.injected.adapter())


def checked(adapter: Adapter) -> Adapter:
    """Refuse NaN and infinity in anything that is about to be kept."""
    for name, pair in adapter.targets.items():
        pair.check_finite(name)
        if pair.magnitude is not None and not bool(torch.isfinite(pair.magnitude).all()):
            raise NumericalError(f"target {name!r}: its magnitude is not finite")
    for key, tensor in adapter.extras.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NumericalError(f"{key!r} is not finite")
    return adapter


def is_done(progress: Progress, plan: Plan, config: TrainConfig) -> bool:
    """Whether a run has all its steps, or evaluations have stopped getting better."""
    enough = progress.step >= plan.total if plan.total is not None else progress.cursor.epoch >= (plan.epochs or 0)
    return enough or (config.patience is not None and progress.stale >= config.patience)


def is_due(step: int, every: int | None, window: Window, plan: Plan) -> bool:
    """Whether to evaluate: every so many steps, else at the end of an epoch; and at the end."""
    at_end = plan.total is not None and step >= plan.total
    return at_end or (step % every == 0 if every is not None else window.after.taken == 0)


@contextmanager
def placed(model: nn.Module, config: TrainConfig) -> Iterator[torch.device]:
    """Move the model to where it is trained, and put device, mode and checkpointing back at the end."""
    first = next(model.parameters(), None)
    if first is None:
        raise TrainingError("the model has no parameters")
    home, training = first.device, {name: module.training for name, module in model.named_modules()}
    device = home if home.type == "meta" else choose_device(config.device)
    moves = device != home and not config.shard  # what is shared out goes block by block, and stays where it is
    if moves:
        model.to(device)
    undo = checkpointing(model) if config.grad_checkpoint else None
    try:
        yield device
    finally:
        if undo is not None:
            undo()
        if moves:
            model.to(home)
        for name, module in model.named_modules():
            module.training = training.get(name, module.training)


def choose_device(name: str) -> torch.device:
    """Return a device by name; ``auto`` is CUDA, else MPS, else the CPU.

    Raises:
        TrainingError: torch knows no such device, or has none here.
    """
    if name != "auto":
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise TrainingError(f"device is {name!r}, expected auto, cpu, cuda, cuda:N or mps") from error
        _check_there(device)
        return device
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _check_there(device: torch.device) -> None:
    """Refuse a device that this machine or this torch does not have: only trying tells."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise TrainingError(
            f"device is {str(device)!r}, which torch cannot use here; leave it out, or say cpu"
        ) from error


def checkpointing(model: nn.Module) -> Callable[[], object]:
    """Let a model of transformers (which renamed this in version 5) compute activations again; return the undoing."""
    for name in ("activation", "gradient"):
        enable = getattr(model, f"{name}_checkpointing_enable", None)
        if enable is None:
            continue
        if getattr(model, f"is_{name}_checkpointing", False):
            return lambda: None
        # reentrant checkpoints lose the gradients of what is behind a frozen input
        enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
        disable: Callable[[], object] = getattr(model, f"{name}_checkpointing_disable")
        return disable
    raise TrainingError(f"{type(model).__name__} has no gradient_checkpointing_enable; leave grad_checkpoint out")


def autocast_of(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """Return the type to compute in, None for that of the tensors."""
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    return torch.bfloat16 if config.precision == "bf16" else None


def narrow_type(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """Return the type that frozen weights are cast to for a whole run; with checkpointing, memory counts for more."""
    return None if config.grad_checkpoint or config.shard else autocast_of(config, device)
