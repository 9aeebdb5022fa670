"""The rule that chooses a sampler and a surrogate's degree where the user leaves them open."""

import dataclasses
import math

from .. import _checks
from ..noise._foreign import as_noise
from ..noise._inverse import is_invertible
from ..noise._protocol import NoiseDistribution
from ..noise._smooth import Gumbel
from ..sampling._independent import Independent
from ..sampling._merged import Merged
from ..sampling._nets import OrthogonalArray, Sobol
from ..sampling._orthogonal import Orthogonal
from ..sampling._protocol import Sampler
from ._surrogate import num_features


@dataclasses.dataclass(frozen=True)
class Rule:
    """Every threshold of the choice; `docs/samplers.md` has what follows from them.

    Attributes:
      degrees: degree, most coordinates, and samples for each coefficient. A fit pays if there are
        enough of them, and its equations, num_features**2 operations a sample, are not dearer than
        drawing it.
      fewest: samples that a fit takes at least; fewer, in few coordinates, tell too little of what
        it is worth.
      block_degree: most coordinates, and samples for each from which a fit of degree 1 pays with
        orthogonal directions, which tell it more. In more coordinates they leave little to fit.
      parts: pairs (r, d): in up to d coordinates a block of orthogonal directions pays from r
        samples for each coordinate on. The block gets all N samples but min(2 sqrt(N), N / 3),
        which are left to make its baseline. In many coordinates drawing it takes twice the time,
        and hardly gains at first.
      pairs: the same for whole blocks of directions with their opposites, and the most: with more,
        nets are better.
      block_coordinates: fewest and most for which blocks are taken.
      block_groups: into how many groups blocks are put for fits, each of which takes time; with as
        many as there are blocks the variance is hardly less. Four blocks stay four: of two groups
        of two, the last of which may have a single sample, one would be fitted on too little.
      per_coordinate: samples for each coordinate from which nets pay.
      most_coordinates: of a net; beyond, nothing was measured.
      sobol_points: points that a Sobol net must have in 1, 2, ... coordinates to be chosen. With
        fewer, derivatives of products of some signs may have more variance than with independent
        samples; in more coordinates, even with thousands of points, many times as much.
      left_out: independent samples for each coordinate, and how many at least, from which a linear
        surrogate of each that is fitted on all others pays; up to how many, for it takes their
        cube; and up to how many outputs, for each takes their square several times.
      nets: how many are taken, each of which is fitted on the other.
      nets_for_errors: how many `estimate` takes. Two tell almost nothing about their spread; eight
        leave seven degrees of freedom, for intervals hardly wider than with many, and each is still
        large enough to be a good net.
      free_groups: groups with a fit each of samples that may be grouped at will.
      most_groups: groups with a fit each of other samples: all others' equations are summed for it.
    """

    degrees: tuple[tuple[int, int, int], ...] = ((2, 6, 10), (1, 100, 3))
    fewest: int = 20
    block_degree: tuple[int, int] = (50, 3)
    parts: tuple[tuple[float, int], ...] = ((1, 200), (1.5, 1000))
    pairs: tuple[int, int] = (2, 12)
    block_coordinates: tuple[int, int] = (3, 1000)
    block_groups: int = 4
    per_coordinate: int = 4
    most_coordinates: int = 1000
    sobol_points: tuple[int, ...] = (1, 1, 24, 96, 96, 96, 250, 250, 250, 250)
    left_out: tuple[float, int, int, int] = (0.25, 8, 256, 8)
    nets: int = 2
    nets_for_errors: int = 8
    free_groups: int = 8
    most_groups: int = 16


RULE = Rule()


@dataclasses.dataclass(frozen=True, repr=False)
class Choice:
    """How a perturbed function draws its samples, and what it subtracts from their values.

    Prints as a few sentences.

    Attributes:
      sampler: draws the samples; may be asked for as `sampler=` as it is.
      degree: of the polynomial surrogate that is fitted to each group's others.
      num_groups: how many independent groups the samples make.
      group_size: samples in a group; the last may have fewer.
      reason: why, in words.
    """

    sampler: Sampler
    degree: int
    num_groups: int
    group_size: int
    reason: str

    def __str__(self) -> str:
        groups = "1 group" if self.num_groups == 1 else f"{self.num_groups} groups"
        of = f"{self.group_size} sample{'s' if self.group_size > 1 else ''}"
        return f"{self.sampler}, {groups} of {of}, degree {self.degree}. {self.reason}"

    __repr__ = __str__


