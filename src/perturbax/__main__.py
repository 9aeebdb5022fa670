"""Runs an unmodified program with `optax.perturbations` served by this package."""

import functools
import importlib.machinery
import io
import os
import pkgutil
import runpy
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

from . import __version__
from ._optax import patch_optax

_USAGE = """\
usage: python -m perturbax SCRIPT [ARG ...]
       python -m perturbax -m MODULE [ARG ...]

Runs a Python program, unmodified, with optax.perturbations served by perturbax.
Everything after SCRIPT or MODULE is handed to the program. Processes that it spawns
are not served: they have optax's own functions, unless they call perturbax.patch_optax().

options:
  -m MODULE      run a module, as python -m MODULE does
  -h, --help     show this text and end
  -V, --version  show the version of perturbax and end
"""


def main() -> None:
    """Runs the program that the command line names.

    The program finds what it would find under `python SCRIPT` or `python -m MODULE`: `sys.argv`,
    `sys.path[0]`, `__name__`, `__file__`, `__package__` and `__loader__`; its exit status becomes
    that of the process, and a traceback begins with its own lines.
    """
    match sys.argv[1:]:
        case ["-h" | "--help", *_]:
            print(_USAGE, end="")
        case ["-V" | "--version", *_]:
            print(f"perturbax {__version__}")
        case []:
            _refuse("name a script to run")
        case ["-m"]:
            _refuse("-m needs the name of a module")
        case ["-m", module, *arguments]:
            _serve()
            sys.argv[:] = ["-m", *arguments]  # runpy puts the module's file in the first place
            _run(_run_module, module, alter_argv=True)
        case [option, *_] if option.startswith("-"):
            _refuse(f"unknown option {option!r}; options of the script come after its name")
        case [script, *arguments]:
            if not os.path.exists(script):
                _refuse(f"there is no file {script!r}")
            _serve()
            sys.argv[:] = [script, *arguments]
            path = os.path.abspath(script)
            is_file = pkgutil.get_importer(path) is None  # no folder, no archive
            place = os.path.dirname(os.path.realpath(script)) if is_file else path
            if not sys.flags.safe_path:
                sys.path[0] = place
            elif not is_file:
                sys.path.insert(0, place)
            if is_file:
                _run(_run_file, path)
            else:
                _run(_run_module, "__main__", alter_argv=False)


def _refuse(message: str) -> NoReturn:
    """Ends with the exit status that Python itself has for a wrong command line."""
    print(f"python -m perturbax: {message}\n\n{_USAGE}", end="", file=sys.stderr)
    sys.exit(2)


def _serve() -> None:
    try:
        patch_optax()
    except ModuleNotFoundError as error:
        if error.name != "optax":
            raise
        sys.exit(f"python -m perturbax: {error}")


def _run(runner: Callable[..., object], program: str, **options: Any) -> None:
    """Runs the program; what it raises is reported as if it had been started by itself."""
    try:
        runner(program, **options)
    except BaseException:
        # Raised further, for the exit status is Python's own affair, as after an interrupt.
        sys.excepthook = functools.partial(_report, sys.excepthook)
        raise


def _run_module(name: str, alter_argv: bool) -> None:
    """Runs a module as Python does, in a `__main__` that stays.

    What runpy has for others puts the former `__main__` and `sys.argv` back once the module's code
    has ended, while threads still run, and before what is registered for the end.
    """
    sys.modules["__main__"] = types.ModuleType("__main__")
    runpy._run_module_as_main(name, alter_argv)  # pyright: ignore[reportAttributeAccessIssue]


def _run_file(path: str) -> None:
    """Runs a file, source or compiled; runpy would replace `sys.argv[0]`, and knows no loader."""
    if path.endswith(".pyc"):
        loader = importlib.machinery.SourcelessFileLoader("__main__", path)
        code: Any = loader.get_code("__main__")
    else:
        loader = importlib.machinery.SourceFileLoader("__main__", path)
        with io.open_code(path) as file:
            code = compile(file.read(), path, "exec", dont_inherit=True)
    module = types.ModuleType("__main__")
    vars(module).update(__file__=path, __loader__=loader, __cached__=None)
    sys.modules["__main__"] = module
    exec(code, vars(module))


def _report(
    hook: Callable[..., object],
    kind: type[BaseException],
    error: BaseException,
    traceback: types.TracebackType | None,
) -> None:
    traceback = _from_program(traceback)
    hook(kind, error.with_traceback(traceback), traceback)


def _from_program(traceback: types.TracebackType | None) -> types.TracebackType | None:
    """Drops the frames of this file and of runpy, which come before those of the program."""
    while traceback is not None:
        names = traceback.tb_frame.f_globals
        if names is not globals() and names is not vars(runpy):
            return traceback
        traceback = traceback.tb_next
    return None


if __name__ == "__main__":
    main()
