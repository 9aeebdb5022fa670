"""Meshes as JAX tells them: inside `jax.shard_map`, which axes values vary over; outside, types."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ._jaxprs import inner_replaced


def in_told_mesh() -> Any:
    """A context in which a jitted function is traced once for a value and its derivative.

    JAX (0.10.2, no issue is known) tells the mesh in derivative rules alone, and would trace once
    with it and once without.
    """
    return jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh())


def share_axes(
    key: Array, leaves: list[Array], scales: list[Array]
) -> tuple[Array, list[Array], list[Array]]:
    """Makes all arguments vary over the mesh axes that any of them varies over.

    Samples do, and fun has to be traced for arguments of their type.
    """
    axes = frozenset().union(*map(varying_axes, (key, *leaves, *scales)))
    if not axes:
        return key, leaves, scales

    impl = jax.random.key_impl(key)
    key = jax.random.wrap_key_data(varying(jax.random.key_data(key), axes), impl=impl)
    return key, [varying(v, axes) for v in leaves], [varying(v, axes) for v in scales]


def varying(value: Array, axes: frozenset[Any]) -> Array:
    """The value, as one that varies over these mesh axes too."""
    missing = tuple(axes - varying_axes(value))
    return jax.lax.pcast(value, missing, to="varying") if missing else value


def varying_axes(value: Any) -> frozenset[Any]:
    """The mesh axes that an array, or a described one, varies over inside `shard_map`."""
    kind = _type_of(value)
    kind = getattr(kind, "manual_axis_type", kind)  # its name since jax 0.10
    return frozenset(getattr(kind, "varying", None) or getattr(kind, "vma", None) or ())


def _type_of(value: Any) -> Any:
    described = isinstance(value, jax.ShapeDtypeStruct | ShapedArray)
    return value if described else jax.typeof(value)


# --- Outside it, for what brings a mesh of its own


def traced_for(mesh: Mesh | None) -> Any:
    """A context in which functions are traced as if no mesh had been set, if there is one here."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def inside_shard_map() -> bool:
    """Whether this is traced as a part of a program of one device among several."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def replicated(mesh: Mesh | None, values: Any) -> Any:
    """A pytree of arrays that a program on all devices of the mesh, if any, may take as they are.

    That is, in their types nothing tells a mesh: inside `shard_map`, that of arguments is another.
    """
    if mesh is None:
        return values

    return jax.tree.map(lambda v: _told(v, mesh) if isinstance(v, Array) else v, values)


def _told(value: Array, mesh: Mesh | None, like: NamedSharding | None = None) -> Array:
    """The array on all devices of the mesh, or where it is, with a type that tells `like`."""
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        data, impl = _told(jax.random.key_data(value), mesh, like), jax.random.key_impl(value)
        return jax.random.wrap_key_data(data, impl=impl)
    return _placed.bind(value, mesh=mesh, type_sharding=like)


def in_told_types(mesh: Mesh | None, values: Any) -> Any:
    """What `replicated` values have become, with types as the mesh that was set here asks for."""
    told: Any = jax.sharding.get_abstract_mesh()
    if mesh is None or not getattr(told, "explicit_axes", ()):
        return values
    like = NamedSharding(told, PartitionSpec())
    return jax.tree.map(lambda v: _placed.bind(v, mesh=mesh, type_sharding=like), values)


def in_types_of_constants(values: Any) -> Any:
    """A pytree with the same arrays, in explicit types that tell as little as those of constants.

    That is, on the mesh that was set here, if any, and not split over it, but under vmap along one
    of its axes: JAX asks for that axis. Where types tell how arrays are split, operations that mix
    coordinates need to be told as well; without, XLA chooses.
    """
    told: Any = jax.sharding.get_abstract_mesh()
    like = NamedSharding(told, PartitionSpec()) if _is_explicit(told) else None

    def one(value: Any) -> Any:
        told = isinstance(value, Array) and has_explicit_axes(value)
        return _told(value, None, like) if told else value

    return jax.tree.map(one, values)


def with_explicit_axes(value: Array, like: Any) -> Array:
    """The value, with the explicit type of `like`, an array or a type, if that has one.

    They have the same shape, or the value has further axes before those.
    """
    if not has_explicit_axes(like):
        return value
    sharding = _sharding_of(like)
    spec = PartitionSpec(*[None] * (value.ndim - len(sharding.spec)), *sharding.spec)
    type_sharding = NamedSharding(sharding.mesh, spec)
    return _placed.bind(value, mesh=None, type_sharding=type_sharding)


def has_explicit_axes(value: Any) -> bool:
    """Whether a type, or that of an array, tells how it is split over a mesh, or that it is not."""
    return _is_explicit(getattr(_sharding_of(value), "mesh", None))


def _sharding_of(value: Any) -> Any:
    return getattr(_type_of(value), "sharding", None)


def _is_explicit(mesh: Any) -> bool:
    return bool(getattr(mesh, "explicit_axes", ())) and not mesh.manual_axes


def without_told_meshes(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """The same operations, of types that tell no mesh; the same object if none does.

    What a function closes over may be on a mesh, by its type, and then what is computed from it is,
    inside of loops, branches and jitted functions too. There, `replicated` does not reach.
    """
    found = [*jaxpr.constvars, *jaxpr.invars]
    found += [v for eqn in jaxpr.eqns for v in (*eqn.invars, *eqn.outvars)]
    telling = dict.fromkeys(v for v in found if isinstance(v, core.Var) and _tells_mesh(v.aval))
    if not telling:
        return jaxpr
    avals: list[Any] = [v.aval for v in telling]
    specs = [jax.ShapeDtypeStruct(v.shape, v.dtype, weak_type=v.weak_type) for v in avals]
    # A trace makes the variables, for their constructor differs between versions of JAX.
    made = jax.make_jaxpr(lambda *v: v)(*specs).jaxpr.invars
    names: dict[Any, Any] = dict(zip(telling, made, strict=True))

    def renamed(variables: Any) -> list[Any]:
        return [names.get(v, v) if isinstance(v, core.Var) else v for v in variables]

    def untold(name: str, value: Any) -> Any:
        if name in ("jvp_jaxpr_fun", "fwd_jaxpr_thunk") and hasattr(value, "call_wrapped"):
            return _UntoldRule(value)
        # Of what is broadcast like something else.
        is_type = name.endswith("sharding") and isinstance(value, NamedSharding)
        return None if is_type and isinstance(value.mesh, AbstractMesh) else value

    eqns = []
    for eqn in jaxpr.eqns:
        params = inner_replaced(eqn.params, without_told_meshes)
        if eqn.primitive.name not in ("sharding_constraint", "reshard"):
            params = {k: untold(k, v) for k, v in params.items()}
        invars, outvars = renamed(eqn.invars), renamed(eqn.outvars)
        eqns.append(eqn.replace(invars=invars, outvars=outvars, params=params))
    return jaxpr.replace(
        constvars=renamed(jaxpr.constvars),
        invars=renamed(jaxpr.invars),
        outvars=renamed(jaxpr.outvars),
        eqns=eqns,
    )


class _UntoldRule:
    """JAX's wrapper of a derivative rule, which tells operations of types that tell no mesh."""

    def __init__(self, rule: Any):
        self._rule = rule

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule, name)

    def call_wrapped(self, *args: Any) -> Any:
        jaxpr, *rest = self._rule.call_wrapped(*args)
        return without_told_meshes(jaxpr), *rest


