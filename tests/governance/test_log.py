"""A log: whatever is changed, removed, moved or cut off is found."""

import itertools

import hypothesis
import pytest
from hypothesis import strategies as st

from fedjax_peft.governance import log, signing

A, B = (signing.signer(x * 32) for x in (b"a", b"b"))
LINES = 4


def write(path, signer):
  end, ends = log.End(), []
  for number in range(LINES):
    entry = {"kind": "round", "x": number, "why": "é\n"}
    if number == 0:
      entry = {"kind": "start", "identity": signer and signer.identity}
    end = log.append(path, end, entry, signer)
    ends.append(end)
  return ends


@pytest.fixture(scope="module", params=[A, None], ids=["signed", "unsigned"])
def whole(request, tmp_path_factory):
  """The bytes of a log that nothing happened to, and of its head."""
  path = tmp_path_factory.mktemp("log") / "log"
  write(path, request.param)
  return path.read_bytes(), log.head_of(path).read_bytes()


@pytest.fixture(params=[A, None], ids=["signed", "unsigned"])
def written(request, tmp_path):
  """The path of such a log, and who signed it."""
  write(tmp_path / "log", request.param)
  return tmp_path / "log", request.param


def broken(data, head, **options):
  found = log.check(data, head, **options)
  return None if found is None else found.line


def test_a_log_reads_back_and_is_whole(written):
  path, signer = written
  assert log.verify(path) is None
  assert log.verify(path, signer and signer.identity) is None
  entries = log.read(path)
  assert [e["number"] for e in entries] == [1, 2, 3, 4]
  assert entries[2]["why"] == "é\n"
  hashes = [e["hash"] for e in entries]
  assert [e["previous"] for e in entries] == [log.NONE, *hashes[:-1]]
  assert log.head_of(path).read_bytes() == path.read_bytes().splitlines()[-1]


def test_every_byte_that_is_changed_is_found_in_its_line(whole):
  (data, head), line = whole, 1
  for i, byte in enumerate(data):
    changed = data[:i] + bytes([byte ^ 1]) + data[i + 1 :]
    assert broken(changed, head) == line, i
    line += byte == 0x0A


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(
  start=st.floats(0, 1), length=st.integers(0, 40), new=st.binary()
)
def test_whatever_is_put_in_the_place_of_some_bytes_is_found(
  whole, start, length, new
):
  data, head = whole
  i = int(start * (len(data) - 1))
  changed = data[:i] + new + data[i + length :]
  hypothesis.assume(changed != data)
  pairs = enumerate(zip(data, changed))
  ends = min(len(data), len(changed))
  same = next((i for i, (a, b) in pairs if a != b), ends)
  assert broken(changed, head) == data[:same].count(b"\n") + 1


def test_every_byte_of_the_head_that_is_changed_is_found(whole):
  data, head = whole
  for i, byte in enumerate(head):
    changed = head[:i] + bytes([byte ^ 1]) + head[i + 1 :]
    assert broken(data, changed) is not None, i
  assert broken(data, b"") is not None
  assert broken(b"", b'{"number":0}') is not None


def test_a_line_that_is_removed_is_found(whole):
  data, head = whole
  lines = data.splitlines(keepends=True)
  for i in range(LINES):
    left = lines[:i] + lines[i + 1 :]
    assert broken(b"".join(left), head) == i + 1


def test_lines_in_another_order_are_found(whole):
  data, head = whole
  lines = data.splitlines(keepends=True)
  for order in itertools.permutations(range(LINES)):
    first = next((i for i, at in enumerate(order) if at != i), None)
    found = broken(b"".join(lines[i] for i in order), head)
    assert found == (None if first is None else first + 1), order
  assert broken(b"".join([*lines, lines[-1]]), head) == LINES + 1


def test_an_end_that_is_cut_off_is_found(whole):
  data, head = whole
  for length in range(len(data)):
    line = data[:length].count(b"\n") + 1
    assert broken(data[:length], head) == line, length


def test_a_log_that_goes_back_is_found_with_a_head_kept_elsewhere(whole):
  data, head = whole
  lines = data.splitlines(keepends=True)
  short, older = b"".join(lines[:2]), lines[1].strip()
  assert broken(short, older) is None  # whoever can replace both can do so
  assert broken(short, head, kept=True) == 3
  assert broken(data, older, kept=True) is None


def test_a_process_may_die_between_a_line_and_its_copy(whole):
  data, _ = whole
  lines = data.splitlines()
  assert broken(data, lines[-2]) is None
  assert broken(data, lines[-3]) == LINES
  assert broken(data, None) == 2
  assert broken(lines[0] + b"\n", None) is None


def test_a_line_that_was_being_written_is_cut_and_counted(written):
  path, _ = written
  data = path.read_bytes()
  path.write_bytes(data + b'{"half')
  assert log.verify(path) == log.Broken(LINES + 1, "it was not finished")
  assert log.cut_unfinished(path) == 6
  assert path.read_bytes() == data
  assert log.cut_unfinished(path) == 0
  assert log.cut_unfinished(path.parent / "none") == 0


def test_a_log_of_another_key_is_refused(tmp_path):
  path = tmp_path / "log"
  write(path, B)
  assert log.verify(path) is None
  assert log.verify(path, A.identity) == log.Broken(
    1, f"it is not signed by {A.identity}"
  )
  write(unsigned := tmp_path / "unsigned", None)
  assert log.verify(unsigned, A.identity).line == 1


def test_a_line_of_another_key_is_refused(tmp_path):
  path = tmp_path / "log"
  end = write(path, A)[-1]
  log.append(path, end, {"kind": "round"}, B)
  assert log.verify(path).line == LINES + 1
  write(other := tmp_path / "other", A)
  log.append(other, end, {"kind": "round"}, None)
  assert log.verify(other).line == LINES + 1
