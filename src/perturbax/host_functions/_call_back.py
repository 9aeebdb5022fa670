"""One call back: all its points, from their arguments to their stacked results."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ..tracing._host_call import NoResultError
from ._arguments import Arguments
from ._attempts import Workers
from ._encoding import skeleton_of
from ._journal import JournalFile, Session
from ._progress import Bar
from ._results import (
    Like,
    Returned,
    canonical,
    cast,
    instead_of,
    like_for,
    like_of,
    narrowed,
    recalled,
    returned,
)
from ._scheduling import Schedule, Tally


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
    """How points are evaluated, and what earlier calls have shown of their results.

    Attributes:
      name: of the function.
      batched: whether a call of it takes many points.
      timeout: as for `host_function`.
      retries: as for `host_function`.
      on_failure: as for `host_function`.
      progress: as for `host_function`.
      workers: where evaluations run.
      journal: where results are kept, if anywhere.
      like: what comes back, if the user has said it.
      found: what comes back for each kind of arguments, as far as it has been seen.
      tally: what has been done so far.
    """

    name: str
    batched: bool
    timeout: float | None
    retries: int
    on_failure: Any
    progress: bool
    workers: Workers
    journal: JournalFile | None
    like: Like | None
    found: dict[Any, Like] = dataclasses.field(default_factory=dict)
    tally: Tally = dataclasses.field(default_factory=Tally)

    def like_at(self, arguments: Arguments, arrays: Sequence[Any]) -> Like | None:
        """What comes back for one point of these arguments, as far as it is known."""
        return self.like or self.found.get(arguments.kind(arrays))

    def no_result(self) -> NoResultError:
        """The error of a program that is to be made before anything has come back."""
        return NoResultError(
            f"{self.name} is called under a trace (jit, for one), and has not been called outside "
            "of one with such arguments: what it returns is not known. Say so, as in "
            "host_function(fun, like=jax.ShapeDtypeStruct((), jnp.float32)) for one number, or "
            f"call {self.name}(x) once outside"
        )


class CallBack:
    """The points of one call back, by number, and what is known of their results."""

    def __init__(
        self,
        evaluator: Evaluator,
        arguments: Arguments,
        arrays: Sequence[np.ndarray],
        mapped: Sequence[bool],
        size: int | None,
    ):
        """For `size` points; None for one, of arrays without an axis for points."""
        self._evaluator, self._structure = evaluator, arguments
        self._arrays, self._mapped, self._size = arrays, mapped, size
        points = [
            jax.ShapeDtypeStruct(v.shape[1:] if m else v.shape, v.dtype)
            for v, m in zip(arrays, mapped, strict=True)
        ]
        self._kind = arguments.kind(points)
        self._like = evaluator.like_at(arguments, points)
        self._count = 1 if size is None else size
        self._found: list[list[np.ndarray] | None] = [None] * self._count
        # Without a journal, a point is evaluated as often as it comes.
        self._equal = {row: [row] for row in range(self._count)}
        self._session: Session | None = None
        if evaluator.journal is not None:
            keys = arguments.keys(evaluator.journal, arrays, mapped, self._count)
            firsts: dict[bytes, int] = {}
            for row, key in enumerate(keys):
                first = firsts.setdefault(key, row)
                if first != row:
                    self._equal[first].append(row)
            self._equal = {row: self._equal[row] for row in firsts.values()}
            self._session = Session(evaluator.journal, keys)

    def run(self) -> None:
        """Evaluates all points, but those that the journal knows."""
        evaluator = self._evaluator
        if self._session is not None:
            self.recall(self._session.known(self._equal))
        rows = [row for row in self._equal if self._found[row] is None]
        bar = Bar(evaluator.progress, evaluator.name, len(rows))
        schedule = Schedule(
            points=self,
            workers=evaluator.workers,
            timeout=evaluator.timeout,
            retries=evaluator.retries,
            raises=isinstance(evaluator.on_failure, str) and evaluator.on_failure == "raise",
            tally=evaluator.tally,
            bar=bar,
            session=self._session,
        )
        try:
            schedule.run(self._parts(rows))
        finally:
            try:
                self._end(bar)
            except KeyboardInterrupt:  # which comes at any moment
                self._end(bar)
                raise
        if self._like is None:
            if not self._count:
                raise evaluator.no_result()
            raise ValueError(
                f"{evaluator.name} failed at the first point, from which perturbax would have "
                "learnt what it returns. Say so: host_function(..., "
                + like_for(evaluator.on_failure)
            ) from schedule.failures[0]
        if schedule.failures:
            instead = instead_of(self._like, evaluator.on_failure)
            for row in schedule.failures:
                self._keep(row, instead)

    def results(self, expected: Sequence[jax.ShapeDtypeStruct] | None) -> list[np.ndarray]:
        """The results of all points, stacked, once `run` has ended; in the dtypes expected."""
        assert self._like is not None
        stacked = [np.zeros((0, *v.shape), v.dtype) for v in self._like.leaves]
        if self._count:
            rows = (leaves for leaves in self._found if leaves is not None)
            stacked = [np.stack(column) for column in zip(*rows, strict=True)]
        if expected is None:
            expected = [canonical(v) for v in self._like.leaves]
        name = self._evaluator.name
        stacked = [narrowed(v, w.dtype, name) for v, w in zip(stacked, expected, strict=True)]
        return [v[0] for v in stacked] if self._size is None else stacked

    def arguments(self, rows: list[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the function is called with for these points.

        Copies: the function may keep them, and these arrays end with the call back.
        """
        pairs = list(zip(self._arrays, self._mapped, strict=True))
        if not self._evaluator.batched:
            [row] = rows
            own = [np.array(v[row] if m else v)[()] for v, m in pairs]
        elif self._size is None:
            own = [np.array(v)[None] for v in self._arrays]
        else:
            # What all points share may be large: one copy, which is not to be written to.
            own = [
                v[rows] if m else np.broadcast_to(v.copy(), (len(rows), *v.shape)) for v, m in pairs
            ]
        return self._structure.unflatten(own)

    def accept(self, rows: list[int], value: Any) -> None:
        """Takes what a call for these points has returned; raises what is no result."""
        value = returned(value, self._evaluator.name)
        if value.error is not None:
            raise value.error
        like, first = self._like, self._like is None
        if like is None:
            like = like_of(value, self._evaluator.batched, self._evaluator.on_failure)
            self._like = like
        for row, leaves in zip(rows, self._leaves(like, value, len(rows)), strict=True):
            self._keep(row, leaves)
            if self._session is not None:
                self._session.write(row, leaves, like.tree)
        if first:
            self._learn(like)

    def recall(self, known: dict[int, Any]) -> None:
        """Takes results that the journal has."""
        evaluator = self._evaluator
        for row, (leaves, tree) in known.items():
            if self._like is None:
                self._like = recalled(leaves, tree, evaluator.on_failure)
                evaluator.found[self._kind] = self._like
            specs = tuple(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in leaves)
            if specs != self._like.leaves or (tree is not None and tree != self._like.tree):
                raise ValueError(
                    f"the journal has a result {specs} of {evaluator.name}, where {self._like} is "
                    "expected; under another name, journal=perturbax.Journal(path, name=...), it "
                    "starts anew"
                )
            self._keep(row, leaves)
        evaluator.tally.add(recalled=len(known))

    def show(self, row: int) -> str:
        """A point, for the note of an exception."""
        pairs = zip(self._arrays, self._mapped, strict=True)
        (x, *_), _ = self._structure.unflatten([v[row] if m else v for v, m in pairs])
        with np.printoptions(threshold=20, edgeitems=4):
            text = f"x = {x!r}"
        return text if len(text) <= 600 else f"{text[:600]} ..."

    def _parts(self, rows: list[int]) -> list[list[int]]:
        """The points of each call of the function."""
        if not self._evaluator.batched:
            return [[row] for row in rows]
        parts = min(len(rows), max(1, (self._evaluator.workers.window() or 2) // 2))
        return [part.tolist() for part in np.array_split(rows, parts)] if rows else []

    def _keep(self, row: int, leaves: list[np.ndarray]) -> None:
        for same in self._equal[row]:
            self._found[same] = leaves

    def _leaves(self, like: Like, value: Returned, count: int) -> list[list[np.ndarray]]:
        """For each point, the leaves of what the function returned, checked and cast."""
        name, batched = self._evaluator.name, self._evaluator.batched
        if value.tree != like.tree:
            raise TypeError(
                f"{name} returned a pytree of the structure {value.tree}, but like, or an earlier "
                f"call, has {like.tree}"
            )
        front = (count,) if batched else ()
        found = [
            cast(leaf, spec, front, name)
            for leaf, spec in zip(value.leaves, like.leaves, strict=True)
        ]
        return [[v[row] for v in found] for row in range(count)] if batched else [found]

    def _learn(self, like: Like) -> None:
        """Tells later calls what comes back; an error where a journal would not tell it again."""
        if self._evaluator.journal is not None and skeleton_of(like.tree) is None:
            raise ValueError(
                f"{self._evaluator.name} returned a pytree of the structure {like.tree}. Its "
                "journal could not tell that when the program is started again: it knows dicts "
                "with strings for keys, lists and tuples. Say what it returns: host_function(..., "
                "like=...). What was evaluated is in the journal"
            )
        self._evaluator.found[self._kind] = like

    def _end(self, bar: Bar) -> None:
        try:
            bar.close()
        finally:
            if self._session is not None:
                self._session.close()
