"""`knet predict` in a checkout that is not installed: `python predict.py --help` tells more."""

from knet_jax.cli.main import run

if __name__ == "__main__":
    run("predict")
