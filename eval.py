"""`knet eval` in a checkout that is not installed: `python eval.py --help` tells more."""

from knet_jax.cli.main import run

if __name__ == "__main__":
    run("eval")