def choose_sampler(
    num_samples: int,
    dim: int,
    noise: NoiseDistribution = Gumbel(),
    *,
    sampler: Sampler | None = None,
    degree: int | None = None,
    num_nets: int = RULE.nets,
    num_outputs: int = 1,
) -> Choice:
    """Tells which sampler and degree `make_perturbed_fun` chooses, and why.

    From one evaluation for each coordinate orthogonal directions pay, from two with opposites, from
    a dozen nets, and polynomials while there are several for each coefficient (the guide to
    samplers has the table). With fewer evaluations than coordinates nothing beats independent
    samples, each against what a linear function of the others predicts, or with very few against
    their mean.

    Args:
      num_samples: as in `make_perturbed_fun`.
      dim: how many perturbed coordinates there are: elements of the floating leaves of x.
      noise: as in `make_perturbed_fun`.
      sampler: as in `make_perturbed_fun`; None leaves it open.
      degree: as in `make_perturbed_fun`; None leaves it open.
      num_nets: how many nets to take where nets are chosen; for standard errors `estimate` takes 8,
        and smaller blocks, so that there are as many.
      num_outputs: how many numbers the function returns. With fewer samples than coordinates, what
        predicting each of many would take is not worth its time.

    Returns:
      A `Choice`: sampler, degree, how many groups of which size, and the reason. A surrogate is
      fitted on the samples of all other groups, and standard errors come from the groups' spread.

    Raises:
      TypeError: where an argument is not of the kind described; where the sampler needs an inverse
        distribution function that the noise lacks.
      ValueError: where a number is too small; where the degree needs moments that the noise lacks.

    Example:
      >>> import perturbax as px
      >>> choice = px.choose_sampler(1000, dim=3, noise=px.Normal())
      >>> choice.sampler, choice.degree, choice.num_groups
      (Sobol(num_groups=2), 2, 2)
      >>> print(px.choose_sampler(100, dim=200))
      Independent(block=1), 100 groups of 1 sample, degree 1. Independent samples, because ...
    """
    num_samples = _checks.check_count(num_samples, "num_samples")
    dim = _checks.check_count(dim, "dim", least=0)
    _checks.check_noise(noise)
    _checks.check_sampler(sampler)
    _checks.check_degree(degree)
    num_nets = _checks.check_count(num_nets, "num_nets")
    num_outputs = _checks.check_count(num_outputs, "num_outputs", least=0)
    return choose(num_samples, dim, as_noise(noise), sampler, degree, num_nets, num_outputs)


