"""Other people's distributions as noise: numpyro's, distrax's, TensorFlow Probability's, anyone's.

None of these libraries is imported: their objects are recognised by the signature of `sample`.
"""

import dataclasses
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from .._checks import defined_at, is_ours, package_of
from ._derivative_limit import Limit, limit_derivatives, visible_limit
from ._inverse import from_words
from ._protocol import Shape

_JUMP = "jumps, for example at an end of its support"
_KINK = "has a kink"
# Laws whose densities are not smooth on the whole line, by the names of their classes. Some depend
# on parameters; those that can have a jump are taken to have one.
_LIMITS: dict[str, tuple[int, str]] = {
    **dict.fromkeys(("Laplace", "AsymmetricLaplace", "AsymmetricLaplaceQuantile"), (1, _KINK)),
    **dict.fromkeys(("Triangular", "GeneralizedNormal"), (1, _KINK)),
    **dict.fromkeys(
        ("Uniform", "LogUniform", "Exponential", "HalfNormal", "HalfCauchy"), (0, _JUMP)
    ),
    **dict.fromkeys(("HalfStudentT", "Pareto", "GeneralizedPareto", "VonMises"), (0, _JUMP)),
    **dict.fromkeys(("Beta", "BetaProportion", "Kumaraswamy", "PERT", "Bates"), (0, _JUMP)),
    **dict.fromkeys(("Gamma", "Chi", "Chi2", "Weibull", "Horseshoe"), (0, _JUMP)),
    **dict.fromkeys(("Dagum", "FoldedDistribution", "Gompertz"), (0, _JUMP)),
}
_DISCRETE = (
    "Bernoulli", "Binomial", "Categorical", "Deterministic", "Delta", "Empirical", "FiniteDiscrete",
    "Geometric", "NegativeBinomial", "Poisson", "QuantizedDistribution", "Rademacher", "Skellam",
    "Zipf",
)  # fmt: skip
# Laws with a density but for one point, by how their names begin.
_MIXED = ("Hurdle", "ZeroInflated")
_OPTIONAL = ("derivatives", "from_bits", "icdf", "mean", "variance")


def as_noise(noise: Any) -> Any:
    """The noise in this library's convention: itself if it is one of this library's.

    Draws by sample(key, shape, dtype), sample(key, shape), sample(seed=key, sample_shape=shape) or
    sample(sample_shape=shape, seed=key). More derivatives than the law is good for raise.

    Raises:
      ValueError: if the law is discrete, of vectors, or a batch of laws.
      TypeError: if `derivatives` is not a number.
    """
    if is_ours(type(noise)):
        return noise
    law = _name(noise)
    _check_shapes(noise, law)
    if _is_discrete(noise):
        raise ValueError(
            f"noise must have a density, but {law} is discrete, or in part: its draws change by "
            "steps, so no derivative follows from them. Use a continuous law such as Normal() (or, "
            "if this one is continuous and only named so, give it an attribute is_discrete = False)"
        )
    return AdaptedNoise(noise, law, _convention(noise.sample), _limit(noise, law))


