"""`python -m knet_jax.export`, the same as `knet export`."""

from knet_jax.cli.main import run

if __name__ == "__main__":
    run("export", "knet export")
