"""Which files are the user's: not Python's own, and not those of packages that are installed."""

import functools
import os
import sysconfig
from pathlib import Path


def is_file_of_user(file: str | None) -> bool:
    """Whether it is one; None is not."""
    if file is None:
        return False
    path = Path(os.path.normcase(file))
    if not {"site-packages", "dist-packages"}.isdisjoint(path.parts):
        return False
    return not any(map(path.is_relative_to, _folders_of_packages()))


@functools.cache
def _folders_of_packages() -> tuple[str, ...]:
    """Where Python's own modules are, and those that are installed."""
    kinds = "stdlib", "platstdlib", "purelib", "platlib"
    folders = [*map(sysconfig.get_path, kinds), os.path.dirname(os.__file__)]
    return tuple({os.path.normcase(folder) for folder in folders if folder})