@dataclasses.dataclass(frozen=True, repr=False)
class AdaptedNoise:
    """A distribution of any convention as noise of this library's.

    It has the optional attributes of `NoiseDistribution` that the distribution has of its own law;
    `quantile` serves as `icdf`.

    Attributes:
      noise: the distribution.
      law: how errors name it.
      convention: how it is drawn from.
      limit: how many derivatives it is good for, None if that is not known.
    """

    noise: Any
    law: str
    convention: str
    limit: Limit | None
    _seen: dict[Any, Limit | None] = dataclasses.field(
        default_factory=dict, init=False, compare=False
    )

    def sample(self, key: Array, sample_shape: Shape = (), dtype: DTypeLike = float) -> Array:
        """Independent draws; consumes `key`."""
        if _is_of_another_law(self.noise, "sample"):
            words = jnp.uint64 if np.dtype(dtype).itemsize > 4 else jnp.uint32
            return from_words(self, jax.random.bits(key, sample_shape, words)).astype(dtype)
        if self.convention == "seed":
            z = self.noise.sample(seed=key, sample_shape=sample_shape)
        elif self.convention == "key":
            z = self.noise.sample(key, sample_shape)
        else:
            z = self.noise.sample(key, sample_shape, dtype)
        drawn = getattr(z, "dtype", None)
        if drawn is not None and not jnp.issubdtype(drawn, jnp.floating):
            raise TypeError(
                f"noise must be real numbers, but {self.law}.sample returned {drawn}: draw from a "
                "continuous law, in a floating dtype"
            )
        if drawn is not None and jnp.finfo(drawn).nmant < 10 and np.dtype(dtype).itemsize >= 4:
            raise TypeError(
                f"{self.law}.sample returned {drawn}, which holds so few numbers that the "
                f"gradient would be far off. Draw in {np.dtype(dtype).name}, as asked for"
                + ("" if self.convention == "dtype" else ": give the law float32 parameters")
            )
        return z if self.convention == "dtype" else z.astype(dtype)

    def log_prob(self, inputs: Array) -> Array:
        """Log-density, of each element or of all together, as the distribution has it."""
        limit = self.limit
        if limit is None:
            key = (np.shape(inputs), jnp.result_type(inputs))
            if key not in self._seen:
                self._seen[key] = visible_limit(
                    self.noise.log_prob, jax.ShapeDtypeStruct(*key), self.law
                )
            limit = self._seen[key]
        if limit is not None and limit.derivatives < math.inf:
            inputs = limit_derivatives(inputs, limit)
        return self.noise.log_prob(inputs)

    def __repr__(self) -> str:
        return repr(self.noise)

    def __getattr__(self, name: str) -> Any:
        if name not in _OPTIONAL:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        if _is_of_another_law(self.noise, name):
            raise AttributeError(f"{self.law} has another law than the class it has {name!r} from")
        if name == "derivatives" and self.limit is not None:
            return self.limit.derivatives
        if name == "icdf":
            return _inverse(self.noise)
        if name not in ("mean", "variance"):
            return getattr(self.noise, name)
        try:
            value = getattr(self.noise, name)  # may be a property, which raises here
            return value() if callable(value) else value
        except (NotImplementedError, ValueError) as error:
            raise AttributeError(f"{self.law} does not know its {name}") from error


def _name(noise: Any) -> str:
    """The class, and the library that it is from."""
    library = _library(noise)
    return f"{library}.{type(noise).__name__}" if library else type(noise).__name__


def _is_of_another_law(noise: Any, name: str) -> bool:
    """Whether an attribute is of a law of this library, of which the noise is another version.

    That is what a class of a user's own makes of `Normal` by methods of its own: three times its
    draws, say, and the density of these. Quantiles and moments, which it inherits, are Normal's.
    Of a density of its own it has other derivatives as well, of quantiles of its own other draws.
    """
    told = {"derivatives": ("log_prob",), "sample": ("icdf", "from_bits")}
    changes = told.get(name, ("log_prob", "sample"))
    far, owner = defined_at(noise, name)
    return is_ours(owner) and any(defined_at(noise, change)[0] < far for change in changes)


def _library(noise: Any) -> str | None:
    root = package_of(type(noise))
    return root if root in ("numpyro", "distrax", "tensorflow_probability") else None


