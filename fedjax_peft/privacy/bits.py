"""Sets of clients, one bit each."""

from collections.abc import Iterable


def pack(places: Iterable[int], clients: int) -> bytes:
  r"""One bit a client, the first one lowest.

  Args:
    places: whose bit is set.
    clients: n.

  Returns:
    ceil(n / 8) bytes.

  Example:
    >>> pack([0, 9], 10)
    b'\x01\x02'
  """
  number = sum(1 << place for place in places)
  return number.to_bytes(-(-clients // 8), "little")


def unpack(data: bytes, clients: int) -> frozenset[int]:
  """Whose bits are set.

  Args:
    data: what `pack` returned.
    clients: n.

  Raises:
    ValueError: if there are bits for another number of clients.
  """
  number = int.from_bytes(data, "little")
  if len(data) != -(-clients // 8) or number >> clients:
    raise ValueError(
      f"expected one bit for each of {clients} clients: got {data.hex()}"
    )
  return frozenset(i for i in range(clients) if number >> i & 1)
