"""The program of worker processes, and what runs inside workers of others.

It imports nothing but Python's own library (and numpy), and is run as a script, so that it does not
import the package, hence not JAX. One process, the nursery, waits for orders and forks workers; it
never does anything else, so that a worker takes milliseconds to start, and forks safely.

A worker is connected with the main program by a socket: requests and replies are pickles with
their length in front. It ends, with all processes that it started, when the socket does; so does
the nursery. So nothing is left of a program that was killed. Nobody else keeps the socket: what the
user's function starts may outlive a worker that dies, and the program has to see that it died.
"""

import io
import os
import pickle
import queue
import signal
import socket
import struct
import sys
import threading
import time
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


def _reduced(obj: Any) -> Any:
    """Turns JAX arrays into numpy arrays: loading one would compute with JAX in the callback."""
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(obj, jax.Array):
        return sys.modules["numpy"].asarray(obj).__reduce__()
    return NotImplemented


class _Pickler(pickle.Pickler):
    """As executors of others pickle."""

    def reducer_override(self, obj: Any) -> Any:
        return _reduced(obj)


def _pickler_by_value() -> type[pickle.Pickler]:
    """Sends classes of the program's script along, which is no module that one could import."""
    import cloudpickle

    class PicklerByValue(cloudpickle.Pickler):
        # Without types: where this function is sent by value, a class body misses global names.
        def reducer_override(self, obj):
            reduced = _reduced(obj)
            return super().reducer_override(obj) if reduced is NotImplemented else reduced

    return PicklerByValue


def dump(value: Any, pickler: type[pickle.Pickler]) -> bytes:
    """A pickle of what a function returned or raised."""
    stream = io.BytesIO()
    pickler(stream, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return stream.getvalue()


def exception_message(error: BaseException, pickler: type[pickle.Pickler]) -> bytes:
    """The reply that carries an exception, with its traceback as text."""
    text = "".join(traceback.format_exception(error))
    return dump(("raised", sendable(error, pickler), text), pickler)


def sendable(error: BaseException, pickler: type[pickle.Pickler]) -> BaseException:
    """The exception, if it can be sent and made again, else one that says what it was."""
    try:
        pickle.loads(dump(error, pickler))
        return error
    except BaseException:  # of its constructor, for one, which may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def careful(fun: Any, /, *args: Any, **kwargs: Any) -> Any:
    """fun(*args, **kwargs) in a pool of others, which it does not harm.

    Exceptions can be sent: one that cannot be unpickled takes the pool with it. And the process
    ends when its parent has: workers of a program that was killed would wait for ever.
    """
    name = "perturbax: looking after the parent"
    if not any(thread.name == name for thread in threading.enumerate()):
        parent = (os.getppid(),)
        threading.Thread(target=_end_with_parent, args=parent, name=name, daemon=True).start()
    try:
        return fun(*args, **kwargs)
    except BaseException as error:
        sent = sendable(error, _Pickler)
        if sent is error:
            raise
        text = "".join(traceback.format_exception(error))
    sent.add_note(f"Raised in a worker process:\n\n{text}")
    raise sent


def sealed(fun: Any, /, *args: Any, **kwargs: Any) -> bytes:
    """A pickle of what becomes of fun(*args, **kwargs), for Dask.

    It would wait forever for a result that cannot be pickled, lose a worker to `sys.exit`, and keep
    of an exception that cannot be sent no more than its text.
    """
    pickler = _pickler_by_value()
    try:
        return _reply(fun(*args, **kwargs), pickler)
    except BaseException as error:
        return exception_message(error, pickler)


def unsealed(message: bytes) -> tuple[Any, BaseException | None]:
    """What a worker process says that a function returned, or the exception that it raised."""
    try:
        kind, value, text = pickle.loads(message)
    except Exception as error:
        error.add_note("Raised by unpickling what a worker process has sent")
        return None, error
    if kind == "returned":
        return value, None
    value.add_note(f"Raised in a worker process:\n\n{text}")
    return None, value


def at_home(process: int, token: str, there: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Calls `there`, or what it stands for where it came from, if it never left that process.

    Dask pickles functions for workers that are threads of the program too.
    """
    pickles = sys.modules.get("perturbax.host_functions._pickles")
    shipped = pickles.SHIPPED.get(token) if pickles and os.getpid() == process else None
    return (there if shipped is None else shipped)(*args, **kwargs)


def timed(
    fun: Any, timeout: float, most: int, in_main: bool, /, *args: Any, **kwargs: Any
) -> tuple[bool, Any]:
    """Whether fun(*args, **kwargs) took longer than `timeout` seconds, and its value if not.

    It is called in a thread, which is left behind where it takes longer. So a TimeoutError that is
    raised here is the function's own.

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
        return True, None
    value, error = found[0]
    if error is not None:
        raise error
    return False, value


# --- Workers


def _end() -> None:
    """Ends this process and all that it started."""
    os.killpg(0, signal.SIGKILL)


def _listen(stream: BinaryIO, inbox: "queue.SimpleQueue[bytes]") -> None:
    try:
        while True:
            inbox.put(read_message(stream))
    except (EOFError, OSError):
        _end()


def _let_go(connection: socket.socket) -> None:
    """Closes the connection, of which streams are left; nothing if that was done before."""
    descriptor = connection.detach()
    if descriptor >= 0:
        os.close(descriptor)


def serve(connection: socket.socket) -> None:
    """Answers requests until the connection ends."""
    connection.set_inheritable(False)  # by programs that the function starts
    os.register_at_fork(after_in_child=lambda: _let_go(connection))
    requests, replies = connection.makefile("rb"), connection.makefile("wb")
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests, inbox), daemon=True).start()
    functions: dict[int, Any] = {}
    args, kwargs = (), {}
    process, pickler = os.getpid(), _pickler_by_value()
    while True:
        kind, number, payload = pickle.loads(inbox.get())
        value = None
        try:
            if kind == "initialize":
                pickle.loads(payload)()
            elif kind == "load":
                functions[number] = pickle.loads(payload)
            elif kind == "arguments":  # apart, for what it takes is not the function's time
                args, kwargs = pickle.loads(payload)
            else:
                value = functions[number](*args, **kwargs)
                args, kwargs = (), {}
            reply = _reply(value, pickler)
        except BaseException as error:
            reply = exception_message(error, pickler)
        if os.getpid() != process:  # the function forked, and this is the copy
            os._exit(0)
        write_message(replies, reply)


