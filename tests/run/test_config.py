"""Configs: what a file says is what runs, and mistakes get one sentence."""

import copy
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest

from fedjax_peft import config, schema

TINY = {"model": {"name": "tiny"}, "data": {"name": "sotu"}}


def with_(**sections):
  return copy.deepcopy({**TINY, **sections})


def write(folder, text):
  path = folder / "tiny.toml"
  path.write_text(text)
  return path


def refusal(tree, *overrides):
  for assignment in overrides:
    config.override(tree, assignment)
  with pytest.raises(ValueError) as caught:  # noqa: PT011, read by the tests
    config.parse(tree)
  text = str(caught.value)
  assert "\n" not in text
  return text


def test_a_file_and_overrides_become_one_config(tmp_path):
  path = write(
    tmp_path,
    """
    rounds = 7
    uplink = [{link = "clip", clip_norm = 1.0}, {link = "weigh"}]
    [model]
    name = "minilm"
    [data]
    name = "sotu"
    clients = 1000
    """,
  )
  made = config.load(path, ["client.epochs=2", "uplink.0.clip_norm=0.5"])
  assert made.name == "tiny"
  assert made.out == "runs/tiny"
  assert made.rounds == 7
  assert made.client.epochs == 2
  assert made.data == {"name": "sotu", "clients": 1000}
  assert made.uplink == (
    {"link": "clip", "clip_norm": 0.5},
    {"link": "weigh"},
  )


def test_a_config_survives_json():
  made = config.parse(with_(client={"steps": 3}))
  assert config.parse(made.to_dict()) == made


def test_every_key_says_its_type_and_meaning():
  for key in schema.fields():
    assert key.doc
    assert key.expected()
  names = [key.name for key in schema.fields()]
  assert "server.learning_rate" in names
  assert len(set(names)) == len(names)


def test_a_misspelt_key_names_the_near_one():
  text = refusal(with_(server={"lerning_rate": 1.0}))
  assert "'server.lerning_rate'" in text
  assert "did you mean 'learning_rate'" in text


def test_a_key_in_the_wrong_section_names_the_right_ones():
  text = refusal(with_(learning_rate=0.1))
  assert "'client.learning_rate' or 'server.learning_rate'" in text


@pytest.mark.parametrize(
  ("assignment", "parts"),
  [
    ("rounds=ten", ["rounds must be int >= 1", "got 'ten'"]),
    ("rounds=0", ["rounds must be int >= 1", "got 0"]),
    ("client.learning_rate=-1", ["float > 0", "got -1"]),
    ("client.learning_rate=nan", ["client.learning_rate", "finite", "nan"]),
    ("server.optimizer=adm", ["sgd | momentum | adam", "did you mean 'adam'"]),
    ("cohort.size=1.5", ["cohort.size must be int >= 1", "got 1.5"]),
    ("client.shuffle=1", ["client.shuffle must be bool", "got 1"]),
    ("client=3", ["[client]: expected a table", "got int"]),
    ("uplink=3", ["uplink must be list of tables", "got 3"]),
    ("uplink=[3]", ["uplink.0 must be list of tables", "got 3"]),
    ("uplink=[{clip_norm=1.0}]", ["uplink", "'link'", "clip_norm"]),
    ("data={clients=3}", ["data", "'name'", "clients"]),
    ('model.peft=[{name="lora"}]', ["model.peft", "'method'"]),
  ],
)
def test_a_wrong_value_says_what_was_expected_and_what_came(assignment, parts):
  text = refusal(with_(client={}, server={}, cohort={}), assignment)
  for part in parts:
    assert part in text


def test_a_missing_key_says_how_to_add_it():
  assert "data is missing" in refusal({"model": {"name": "tiny"}})
  text = refusal({"model": {}, "data": {"name": "sotu"}})
  assert "model.name is missing" in text
  assert "--set model.name=" in text


def test_epochs_and_steps_together_are_refused():
  text = refusal(with_(client={"epochs": 1, "steps": 2}))
  assert "[client]" in text
  assert "epochs=1, steps=2" in text


@pytest.mark.parametrize(
  ("assignment", "part"),
  [
    ("rounds", "expects key=value"),
    ("=3", "expects key=value"),
    ("client..batch=3", "expects key=value"),
    ("uplink.1.bits=3", "'1' names nothing in a list of 1"),
    ("uplink.clip.bits=3", "'clip' names nothing"),
    ("rounds.every=3", "names nothing in 5"),
  ],
)
def test_an_override_that_fits_nothing_is_refused(assignment, part):
  tree = {"uplink": [{"link": "weigh"}], "rounds": 5}
  with pytest.raises(ValueError, match=part):
    config.override(tree, assignment)


def test_a_missing_file_names_the_near_one(tmp_path):
  path = write(tmp_path, "")
  with pytest.raises(FileNotFoundError, match=r"did you mean .*tiny\.toml"):
    config.load(path.with_name("tinny.toml"))


def test_a_file_that_is_not_toml_is_refused_with_its_line(tmp_path):
  path = write(tmp_path, "rounds = \n")
  with pytest.raises(ValueError, match=r"tiny\.toml is not valid TOML.*line 1"):
    config.load(path)


def clip(clip_norm: float, *, groups: tuple[str, ...] = ()) -> str:
  if clip_norm <= 0:
    raise ValueError(f"clip_norm must be positive, got {clip_norm=}")
  return f"clip {clip_norm} {groups}"


def opaque(fun: Callable) -> None:
  raise AssertionError(fun)


def test_options_of_a_free_table_become_arguments():
  made = config.call(clip, {"clip_norm": 1, "groups": ["a"]}, "uplink.0")
  assert made == "clip 1.0 ('a',)"


@pytest.mark.parametrize(
  ("factory", "options", "part"),
  [
    (clip, {"clip_nrm": 1.0}, "uplink.0: unknown option 'clip_nrm' of "
                              r"clip\(clip_norm, groups\); did you mean "
                              "'clip_norm'"),
    (clip, {"clip_norm": "a"}, "uplink.0.clip_norm must be float, got 'a'"),
    (clip, {}, "option 'clip_norm' of .* is missing"),
    (clip, {"clip_norm": -1.0}, "uplink.0: clip_norm must be positive"),
    (opaque, {"fun": 1}, "fun must be Callable, got 1"),
  ],
)  # fmt: skip
def test_a_wrong_option_of_a_free_table_is_refused(factory, options, part):
  with pytest.raises(ValueError, match=part):
    config.call(factory, options, "uplink.0")


def test_differences_name_the_keys_that_differ():
  a = config.parse(TINY).to_dict()
  b = config.parse(with_(client={"batch": 4})).to_dict()
  assert config.differences(a, b) == [
    "client.batch is 8 in the run and 4 now",
  ]
  assert config.differences(a, a) == []


def test_reading_a_config_does_not_import_jax():
  # The package's public names may; what decides on devices must not.
  program = f"""
import sys, types
package = types.ModuleType("fedjax_peft")
package.__path__ = [{str(pathlib.Path(config.__file__).parent)!r}]
sys.modules["fedjax_peft"] = package
import fedjax_peft.__main__
sys.exit("jax" in sys.modules)
"""
  assert subprocess.run([sys.executable, "-c", program]).returncode == 0
