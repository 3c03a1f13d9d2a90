"""Queues: how long a request waits for a server that others use too.

Pollaczek, 1930, and Khinchin, 1932; Kleinrock, Queueing Systems, 1975.
"""

import numpy as np

Numbers = float | np.ndarray


def wait(
  arrivals: Numbers, seconds: Numbers, *, variability: float = 1.0
) -> np.ndarray:
  """Mean wait before service, one server and Poisson arrivals (M/G/1).

  Args:
    arrivals: requests per second.
    seconds: mean time of service.
    variability: squared coefficient of variation of that time; 1 = exponential
      (M/M/1), 0 = always the same (M/D/1).

  Returns:
    float64 seconds; inf where requests come faster than they are served.

  Raises:
    ValueError: if an argument is negative.
  """
  busy = load(arrivals, seconds)
  if not variability >= 0:
    raise ValueError(
      f"variability must be a number of at least 0, got {variability=}"
    )
  with np.errstate(divide="ignore", invalid="ignore"):
    full = busy / (1 - busy) * (1 + variability) / 2 * seconds
  return np.where(busy < 1, full, np.inf)


def response(
  arrivals: Numbers, seconds: Numbers, *, variability: float = 1.0
) -> np.ndarray:
  """Mean time from a request to its answer: `wait` and service.

  For M/M/1 it is 1 / (1 / seconds - arrivals).

  Example:
    >>> float(response(2.0, 0.25))
    0.5
  """
  return wait(arrivals, seconds, variability=variability) + seconds


def response_quantile(
  arrivals: Numbers, seconds: Numbers, q: float
) -> np.ndarray:
  """The time within which a fraction q of M/M/1 requests is answered.

  Response times of M/M/1 are exponential, so it is -log(1 - q) means.

  Raises:
    ValueError: if q is not in [0, 1), or an argument is negative.
  """
  if not 0 <= q < 1:
    raise ValueError(f"q must be a fraction in [0, 1), got {q=}")
  if q == 0:
    return np.zeros_like(load(arrivals, seconds))
  return -np.log1p(-q) * response(arrivals, seconds)


def load(arrivals: Numbers, seconds: Numbers) -> np.ndarray:
  """The fraction of time that the server works, if below 1.

  Raises:
    ValueError: if an argument is negative.
  """
  busy = np.asarray(arrivals * seconds, np.float64)
  if not (
    np.all(np.asarray(arrivals) >= 0) and np.all(np.asarray(seconds) > 0)
  ):
    raise ValueError(
      "arrivals must be at least 0 a second, and seconds above 0, got "
      f"{arrivals=} {seconds=}"
    )
  return busy
