"""`python -m knet_jax.demo`, the same as `knet demo`."""

from knet_jax.cli.main import run

if __name__ == "__main__":
    run("demo")
