"""`python -m knet_jax.data.shapes`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("knet_jax.data.sources.shapes", run_name="__main__", alter_sys=True)
