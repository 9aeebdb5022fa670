"""perturbax: gradients of what cannot be differentiated, by perturbation."""

from importlib.metadata import version as _version

from . import solvers as solvers
from ._call import Settings as Settings
from ._optax import patch_optax as patch_optax, unpatch_optax as unpatch_optax
from ._perturb import PerturbedFun as PerturbedFun, make_perturbed_fun as make_perturbed_fun
from ._straight_through import make_straight_through_fun as make_straight_through_fun
from .carried._carry import (
    Carried as Carried,
    CarriedState as CarriedState,
    carry as carry,
)
from .diagnostics._check_noise import NoiseReport as NoiseReport, check_noise as check_noise
from .diagnostics._diagnose import diagnose as diagnose
from .diagnostics._diagnosis import Alternative as Alternative, Diagnosis as Diagnosis
from .diagnostics._smoothing import plot_smoothing as plot_smoothing
from .diagnostics._standard_errors import (
    Estimate as Estimate,
    Intervals as Intervals,
    estimate as estimate,
)
from .diagnostics._sweep import SigmaSweep as SigmaSweep, sweep_sigma as sweep_sigma
from .estimator._default_rule import Choice as Choice, choose_sampler as choose_sampler
from .host_functions._host_function import host_function as host_function
from .host_functions._journal import Journal as Journal
from .host_functions._processes import ProcessWorkers as ProcessWorkers
from .host_functions._scheduling import HostCounts as HostCounts
from .minimization._minimize import MinimizeProgress as MinimizeProgress, minimize as minimize
from .minimization._result import (
    MinimizeHistory as MinimizeHistory,
    MinimizeResult as MinimizeResult,
)
from .noise._limited import Laplace as Laplace, Triangular as Triangular, Uniform as Uniform
from .noise._protocol import NoiseDistribution as NoiseDistribution
from .noise._smooth import (
    Cauchy as Cauchy,
    Gumbel as Gumbel,
    Logistic as Logistic,
    Normal as Normal,
    StudentT as StudentT,
)
from .optimizers._argmax import make_perturbed_argmax as make_perturbed_argmax
from .optimizers._distribution import (
    EmpiricalDistribution as EmpiricalDistribution,
    make_perturbed_distribution as make_perturbed_distribution,
)
from .optimizers._fenchel_young import make_fenchel_young_loss as make_fenchel_young_loss
from .optimizers._implicit_mle import (
    SumOfGamma as SumOfGamma,
    make_implicit_mle as make_implicit_mle,
)
from .optimizers._max import make_perturbed_max as make_perturbed_max
from .sampling._independent import Antithetic as Antithetic, Independent as Independent
from .sampling._nets import OrthogonalArray as OrthogonalArray, Sobol as Sobol
from .sampling._orthogonal import Orthogonal as Orthogonal
from .sampling._protocol import Sampler as Sampler
from .tracing._host_exceptions import own_exceptions as own_exceptions

__version__ = _version("perturbax")
