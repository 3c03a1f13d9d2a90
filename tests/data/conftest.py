import pytest


@pytest.fixture
def home(tmp_path, monkeypatch):
  """An empty cache directory."""
  path = tmp_path / "home"
  monkeypatch.setenv("FEDJAX_PEFT_HOME", str(path))
  return path
