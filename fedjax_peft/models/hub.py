"""Models by hub id: from the hub client's cache, else from the network.

Before a download, one question with a short timeout finds out whether the hub
answers, so that nothing hangs.
"""

import pathlib

import huggingface_hub as client
from huggingface_hub import errors

_FILES = ["config.json", "*.safetensors", "*.index.json", "tokenizer.json"]
_TIMEOUT = 5.0  # seconds


def directory(name: str) -> pathlib.Path:
  """The directory of a hub model, downloaded if it is not there yet.

  Args:
    name: "owner/name".

  Returns:
    A directory as `huggingface.load` wants it.

  Raises:
    FileNotFoundError: if the model is neither in the client's cache nor to be
      had from the hub; at most a few seconds after the call.
  """
  try:
    return _complete(client.snapshot_download(name, local_files_only=True))
  except (errors.LocalEntryNotFoundError, FileNotFoundError):
    pass
  try:
    client.HfApi().model_info(name, timeout=_TIMEOUT)
    return _complete(
      client.snapshot_download(
        name, allow_patterns=_FILES, etag_timeout=_TIMEOUT
      )
    )
  except Exception as error:  # whatever the client's transport raises
    reason = str(error).strip().partition("\n")[0]
    raise FileNotFoundError(
      f"model {name!r} is not in the hub client's cache and could not be"
      f" downloaded: {reason or type(error).__name__}; check the id and the"
      " network"
    ) from error


def _complete(path):
  """The snapshot, if it has weights: another tool may have left a part."""
  path = pathlib.Path(path)
  if not (path / "config.json").is_file() or not any(
    path.glob("*.safetensors")
  ):
    raise FileNotFoundError(
      f"{path} needs config.json and safetensors weights, and lacks them"
    )
  return path
