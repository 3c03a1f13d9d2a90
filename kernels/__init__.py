"""Compute kernels; imported as `fedjax_peft.kernels`, whatever the install.

The folder lies at the top of the repository so that each kernel keeps its
sources, shapes and benchmarks together; `setup.py` maps it into the package.
"""
