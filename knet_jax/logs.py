"""`python -m knet_jax.logs`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("knet_jax.training.logs", run_name="__main__", alter_sys=True)
