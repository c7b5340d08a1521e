"""`python -m knet_jax.logs`, the same as `knet logs`."""

from knet_jax.cli.main import run

if __name__ == "__main__":
    run("logs")
