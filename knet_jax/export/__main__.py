"""`python -m knet_jax.export`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("knet_jax.export.model_file", run_name="__main__", alter_sys=True)
