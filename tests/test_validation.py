import itertools
import runpy
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from knet_jax.config.files import load_config
from knet_jax.config.validation import RULES_OF_TASKS, RULES_WHERE_GIVEN, check_data, validate
from knet_jax.model import BACKBONES, NECKS, make_model
from knet_jax.system.errors import UserError
from knet_jax.tasks import TASKS

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
COCO = str(next(path for path in CONFIGS if path.stem == "coco_panoptic"))
ADE20K = str(next(path for path in CONFIGS if path.stem == "ade20k_semantic"))


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
        ("task=instances", "config.task is 'instances'; accepted: panoptic, instance, semantic"),
        ("seed=-1", "config.seed is -1; accepted: a whole number of at least 0"),
        ("seed=4294967296", "config.seed is 4294967296; .* less than"),
        ("model.num_proposals=0", "config.model.num_proposals is 0; accepted: "),
        ("model.dtype=float16", "accepted: float32, bfloat16"),
        ("model.channels=100", "config.model.channels is 100; accepted: multiples of config.model"),
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
    with pytest.raises(UserError, match=r"config.optim.lr is missing"):
        validate(config)


# Networks of other tasks. Every change is one of a config that is valid.

MODELS = {
    "instance": {"num_proposals": 10, "num_things": 3, "num_stuff": 0},
    "semantic": {
        "num_proposals": 0,
        "num_things": 0,
        "num_stuff": 3,
        "auxiliary_channels": 32,
        "neck": {"name": "psp", "scales": (1, 2), "norm": "group"},
    },
}
MODELS["panoptic"] = MODELS["instance"] | {"num_stuff": 2, "neck": {"sine": False}}


def config_of(task, backbone=(), **model) -> ConfigDict:
    """A small network of a task; all but it as in a recipe."""
    config = load_config(f"{COCO}:tiny")
    with config.unlocked():
        config.task = task
        config.data.max_things = 3
        recipe = load_config(COCO.replace("coco_panoptic", f"coco_{task}"))
        config.eval = recipe.eval
        if task == "semantic":
            config.data = recipe.data
        backbone = {"norm": "group", "frozen_stages": 0} | dict(backbone)
        config.model = ConfigDict({"backbone": backbone} | MODELS[task] | model)
    return config


@pytest.mark.parametrize("task", MODELS)
def test_keys_that_are_not_given_have_the_defaults_of_the_network(task):
    config = config_of(task)
    validate(config)
    make_model(**config.model)


def test_tables_are_of_the_same_tasks():
    assert RULES_OF_TASKS.keys() == TASKS.keys() == MODELS.keys()


def test_every_argument_of_a_part_has_a_rule():
    """But for those that the network hands on to it."""
    for part, table in ("backbone", BACKBONES), ("neck", NECKS):
        handed_on = {"parent", "name", "dtype"} | ({"channels"} if part == "neck" else set())
        for module in table.values():
            keys = {f"model.{part}.{key}" for key in set(module.__dataclass_fields__) - handed_on}
            assert keys <= RULES_WHERE_GIVEN.keys(), module


@pytest.mark.parametrize(
    ("task", "model", "message"),
    [
        (
            "panoptic",
            {"num_proposals": 0},
            "num_proposals is 0; .*least 1 where config.task is 'pa",
        ),
        ("instance", {"num_stuff": 53}, "num_stuff is 53; accepted: 0 where config.task is 'inst"),
        (
            "semantic",
            {"num_proposals": 100},
            "num_proposals is 100; accepted: 0 where .*'semantic'",
        ),
        ("semantic", {"num_things": 80}, "num_things is 80; accepted: 0 where"),
        ("semantic", {"num_stuff": 0}, "num_stuff is 0; accepted: a whole number of at least 1"),
        (
            "semantic",
            {"neck": {}},
            "neck.name is 'semantic_fpn'; accepted: fcn, psp, aspp, uper whe",
        ),
        (
            "panoptic",
            {"neck": {"name": "uper"}},
            "neck.name is 'uper'; accepted: semantic_fpn where",
        ),
        (
            "panoptic",
            {"neck": {"name": "fpn"}},
            "neck.name is 'fpn'; accepted: semantic_fpn, fcn, p",
        ),
        ("instance", {"auxiliary_channels": 256}, "auxiliary_channels is 256; accepted: 0 where"),
        ("semantic", {"auxiliary_channels": -1}, "auxiliary_channels is -1; accepted: a whole"),
        ("semantic", {"neck": {"name": "psp", "dilations": (1,)}}, "no key config.model.neck.dila"),
        ("semantic", {"neck": {"name": "psp", "scale": (1,)}}, "neck.scale; did you mean scales"),
        (
            "semantic",
            {"neck": {"name": "psp", "scales": ()}},
            r"neck.scales is \(\); accepted: whole",
        ),
        ("semantic", {"neck": {"name": "aspp", "dilations": (0, 1)}}, r"dilations is \(0, 1\)"),
        (
            "semantic",
            {"neck": {"name": "fcn", "norm": "layer"}},
            "neck.norm is 'layer'; accepted: fr",
        ),
        (
            "instance",
            {"neck": {"coordinates": 1}},
            "neck.coordinates is 1; accepted: True or False",
        ),
        ("instance", {"neck": {"channels": 64}}, "no key config.model.neck.channels"),
        ("instance", {"chanels": 64}, "no key config.model.chanels; did you mean .*channels"),
        (
            "instance",
            {"num_stages": -1},
            "num_stages is -1; accepted: a whole number of at least 0",
        ),
        ("instance", {"dropout": 1.0}, "dropout is 1.0; accepted: a probability below 1"),
        ("instance", {"adaptive_update": 0}, "adaptive_update is 0; accepted: True or False"),
        ("instance", {"kernel_interaction": "no"}, "kernel_interaction is 'no'; accepted: True or"),
        (
            "semantic",
            {"channels": 260},
            "channels is 260; accepted: multiples of config.model.num_h",
        ),
        (
            "semantic",
            {"backbone": {"name": "resnext"}},
            "backbone.name is 'resnext'; accepted: resn",
        ),
        ("semantic", {"backbone": {"depth": (1, 1, 1, 1)}}, "backbone.depth; did you mean depths"),
        (
            "semantic",
            {"backbone": {"depths": (3, 4)}},
            r"backbone.depths is \(3, 4\); accepted: four",
        ),
        ("semantic", {"backbone": {"frozen_stages": 5}}, "frozen_stages is 5; accepted: 0 to 4"),
        ("semantic", {"backbone": {"norm": None}}, "backbone.norm is None; accepted: frozen_batch"),
    ],
)
def test_a_network_that_cannot_be_is_named(task, model, message):
    with pytest.raises(ValueError, match=message) as caught:
        validate(config_of(task, **model))
    assert "config.model." in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("num_stages", [0, 1, 7])
