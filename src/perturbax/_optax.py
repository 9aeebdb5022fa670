"""Serving `optax.perturbations` by this package.

The functions here set and restore attributes of the module `optax.perturbations` in the running
process; they write to no file.
"""

import importlib
import sys
import types

from ._perturb import make_perturbed_fun
from .noise._protocol import NoiseDistribution
from .noise._smooth import Gumbel, Normal

_MODULE_NAME = "optax.perturbations"
_SERVED = {
    "Gumbel": Gumbel,
    "NoiseDistribution": NoiseDistribution,
    "Normal": Normal,
    "make_perturbed_fun": make_perturbed_fun,
}

# What was replaced is kept on the module it was replaced in, so that the two cannot come apart when
# either package is imported a second time.
_ORIGINALS = "_replaced_by_perturbax"


def patch_optax() -> None:
    """Serves `optax.perturbations` by this package, in this process.

    Afterwards `make_perturbed_fun`, `Gumbel`, `Normal` and `NoiseDistribution` of the module
    `optax.perturbations` are those of `perturbax`, however a program reaches them: `import optax`,
    `import optax.perturbations` or `from optax.perturbations import make_perturbed_fun`. It makes
    no difference whether optax was imported before, and a second call changes nothing.

    Two things stay as they are. A name that was imported *from* the module earlier, as in
    `from optax.perturbations import Gumbel`, keeps the object it was bound to: call `patch_optax`
    before such imports. A process that is started afresh, such as a worker of `multiprocessing`
    with the start method "spawn", has its own `optax.perturbations`: call `patch_optax` there too.

    Raises:
      ModuleNotFoundError: optax is not installed.

    Example:
      >>> import perturbax
      >>> perturbax.patch_optax()
      >>> import optax
      >>> optax.perturbations.make_perturbed_fun is perturbax.make_perturbed_fun
      True
      >>> perturbax.unpatch_optax()
      >>> optax.perturbations.make_perturbed_fun is perturbax.make_perturbed_fun
      False
    """
    module = _import_perturbations()
    originals = dict(vars(module).get(_ORIGINALS, {}))
    # After importlib.reload of the module its names are new ones of its own.
    originals.update({name: vars(module)[name] for name in _SERVED if not _is_served(module, name)})
    vars(module).update(_SERVED, **{_ORIGINALS: originals})


def unpatch_optax() -> None:
    """Gives `optax.perturbations` its own objects back: the very ones that were there before.

    Without an earlier `patch_optax` it does nothing. As there, names that were imported from the
    module in the meantime keep the objects they were bound to.
    """
    module = sys.modules.get(_MODULE_NAME)
    if module is None or _ORIGINALS not in vars(module):
        return
    originals = vars(module).pop(_ORIGINALS)
    for name in _SERVED:
        if _is_served(module, name):
            delattr(module, name)
            vars(module).update({name: originals[name]} if name in originals else {})
    if module.__spec__ is None:  # made by _import_perturbations, for an optax without it
        del sys.modules[_MODULE_NAME]
        delattr(sys.modules["optax"], "perturbations")


def _is_served(module: types.ModuleType, name: str) -> bool:
    """Whether a name is missing from the module, or comes from this package, imported once more."""
    origin = getattr(vars(module).get(name), "__module__", None)
    return name not in vars(module) or str(origin).split(".")[0] == __name__.split(".")[0]


def _import_perturbations() -> types.ModuleType:
    """Imports `optax.perturbations`; makes it where the installed optax has none."""
    try:
        optax = importlib.import_module("optax")
    except ModuleNotFoundError as error:
        if error.name != "optax":
            raise
        raise ModuleNotFoundError(
            "perturbax can only serve optax.perturbations where optax is installed, and it is not. "
            "Either install it (pip install optax), or import the same names from this package: "
            "from perturbax import make_perturbed_fun, Gumbel, Normal",
            name="optax",
        ) from None
    try:
        return importlib.import_module(_MODULE_NAME)
    except ModuleNotFoundError as error:
        if error.name != _MODULE_NAME:
            raise
        module = types.ModuleType(_MODULE_NAME, "Served by perturbax.")
        sys.modules[_MODULE_NAME] = module
        setattr(optax, "perturbations", module)  # noqa: B010
        return module
