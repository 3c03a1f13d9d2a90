"""Packages: kernels/ installs inside fedjax_peft, however it is installed."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
SKIP = shutil.ignore_patterns(
  ".*", "runs", "*.egg-info", "build", "dist", "*.so"
)

BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])("dist"))
"""

CHECK = """
import importlib.util
import fedjax_peft.kernels.native
assert importlib.util.find_spec("kernels") is None
print(fedjax_peft.kernels.__file__)
print(fedjax_peft.kernels.native.missing())
"""


def run(*command, cwd, **environment):
  done = subprocess.run(
    list(map(str, command)),
    cwd=cwd,
    capture_output=True,
    text=True,
    env=os.environ | environment,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.strip().splitlines()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A copy of the tree, and an environment with our dependencies in it."""
  root = tmp_path_factory.mktemp("packaging")
  shutil.copytree(ROOT, root / "tree", ignore=SKIP)
  run(sys.executable, "-m", "venv", root / "venv", cwd=root)
  python = root / "venv" / "bin" / "python"
  run(python, "-m", "pip", "install", "-q", "setuptools>=77", cwd=root)
  (site,) = (root / "venv" / "lib").glob("python*/site-packages")
  ours = sysconfig.get_paths()["purelib"]
  (site / "dependencies.pth").write_text(f"{ours}\n")
  for kind in ("build_sdist", "build_wheel"):
    run(python, "-c", BUILD, kind, cwd=root / "tree")
  return python, root / "tree"


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_kernels_in_their_place(source):
  _, tree = source
  (wheel,) = (tree / "dist").glob("*.whl")
  with zipfile.ZipFile(wheel) as file:
    names = file.namelist()
  assert "fedjax_peft/kernels/__init__.py" in names
  if shutil.which("g++"):
    assert "fedjax_peft/kernels/native/_mask.so" in names
  assert {n.split("/")[0] for n in names if "dist-info" not in n} == {
    "fedjax_peft"
  }
  ours = {p.relative_to(tree) for p in (tree / "fedjax_peft").rglob("*.py")}
  assert {str(p) for p in ours} <= set(names)
  (sdist,) = (tree / "dist").glob("*.tar.gz")
  with tarfile.open(sdist) as file:
    names = [n.partition("/")[2] for n in file.getnames()]
  assert "kernels/__init__.py" in names
  assert "fedjax_peft/__main__.py" in names
  sources = {
    f"kernels/native/{p.name}"
    for pattern in ("*.cc", "*.h")
    for p in (tree / "kernels" / "native").glob(pattern)
  }
  assert sources
  assert sources <= set(names)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz", "editable"])
def test_kernels_import_as_ours_and_never_at_the_top(source, kind, tmp_path):
  python, tree = source
  what = ["-e", tree]
  if kind != "editable":
    what = list((tree / "dist").glob(kind))
  flags = ["-q", "--no-deps", "--no-build-isolation", "--ignore-installed"]
  run(python, "-m", "pip", "install", *flags, *what, cwd=tmp_path)
  where, *missing = run(python, "-c", CHECK, cwd=tmp_path)
  if shutil.which("g++"):
    assert missing == []
  inside = tree if kind == "editable" else python.parent.parent
  assert where.startswith(str(inside))
  command = python.parent / "fedjax-peft"
  assert "usage: fedjax-peft" in run(command, "--help", cwd=tmp_path)[0]
  run(python, "-m", "pip", "uninstall", "-q", "-y", "fedjax-peft", cwd=tmp_path)


@pytest.mark.slow
def test_an_install_without_a_compiler_works_and_says_so(source, tmp_path):
  python, tree = source
  clean = tmp_path / "tree"
  shutil.copytree(tree, clean, ignore=SKIP)
  flags = ["-q", "--no-deps", "--no-build-isolation", "--ignore-installed"]
  command = [python, "-m", "pip", "install", *flags, clean]
  run(*command, cwd=tmp_path, CC="no-compiler", CXX="no-compiler")
  _, missing = run(python, "-c", CHECK, cwd=tmp_path)
  assert "install one (g++)" in missing
  run(python, "-m", "pip", "uninstall", "-q", "-y", "fedjax-peft", cwd=tmp_path)