@pytest.mark.parametrize("task", MODELS)
def test_any_number_of_updates_is_accepted(task, num_stages):
    validate(config_of(task, num_stages=num_stages))


def test_without_interaction_there_are_no_heads_to_divide_channels_by():
    validate(config_of("instance", channels=60, kernel_interaction=False))


@pytest.mark.parametrize(
    ("task", "key"),
    [
        ("panoptic", "eval.instance_threshold"),
        ("panoptic", "eval.overlap_threshold"),
        ("instance", "eval.num_results"),
        ("semantic", "model.num_stuff"),
        ("semantic", "model.backbone"),
    ],
)
def test_keys_that_a_task_needs(task, key):
    config = config_of(task)
    section, _, name = key.partition(".")
    with config.unlocked():
        del config[section][name]
    with pytest.raises(UserError, match=rf"config\.{key} is missing"):
        validate(config)


@pytest.mark.parametrize(
    ("task", "key"),
    [
        ("panoptic", "scales"),
        ("panoptic", "num_results"),
        ("instance", "window"),
        ("semantic", "overlap_threshold"),
    ],
)
def test_keys_of_another_task_are_named(task, key):
    config = config_of(task)
    with config.unlocked():
        config.eval[key] = ()
    with pytest.raises(UserError, match=f"no key config.eval.{key}; "):
        validate(config)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("scales=()", r"config.eval.scales is \(\); accepted: numbers above 0"),
        ("scales=(1.0, 0.0)", r"config.eval.scales is \(1.0, 0.0\)"),
        ("flip=2", "config.eval.flip"),
        ("window=(500, 512)", r"config.eval.window is \(500, 512\); accepted: \(\), .*of 32"),
        ("window=(512, 512)", r"config.eval.window_step is \(\); accepted: .*no pixel is left out"),
        ("window_step=(32, 32)", r"config.eval.window_step is \(32, 32\); accepted: "),
    ],
)
def test_ways_to_see_a_picture_that_make_no_sense(argument, message):
    with pytest.raises(UserError, match=message):
        validate(load_config(ADE20K, [f"--config.eval.{argument}"]))


def test_windows_may_touch_but_leave_no_gap():
    config = config_of("semantic")
    config.eval.update({"window": (512, 512), "window_step": (512, 352)})
    validate(config)
    config.data.eval_multiple = 8
    with pytest.raises(UserError, match=r"eval_multiple is 8; accepted with .*multiples of 32"):
        validate(config)
    config.data.eval_multiple = 64
    config.eval.window_step = (512, 544)
    with pytest.raises(UserError, match=r"window_step is \(512, 544\).*at most .*\(512, 512\)"):
        validate(config)


def test_a_weight_of_no_term_is_named():
    config = config_of("instance")
    config.loss = ConfigDict({"mask": 1.0, "diec": 4.0})
    with pytest.raises(UserError, match="no key config.loss.diec; did you mean dice"):
        validate(config)
    config.loss = ConfigDict({"mask": 1.0})  # the others have their defaults
    validate(config)


def test_there_are_no_more_slots_than_proposals():
    config = config_of("instance")
    config.data.max_things = 11
    with pytest.raises(UserError, match="max_things is 11; accepted: at most .*num_proposals, 10"):
        validate(config)


@pytest.mark.parametrize(
    ("task", "key", "message"),
    [
        ("panoptic", "flpi", "no key config.data.flpi; did you mean flip"),
        ("panoptic", "crop", "no key config.data.crop; "),
        ("instance", "num_train", "no key config.data.num_train; "),
        ("semantic", "max_things", "no key config.data.max_things; "),
        ("semantic", "ignore_index", "no key config.data.ignore_index; "),
    ],
)
def test_a_key_that_the_data_does_not_have_is_named(task, key, message):
    """Of this dataset and of this task, whoever else has it."""
    config = config_of(task)
    check_data(config)
    with config.unlocked():
        config.data[key] = 1
    for check in (check_data, validate):
        with pytest.raises(UserError, match=message) as caught:
            check(config)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["dataset", "root", "data_dir", "train_split", "flip", "canvas"])
def test_a_key_that_the_data_lacks_is_named(key):
    config = config_of("panoptic")
    with config.unlocked():
        del config.data[key]
    with pytest.raises(UserError, match=rf"config\.data\.{key} is missing; accepted: "):
        validate(config)


def test_data_is_checked_without_the_rest():
    """Which preparing it does not need."""
    config = config_of("semantic")
    config.train.batch_size = -1
    check_data(config)
    config.data.max_class_share = 0.0
    with pytest.raises(UserError, match="max_class_share is 0.0; accepted: a share above 0"):
        check_data(config)
