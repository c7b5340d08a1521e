"""`python -m knet_jax.demo`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("knet_jax.cli.demo", run_name="__main__", alter_sys=True)
