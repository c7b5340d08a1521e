"""`python -m knet_jax.data.shapes`, the same as `knet shapes`."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "shapes")
    runpy.run_module("knet_jax.cli.main", run_name="__main__")
