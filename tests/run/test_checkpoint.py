"""Checkpoints: whatever was saved comes back, or a sentence says why not."""

import os
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_peft import checkpoint, record


class State(NamedTuple):
  """A state with one leaf of each kind."""

  round: jax.Array
  params: dict[str, jax.Array]
  opt: Any
  key: jax.Array
  empty: tuple
  nothing: jax.Array
  host: np.ndarray
  number: int


def state(round_=3, width=4):
  params = {
    "head/kernel": jnp.arange(2.0 * width).reshape(2, width),
    "scale": jnp.array(0.5, jnp.bfloat16),
  }
  return State(
    round=jnp.int32(round_),
    params=params,
    opt=optax.adam(0.1).init(params),
    key=jax.random.key(7),
    empty=(),
    nothing=jnp.zeros((0, 3)),
    host=np.array([True, False]),
    number=12,
  )


def clients(count=5):
  return {
    "local": {"a/b": jnp.arange(count * 6.0).reshape(count, 2, 3)},
    "seen": jnp.arange(count) % 2 == 0,
    "none": jnp.zeros((count, 0)),
  }


@pytest.fixture
def saved(tmp_path):
  kept = checkpoint.Checkpoints(tmp_path / "checkpoints")
  kept.save(3, state(), clients(), {"round": 3, "settings": {"lanes": 2}})
  kept.wait()
  yield kept
  kept.close()


def test_everything_comes_back_as_it_was(saved):
  like = jax.tree.map(lambda x: x, state(round_=0))
  found = saved.latest(like, clients())
  assert found.step == 3
  assert found.meta == {"round": 3, "settings": {"lanes": 2}}
  assert record.digest(found.state) == record.digest(state())
  assert record.digest(found.clients) == record.digest(clients())
  assert jax.tree.structure(found.state) == jax.tree.structure(state())
  for a, b in zip(jax.tree.leaves(found.state), jax.tree.leaves(state())):
    assert type(a) is type(b)


def test_arrays_go_to_the_devices_of_the_template(saved):
  mesh = jax.make_mesh((2,), ("clients",))
  sharding = jax.NamedSharding(mesh, jax.P())
  like = state()._replace(params=jax.device_put(state().params, sharding))
  found = saved.latest(like, clients())
  assert found.state.params["scale"].sharding == sharding
  assert not found.state.round.committed


def test_a_directory_without_checkpoints_has_no_latest(tmp_path):
  kept = checkpoint.Checkpoints(tmp_path)
  assert kept.latest(state()) is None
  assert kept.meta() is None
  kept.close()


def test_only_the_newest_are_kept_and_the_newest_is_loaded(tmp_path):
  kept = checkpoint.Checkpoints(tmp_path, keep=2)
  for step in range(1, 5):
    kept.save(step, {"x": jnp.full(3, float(step))}, (), {"round": step})
  kept.wait()
  assert kept.steps() == [3, 4]
  assert kept.meta() == {"round": 4}
  kept.close()
  again = checkpoint.Checkpoints(tmp_path, keep=2)
  found = again.latest({"x": jnp.zeros(3)})
  np.testing.assert_array_equal(found.state["x"], np.full(3, 4.0))
  again.close()


def test_what_is_donated_after_a_save_is_saved_as_it_was(tmp_path):
  step = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
  kept = checkpoint.Checkpoints(tmp_path)
  x, host = jnp.zeros(300_000), np.zeros(300_000)
  kept.save(1, {"x": x, "host": host})
  host[:] = 9
  for _ in range(20):
    x = step(x)
  kept.wait()
  found = kept.latest({"x": x, "host": host})
  assert not np.any(found.state["x"])
  assert not np.any(found.state["host"])
  kept.close()


def test_one_row_is_one_chunk_and_reads_alone(saved):
  row = saved.row(3, 4, clients())
  whole = jax.tree.map(lambda x: x[4], clients())
  assert record.digest(row) == record.digest(whole)


def test_a_row_of_many_clients_reads_in_milliseconds(tmp_path):
  rows = {"local": np.zeros((2000, 64, 8), np.float32)}
  rows["local"] += np.arange(2000, dtype=np.float32)[:, None, None]
  kept = checkpoint.Checkpoints(tmp_path)
  kept.save(1, {"round": 1}, rows)
  kept.wait()
  kept.row(1, 0, rows)
  start = time.perf_counter()
  for client in (1999, 3, 1024):
    assert np.all(kept.row(1, client, rows)["local"] == client)
  assert (time.perf_counter() - start) / 3 < 0.1
  kept.close()


@pytest.mark.parametrize(
  ("step", "client", "part"), [(2, 0, "step must be"), (3, 5, "client must be")]
)
def test_a_row_that_is_not_there_is_refused(saved, step, client, part):
  with pytest.raises(ValueError, match=part):
    saved.row(step, client, clients())


