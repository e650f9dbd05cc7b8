"""``train_many``: several adapters on one base at once, each of them what its own run would give.

The base is in memory once, and one pass serves all where the model keeps rows apart (``loraforge.training.group``).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from loraforge.adapter import Adapter
from loraforge.errors import LoraforgeError, TrainingError
from loraforge.layers import widen
from loraforge.layers.shared import Shared, check_shareable
from loraforge.training import ranks
from loraforge.training.batches import Batch, Count, count_labels
from loraforge.training.config import TrainConfig
from loraforge.training.group import Group
from loraforge.training.halving import Halving
from loraforge.training.loop import Metrics, autocast_of, make_plan, narrow_type, placed
from loraforge.training.seats import Dropped, Member, Seat
from loraforge.training.shard import check_shardable
from loraforge.training.streams import apart
from loraforge.training.together import RowLosses, Way
from loraforge_registry.paths import AnyPath, expand

_COMMON = ("device", "precision", "grad_checkpoint")
"""Settings of the model, which is one for all."""


@dataclass(frozen=True)
class Trained(Mapping[str, Adapter]):
    """The trained adapters by name; to ask for one that failed raises its error.

    ``dropped`` says of those that lost a contest when; ``apart`` why the adapters took turns, if they did.
    """

    adapters: Mapping[str, Adapter]
    failed: Mapping[str, LoraforgeError]
    dropped: Mapping[str, Dropped]
    apart: str | None

    def __getitem__(self, name: str) -> Adapter:
        if name in self.failed:
            raise self.failed[name]
        return self.adapters[name]

    def __contains__(self, name: object) -> bool:
        return name in self.adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self.adapters)

    def __len__(self) -> int:
        return len(self.adapters)


def train_many(  # noqa: PLR0913 - the first two are the call, the rest are options
    model: nn.Module,
    members: Mapping[str, Member | tuple[Iterable[Batch], TrainConfig]],
    *,
    halving: Halving | None = None,
    at_once: int | None = None,
    run: AnyPath | None = None,
    resume: bool = False,
    count: Count = count_labels,
    row_losses: RowLosses | None = None,
    on_step: Callable[[str, Metrics], None] | None = None,
    on_end: Callable[[str, Adapter], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Trained:
    """Train several adapters for ``model`` at once and return them by name; the model is then as it was.

    The base is in memory once. Where the model is a causal one of transformers, or ``row_losses`` gives each row's
    summed loss, the rows of all adapters (of ``at_once`` of them) go through it in one pass. Before that counts, the
    first step is computed both ways; where they differ by more than rounding, or batches cannot be put together, the
    adapters take turns on the one base, and ``apart`` of what is returned says why.

    ``run``, ``resume``, ``count`` and ``should_stop`` are as for ``train``, of all together. A checkpoint is written
    when one is due for any. ``on_end`` is called with each adapter that has ended, after a resume again.

    Numerics: as ``train``; in turns to the bit, else to the rounding of products with more rows.

    Raises:
        TargetError: an adapter that cannot share the base, before anything runs.
        TrainingError: settings of the model that differ, or a run that cannot start.
    """
    seats = _seats(members)
    _check(seats, halving)
    config = seats[0].member.config
    folder = None if run is None else expand(run)
    with apart(), placed(model, config) as device, _shared(model) as shared:
        way = Way(model, shared, count, autocast_of(config, device), row_losses, narrow_type(config, device))
        group = Group(seats, way, halving, at_once or len(seats), folder)
        group.begin(resume=resume)
        for seat in seats:
            if seat.adapter is not None and on_end is not None:
                on_end(seat.name, seat.adapter)
        model.train()
        stop = False
        while not stop and group.is_going():
            for seat, metrics in group.round():
                if on_step is not None:
                    on_step(seat.name, metrics)
                if seat.adapter is not None and on_end is not None:
                    on_end(seat.name, seat.adapter)
            stop = should_stop is not None and should_stop()
            group.record(last=stop or not group.is_going())
        group.finish()
        return _results(seats, group.apart)


@contextmanager
def _shared(model: nn.Module) -> Iterator[Shared]:
    shared = Shared(model)
    model.requires_grad_(requires_grad=False)
    try:
        yield shared
    finally:
        widen(model)
        shared.close()


def _seats(members: Mapping[str, Member | tuple[Iterable[Batch], TrainConfig]]) -> list[Seat]:
    """Look at every member before anything runs."""
    seats = []
    for name, given in members.items():
        member = given if isinstance(given, Member) else Member(*given)
        check_shareable(name, member.config, member.adapter)
        seats.append(Seat(name, member, make_plan(member.batches, member.config)))
    return seats


def _results(seats: Sequence[Seat], apart: str | None) -> Trained:
    adapters = {seat.name: seat.adapter for seat in seats if seat.adapter is not None}
    failed = {seat.name: seat.error for seat in seats if seat.error is not None}
    dropped = {seat.name: seat.dropped for seat in seats if seat.dropped is not None}
    return Trained(adapters, failed, dropped, apart)


def _check(seats: Sequence[Seat], halving: Halving | None) -> None:
    """Refuse what cannot be, before anything runs."""
    if not seats:
        raise TrainingError("there is no adapter to train")
    if ranks.size() > 1:
        raise TrainingError("several adapters at once are trained by one process; start it without torchrun")
    first = seats[0]
    for seat in seats:
        config = seat.member.config
        for name in _COMMON:
            mine, others = getattr(config, name), getattr(first.member.config, name)
            if mine != others:
                raise TrainingError(
                    f"{seat.name} has {name}={mine!r} and {first.name} {others!r}: they share one model, so give all "
                    "the same"
                )
        if config.shard:
            check_shardable()
        if config.compile:
            raise TrainingError(f"{seat.name}: compile is for one adapter alone, not for several at once: leave it out")
        if seat.member.valid is None and (config.patience, config.eval_every) != (None, None):
            raise TrainingError(
                f"{seat.name}: eval_every and patience are about an evaluation: give valid, the data for it"
            )
    if halving is not None:
        _check_contests(seats)


def _check_contests(seats: Sequence[Seat]) -> None:
    starts: dict[str, int] = {}
    for seat in seats:
        member = seat.member
        if member.contest is not None:
            if member.valid is None:
                raise TrainingError(f"{seat.name}: a contest is judged by an evaluation: give valid, the data for it")
            if starts.setdefault(member.contest, member.joins) != member.joins:
                raise TrainingError(f"{seat.name} joins later than others of its contest: they must start together")
