"""Violations: something crosses a boundary that must not."""


class Violation(ValueError):
  """One sentence: which boundary, which leaf, whose; and what to do.

  Attributes:
    record: what the round's record would have said; {} before the first round.
  """

  def __init__(self, message: str, record: dict | None = None):
    super().__init__(message)
    self.record = {} if record is None else record