def _convention(sample: Any) -> str:
    """What `sample` expects: "seed" and "key" have no dtype, "dtype" is this library's own."""
    try:
        parameters = inspect.signature(sample).parameters
    except (TypeError, ValueError):
        return "dtype"
    if "seed" in parameters:
        return "seed"
    if "dtype" in parameters or any(p.kind == p.VAR_POSITIONAL for p in parameters.values()):
        return "dtype"
    positional = [
        p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    # A third parameter under another name is the dtype, unless it may be left out as None.
    third = positional[2].default if len(positional) > 2 else None
    return "key" if third is None else "dtype"


def _check_shapes(noise: Any, law: str) -> None:
    event, batch = (_shape(noise, name) for name in ("event_shape", "batch_shape"))
    if event:
        raise ValueError(
            f"noise must be a law of single numbers, but {law} has event_shape {event}: it draws "
            "vectors. Every coordinate of x gets its own draw, so a law of one of them is enough"
        )
    if batch:
        raise ValueError(
            f"noise must be one law for all coordinates, but {law} has batch_shape {batch}. Use "
            "the law with scalar parameters, and give each coordinate its scale as sigma, an array "
            "that broadcasts into x"
        )


def _shape(noise: Any, name: str) -> Shape:
    shape = getattr(noise, name, ())
    return () if callable(shape) else tuple(shape)


def _is_discrete(noise: Any) -> bool:
    names = [c.__name__ for c in type(noise).__mro__]
    # As in BernoulliProbs and CategoricalLogits.
    by_name = any(n == d or n in (f"{d}Probs", f"{d}Logits") for n in names for d in _DISCRETE)
    by_name = by_name or any(n.startswith(_MIXED) for n in names)
    declared = getattr(noise, "is_discrete", None)
    # A class of a user's own may have any name. Of numpyro's, Delta says that it is not discrete.
    if isinstance(declared, bool) and (declared or _library(noise) is None):
        return declared
    return by_name


def _limit(noise: Any, law: str) -> Limit | None:
    """What is known of the smoothness of the density: by its own word, or by name."""
    declared = getattr(noise, "derivatives", None)
    if declared is not None and not _is_of_another_law(noise, "derivatives"):
        if isinstance(declared, bool) or not isinstance(declared, int | float | np.number):
            raise TypeError(
                f"{law}.derivatives must be a number, how many derivatives the noise is good for, "
                f"got {declared!r}"
            )
        if declared != declared or declared < 0:
            raise ValueError(f"{law}.derivatives must be >= 0, got {declared}")
        count = float(declared)  # may be infinite: that there is no limit is an answer, too
        return Limit(
            law,
            count if math.isinf(count) else int(count),
            "is not smooth, as its attribute `derivatives` says",
        )
    remedy = (
        f", or, if this {type(noise).__name__} is good for more, wrap it in an object with sample, "
        "log_prob and an attribute `derivatives` that says so"
    )
    for name in (c.__name__ for c in type(noise).__mro__):
        if "Truncated" in name:
            return Limit(law, 0, _JUMP, remedy)
        if name in _LIMITS:
            return Limit(law, *_LIMITS[name], remedy)
        if name.startswith("Transformed") and not _is_affine(noise):
            return None  # it may well smooth what it transforms
    return _limit_of_parts(noise, law)


def _is_affine(transformed: Any) -> bool:
    """Whether a transformed law is another one moved and scaled; numpyro tells."""
    transforms = getattr(transformed, "transforms", None)
    return bool(transforms) and all(type(t).__name__ == "AffineTransform" for t in transforms)


def _limit_of_parts(noise: Any, law: str) -> Limit | None:
    """The least limit of what a mixture, or another wrapper, is made of."""
    parts: list[Any] = []
    for name in ("base_dist", "component_distribution", "components_distribution", "distribution"):
        parts.append(getattr(noise, name, None))
    parts.extend(getattr(noise, "component_distributions", None) or ())
    limits = [_limit(part, law) for part in parts if hasattr(part, "log_prob")]
    known = [limit for limit in limits if limit is not None]
    return min(known, key=lambda limit: limit.derivatives) if known else None


def _inverse(noise: Any) -> Any:
    """The inverse distribution function under either of its names, if it is implemented."""
    for name in ("icdf", "quantile"):
        inverse = getattr(noise, name, None)
        if callable(inverse):
            try:
                jax.eval_shape(inverse, jax.ShapeDtypeStruct((), jnp.float32))
            except (NotImplementedError, AttributeError, ImportError):
                continue
            return inverse
    raise AttributeError(f"{_name(noise)} has no inverse distribution function")
