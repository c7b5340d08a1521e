import itertools
import runpy
from pathlib import Path

import pytest

from knet_jax.configuration import ConfigError, load_config
from knet_jax.validation import validate

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
COCO = str(next(path for path in CONFIGS if path.stem == "coco_panoptic"))


def every_recipe():
    """Every config file with every variant, and every two of them."""
    for path in CONFIGS:
        variants = runpy.run_path(str(path))["VARIANTS"]
        for count in range(3):
            for names in itertools.combinations(variants, count):
                yield f"{path}:{','.join(names)}"


@pytest.mark.parametrize("spec", list(every_recipe()), ids=lambda spec: Path(spec).name)
def test_every_recipe_is_valid(spec):
    validate(load_config(spec))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("task=instances", "config.task is 'instances'; accepted: panoptic"),
        ("seed=-1", "config.seed is -1; accepted: a whole number of at least 0"),
        ("model.num_proposals=0", "config.model.num_proposals is 0; accepted: "),
        ("model.dtype=float16", "accepted: float32, bfloat16"),
        ("model.channels=100", "config.model.channels is 100; accepted: multiples of config.model"),
        ("data.dataset=voc", "config.data.dataset is 'voc'; accepted: coco, shapes"),
        ("data.canvas=800,1333", r"config.data.canvas is \(800, 1333\); .*multiples of 32"),
        ("data.canvas=800", r"config.data.canvas is \(800,\)"),
        ("data.canvas=a,b", r"config.data.canvas is .*; accepted"),
        ("data.short_side=800,640", r"config.data.short_side is \(800, 640\)"),
        ("data.flip=1.5", "config.data.flip is 1.5; accepted: a probability"),
        ("optim.lr=0", "config.optim.lr is 0.0; accepted: a number above 0"),
        ("optim.lr=nan", "config.optim.lr is nan"),
        ("optim.lr=inf", "config.optim.lr is inf"),
        ("optim.decay_at=11,8", r"config.optim.decay_at is \(11, 8\); .*ascending"),
        ("optim.decay_factor=0.1", "config.optim.decay_factor is 0.1; accepted: a divisor"),
        ("optim.unit=iter", "config.optim.unit is 'iter'; accepted: epoch, step"),
        ('optim.groups=(("a", "(", 1.0, 1.0),)', r"config.optim.groups\[0\]"),
        ("train.batch_size=0", "config.train.batch_size is 0"),
        ("train.batch_size=18", "config.train.batch_size is 18; accepted: multiples of the 4 dev"),
        ("train.epochs=0", "config.train.epochs and config.train.steps are both 0"),
        ("train.keep=0", "config.train.keep is 0"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(argument, message):
    config = load_config(COCO, [f"--config.{argument}"])
    with pytest.raises(ValueError, match=message) as caught:
        validate(config, num_devices=4)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named():
    config = load_config(COCO)
    with config.unlocked():
        del config.optim.lr
    with pytest.raises(ConfigError, match=r"config.optim.lr is missing"):
        validate(config)
