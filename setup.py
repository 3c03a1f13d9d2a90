"""Lists the packages and builds the native kernels, where that is possible.

Everything else about the project is in pyproject.toml. The folder `kernels/`
installs as `fedjax_peft.kernels`, which a static table could only say package
by package.
"""

import os
import pathlib
import sys

import setuptools
from setuptools.command import build_ext


class Native(build_ext.build_ext):
  """Builds shared libraries without a Python in them, or says why not.

  FEDJAX_PEFT_NO_NATIVE=1 leaves it out, FEDJAX_PEFT_REQUIRE_NATIVE=1 fails
  where it cannot be built.
  """

  def get_ext_filename(self, fullname):
    return fullname.replace(".", os.sep) + ".so"

  def get_export_symbols(self, ext):
    return []

  def build_extension(self, ext):
    if os.environ.get("FEDJAX_PEFT_NO_NATIVE") == "1":
      return
    try:
      import jax

      ext.include_dirs = [jax.ffi.include_dir(), "kernels/native"]
      super().build_extension(ext)
    except Exception as error:
      if os.environ.get("FEDJAX_PEFT_REQUIRE_NATIVE") == "1":
        raise
      print(f"native {ext.name} skipped: {error}", file=sys.stderr)


ours = setuptools.find_packages(include=["fedjax_peft", "fedjax_peft.*"])
kernels = ["fedjax_peft.kernels"] + [
  f"fedjax_peft.kernels.{name}" for name in setuptools.find_packages("kernels")
]
native = pathlib.Path("kernels/native")
setuptools.setup(
  packages=ours + kernels,
  package_dir={"fedjax_peft.kernels": "kernels"},
  package_data={"fedjax_peft.kernels": ["native/*.cc", "native/*.h"]},
  cmdclass={"build_ext": Native},
  ext_modules=[
    setuptools.Extension(
      f"fedjax_peft.kernels.native._{source.stem}",
      [str(source)],
      depends=sorted(map(str, native.glob("*.h"))),
      language="c++",
      # Products and sums are rounded one by one, as the specification says.
      extra_compile_args=["-O3", "-std=c++17", "-w", "-ffp-contract=off"],
      optional=True,
    )
    for source in sorted(native.glob("*.cc"))
  ],
)
