"""The program of a worker process, and what runs inside workers of others.

It imports nothing but Python's own library, so that a worker starts fast: run as a script it does
not import the package, hence not JAX.

A worker reads requests from standard input and writes replies to standard output, each a pickle
with its length in front. It ends, with all processes that it started, when its input does: that is
what is left of a program that was killed.
"""

import io
import os
import pickle
import queue
import signal
import struct
import sys
import threading
import traceback
from typing import Any, BinaryIO

_LENGTH = struct.Struct("<Q")


def write_message(stream: BinaryIO, message: bytes) -> None:
    """Writes the length of the message, and the message."""
    stream.write(_LENGTH.pack(len(message)))
    stream.write(message)
    stream.flush()


def read_message(stream: BinaryIO) -> bytes:
    """What `write_message` wrote; raises EOFError where the stream ends before."""
    return _read(stream, _LENGTH.unpack(_read(stream, _LENGTH.size))[0])


def _read(stream: BinaryIO, count: int) -> bytes:
    parts, missing = [], count
    while missing:
        part = stream.read(missing)
        if not part:
            raise EOFError
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


class _Pickler(pickle.Pickler):
    """Turns JAX arrays into numpy arrays: loading one would compute with JAX in the callback."""

    def reducer_override(self, obj: Any) -> Any:
        jax = sys.modules.get("jax")
        if jax is not None and isinstance(obj, jax.Array):
            return sys.modules["numpy"].asarray(obj).__reduce__()
        return NotImplemented


def dump(value: Any) -> bytes:
    """A pickle of what a function returned or raised."""
    stream = io.BytesIO()
    _Pickler(stream, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return stream.getvalue()


def exception_message(error: BaseException) -> bytes:
    """The reply that carries an exception, with its traceback as text."""
    text = "".join(traceback.format_exception(error))
    try:
        message = dump(("raised", error, text))
        pickle.loads(message)
        return message
    except Exception:  # an exception that cannot be sent, or not be made again
        name = type(error).__name__
        return dump(("raised", RuntimeError(f"{name}: {error}"), text))


def timed(fun: Any, timeout: float, most: int, in_main: bool, /, *args: Any, **kwargs: Any) -> Any:
    """fun(*args, **kwargs) in a thread that is left behind after `timeout` seconds.

    For executors whose workers are not ours to end. Where `most` threads were left behind already,
    a process ends itself, and its executor notices; the main program (`in_main`) has an error.
    """
    name = "perturbax: evaluation given up"
    left_behind = sum(t.name == name for t in threading.enumerate())
    if left_behind >= most:
        if in_main:
            raise RuntimeError(
                f"{left_behind} evaluations hang in threads, which cannot be ended. Use "
                "perturbax.ProcessWorkers, which ends and replaces the process of each"
            )
        os._exit(1)
    found: list[Any] = []

    def run() -> None:
        try:
            found.append((fun(*args, **kwargs), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    if not found:
        thread.name = name
        raise TimeoutError(f"an evaluation took more than timeout={timeout:g} seconds")
    value, error = found[0]
    if error is not None:
        raise error
    return value


def _end() -> None:
    """Ends this process and all that it started."""
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def _listen(stream: BinaryIO, inbox: "queue.SimpleQueue[bytes]") -> None:
    try:
        while True:
            inbox.put(read_message(stream))
    except (EOFError, OSError):
        _end()


def main() -> None:
    """Answers requests until the input ends."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # Of the function: it reads nothing, and what it prints goes where errors go.
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests, inbox), daemon=True).start()
    sys.path[:] = pickle.loads(inbox.get())
    functions: dict[int, Any] = {}
    args, kwargs = (), {}
    while True:
        kind, number, payload = pickle.loads(inbox.get())
        try:
            if kind == "initialize":
                pickle.loads(payload)()
                reply = dump(("done", None, ""))
            elif kind == "load":
                functions[number] = pickle.loads(payload)
                reply = dump(("done", None, ""))
            elif kind == "arguments":  # apart, for what it takes is not the function's time
                args, kwargs = pickle.loads(payload)
                reply = dump(("done", None, ""))
            else:
                value = functions[number](*args, **kwargs)
                args, kwargs = (), {}
                try:
                    reply = dump(("returned", value, ""))
                except Exception as error:
                    raise TypeError(f"fun returned what cannot be pickled: {error}") from error
        except BaseException as error:
            reply = exception_message(error)
        write_message(replies, reply)


if __name__ == "__main__":
    main()
