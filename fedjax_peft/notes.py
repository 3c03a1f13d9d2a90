"""Notes: what clients tell of themselves beside their message.

They are small, go up in the clear, and are counted among the bytes. Plans read
them: which clients have a high loss, whose updates are alike.
"""

import jax
import jax.numpy as jnp

from fedjax_peft import ingredients, tree


def loss() -> ingredients.Note:
  """The mean training loss over the client's steps of a round."""

  def make(message, stats):
    total, count = stats["loss"]
    return (total / jnp.maximum(count, 1)).astype(jnp.float32)

  return ingredients.Note("loss", make)


def sketch(size: int = 64) -> ingredients.Note:
  """A short vector whose inner products are those of the messages, on average.

  Entries get random signs and are added up in `size` buckets (feature hashing,
  Weinberger et al., 2009, https://arxiv.org/abs/0902.2206): for fixed messages
  the inner product of two sketches has mean <a, b> over the signs, which are
  the same for all clients, and a variance of at most (|a|^2 |b|^2 +
  <a, b>^2) / size where no entry dominates.

  Args:
    size: of the vector, [size] float32.
  """

  def make(message, stats):
    total = jnp.zeros((size,), jnp.float32)
    for i, x in enumerate(tree.leaves(message)):
      if tree.is_factored(x):
        x = x.left.T @ x.right
      flat = x.astype(jnp.float32).reshape(-1)
      signs = jax.random.rademacher(
        jax.random.fold_in(jax.random.key(0), i), flat.shape, jnp.float32
      )
      padded = jnp.pad(flat * signs, (0, -flat.size % size))
      total = total + jnp.sum(padded.reshape(-1, size), axis=0)
    return total

  return ingredients.Note("sketch", make, (size,))


NOTES = {"loss": loss(), "sketch": sketch()}
