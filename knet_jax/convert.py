"""`python -m knet_jax.convert`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("knet_jax.saved.convert", run_name="__main__", alter_sys=True)
