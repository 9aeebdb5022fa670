"""host_function: functions outside JAX, evaluated by threads, processes and clusters."""

import dataclasses
import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .._checks import check_bool, check_count, check_fun
from ..tracing._host_call import NoResultError, host_call, is_asking
from ._encoding import leaf_digest, skeleton_of
from ._executors import check_executor, workers_for
from ._function_names import known_by
from ._journal import Journal, JournalFile, Session, check_journal
from ._progress import Bar, check_progress
from ._results import (
    Like,
    Returned,
    canonical,
    cast,
    described,
    instead_of,
    like_of,
    narrowed,
    recalled,
    returned,
)
from ._scheduling import HostCounts, Schedule, Tally


def host_function(
    fun: Callable[..., Any],
    *,
    executor: Any = None,
    like: Any = None,
    batched: bool = False,
    timeout: float | None = None,
    retries: int = 0,
    on_failure: Any = "raise",
    journal: Any = None,
    progress: bool = False,
) -> "HostFunction":
    r"""A function outside JAX (a solver, a simulator, a service) as one that JAX can call.

    The result h(x) works eagerly and inside `jit`, `vmap`, `scan`, layers and perturbed functions,
    through which it gets derivatives: :math:`\nabla E[h(x + \sigma \epsilon)]` from values of
    `fun` alone. All points of a vmap (the samples of a perturbed function, for one) arrive
    together, and are evaluated side by side; results are those of a loop, bit by bit.

    Args:
      fun: from a pytree (and any further arguments) to a pytree of numbers and arrays. It gets
        numpy arrays, and numpy numbers for arrays without axes, and computes with numpy: JAX inside
        a callback can wait forever, and is an error where that is seen. Its result has to depend on
        its arguments alone (and chance), and is cast to the dtypes of `like`.
      executor: where evaluations run. None: one after another in the thread that waits for them,
        and never two at a time, on several devices either. An int: in so many threads, for what
        waits or computes outside Python. `ProcessWorkers(n)`: in processes, for what computes in
        Python or may hang or crash. Or any `concurrent.futures.Executor`, of loky too, or a Dask
        Client.
      like: what fun returns for one point: a pytree of `jax.ShapeDtypeStruct`, arrays or numbers,
        of which shapes and dtypes count. None asks fun, once for each kind of argument, where x is
        not traced.
      batched: whether fun takes many points at once: all leaves of its arguments, and of its
        result, have one leading axis then, of the same size, whatever vmaps there are. What all
        points share is there once, as a view that is not to be written to. An executor is given one
        part a worker.
      timeout: seconds after which a call of fun is given up; None for never. `ProcessWorkers` end
        and replace the process; a thread cannot be ended, and is left behind and replaced.
      retries: how many times a point is evaluated again after an exception or a timeout. (What a
        dead worker was at is evaluated again anyway.)
      on_failure: what becomes of a point where all attempts fail: "raise", the exception; a number,
        or a pytree like the result, which is the result then; or "missing", NaN. See
        `make_perturbed_fun(..., missing=...)`.
      journal: a path, or a `Journal`: every finished evaluation is in this file before it is used,
        and is not made again, by this program or by one that is started after it has crashed. A
        result with other nodes than dicts, lists and tuples takes `like`.
      progress: whether to draw a bar where evaluations take more than a second (with tqdm).

    Returns:
      A function `h(x, *args, **kwargs)`, with attributes `counts` (what it has done so far) and
      `close()` (which ends threads that it has started). Make it once: each one is compiled anew.

    Raises:
      TypeError: where an argument, or what fun returns, is not of the kind described.
      ValueError: where an argument is out of range, or fun returns other shapes than `like`.
      ImportError: where an optional package is missing; the error names the extra.
      NotImplementedError: for a derivative of h itself.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> import perturbax as px
      >>> def simulator(settings):  # numpy in, numpy out
      ...     return np.sum(np.rint(settings))
      >>> h = px.host_function(simulator, executor=8)
      >>> smooth = px.make_perturbed_fun(h, num_samples=400, sigma=0.5, noise=px.Normal())
      >>> print(jax.grad(smooth, argnums=1)(jax.random.key(0), jnp.ones(2)).round(1))
      [1. 1.]
    """
    check_fun(fun)
    if isinstance(fun, HostFunction):
        raise TypeError("fun is a host function already")
    executor = check_executor(executor)
    batched = check_bool(batched, "batched")
    if timeout is not None:
        number = isinstance(timeout, int | float | np.number) and not isinstance(timeout, bool)
        if not number or not 0 < timeout < math.inf:
            kind = ValueError if number else TypeError
            raise kind(f"timeout must be None or a positive number, got {timeout!r}")
        timeout = float(timeout)
    retries = check_count(retries, "retries", least=0)
    if isinstance(on_failure, str) and on_failure not in ("raise", "missing"):
        raise ValueError(
            f"on_failure must be 'raise', 'missing', a number or a pytree, got {on_failure!r}"
        )
    progress = check_progress(check_bool(progress, "progress"))
    return HostFunction(
        fun,
        executor=executor,
        like=None if like is None else described(like, on_failure),
        batched=batched,
        timeout=timeout,
        retries=retries,
        on_failure=on_failure,
        journal=check_journal(journal),
        progress=progress,
    )


