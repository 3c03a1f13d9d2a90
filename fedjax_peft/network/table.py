"""Tables: CSV files whose columns and types are known."""

import os
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.csv

from fedjax_peft import validate


def read(
  path: str | os.PathLike,
  needed: Mapping[str, pa.DataType],
  optional: Mapping[str, pa.DataType] | None = None,
) -> dict[str, np.ndarray]:
  """Reads a CSV whose columns and types are known.

  Returns:
    {column: array [rows]} of the columns that are there.

  Raises:
    ValueError: if a column is missing or not known, or a cell is empty or not
      of its column's type.
  """
  types = {**needed, **(optional or {})}
  try:
    table = pyarrow.csv.read_csv(
      os.fspath(path),
      convert_options=pyarrow.csv.ConvertOptions(
        column_types=types, quoted_strings_can_be_null=False
      ),
    )
  except pa.ArrowInvalid as error:
    raise ValueError(
      f"{path}: must be a CSV with the columns {', '.join(types)}: {error}"
    ) from error
  found = table.column_names
  missing = [name for name in needed if name not in found]
  if missing:
    raise ValueError(
      f"{path}: column {missing[0]!r} is missing, got {', '.join(found)}"
      f"{validate.near(missing[0], found)}"
    )
  odd = [name for name in found if name not in types]
  if odd:
    raise ValueError(
      f"{path}: column {odd[0]!r} must be one of {', '.join(types)}"
      f"{validate.near(odd[0], types)}"
    )
  for name in found:
    if table[name].null_count:
      raise ValueError(
        f"{path}: column {name!r} must hold a value in every row, got "
        f"{table[name].null_count} rows without"
      )
  return {name: table[name].to_numpy() for name in found}
