"""Grid: the link that puts messages on the grid of a plan.

`fixed_point` takes the coarsest grid that is safe for whatever it is given;
here the grid comes from a plan, which may use a rotation, the total of all
weights, or bits that leave room for noise.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import link, tree
from fedjax_peft.links import clipping, gridding, masking, rotating, weighing
from fedjax_peft.privacy import ranges

# Float32 rounds, also above a bound; by this much less than a step a step is
# longer than planned, so that what is within the bound stays within it.
_COARSER = 1 + 2.0**-20


def grid(plan: ranges.Plan) -> link.Link:
  """Rounds to the nearest point of a plan's grid.

  A sender's value is cut to its weight times the clip norm, and to what the
  modulus holds; neither happens to an honest sender but with the plan's
  probability. Cut values are counted in `grid/saturated`.

  Args:
    plan: made for at least as many senders, weights and values.

  Returns:
    A link with `receive_on="any"`; the wire holds unsigned integers of 8, 16
    or 32 bits, as many as the plan needs. Its `init` raises ValueError if a
    message, its bound or its integers are not what the plan was made for.
  """
  load = plan.load
  width = next(w for w in (8, 16, 32) if plan.bits <= w)
  dtype, signed = jnp.dtype(f"uint{width}"), jnp.dtype(f"int{width}")
  scale = np.float32(1 / (plan.step * _COARSER))
  top = np.float32(plan.capacity)
  if int(top) > plan.capacity:
    top = np.nextafter(top, np.float32(0))

  def init(spec):
    _check(plan, spec)
    return (), ()

  def send(message, mine, shared, ctx):
    weight = jnp.clip(ctx.weight, 0, load.max_weight).astype(jnp.uint32)
    # Without overflow: what is above the capacity is cut to it anyway.
    room = np.uint32(plan.capacity // plan.levels)
    limit = jnp.where(
      weight <= room,
      jnp.minimum(weight, room) * np.uint32(min(plan.levels, plan.capacity)),
      np.uint32(plan.capacity),
    ).astype(jnp.int32)
    cut = []

    def one(x):
      if not tree.is_float(x):
        return x.astype(signed).astype(dtype)
      wanted = jnp.round(x.astype(jnp.float32) * scale)
      held = jnp.clip(wanted, -top, top).astype(jnp.int32)
      y = jnp.clip(held, -limit, limit)
      cut.append(jnp.sum((jnp.abs(wanted) > top) | (y != held)))
      return y.astype(dtype)

    wire = gridding.on(message, one)
    total = sum(cut, jnp.zeros((), jnp.int32)).astype(jnp.float32)
    return wire, mine, {"grid/saturated": total}

  def receive(wire, shared, roster, key):
    return gridding.off(wire, scale), shared

  def after(spec):
    # Each value moves by half a step at most.
    error = plan.step * _COARSER / 2 * gridding.floats(spec.message) ** 0.5
    wire = gridding.spec(spec.message, dtype)
    return spec._replace(message=wire, bound=spec.bound + error)

  return link.Link(
    name="grid", init=init, send=send, receive=receive, after=after
  )


def links_of(plan: ranges.Plan, *, neighbours: int = 32) -> link.Link:
  """Clip, weigh, rotate, round and mask, as a plan says; noise is not in it.

  Args:
    plan: with `norm="l2"`.
    neighbours: of a sender, see `mask`.

  Returns:
    A chain with `receive_on="sum"`.

  Raises:
    ValueError: if the plan bounds values one by one, which no link does.
  """
  load = plan.load
  if load.norm != "l2":
    raise ValueError(
      f"clip bounds the L2 norm of a message, got a plan with {load.norm=}; "
      "use plan(norm='l2')"
    )
  links = [
    clipping.clip(load.clip_norm),
    weighing.weigh("clients")
    if load.max_weight == 1
    else weighing.weigh(max_weight=load.max_weight),
  ]
  if load.rotation is not None:
    links.append(rotating.rotate(load.rotation))
  return link.chain(*links, grid(plan), masking.mask(neighbours))


def _check(plan: ranges.Plan, spec: link.Spec) -> None:
  """Raises ValueError unless a plan was made for such messages."""
  load = plan.load
  heaviest = load.clip_norm * load.max_weight
  values = gridding.floats(spec.message)
  turned = any(
    isinstance(x, rotating.Rotated)
    for x in jax.tree.leaves(
      spec.message, is_leaf=lambda x: isinstance(x, rotating.Rotated)
    )
  )
  wrong = {
    f"senders={spec.senders}": spec.senders > load.senders,
    f"dimension={values}": values > load.dimension,
    # A rotation keeps norms up to what float32 loses.
    f"a bound of {spec.bound:g}, where clip_norm x max_weight is "
    f"{heaviest:g}": not spec.bound <= heaviest * (1 + 2e-5),
    "rotation=None": not turned and "rotation" in plan.bound,
  }
  for what, is_wrong in wrong.items():
    if is_wrong:
      raise ValueError(
        f"the plan was made for other messages than these: {load}, got {what}; "
        "plan again, or use links_of(plan)"
      )
  exact = any(not tree.is_float(x) for x in jax.tree.leaves(spec.message))
  if exact and not spec.integer_bound <= load.max_weight:
    raise ValueError(
      f"integers of up to {spec.integer_bound} can wrap on a grid planned for "
      f"max_weight={load.max_weight}; use weigh(max_weight=...), or plan again"
    )