class HostFunction:
    """A function made by `host_function`, whose documentation says more."""

    def __init__(
        self,
        fun: Callable[..., Any],
        *,
        executor: Any,
        like: Like | None,
        batched: bool,
        timeout: float | None,
        retries: int,
        on_failure: Any,
        journal: Journal | None,
        progress: bool,
    ):
        """From checked arguments."""
        name = getattr(fun, "__name__", None)
        self.__name__ = self.__qualname__ = name if isinstance(name, str) else type(fun).__name__
        self.__doc__ = inspect.getdoc(fun)
        self.__wrapped__ = fun
        self._batched, self._timeout, self._retries = batched, timeout, retries
        self._on_failure, self._progress = on_failure, progress
        self._like, self._found = like, dict[Any, Like]()
        self._tally = Tally()
        self._workers = workers_for(executor, fun, timeout)
        self._journal = None if journal is None else JournalFile(journal, fun)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluates the function."""
        leaves, tree = jax.tree.flatten(((x, *args), kwargs))
        call = _Call(self, tree, tuple(None if _is_array(v) else v for v in leaves))
        arrays = [_array(v) for v in leaves if _is_array(v)]
        call.check_fixed()
        like = self.like_at(call, arrays)
        results = None if like is None else tuple(map(canonical, like.leaves))
        found = host_call(arrays, call, results)
        like = like or self.like_at(call, arrays)
        assert like is not None
        return jax.tree.unflatten(like.tree, found)

    @property
    def counts(self) -> HostCounts:
        """What this function has done so far."""
        return self._tally.counts

    def close(self) -> None:
        """Ends threads that were started for this function, and closes its journal.

        A call starts and opens them again.
        """
        self._workers.close()
        if self._journal is not None:
            self._journal.close()

    def __enter__(self) -> "HostFunction":
        """Returns the function, which the end of the `with` block closes."""
        return self

    def __exit__(self, *exception: object) -> None:
        """As `close`."""
        self.close()

    def __repr__(self) -> str:
        """Says what it was made of."""
        return f"<host function {self.__name__}>"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __reduce__(self) -> Any:
        """Raises: what it runs on belongs to this process."""
        raise TypeError(
            f"the host function {self.__name__} cannot be pickled; pickle the function that it was "
            "made of, and make a host function of it there"
        )

    def identity(self) -> str:
        """Its name in a journal; without one, what its code and data are known by."""
        return known_by(self.__wrapped__) if self._journal is None else self._journal.name

    def like_at(self, call: "_Call", arrays: Sequence[Any]) -> Like | None:
        """What comes back for such arguments, as far as it is known."""
        return self._like or self._found.get(call.kind(arrays))

    def evaluate(
        self,
        call: "_Call",
        arrays: Sequence[np.ndarray],
        mapped: tuple[bool, ...],
        size: int | None,
        results: tuple[jax.ShapeDtypeStruct, ...] | None,
    ) -> list[np.ndarray]:
        """All points of one call back."""
        count = 1 if size is None or is_asking() else size
        found: list[list[np.ndarray] | None] = [None] * count
        points = [
            jax.ShapeDtypeStruct(v.shape[1:] if m else v.shape, v.dtype)
            for v, m in zip(arrays, mapped, strict=True)
        ]
        kind = call.kind(points)
        like = self._like or self._found.get(kind)

        def arguments(rows: list[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            # Copies: the function may keep them, and these arrays end with the call back.
            if self._batched and size is None:
                return call.unflatten([np.array(v)[None] for v in arrays])
            if self._batched:
                # What all points share may be large: one copy, which is not to be written to.
                stacked = [
                    v[rows] if m else np.broadcast_to(v.copy(), (len(rows), *v.shape))
                    for v, m in zip(arrays, mapped, strict=True)
                ]
                return call.unflatten(stacked)
            [row] = rows
            own = [np.array(v[row] if m else v)[()] for v, m in zip(arrays, mapped, strict=True)]
            return call.unflatten(own)

        def keep(row: int, leaves: list[np.ndarray]) -> None:
            for same in equal[row]:
                found[same] = leaves

        def accept(rows: list[int], value: Any) -> None:
            nonlocal like
            value = returned(value, self.__name__)
            if value.error is not None:
                raise value.error
            first = like is None
            if like is None:
                like = like_of(value, self._batched, self._on_failure)
            for row, leaves in zip(rows, self._leaves(like, value, len(rows)), strict=True):
                keep(row, leaves)
                if session is not None:
                    session.write(row, leaves, like.tree)
            if first:
                self._learn(kind, like)

        def recall(known: dict[int, Any]) -> None:
            nonlocal like
            for row, (leaves, tree) in known.items():
                if like is None:
                    like = recalled(leaves, tree, self._on_failure)
                    self._found[kind] = like
                specs = tuple(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in leaves)
                if specs != like.leaves or (tree is not None and tree != like.tree):
                    raise ValueError(
                        f"the journal has a result {specs} of {self.__name__}, where {like} is "
                        "expected; under another name, journal=perturbax.Journal(path, name=...), "
                        "it starts anew"
                    )
                keep(row, leaves)
            self._tally.add(recalled=len(known))

        def show(row: int) -> str:
            (x, *_), _ = call.unflatten(
                [v[row] if m else v for v, m in zip(arrays, mapped, strict=True)]
            )
            with np.printoptions(threshold=20, edgeitems=4):
                text = f"x = {x!r}"
            return text if len(text) <= 600 else f"{text[:600]} ..."

        # Without a journal, a point is evaluated as often as it comes.
        session, equal = None, {row: [row] for row in range(count)}
        if self._journal is not None:
            keys = call.keys(self._journal, arrays, mapped, count)
            firsts: dict[bytes, int] = {}
            for row, key in enumerate(keys):
                first = firsts.setdefault(key, row)
                if first != row:
                    equal[first].append(row)
            equal = {row: equal[row] for row in firsts.values()}
            session = Session(self._journal, keys)
            recall(session.known(equal))
        rows = [row for row in equal if found[row] is None]
        bar = Bar(self._progress, self.__name__, len(rows))
        schedule = Schedule(
            workers=self._workers,
            arguments=arguments,
            accept=accept,
            show=show,
            timeout=self._timeout,
            retries=self._retries,
            raises=isinstance(self._on_failure, str) and self._on_failure == "raise",
            tally=self._tally,
            bar=bar,
            session=session,
            recall=recall,
        )
        try:
            schedule.run(self._parts(rows))
        finally:
            try:
                _end(bar, session)
            except KeyboardInterrupt:  # which comes at any moment
                _end(bar, session)
                raise
        if like is None:
            if not count:
                raise call.no_result()
            error = schedule.failures[0]
            raise ValueError(
                f"{self.__name__} failed at the first point, from which perturbax would have "
                "learnt what it returns. Say so: host_function(..., like=...)"
            ) from error
        if schedule.failures:
            instead = instead_of(like, self._on_failure)
            for row in schedule.failures:
                keep(row, instead)
        columns = zip(*(leaves for leaves in found if leaves is not None), strict=True)
        stacked = [np.stack(column) for column in columns]
        if not count:
            stacked = [np.zeros((0, *v.shape), v.dtype) for v in like.leaves]
        wanted = results or tuple(map(canonical, like.leaves))
        stacked = [
            narrowed(v, w.dtype, self.__name__) for v, w in zip(stacked, wanted, strict=True)
        ]
        if size is None:
            return [v[0] for v in stacked]
        if count < size:  # asked for what comes back alone
            return [np.repeat(v, size, axis=0) for v in stacked]
        return stacked

    def _learn(self, kind: Any, like: Like) -> None:
        """Knows what comes back from now on; an error where a journal would not tell it again."""
        if self._journal is not None and skeleton_of(like.tree) is None:
            raise ValueError(
                f"{self.__name__} returned a pytree of the structure {like.tree}. Its journal "
                "could not tell that when the program is started again: it knows dicts with "
                "strings for keys, lists and tuples. Say what it returns: host_function(..., "
                "like=...). What was evaluated is in the journal"
            )
        self._found[kind] = like

    def points_at_a_time(self) -> int:
        """Twice what is under way at a time, so that workers seldom wait for the last of many."""
        return 2 * (self._workers.window() or 1)

    def _parts(self, rows: list[int]) -> list[list[int]]:
        """The points of each call of the function."""
        if not self._batched:
            return [[row] for row in rows]
        parts = min(len(rows), max(1, (self._workers.window() or 2) // 2))
        return [part.tolist() for part in np.array_split(rows, parts)] if rows else []

    def _leaves(self, like: Like, value: Returned, count: int) -> list[list[np.ndarray]]:
        """For each point, the leaves of what the function returned, checked and cast."""
        if value.tree != like.tree:
            raise TypeError(
                f"{self.__name__} returned a pytree of the structure {value.tree}, but like, or an "
                f"earlier call, has {like.tree}"
            )
        front = (count,) if self._batched else ()
        found = [
            cast(leaf, spec, front, self.__name__)
            for leaf, spec in zip(value.leaves, like.leaves, strict=True)
        ]
        if not self._batched:
            return [found]
        return [[v[row] for v in found] for row in range(count)]


def _end(bar: Bar, session: Session | None) -> None:
    try:
        bar.close()
    finally:
        if session is not None:
            session.close()


@dataclasses.dataclass(frozen=True)
class _Call:
    """A host function, called with arguments of some structure: what a program calls back to.

    Attributes:
      function: the host function.
      tree: structure of the arguments, positional and by name.
      fixed: the leaves of the arguments, None where an array is.
    """

    function: HostFunction
    tree: Any
    fixed: tuple[Any, ...]

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def evaluate(self, arrays: Any, mapped: Any, size: Any, results: Any) -> list[np.ndarray]:
        return self.function.evaluate(self, arrays, mapped, size, results)

    def points_at_a_time(self) -> int:
        return self.function.points_at_a_time()

    def identity(self) -> str:
        return self.function.identity()

    def no_result(self) -> Exception:
        name = self.__name__
        return NoResultError(
            f"{name} is called under a trace (jit, for one), and has not been called outside of "
            "one with such arguments: what it returns is not known. Say so, as in "
            "host_function(fun, like=jax.ShapeDtypeStruct((), jnp.float32)) for one number, or "
            f"call {name}(x) once outside"
        )

    def check_fixed(self) -> None:
        for leaf in self.fixed:
            if not isinstance(leaf, str | bytes | None):
                raise TypeError(
                    f"{self.__name__} was called with {leaf!r} ({type(leaf).__name__}), but takes "
                    "pytrees of arrays, numbers and strings. Give it anything else by "
                    "functools.partial, before host_function"
                )

    def kind(self, arrays: Sequence[Any]) -> Any:
        """What the result's structure may depend on."""
        return self.tree, self.fixed, tuple((v.shape, np.dtype(v.dtype)) for v in arrays)

    def keys(
        self, journal: JournalFile, arrays: Sequence[np.ndarray], mapped: Any, count: int
    ) -> list[bytes]:
        """What the journal knows each point by, with the arguments and the function."""
        prefix = journal.key_prefix(self.tree, self.fixed)
        # What all points share is read once.
        shared = [None if m else leaf_digest(v) for v, m in zip(arrays, mapped, strict=True)]

        def key(row: int) -> bytes:
            digests = (
                leaf_digest(v[row]) if s is None else s for v, s in zip(arrays, shared, strict=True)
            )
            return hashlib.sha256(prefix + b"".join(digests)).digest()

        return [key(row) for row in range(count)]

    def unflatten(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rest = iter(arrays)
        leaves = [next(rest) if fixed is None else fixed for fixed in self.fixed]
        return jax.tree.unflatten(self.tree, leaves)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, bool | int | float | complex | np.generic | np.ndarray | Array)


def _array(leaf: Any) -> Any:
    if jnp.issubdtype(getattr(leaf, "dtype", bool), jax.dtypes.prng_key):
        raise TypeError(
            "a host function was called with a PRNG key, which numpy does not know; pass "
            "jax.random.key_data(key), and make a numpy.random.Generator of it"
        )
    if isinstance(leaf, Array):
        return leaf
    # An array of JAX's own. Of another number JAX makes a part of the program, one for each.
    with jax.ensure_compile_time_eval():
        return jnp.asarray(leaf)
