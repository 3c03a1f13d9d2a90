"""The table `trust`: a command that lets too much cross does not run."""

import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from fedjax_peft import __main__, build, config, record, trust

CLIENTS, TOKENS = 8, 32


class WideText(tfds.core.GeneratorBasedBuilder):
  """Sequences that are long enough to be told from all others."""

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
          "label": tfds.features.ClassLabel(num_classes=3),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    rng = np.random.default_rng(0)
    for number in range(CLIENTS * 5):
      tokens = rng.integers(0, 64, TOKENS, dtype=np.int32)
      yield (
        number,
        {
          "client_id": f"client {number % CLIENTS}",
          "tokens": tokens,
          "length": TOKENS,
          "label": int(tokens[0]) % 3,
        },
      )


CONFIG = """
rounds = 2
[model]
name = "encoder"
options = {{vocab = 64, width = 16, ffn = 16, heads = 2, depth = 2}}
peft = [{{method = "lora", rank = 2}}, {{method = "tune", where = ".*head/.*"}}]
[data]
name = "{data}"
[client]
batch = 4
[cohort]
size = 4
[execution]
width = 2
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  builder = WideText(data_dir=tmp_path_factory.mktemp("data"))
  builder.download_and_prepare()
  return CONFIG.format(data=pathlib.Path(builder.data_dir))


@pytest.fixture
def path(text, tmp_path):
  (tmp_path / "c.toml").write_text(f'out = "{tmp_path / "run"}"\n{text}')
  return tmp_path / "c.toml"


def test_a_run_with_canaries_records_that_none_was_found(path, tmp_path):
  up = "trust.up={leaves=['.*/lora_.', 'head/.*'], dtypes=['float32', 'int32']}"
  more = ("--set", "trust.canaries=2", "--set", up)
  assert __main__.main(["train", str(path), *more]) == 0
  lines = record.read(tmp_path / "run" / "records.jsonl")
  assert [line["trust/found"] for line in lines] == [0, 0]


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (["trust.up={leaves=['head/.*']}"], "uplink to 'cloud' may carry leaves"),
    (["trust.up={most_bytes=100}"], "may carry 100 bytes a message"),
    (
      ["trust.down={dtypes=['int8']}"],
      "downlink from 'cloud' may carry dtypes",
    ),
    (["trust.up={leafs=['a']}"], "trust.up: unknown option 'leafs'"),
    (["trust.notes={most_bytes=4}"], "trust.notes says what crosses"),
    (["trust.cut={most_bytes=4}"], "got a model without"),
    (
      ["trust.canaries=1", "split.ends={device='embeddings'}"],
      "depend on one value of 'tokens' each; cut after a later stage",
    ),
    (
      ["trust.canaries=1", "split.ends={device=1}", "split.cache=float32"],
      "depend on one value of 'tokens' each; cut after a later stage",
    ),
    (
      ["trust.canaries=1", "split.cuts={embeddings=0.5, whole=0.5}"],
      "depend on one value of 'tokens' each; cut after a later stage",
    ),
    (
      ["trust.cut={most_bytes=100}", "split.ends={device='layers/0'}"],
      "cut between 'device' and 'server' may carry 100 bytes",
    ),
  ],
)
def test_what_lets_too_much_cross_is_refused_before_it_runs(
  path, tmp_path, capsys, changes, words
):
  more = [x for change in changes for x in ("--set", change)]
  assert __main__.main(["train", str(path), *more]) == 2
  assert words in capsys.readouterr().err
  assert not (tmp_path / "run" / "records.jsonl").exists()


@pytest.mark.parametrize(
  "split", ["split.ends={device='layers/0'}", "split.cuts={'layers/0'=1.0}"]
)
def test_a_cut_after_a_block_may_be_watched(path, split):
  run = config.load(str(path), ["trust.canaries=1", split])
  parts = build.build(run)
  assert isinstance(parts.algorithm.work.watch, trust.Watch)
  plain = build.build(config.load(str(path), []))
  assert plain.algorithm.work.watch is None
  assert len(parts.data.examples["tokens"]) == 1 + len(
    plain.data.examples["tokens"]
  )