def choose(
    num_samples: int,
    dim: int,
    noise: NoiseDistribution,
    sampler: Sampler | None,
    degree: int | None,
    num_nets: int = RULE.nets,
    num_outputs: int = 1,
) -> Choice:
    """`choose_sampler` of checked arguments; `dim` may be symbolic."""
    given = {"sampler": sampler, "degree": degree}
    if dim == 0:
        degree = 0  # a polynomial of no coordinates is a constant
    if sampler is not None:
        _checks.check_group_size(sampler, num_samples, dim)
    check_needs(sampler, degree, dim, noise)
    why_sampler, leave_alone = "", sampler is None and not is_invertible(noise)
    if sampler is None:
        sampler, why_sampler = _sampler(num_samples, dim, noise, num_nets)
    polynomial, why_degree = degree, ""
    if polynomial is None and leave_alone:
        polynomial = 0
    elif polynomial is None:
        polynomial, why_degree = _degree(num_samples, dim, noise, sampler, num_outputs)
    if polynomial:
        if sampler.group_size(num_samples, dim) >= num_samples:
            polynomial, why_degree = 0, "Degree 0, because a single group leaves nothing to fit on."
        else:
            few = given["sampler"] is None and num_nets <= RULE.nets
            sampler = _for_fits(sampler, num_samples, dim, polynomial, few)
    asked = " and ".join(name for name, value in given.items() if value is not None)
    why_merged = ""
    if isinstance(sampler, Merged):
        why_merged = f"{sampler.count} groups of it count as one, for each takes a fit."
    sentences = why_sampler, why_degree, why_merged, f"Asked for: {asked}." if asked else ""
    reason = " ".join(filter(None, sentences))
    size = sampler.group_size(num_samples, dim)
    return Choice(sampler, polynomial, -(-num_samples // size), size, reason)


def check_needs(
    sampler: Sampler | None, degree: int | None, dim: int, noise: NoiseDistribution
) -> None:
    """Raises where what was asked for needs more than there is."""
    kind = f"{type(sampler).__name__}()"
    if getattr(sampler, "needs_inverse", False) and not is_invertible(noise):
        raise TypeError(
            f"{kind} needs noise with an inverse distribution function, which {_name(noise)} "
            "lacks: define noise.icdf(u), or use Independent()"
        )
    if not isinstance(dim, int) and (degree or getattr(sampler, "needs_dim", False)):
        asked = f"degree={degree}" if degree else kind
        raise ValueError(
            f"{asked} needs to know how many coordinates x has, but its shape is symbolic, {dim}: "
            "use Independent() and degree=0"
        )
    if degree and not _has_moments(noise):
        needs = f"degree={degree} needs noise with a finite mean and variance, given as noise.mean"
        moments = ("mean", "variance")
        arrays = [name for name in moments if hasattr(getattr(noise, name, 0.0), "ndim")]
        if arrays:
            raise ValueError(
                f"{needs} and noise.variance, Python numbers; {arrays[0]} of {_name(noise)} is an "
                "array: give a float, or use degree=0"
            )
        raise ValueError(f"{needs} and noise.variance; {_name(noise)} has none: use degree=0")


def _sampler(
    num_samples: int, dim: int, noise: NoiseDistribution, num_nets: int
) -> tuple[Sampler, str]:
    """The sampler for `dim` coordinates, and why."""
    if not is_invertible(noise):
        why = f"{_name(noise)} has no inverse distribution function, which all others need"
    elif not isinstance(dim, int):
        why = f"the number of coordinates is symbolic, {dim}"
    elif dim == 0:
        why = "there are no coordinates"
    elif _takes_blocks(num_samples, dim, noise):
        return _blocks(num_samples, dim, num_nets)
    elif dim > RULE.most_coordinates:
        why = f"nets of more than {RULE.most_coordinates} coordinates were not measured"
    elif dim > num_samples // RULE.per_coordinate:
        why = (
            f"nets pay from {RULE.per_coordinate} samples for each coordinate and there are "
            f"{num_samples} for {dim}"
        )
    else:
        return _nets(num_samples, dim, num_nets)
    return Independent(), f"Independent samples, because {why}."


def _takes_blocks(num_samples: int, dim: int, noise: NoiseDistribution) -> bool:
    """Whether there are as many samples as for blocks, and the tails allow it."""
    fewest, most = RULE.block_coordinates
    several = _part(dim) * dim <= num_samples <= RULE.pairs[1] * dim
    return several and fewest <= dim <= most and _has_moments(noise)


def _part(dim: int) -> float:
    """Samples for each coordinate from which a block of orthogonal directions pays."""
    return min((few for few, up_to in RULE.parts if dim <= up_to), default=math.inf)


def _blocks(num_samples: int, dim: int, num_nets: int) -> tuple[Sampler, str]:
    """Blocks of orthogonal directions, with opposites if there are enough samples for a whole one.

    For standard errors there are more.
    """
    if num_samples < RULE.pairs[0] * dim:
        why = f"there are {_part(dim)} to {RULE.pairs[0]} samples for each coordinate"
        others = min(2 * math.isqrt(num_samples), num_samples // 3)
        most = -(-num_samples // num_nets) if num_nets > RULE.nets else num_samples - others
        return Orthogonal(min(most, dim)), f"Orthogonal directions, because {why}."
    most = num_samples // 2 // num_nets if num_nets > RULE.nets else dim
    pairs = Orthogonal(max(most, 1) if most < dim else None, antithetic=True)
    why = f"there are {RULE.pairs[0]} to {RULE.pairs[1]} samples for each coordinate"
    return pairs, f"Orthogonal directions and their opposites, because {why}."


def _nets(num_samples: int, dim: int, num_nets: int) -> tuple[Sampler, str]:
    """Sobol nets if theirs are large enough for `dim` coordinates, else orthogonal arrays."""
    sobol = Sobol(num_nets)
    size = sobol.group_size(num_samples, dim)
    many = f"there are at least {RULE.per_coordinate} samples for each coordinate"
    if dim > len(RULE.sobol_points):
        why = f"Sobol nets would miss some functions of {dim} coordinates"
    elif size < RULE.sobol_points[dim - 1]:
        why = f"Sobol nets of {dim} coordinates need {RULE.sobol_points[dim - 1]} points each"
    else:
        return sobol, f"Sobol nets, because {many}, and so few coordinates."
    return OrthogonalArray(num_nets), f"Orthogonal arrays, because {many}, and {why}."


def _degree(
    num_samples: int, dim: int, noise: NoiseDistribution, sampler: Sampler, num_outputs: int
) -> tuple[int, str]:
    """The degree whose coefficients half of the samples determine well, at little cost; and why.

    Or degree 1 where each of few samples is cheaply predicted from all others.
    """
    if getattr(noise, "derivatives", math.inf) < 1:
        return 0, "Degree 0, because a fit serves derivatives, which the noise is not good for."
    most = _most_degree(noise)
    if not most:
        return 0, "Degree 0, because the noise has too few moments for a polynomial."
    if not isinstance(dim, int) or dim == 0:
        return 0, ""
    why, orthogonal = "", isinstance(sampler, Orthogonal)
    for degree, most_dim, per_coefficient in RULE.degrees:
        least = 2 * per_coefficient * num_features(dim, degree)
        if orthogonal and degree == 1:
            most_dim, least = RULE.block_degree[0], RULE.block_degree[1] * dim
        least = max(RULE.fewest, least)
        if dim > most_dim:
            why = f"a fit of degree {degree} in more than {most_dim} coordinates costs too much"
        elif num_samples < least:
            why = f"a fit of degree {degree} needs {least} samples"
        else:
            degree = min(degree, most)
            return degree, f"Degree {degree}, because {least} samples are enough for its fit."
    if sampler.group_size(num_samples, dim) == 1 and _fits_each(num_samples, dim):
        per_coordinate, fewest, most, most_outputs = RULE.left_out
        least = max(math.ceil(per_coordinate * dim), fewest)
        few = isinstance(num_outputs, int) and num_outputs <= most_outputs
        if few and least <= num_samples <= most:
            return 1, "Degree 1, because each of so few samples is cheaply predicted from the rest."
        if num_samples < least:
            why = f"predicting each sample from the rest pays from {least} samples"
        elif not few:
            why = f"predicting {num_outputs} outputs of each sample from the rest costs too much"
        else:
            why = f"predicting each of {num_samples} samples from the rest costs too much"
    return 0, f"Degree 0, because {why}."


def _most_degree(noise: NoiseDistribution) -> int:
    """The degree that the tails leave useful: features of degree d need moments of order d + 2."""
    if not _has_moments(noise):
        return 0
    moment = getattr(noise, "moment", None)
    if moment is None:
        return 1  # of other noise, mean and variance are all that is known
    return 2 if math.isfinite(moment(4)) else int(math.isfinite(moment(3)))


def _fits_each(num_samples: int, dim: int) -> bool:
    """Whether fitting each sample on all others takes less than fits of a few groups."""
    return num_samples <= 2 * dim


def _for_fits(sampler: Sampler, num_samples: int, dim: int, degree: int, few: bool) -> Sampler:
    """The sampler, in so few groups that one fit for each is not too much."""
    alone = sampler.group_size(num_samples, dim) == 1
    if degree == 1 and alone and _fits_each(num_samples, dim):
        return sampler
    most = RULE.block_groups if few and isinstance(sampler, Orthogonal) else RULE.most_groups

    def num_groups(sampler: Sampler) -> int:
        return -(-num_samples // sampler.group_size(num_samples, dim))

    in_groups = getattr(sampler, "in_groups", None)
    if in_groups is not None and num_groups(sampler) > RULE.free_groups:
        sampler = in_groups(num_samples, RULE.free_groups)
    if num_groups(sampler) > most:
        sampler = Merged(sampler, -(-num_groups(sampler) // most))
    return sampler


def _has_moments(noise: NoiseDistribution) -> bool:
    moments = (getattr(noise, name, math.nan) for name in ("mean", "variance"))
    return all(isinstance(m, int | float) and math.isfinite(m) for m in moments)


def _name(noise: NoiseDistribution) -> str:
    return getattr(noise, "law", repr(noise))
