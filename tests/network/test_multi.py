"""Several radios: parts that finish together, links that take over."""

import numpy as np
import pytest

from fedjax_peft.network import access, multi, radio, trace

IDS = np.arange(200)
FAR = np.full(200, 200.0)
CELL = radio.radio(sharing="own", bandwidth=1e6)
WIFI = radio.radio(
  up=12e6,
  down=1e7,
  sharing="own",
  shadowing=0.0,
  fading="none",
  p_gb=0.2,
  p_bg=0.5,
)


def both(use, number=3):
  return multi.signal(multi.multi([CELL, WIFI], use=use), FAR, IDS, number, 0)


def test_one_radio_is_itself():
  one = multi.signal(multi.multi([CELL]), FAR, IDS, 3, 0)
  for a, b in zip(one, radio.signal(CELL, FAR, IDS, 3, 0), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_split_message_takes_as_long_as_its_equal_finish_split():
  size = 10**6
  found = both("split")
  rates = [
    multi.signal(multi.multi([one]), FAR, IDS, 3, multi._seed(0, i)).up
    for i, one in enumerate((CELL, WIFI))
  ]
  _, seconds = access.split(np.full(200, size), np.stack(rates, -1))
  np.testing.assert_allclose(size * 8 / found.up, seconds)
  assert (found.up >= np.max(rates, 0)).all()


def test_when_a_link_is_off_the_other_takes_over():
  found = both("switch")
  wifi = multi.signal(multi.multi([WIFI]), FAR, IDS, 3, multi._seed(0, 1))
  off = ~wifi.on
  assert 20 < off.sum() < 180
  assert found.on.all()
  cell = radio.signal(CELL, FAR, IDS, 3, 0)
  np.testing.assert_array_equal(found.up[off], cell.up[off])


def test_a_link_is_kept_until_another_is_better_by_the_margin():
  wide = multi.multi([CELL, WIFI], use="switch", margin=1e9)
  found = multi.signal(wide, FAR, IDS, 3, 0)
  cell = radio.signal(CELL, FAR, IDS, 3, 0)
  wifi = multi.signal(multi.multi([WIFI]), FAR, IDS, 3, multi._seed(0, 1))
  usual = radio.signal(CELL._replace(fading="none"), FAR, IDS, 0, 0).up > 12e6
  assert 0 < usual.sum() < 200
  np.testing.assert_array_equal(
    found.up, np.where(usual | ~wifi.on, cell.up, wifi.up)
  )


def test_no_radio_is_refused():
  with pytest.raises(ValueError, match="at least one radio"):
    multi.multi([])


def test_recorded_rates_are_the_links(tmp_path):
  path = tmp_path / "rates.csv"
  path.write_text(
    "client,time,up,down\n0,0,8e6,16e6\n0,10,0,16e6\n1,0,1e6,1e6\n"
  )
  recorded = trace.read_trace(path)
  early, late = (
    multi.links(recorded, [1.0, 1.0], [0, 1], 0, 0, now) for now in (5.0, 15.0)
  )
  np.testing.assert_array_equal(early.up, [8e6, 1e6])
  np.testing.assert_array_equal(early.on, [True, True])
  np.testing.assert_array_equal(late.on, [False, True])
  assert multi.calm(recorded) is recorded
  assert multi.divided(recorded, 7) is recorded


def test_a_divided_band_is_that_of_so_many_who_share_it():
  shared = radio.radio(bandwidth=10e6, broadcast=False)
  together = radio.signal(shared, FAR, IDS, 3, 0)
  alone = multi.links(multi.divided(shared, 200), FAR, IDS, 3, 0, 0.0)
  np.testing.assert_allclose(alone.up, together.up)