def _tells_mesh(aval: Any) -> bool:
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    return isinstance(aval, ShapedArray) and mesh is not None and not mesh.empty


def _place(value: Array, *, mesh: Mesh | None, type_sharding: Any) -> Array:
    if not getattr(value, "committed", False):
        return value
    spec = PartitionSpec()
    if mesh is None:
        found = value.sharding
        if not isinstance(found, NamedSharding) or not isinstance(found.mesh, Mesh):
            return value
        mesh, spec = Mesh(found.mesh.devices, found.mesh.axis_names), found.spec
    if type_sharding is not None:
        told, spec = type_sharding.mesh, type_sharding.spec
        devices = mesh.devices.reshape(told.axis_sizes)
        mesh = Mesh(devices, told.axis_names, axis_types=told.axis_types)
    return jax.device_put(value, NamedSharding(mesh, spec))


def _placed_type(aval: Any, *, mesh: Mesh | None, type_sharding: Any) -> Any:
    kind: Any = ShapedArray
    return kind(aval.shape, aval.dtype, weak_type=aval.weak_type, sharding=type_sharding)


def _placed_transpose(
    cotangent: Any, value: Any, *, mesh: Mesh | None, type_sharding: Any
) -> list[Any]:
    if type(cotangent) is ad.Zero:
        return [cotangent]
    if _tells_mesh(value.aval):
        return [_placed.bind(cotangent, mesh=mesh, type_sharding=value.aval.sharding)]
    # A cotangent has the type of what the value was added to, if that told more.
    told = _tells_mesh(jax.typeof(cotangent))
    return [_placed.bind(cotangent, mesh=mesh, type_sharding=None) if told else cotangent]


def _placed_batch(
    batch: Any, args: Any, axes: Any, *, mesh: Mesh | None, type_sharding: Any
) -> Any:
    (value,), (axis,) = args, axes
    if type_sharding is not None and axis is not None:
        spec = list(type_sharding.spec)
        # The axis of the mesh along which it is that JAX vmaps, if any.
        spec = PartitionSpec(*spec[:axis], batch.explicit_mesh_axis, *spec[axis:])
        type_sharding = NamedSharding(type_sharding.mesh, spec)
    return _placed.bind(value, mesh=mesh, type_sharding=type_sharding), axis


# The same array on all devices of the mesh (where it is, for None), with a type that does not tell
# it, or tells `type_sharding`. Under jit it is XLA that sees to where it is.
_placed = core.Primitive("placed")
_placed.def_impl(_place)
_placed.def_abstract_eval(_placed_type)
ad.deflinear2(_placed, _placed_transpose)
batching.fancy_primitive_batchers[_placed] = _placed_batch
mlir.register_lowering(_placed, lambda _, value, **__: [value])
