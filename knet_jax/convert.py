"""`python -m knet_jax.convert`, the same as `knet convert`."""

from knet_jax.cli.main import run

if __name__ == "__main__":
    run("convert")
