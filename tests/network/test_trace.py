"""Traces: rates looked up in time."""

import numpy as np
import pytest

from fedjax_peft.network import trace


def drawn(rows=200, seed=0):
  rng = np.random.default_rng(seed)
  pairs = rng.permutation(9 * 40)[:rows]
  client, time = np.divmod(pairs, 40)
  return client * 7 + 3, time / 4, *rng.uniform(0, 1e7, (2, rows))


def looked_up(columns, client, time):
  """The last row of the client up to then, else its first: a plain loop."""
  client_, time_, up, down = columns
  mine = sorted(
    (t, u, d)
    for c, t, u, d in zip(client_, time_, up, down, strict=True)
    if c == client
  )
  past = [row for row in mine if row[0] <= time]
  return (past[-1] if past else mine[0])[1:]


@pytest.mark.parametrize("period", [None, 2.5])
def test_rates_are_those_of_the_last_row_up_to_now(period):
  columns = drawn()
  both = trace.trace(*columns, period=period)
  rng = np.random.default_rng(1)
  ids = rng.choice(np.unique(columns[0]), 300)
  times = rng.integers(-4, 60, 300) / 4  # some before all rows, some on one
  times = np.maximum(times, 0)
  up, down = both.rates(ids, times)
  now = times if period is None else times % period
  wanted = [looked_up(columns, c, t) for c, t in zip(ids, now, strict=True)]
  np.testing.assert_array_equal(np.stack([up, down], 1), wanted)


def test_all_clients_may_be_asked_for_one_time():
  both = trace.trace(*drawn())
  ids = np.unique(drawn()[0])
  one, many = both.rates(ids, 3.0), both.rates(ids, np.full(ids.size, 3.0))
  np.testing.assert_array_equal(one, many)


def test_a_file_is_read_as_its_rows(tmp_path):
  columns = drawn(30)
  lines = [",".join(map(repr, map(float, row[1:]))) for row in zip(*columns)]
  lines = [f"{c},{line}" for c, line in zip(columns[0], lines, strict=True)]
  (tmp_path / "t.csv").write_text("\n".join(["client,time,up,down", *lines]))
  found = trace.read_trace(tmp_path / "t.csv", period=9.0)
  for x, y in zip(found, trace.trace(*columns, period=9.0), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
  ("text", "match"),
  [
    ("client,time,up\n0,1,1\n", "'down' is missing"),
    ("client,time,up,down\n", "at least one"),
    ("client,time,up,down\n0,1,-1,1\n", "'up' .* at least 0, got -1"),
    (
      "client,time,up,down\n0,nan,1,1\n",
      "'time' must hold a value in every row",
    ),
    ("client,time,up,down\n4,1,1,1\n4,1,2,2\n", "two of client 4 at 1.0 s"),
  ],
)
def test_a_bad_file_is_refused_with_one_sentence(tmp_path, text, match):
  (tmp_path / "t.csv").write_text(text)
  with pytest.raises(ValueError, match=match) as error:
    trace.read_trace(tmp_path / "t.csv")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("stranger", [-1, 0, 4, 1000])
def test_a_client_without_a_row_is_refused(stranger):
  with pytest.raises(ValueError, match=f"got none of client {stranger}"):
    trace.trace(*drawn()).rates([3, stranger], 0.0)
