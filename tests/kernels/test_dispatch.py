"""Which implementation runs: chosen by what is compiled for, never replaced."""

import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernel_cases
from fedjax_peft import kernels
from fedjax_peft.kernels import dispatch, native

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TPU, GPU = "@tpu_custom_call", "@__gpu$xla.gpu.triton"


@functools.cache
def smallest(name):
  """The shape of a kernel with the fewest values, but not with none."""
  found = {}
  for case in kernel_cases.cases():
    if case.kernel.name == name and not case.spec.bench:
      arrays = case.draw()
      out = jax.eval_shape(case.reference, *arrays)
      sizes = [x.size for x in (*arrays, *jax.tree.leaves(out))]
      if all(sizes):
        found[sum(sizes)] = case
  return found[min(found)]


def calls(case, platform, implementation=None):
  """The foreign functions in a kernel's program for a platform."""

  def fun(*arrays):
    return case.run(*arrays, implementation=implementation)

  lowered = jax.jit(fun).trace(*case.draw())
  text = lowered.lower(lowering_platforms=(platform,)).as_text()
  return set(re.findall(r"custom_call (@[\w.$]+)", text))


@pytest.fixture(params=kernel_cases.names())
def case(request):
  return smallest(request.param)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_the_platform_that_is_compiled_for_chooses(case, platform):
  kernel, found = case.kernel, calls(case, platform)
  names = {"cpu": native_calls(found), "tpu": {TPU}, "cuda": {GPU}}
  there = {
    "cpu": kernel.native,
    "tpu": kernel.pallas_tpu,
    "cuda": kernel.pallas_gpu,
  }
  why = {"cuda": "gpu"}.get(platform, platform)
  expected = there[platform] is not None and why not in kernel.why
  if platform == "cpu":
    expected = expected and not native.missing(kernel.library)
  assert bool(found & names[platform]) == expected
  others = {TPU, GPU} | native_calls(found)
  assert not found & (others - names[platform])


def native_calls(found):
  return {name for name in found if name.startswith("@fedjax_peft.")}


def test_explain_says_what_the_programs_hold(case):
  row = re.search(rf"^{case.kernel.name} .*$", dispatch.explain(), re.M)
  _, cpu, tpu, gpu = row[0].split()
  found = {p: calls(case, p) for p in ("cpu", "tpu", "cuda")}
  assert cpu == ("native" if native_calls(found["cpu"]) else "reference")
  assert tpu == ("pallas_tpu" if TPU in found["tpu"] else "reference")
  assert gpu == ("pallas_gpu" if GPU in found["cuda"] else "reference")
  for platform, why in case.kernel.why.items():
    assert f"on {platform}" in dispatch.explain()
    assert why in dispatch.explain()


def test_a_named_implementation_is_what_runs(case):
  assert not calls(case, "cpu", "reference")
  assert not calls(case, "tpu", "reference") & {TPU}
  if case.kernel.native and not native.missing(case.kernel.library):
    assert native_calls(calls(case, "cpu", "native"))


def test_a_named_implementation_of_another_platform_is_refused(case):
  for implementation in ("pallas_tpu", "pallas_gpu"):
    if getattr(case.kernel, implementation):
      with pytest.raises(ValueError, match="interpret mode"):
        jax.block_until_ready(
          case.run(*case.draw(), implementation=implementation)
        )


def toy(**more):
  """A kernel that doubles, and notes how its Pallas versions are called."""
  seen = []

  def pallas(x, *, interpret=False):
    seen.append(interpret)
    return x * 2

  implementations = {"pallas_tpu": pallas, "pallas_gpu": pallas} | more
  kernel = dispatch.Kernel("toy", reference=lambda x: x + x, **implementations)
  return kernel, seen


def test_interpret_mode_is_never_chosen():
  kernel, seen = toy()
  x = np.arange(3)
  np.testing.assert_array_equal(dispatch.call(kernel, jnp.asarray(x)), 2 * x)
  assert not any(seen)
  dispatch.call(kernel, x, implementation="interpret_tpu")
  assert seen[-1] is True


def test_an_implementation_that_does_not_exist_is_refused():
  kernel, _ = toy(pallas_gpu=None)
  match = (
    r"of toy must be one of \['reference', 'pallas_tpu', 'interpret_tpu'\] or "
    r"None: got implementation='{}'"
  )
  for name in ("native", "pallas_gpu", "interpret_gpu", "cuda"):
    with pytest.raises(ValueError, match=match.format(name)):
      dispatch.call(kernel, jnp.ones(2), implementation=name)


def test_a_native_kernel_that_was_not_built_is_refused_with_the_remedy():
  kernel, _ = toy(native=lambda x: x, library="not_there")
  with pytest.raises(RuntimeError) as error:
    dispatch.call(kernel, jnp.ones(2), implementation="native")
  assert re.search(
    r"the native toy cannot run: .*install one \(g\+\+\).*; use "
    r"implementation=None or 'reference'",
    str(error.value),
  )
  assert dispatch.call(kernel, jnp.ones(2))[0] == 2  # None goes on without


def test_a_reason_to_leave_xla_in_charge_is_followed():
  kernel, _ = toy(why={"tpu": "it is one instruction"})
  trace = jax.jit(lambda x: dispatch.call(kernel, x)).trace(jnp.ones(2))
  tpu = trace.lower(lowering_platforms=("tpu",)).as_text()
  gpu = trace.lower(lowering_platforms=("cuda",)).as_text()
  assert "stablehlo.add" in tpu
  assert "stablehlo.multiply" in gpu


def python(code, **environment):
  """Runs a line of Python at the root of the repository."""
  return subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    capture_output=True,
    text=True,
    check=False,
  )


def test_without_native_kernels_the_reference_runs_and_explain_says_so():
  code = """
import numpy as np
from fedjax_peft import kernels
from fedjax_peft.kernels.mask import api
print(kernels.explain())
q, keys, row = np.zeros((1, 2), "u4"), np.zeros((1, 8), "u4"), np.zeros(1, "i4")
rest = keys, row, row - 1, np.zeros(3, "u4")
print(api.mask_add(q, *rest)[0, 0])
api.mask_add(q, *rest, implementation="native")
"""
  done = python(code, FEDJAX_PEFT_NO_NATIVE="1")
  assert "not here (FEDJAX_PEFT_NO_NATIVE=1 is set)" in done.stdout
  assert not re.search(r"^\w+ +native", done.stdout, re.M)
  assert re.search(r"^mask_add +reference +pallas_tpu", done.stdout, re.M)
  # The first word of ChaCha20 under a key, nonce and counter of zeros:
  # RFC 7539, https://www.rfc-editor.org/rfc/rfc7539, A.1, test vector 1.
  assert done.stdout.splitlines()[-1] == str(0xADE0B876)
  error = done.stderr.splitlines()[-1]
  assert "RuntimeError: the native mask_add cannot run" in error
  assert "use implementation=None or 'reference'" in error


def test_kernels_are_refused_as_a_top_level_package():
  done = python("import kernels")
  assert done.returncode != 0
  assert "must be imported as fedjax_peft.kernels" in done.stderr
  done = python("from fedjax_peft import kernels; print(kernels.__name__)")
  assert done.stdout.strip() == "fedjax_peft.kernels"


def test_every_kernel_has_shapes_to_measure_and_odd_ones():
  for name in dispatch.KERNELS:
    specs = [c.spec for c in kernel_cases.cases() if c.kernel.name == name]
    assert any(spec.bench for spec in specs)
    assert not all(spec.bench for spec in specs)
    assert len({spec.name for spec in specs}) == len(specs)
  assert kernels.explain() == dispatch.explain()
