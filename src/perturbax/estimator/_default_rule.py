"""The rule that chooses a sampler and a surrogate's degree where the user leaves them open."""

import math

from ..noise._inverse import is_invertible
from ..noise._protocol import NoiseDistribution
from ..sampling._draw_groups import Merged
from ..sampling._independent import Antithetic, Independent
from ..sampling._nets import DigitalNet, OrthogonalArray, Sobol
from ..sampling._orthogonal import Orthogonal
from ..sampling._protocol import Sampler
from ._surrogate import num_features

# Degree, most coordinates, and samples for each coefficient. A fit pays if there are enough of
# them, and its equations, num_features**2 operations a sample, are not dearer than drawing it.
_RULE = ((2, 6, 10), (1, 100, 3))
# Fewer samples, in few coordinates, tell too little of what a fit is worth.
_FEWEST = 20
# Most coordinates of a net: beyond, nothing was measured.
_NETS = 1000
# Points that a Sobol net must have in 1, 2, ... coordinates to be chosen. With fewer, derivatives
# of products of some signs may have more variance than with independent samples; in more
# coordinates, even with thousands of points, many times as much.
_SOBOL = (1, 1, 24, 96, 96)
# Independent samples are cut into this many groups where a surrogate is fitted.
_BLOCKS = 8
# Most groups of other samplers that get a surrogate each: all others' equations are summed for it.
_MOST_FITS = 16


def choose(
    sampler: Sampler | None,
    degree: int | None,
    num_samples: int,
    dim: int,
    noise: NoiseDistribution,
) -> tuple[Sampler, int]:
    """Sampler and degree for `num_samples` evaluations of a function of `dim` coordinates.

    Nets pay from four evaluations for each coordinate, polynomials while there are several for each
    coefficient (`docs/samplers.md` has the table); beyond that nothing beats independent samples,
    each against the mean of the others.

    Raises:
      TypeError: if the sampler needs an inverse distribution function that the noise lacks.
      ValueError: if a surrogate needs moments that the noise lacks.
    """
    name = getattr(noise, "law", repr(noise))
    invertible = is_invertible(noise)
    polynomial = _has_moments(noise) and isinstance(dim, int)
    if isinstance(sampler, Antithetic | Orthogonal | DigitalNet) and not invertible:
        raise TypeError(
            f"{type(sampler).__name__}() needs noise with an inverse distribution function, which "
            f"{name} lacks: define noise.icdf(u), or use Independent()"
        )
    if not isinstance(dim, int) and (degree or isinstance(sampler, Orthogonal | DigitalNet)):
        asked = f"degree={degree}" if degree else f"{type(sampler).__name__}()"
        raise ValueError(
            f"{asked} needs to know how many coordinates x has, but its shape is symbolic, {dim}: "
            "use Independent() and degree=0"
        )
    if degree and not polynomial:
        raise ValueError(
            f"degree={degree} needs noise with a finite mean and variance, given as noise.mean and "
            f"noise.variance; {name} has none: use degree=0"
        )
    if degree is None:
        degree = min(_degree(num_samples, dim), _most_degree(noise)) if polynomial else 0
        if sampler is None and not invertible:
            degree = 0
    if sampler is None:
        pay = invertible and isinstance(dim, int) and 0 < dim <= min(_NETS, num_samples // 4)
        sampler = nets_for(num_samples, dim) if pay else Independent()
    if not degree:
        return sampler, degree
    groups = -(-num_samples // sampler.group_size(num_samples, dim))
    if groups == 1:
        degree = 0  # a single group leaves nothing to fit on
    elif groups > _BLOCKS and isinstance(sampler, Independent) and sampler.block == 1:
        sampler = Independent(block=-(-num_samples // _BLOCKS))
    elif groups > _MOST_FITS:
        sampler = Merged(sampler, -(-groups // _MOST_FITS))
    return sampler, degree


def nets_for(num_samples: int, dim: int, num_groups: int = 2) -> DigitalNet:
    """Sobol nets if theirs are large enough for `dim` coordinates, else orthogonal arrays."""
    sobol = Sobol(num_groups)
    enough = dim <= len(_SOBOL) and sobol.group_size(num_samples, dim) >= _SOBOL[dim - 1]
    return sobol if enough else OrthogonalArray(num_groups)


def _degree(num_samples: int, dim: int) -> int:
    """The degree whose coefficients half of the samples determine well, at little cost."""
    for degree, most_dim, per_coefficient in _RULE:
        enough = num_samples >= max(_FEWEST, 2 * per_coefficient * num_features(dim, degree))
        if 0 < dim <= most_dim and enough:
            return degree
    return 0


def _most_degree(noise: NoiseDistribution) -> int:
    """The degree that the tails leave useful: features of degree d need moments of order d + 2."""
    moment = getattr(noise, "moment", None)
    if moment is None:
        return 1  # of other noise, mean and variance are all that is known
    return 2 if math.isfinite(moment(4)) else int(math.isfinite(moment(3)))


def _has_moments(noise: NoiseDistribution) -> bool:
    moments = (getattr(noise, name, math.nan) for name in ("mean", "variance"))
    return all(isinstance(m, int | float) and math.isfinite(m) for m in moments)