@pytest.mark.parametrize(
  ("like", "part"),
  [
    (state(width=5), r"head/kernel.* expected float32\[2, 5\], got .*\[2, 4\]"),
    (state()._replace(number=1.5), "number expected float64"),
    (state()._replace(empty=(jnp.zeros(2),)), r"empty\[0\] expected, got none"),
    (state()._replace(params={}), "not expected"),
  ],
)
def test_a_checkpoint_of_another_config_is_refused(saved, like, part):
  with pytest.raises(ValueError, match=f"of another config.*{part}"):
    saved.latest(like, clients())
  with pytest.raises(ValueError, match=r"float32\[6, 2, 3\]"):
    saved.latest(state(), clients(6))


def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_there(tmp_path):
  kept = checkpoint.Checkpoints(tmp_path)
  like = {"x": jnp.zeros(5000)}
  for step in (1, 2):
    kept.save(step, jax.tree.map(lambda x, s=step: x + s, like))
  kept.close()
  for path in (tmp_path / "2").rglob("d/*"):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  again = checkpoint.Checkpoints(tmp_path)
  with pytest.raises(ValueError, match=r"checkpoint .*/2 must be readable"):
    again.latest(like)
  again.close()
  for path in sorted((tmp_path / "2").rglob("*"), reverse=True):
    path.rmdir() if path.is_dir() else path.unlink()
  (tmp_path / "2").rmdir()
  last = checkpoint.Checkpoints(tmp_path)
  assert last.latest(like).step == 1
  last.close()


def run(program, *arguments, **options):
  return subprocess.Popen(
    [sys.executable, "-c", program, *map(str, arguments)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **options,
  )


FULL = """
import logging, resource, sys
import jax.numpy as jnp
from fedjax_peft import checkpoint
logging.getLogger("absl").setLevel(logging.CRITICAL)
kept = checkpoint.Checkpoints(sys.argv[1])
kept.save(1, {"x": jnp.arange(1000.0)})
kept.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
kept.save(2, {"x": jnp.arange(1_000_000.0)})
try:
  kept.wait()
except OSError as error:
  print(error)
  print(kept.steps(), kept.latest({"x": jnp.zeros(1000)}).step)
"""


def test_a_save_that_fails_is_raised_and_the_one_before_stays(tmp_path):
  child = run(FULL, tmp_path)
  out, err = child.communicate(timeout=120)
  assert child.returncode == 0, err
  sentence, rest = out.splitlines()
  assert "the checkpoint of round 2 could not be written" in sentence
  assert "--resume" in sentence
  assert rest == "[1] 1"


KILLED = """
import itertools, os, signal, sys, threading
import numpy as np
from fedjax_peft import checkpoint
kept = checkpoint.Checkpoints(sys.argv[1])
like = {"x": np.zeros(400_000), "step": 0}
rows = {"row": np.zeros((200, 50))}
found = kept.latest(like, rows)
first = 0
if found is not None:
  first = found.meta["step"]
  assert found.step == first == found.state["step"]
  assert np.all(found.state["x"] == first), "state"
  assert np.all(found.clients["row"] == first), "clients"
print(first, flush=True)
delay = float(sys.argv[2])
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
threading.Timer(delay, kill).start()
for step in itertools.count(first + 1):
  state = {"x": np.full(400_000, float(step)), "step": step}
  kept.save(step, state, {"row": np.full((200, 50), float(step))},
            {"step": step})
"""


def killed_at(tmp_path, delays):
  """Kills a process that does nothing but save; returns where each began."""
  began = []
  for delay in delays:
    child = run(KILLED, tmp_path, delay)
    out, err = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, err
    began.append(int(out))
  return began


def test_a_killed_process_leaves_a_checkpoint_that_loads(tmp_path):
  began = killed_at(tmp_path, [0.31, 0.47, 0.01])
  assert began == sorted(began)
  assert began[-1] > 0


@pytest.mark.slow
def test_processes_killed_at_many_moments_never_load_half_a_save(tmp_path):
  began = killed_at(tmp_path, np.linspace(0.2, 0.6, 25))
  assert began == sorted(began)
  assert len(set(began)) > 20


def mount(folder):
  """A real disk of one mebibyte, where the system lets us have one."""
  command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
  try:
    return subprocess.run(command, capture_output=True).returncode == 0
  except FileNotFoundError:
    return False


# The library's other writes may report to an event loop that is gone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount")
def test_a_full_disk_is_said_in_one_sentence(tmp_path):
  if not mount(tmp_path):
    pytest.skip("needs the right to mount")
  try:
    kept = checkpoint.Checkpoints(tmp_path / "checkpoints")
    kept.save(1, {"x": jnp.zeros(1000)})
    kept.save(2, {"x": jax.random.normal(jax.random.key(0), (1_000_000,))})
    with pytest.raises(OSError, match=r"round 2 .*: the disk is full; make"):
      kept.wait()
    assert kept.latest({"x": jnp.zeros(1000)}).step == 1
    kept.close()
  finally:
    subprocess.run(["umount", str(tmp_path)], check=True)
