"""Lists the packages; everything else about the project is in pyproject.toml.

The folder `kernels/` installs as `fedjax_peft.kernels`, which a static table
could only say package by package.
"""

import setuptools

ours = setuptools.find_packages(include=["fedjax_peft", "fedjax_peft.*"])
kernels = ["fedjax_peft.kernels"] + [
  f"fedjax_peft.kernels.{name}" for name in setuptools.find_packages("kernels")
]
setuptools.setup(
  packages=ours + kernels,
  package_dir={"fedjax_peft.kernels": "kernels"},
)
