"""A tiny prepared data set and a config that trains on it in seconds."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

CLIENTS, TOKENS, CLASSES = 12, 8, 3


class TinyText(tfds.core.GeneratorBasedBuilder):
  """Sequences whose first token gives their class away."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, **options):
    super().__init__(file_format="array_record", **options)

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "client_id": tfds.features.Text(),
          "tokens": tfds.features.Tensor(shape=(TOKENS,), dtype=np.int32),
          "length": np.int32,
          "label": tfds.features.ClassLabel(num_classes=CLASSES),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    rng = np.random.default_rng(0)
    for number in range(CLIENTS * 14):
      tokens = rng.integers(3, 40, TOKENS, dtype=np.int32)
      yield (
        number,
        {
          "client_id": f"client {number % CLIENTS}",
          "tokens": tokens,
          "length": TOKENS,
          "label": int(tokens[0]) % CLASSES,
        },
      )


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
  """The directory of the prepared data set."""
  builder = TinyText(data_dir=tmp_path_factory.mktemp("data"))
  builder.download_and_prepare()
  return pathlib.Path(builder.data_dir)


CONFIG = """
rounds = 6
[model]
name = "encoder"
options = {{vocab = 40, width = 16, ffn = 16, heads = 2}}
peft = [{{method = "lora", rank = 2}}, {{method = "tune", where = "head/.*"}}]
[data]
name = "{data}"
unseen = 0.1
[client]
batch = 4
learning_rate = 0.05
[server]
optimizer = "adam"
learning_rate = 0.01
[cohort]
size = 5
[[uplink]]
link = "clip"
clip_norm = 1.0
[[uplink]]
link = "weigh"
max_weight = 16
[[uplink]]
link = "fixed_point"
[evaluate]
every = 3
[execution]
width = 2
[checkpoint]
every = 2
"""


@pytest.fixture(scope="session")
def tiny_text(tiny_data):
  """The text of a config of six rounds."""
  return CONFIG.format(data=tiny_data)


@pytest.fixture
def tiny(tmp_path, tiny_text):
  """The path of a config of six rounds; the run goes to `run` beside it."""
  path = tmp_path / "tiny.toml"
  path.write_text(f'out = "{tmp_path / "run"}"\n{tiny_text}')
  return path


@pytest.fixture(scope="session")
def start(tmp_path_factory):
  """Starts `fedjax-peft ARGUMENTS` as a process of its own, on two streams."""
  cache = pathlib.Path(__file__).parent.parent.parent / ".cache" / "jax"
  environment = os.environ | {
    "FEDJAX_PEFT_HOME": str(tmp_path_factory.mktemp("home")),
    "FEDJAX_PEFT_STREAMS": "2",
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
  }
  flags = os.environ["XLA_FLAGS"].split()  # it makes its streams itself
  flags = [x for x in flags if "device_count" not in x]
  environment["XLA_FLAGS"] = " ".join(flags)

  def process(*arguments, **more):
    return subprocess.Popen(
      [sys.executable, "-m", "fedjax_peft", *map(str, arguments)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=environment | more,
    )

  return process
