"""Adapters that are trained side by side, one round after another.

A round is one step of every adapter that has joined and is not done: gradients in as few passes as possible, then each
one's own clipping, rate and AdamW. Each has its own data order, token count, schedule, dropout, evaluation and end; one
whose loss is no number ends alone.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from loraforge.errors import NumericalError, TrainingError
from loraforge.layers import narrow, widen
from loraforge.layers.shared import ApartError
from loraforge.training import checkpoints, group_state
from loraforge.training.batches import Batch, Window, windows
from loraforge.training.halving import Halving, losers
from loraforge.training.loop import Metrics, checked, is_done, is_due, judge, make_run, result, update
from loraforge.training.seats import Dropped, Seat
from loraforge.training.step import evaluate
from loraforge.training.streams import seed_all
from loraforge.training.together import Found, Turn, Way, agree, in_turns, together


class Group:
    """Adapters that are trained side by side: who is there, and one round after another."""

    def __init__(
        self, seats: Sequence[Seat], way: Way, halving: Halving | None, at_once: int, folder: Path | None
    ) -> None:
        self.seats, self.way, self.halving, self.at_once, self.folder = seats, way, halving, at_once, folder
        self.number = 0
        self.apart: str | None = None
        self._done: list[tuple[Seat, Metrics]] = []

    def begin(self, *, resume: bool) -> None:
        """Start, or go on from the last checkpoint."""
        if self.folder is None:
            return
        saved = group_state.find(self.folder, self.seats, self._common(), resume=resume)
        if saved is not None:
            self.number, self.apart = saved.number, saved.apart
            self._seat([seat for seat, one in zip(self.seats, saved.seats, strict=True) if group_state.is_there(one)])
            for place, seat in enumerate(self.seats):
                group_state.restore(seat, place, saved)
                if seat.ended and seat.run is not None:
                    self._leave(seat)
        checkpoints.tidy(self.folder, self.number, "round")

    def is_going(self) -> bool:
        """Whether any adapter has steps before it."""
        return any(not seat.ended for seat in self.seats)

    def round(self) -> list[tuple[Seat, Metrics]]:
        """Take one step of every adapter that is there; return what each did."""
        waiting = [seat for seat in self.seats if not seat.ended and seat.run is None]
        self._seat([seat for seat in waiting if seat.member.joins <= self.number])
        active = [seat for seat in self.seats if seat.run is not None]
        if not active:  # the next one joins later
            self.number = min(seat.member.joins for seat in self.seats if not seat.ended)
            return []
        started = time.perf_counter()
        taken = self._fetch(active)
        found = self._gradients(taken)
        done = []
        for seat, window in taken:
            if not seat.ended:
                with self._alone_in_failing(seat):
                    done.append((seat, self._update(seat, window, *found[seat.name])))
        self.number += 1
        seconds = time.perf_counter() - started
        done = [(seat, replace(metrics, seconds=seconds)) for seat, metrics in done if not seat.ended]
        self._end(done)
        self._done = done
        return done

    def record(self, *, last: bool) -> None:
        """Write the round's metrics, and a checkpoint where one is due."""
        if self.folder is None:
            return
        for seat, metrics in self._done:
            said = {key: value for key, value in metrics.__dict__.items() if value is not None}
            checkpoints.log(self.folder, {"round": self.number, "name": seat.name, **said})
        if last or any(seat.is_saving for seat in self.seats):
            for seat in self.seats:
                if seat.run is not None:
                    with self._alone_in_failing(seat):
                        checked(seat.run.injected.adapter())
            group_state.save(self.folder, self.seats, self.number, self.apart, self._common())

    def finish(self) -> None:
        """Take those that are not done for what they are now."""
        for seat in self.seats:
            if seat.run is not None:
                self._finish(seat)

    def _common(self) -> dict[str, object]:
        """What of a run is the same for all adapters."""
        return {"at_once": self.at_once, "halving": None if self.halving is None else asdict(self.halving)}

    def _seat(self, seats: Sequence[Seat]) -> None:
        if not seats:
            return
        widen(self.way.model)
        for seat in seats:
            config = seat.member.config
            seed_all(config.seed, "start")
            seat.run = make_run(self.way.shared.join(seat.name, config, seat.member.adapter), config)
        narrow(self.way.model, self.way.narrow)

    def _leave(self, seat: Seat) -> None:
        seat.run = seat.coming = None
        self.way.shared.leave(seat.name)

    def _fetch(self, active: Sequence[Seat]) -> list[tuple[Seat, Window]]:
        found = []
        for seat in active:
            if seat.coming is None:
                config = seat.member.config
                seat.coming = windows(seat.member.batches, config.grad_accum, config.seed, seat.now.progress.cursor)
            with self._alone_in_failing(seat):
                window = next(seat.coming)
                if not any(self.way.count(self.way.model, batch) for batch in window.batches):
                    number = len(window.batches)
                    raise TrainingError(f"none of the {number} micro-batches of a step has a label: all are masked")
                found.append((seat, window))
        return found

    def _gradients(self, taken: Sequence[tuple[Seat, Window]]) -> Found:
        turns = []
        for seat, window in taken:
            seat.clear()
            turns.append(Turn(seat.name, window.batches, seat.member.config.seed, seat.now.progress.step))
        found: Found = {}
        for begin in range(0, len(turns), self.at_once):
            some = slice(begin, begin + self.at_once)
            found |= self._pass([seat for seat, _ in taken[some]], turns[some])
        return found

    def _pass(self, seats: Sequence[Seat], turns: Sequence[Turn]) -> Found:
        """Compute gradients together where that is known to be right; where somebody is new, try it first."""
        if self.apart is not None or len(turns) == 1:
            return in_turns(self.way, turns)
        try:
            found = together(self.way, turns)
        except ApartError as error:
            self.apart = str(error)
            return self._again(seats, turns)
        if all(turn.step for turn in turns):
            return found
        ours = {seat.name: seat.gradients() for seat in seats}
        alone = self._again(seats, turns)
        differs = agree(ours, {seat.name: seat.gradients() for seat in seats}, _tolerance(self.way))
        if differs is not None:
            self.apart = f"beside the others {differs} has not the gradient that it has alone, so the model mixes rows"
            return alone
        for seat in seats:
            seat.put_back(ours[seat.name])
        return found

    def _again(self, seats: Sequence[Seat], turns: Sequence[Turn]) -> Found:
        for seat in seats:
            seat.clear()
        return in_turns(self.way, turns)

    def _update(self, seat: Seat, window: Window, loss: float, tokens: int) -> Metrics:
        member, run = seat.member, seat.now
        metrics = update(run, window, member.config, seat.plan, loss, tokens)
        if member.valid is not None and is_due(run.progress.step, member.config.eval_every, window, seat.plan):
            metrics = judge(run, metrics, self._evaluate(seat, member.valid))
        return metrics

    def _evaluate(self, seat: Seat, valid: Iterable[Batch]) -> float:
        with self.way.shared.alone(seat.name):
            return evaluate(self.way.model, valid, self.way.count, self.way.autocast)

    def _end(self, done: Sequence[tuple[Seat, Metrics]]) -> None:
        for seat, _ in done:
            if is_done(seat.now.progress, seat.plan, seat.member.config):
                self._finish(seat)
        if self.halving is not None:
            for contest in sorted({seat.member.contest for seat, _ in done if seat.member.contest is not None}):
                self._hold(self.halving, [seat for seat, _ in done if seat.member.contest == contest and seat.run])

    def _hold(self, halving: Halving, rivals: Sequence[Seat]) -> None:
        """Judge a contest, if its members have come to a rung."""
        if not rivals:
            return
        step, contest = rivals[0].now.progress.step, rivals[0].member.contest
        kept = dict(halving.plan(sum(seat.member.contest == contest for seat in self.seats), step)).get(step)
        if kept is None or kept >= len(rivals):
            return
        losses = {seat.name: self._evaluate(seat, seat.member.valid or ()) for seat in rivals}
        gone = losers(losses, kept)
        for seat in rivals:
            if seat.name in gone:
                seat.dropped = Dropped(step, losses[seat.name])
                self._leave(seat)

    def _finish(self, seat: Seat) -> None:
        with self._alone_in_failing(seat):
            seat.adapter = result(seat.now)
            seat.kept = checkpoints.named(seat.now.parameters, seat.now.fixed)
            self._leave(seat)

    @contextmanager
    def _alone_in_failing(self, seat: Seat) -> Iterator[None]:
        """End an adapter alone that cannot go on."""
        try:
            yield
        except (NumericalError, TrainingError) as error:
            seat.error = type(error)(f"{seat.name}: {error}")
            self._leave(seat)


def _tolerance(way: Way) -> float:
    """What rounding may do to a gradient; rows that mix do far more."""
    half = way.autocast is not None or next(way.model.parameters()).dtype.itemsize < 4
    return 0.1 if half else 1e-3
