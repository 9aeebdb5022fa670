"""Runs an unmodified program with `optax.perturbations` served by this package."""

import os
import runpy
import sys
import types
from collections.abc import Callable
from typing import NoReturn

from . import __version__
from ._patch import patch_optax

_USAGE = """\
usage: python -m perturbax SCRIPT [ARG ...]
       python -m perturbax -m MODULE [ARG ...]

Runs a Python program, unmodified, with optax.perturbations served by perturbax.
Everything after SCRIPT or MODULE is handed to the program.

options:
  -m MODULE      run a module, as python -m MODULE does
  -h, --help     show this text and end
  -V, --version  show the version of perturbax and end
"""


def main() -> None:
    """Runs the program that the command line names.

    The program finds what it would find under `python SCRIPT` or `python -m MODULE`: `sys.argv`,
    `sys.path[0]`, `__name__` and `__file__`; its exit status becomes that of the process, and a
    traceback begins with its own lines.
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
            _run(runpy.run_module, module, alter_sys=True)
        case [option, *_] if option.startswith("-"):
            _refuse(f"unknown option {option!r}; options of the script come after its name")
        case [script, *arguments]:
            if not os.path.exists(script):
                _refuse(f"there is no file {script!r}")
            _serve()
            sys.argv[:] = [script, *arguments]
            if not sys.flags.safe_path:
                sys.path[0] = os.path.dirname(os.path.realpath(script))
            _run(runpy.run_path, os.path.abspath(script))


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


def _run(runner: Callable[..., object], program: str, **options: bool) -> None:
    """Runs the program; what it raises is reported as if it had been started by itself."""
    try:
        runner(program, run_name="__main__", **options)
    except Exception as error:
        error.__traceback__ = _from_program(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)


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
