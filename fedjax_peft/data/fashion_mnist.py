"""Fashion-MNIST: 70,000 grey images of ten kinds of clothing, partitioned.

Xiao et al., 2017, https://arxiv.org/abs/1708.07747; from the Debian package
dataset-fashion-mnist, in IDX files.
"""

import gzip
import math
import pathlib
from typing import Literal

import numpy as np
import tensorflow_datasets as tfds

from fedjax_peft.data import check, fetch, records
from fedjax_peft.data import partition as partitions
from fedjax_peft.data.clients import Population
from fedjax_peft.data.ragged import Ragged

LICENCE = "MIT"
SOURCE = "Debian dataset-fashion-mnist, 31 MB (needs apt-get and dpkg-deb)"
VERSION = "1.0.0"
CLASSES: tuple[str, ...] = (
  "T-shirt/top",
  "Trouser",
  "Pullover",
  "Dress",
  "Coat",
  "Sandal",
  "Shirt",
  "Sneaker",
  "Bag",
  "Ankle boot",
)


class FashionMnist(tfds.core.GeneratorBasedBuilder):
  """The images as they are, in the order of the files."""

  VERSION = tfds.core.Version(VERSION)

  def __init__(self, source: str | pathlib.Path = "", **options):
    """Reads the IDX files in the directory `source`, when preparing."""
    self._source = pathlib.Path(source)
    super().__init__(file_format="array_record", **options)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Grey images of clothing, 28 x 28.",
      license=LICENCE,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8),
          "label": tfds.features.ClassLabel(names=CLASSES),
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    return {
      "train": self._generate_examples("train"),
      "test": self._generate_examples("t10k"),
    }

  def _generate_examples(self, part):
    images = idx(self._source / f"{part}-images-idx3-ubyte.gz")
    labels = idx(self._source / f"{part}-labels-idx1-ubyte.gz")
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
      yield row, {"image": image[..., None], "label": int(label)}


def idx(path: pathlib.Path) -> np.ndarray:
  """The array of uint8 in a gzipped IDX file, in the shape it states.

  Raises:
    ValueError: if the file is not what its header says.
  """
  with gzip.open(path) as file:
    data = file.read()
  ranks = data[3] if data[:3] == b"\0\0\x08" else 0
  shape = tuple(np.frombuffer(data, ">u4", ranks, 4).astype(int).tolist())
  if not ranks or len(data) != 4 + 4 * ranks + math.prod(shape):
    raise ValueError(f"{path.name} must be an IDX file of bytes, and is not")
  return np.frombuffer(data, np.uint8, offset=4 + 4 * ranks).reshape(shape)


def prepare():
  """Gets the package and writes the records, unless they are there."""
  if records.is_prepared("fashion_mnist", VERSION):
    return
  source = fetch.archive(
    "dataset-fashion-mnist",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    ("*-ubyte.gz",),
    fetch.home() / "packages" / "dataset-fashion-mnist",
  )
  records.build(FashionMnist(source, data_dir=fetch.home() / "datasets"))


def load(
  *,
  seed: int = 0,
  clients: int = 100,
  partition: Literal["dirichlet", "iid", "quantity", "shards"] = "dirichlet",
  alpha: float = 0.3,
  min_size: int = 10,
  per_client: int = 2,
  sigma: float = 1.0,
  heldout: int = 100,
  unseen: float = 0.0,
  dtype: Literal["float32", "uint8"] = "float32",
) -> Population:
  """Images and labels; the 60,000 train, of the 10,000 others tests are dealt.

  Args:
    seed: of the partition, the held-out rows and the unseen clients.
    clients: N.
    partition: how training images are split; `alpha`, `min_size`, `per_client`
      and `sigma` are options of the functions in `fedjax_peft.data.partition`.
    alpha: of "dirichlet".
    min_size: of "dirichlet" and "quantity".
    per_client: of "shards".
    sigma: of "quantity".
    heldout: test images per client, in its own label mixture
      (`partition.mirror`).
    unseen: the fraction of clients that are never trained on.
    dtype: "float32" scales pixels to [0, 1]; "uint8" keeps 0 to 255.

  Returns:
    Examples `image` [M, 28, 28, 1] and `label` int32 [M]; `test` is the 10,000
    test images.

  Raises:
    FileNotFoundError: if the data set is not prepared.
  """
  check.choice("dtype", dtype, ("float32", "uint8"))
  check.fraction("unseen", unseen)
  builder = records.prepared("fashion_mnist", VERSION)
  parts = [records.read(builder, split) for split in ("train", "test")]
  image = np.concatenate([part["image"] for part in parts])
  label = np.concatenate([part["label"] for part in parts]).astype(np.int32)
  count = len(parts[0]["label"])
  train = partitions.by_name(
    partition,
    label[:count],
    clients,
    alpha=alpha,
    min_size=min_size,
    per_client=per_client,
    sigma=sigma,
    seed=seed,
  )
  tested = partitions.mirror(
    train, label[:count], label[count:], size=heldout, seed=seed
  )
  hidden = np.random.default_rng(seed).permutation(clients)
  hidden = hidden[: round(unseen * clients)]
  if dtype == "float32":
    image = image.astype(np.float32) / np.float32(255)
  return Population(
    examples={"image": image, "label": label},
    train=train,
    heldout=Ragged(tested.indptr, tested.rows + count),
    names=tuple(
      f"{client:0{len(str(clients - 1))}d}" for client in range(clients)
    ),
    seen=~np.isin(np.arange(clients), hidden),
    test=np.arange(count, len(label)),
    classes=CLASSES,
    name="fashion_mnist",
  )
