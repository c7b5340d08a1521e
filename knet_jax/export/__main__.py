"""`python -m knet_jax.export`, the same as `knet export`."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "export")
    runpy.run_module("knet_jax.cli.main", run_name="__main__")