def _reply(value: Any, pickler: type[pickle.Pickler]) -> bytes:
    try:
        return dump(("returned", value, ""), pickler)
    except Exception as error:
        raise TypeError(f"fun returned what cannot be pickled: {error}") from error


# --- The nursery: orders are a letter and a number, answers are a number

ORDER = struct.Struct("<cq")
ANSWER = struct.Struct("<q")
# In place of an exit status, for a worker that another nursery has started, which died.
UNKNOWN = 256


def _fork(control: socket.socket, connection: int) -> int:
    """Starts a worker at the other end of the connection; its process."""
    process = os.fork()
    if process:
        os.close(connection)
        return process
    control.close()
    os.setpgid(0, 0)
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:  # or all workers would draw the same random numbers
        numpy_random.seed()
    try:
        serve(socket.socket(fileno=connection))
    finally:
        os._exit(1)
    return 0


def _exit_status(process: int) -> int:
    """Waits for a worker's end."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    except ChildProcessError:
        return UNKNOWN


def main() -> None:
    """Carries out orders until there can be no more."""
    control = socket.socket(fileno=int(sys.argv[1]))
    with control.makefile("rb") as stream:
        sys.path[:], modules = pickle.loads(read_message(stream))
    for module in modules:
        __import__(module)
    control.sendall(ANSWER.pack(os.getpid()))
    while True:
        message, connections, _, _ = socket.recv_fds(control, ORDER.size, 1)
        if len(message) < ORDER.size:
            return
        order, number = ORDER.unpack(message)
        if order == b"f":
            answer = _fork(control, connections[0])
        else:
            answer = _exit_status(number)
        control.sendall(ANSWER.pack(answer))


if __name__ == "__main__":
    main()
