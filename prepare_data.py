"""`knet prepare` in a checkout that is not installed: `python prepare_data.py --help` tells more."""

from knet_jax.cli.main import run

if __name__ == "__main__":
    run("prepare")
