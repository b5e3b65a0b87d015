"""Proof of compute for unmodified vLLM (V1 engine).

Importing this package imports neither torch nor vLLM; `gonka_poc.gpu_random`, `gonka_poc.data` and
`gonka_poc.validation` work without vLLM.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("gonka-poc")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+source"

__all__ = ["__version__"]
