import itertools
from pathlib import Path

import pytest
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from knet_jax.config import files, rules, schema
from knet_jax.config.files import base, load_config
from knet_jax.config.validation import check_data, validate
from knet_jax.data.annotations import by_task
from knet_jax.data.recipes import RECIPES
from knet_jax.data.sources import by_name
from knet_jax.matching import LossWeights
from knet_jax.model import BACKBONES, NECKS, make_model
from knet_jax.system.errors import UserError
from knet_jax.tasks import TASKS

SMALL = {
    "panoptic": "shapes_panoptic:tiny",
    "instance": "shapes_instance:tiny",
    "semantic": "shapes_semantic:tiny",
}


def refuse(config, message, check=validate, **options):
    with pytest.raises(UserError, match=message) as caught:
        check(config, **options)
    assert "\n" not in str(caught.value)


def change(spec, key, value):
    """A config of which a key has any value, as a file could state it, or is not there (None)."""
    values = schema.flatten(load_config(spec)) | {key: value}
    values = {name: value for name, value in values.items() if name != key or value is not None}
    return ConfigDict(unflatten_dict(values, sep="."))


# The table.


def test_the_table_knows_what_there_is():
    assert {*schema.TASKS} == TASKS.keys() == by_task.KINDS.keys()
    assert {*schema.DATASETS} == by_name.DATASETS.keys()
    assert {*schema.BACKBONES} == BACKBONES.keys() and {*schema.NECKS} == NECKS.keys()
    weights = {name.removeprefix("loss.") for name in schema.EVERY if name.startswith("loss.")}
    assert weights == {*LossWeights._fields}
    for part, modules in ("backbone", BACKBONES), ("neck", NECKS):
        for name, module in modules.items():
            keys = schema.find_keys({f"model.{part}.name": name}, schema.MODEL_CHOICES)
            ours = {key.rpartition(".")[2] for key in keys if key.startswith(f"model.{part}.")}
            handed_on = {"parent", "name", "dtype"} | ({"channels"} if part == "neck" else set())
            assert ours - {"name"} == {*module.__dataclass_fields__} - handed_on, name
    for task, recipe in RECIPES.items():
        keys = schema.find_keys({"task": task, "data.dataset": "coco"})
        assert {f"data.{name}" for name in recipe._fields} <= keys.keys()


def test_every_default_is_accepted():
    for group in schema.KEY_GROUPS:
        for name, (default, (test, _), _) in group.keys.items():
            has_none = default == schema.REQUIRED or isinstance(default, schema.Follows)
            assert has_none or test(default), name


def test_what_follows_another_key_unless_it_is_set():
    """As in the reference, a network of N proposals returns N results, and learns of N things."""
    for spec, overrides, wanted in (
        ("coco_instance", {}, (100, 100, 100)),
        ("coco_instance:n256", {}, (256, 256, 256)),
        ("coco_instance", {"model.num_proposals": 50}, (50, 50, 50)),  # a row of Table 4d
        ("coco_instance:n256", {"eval.num_results": 300, "data.max_things": 9}, (256, 9, 300)),
    ):
        config = load_config(spec, overrides)
        validate(config)
        found = config.model.num_proposals, config.data.max_things, config.eval.num_results
        assert found == wanted


def test_the_documentation_has_the_table():
    page = Path(__file__).parents[1] / "docs/training.md"
    assert page.read_text().endswith(schema.to_markdown())


# Recipes.


AFTER = {"frozen_vit": {"vit_s", "vit_b", "dinov3_b"}}
"""Variants that change what another one brings, one of these."""


def test_every_recipe_is_valid():
    """Every config file with every variant; with every two of them, where they are defined."""
    for name in sorted(path.stem for path in files.SHIPPED.glob("*.py")):
        variants = base(name).VARIANTS
        at_most = 2 if name in ("ade20k_semantic", "coco_panoptic") else 1
        for count in range(at_most + 1):
            for chosen in itertools.combinations(variants, count):
                if all(AFTER.get(variant, {variant}) & {*chosen} for variant in chosen):
                    validate(load_config(f"{name}:{','.join(chosen)}"))


def test_a_network_with_a_few_keys_has_the_defaults_of_the_others():
    few = {"num_proposals": 10, "num_things": 3, "num_stuff": 2}
    for changes in ({}, {"neck": {"sine": False}}, {"backbone": {"name": "swin"}}):
        make_model(**few | changes)
    for changes, message in (
        ({"chanels": 64}, "no key config.model.chanels; did you mean model.channels"),
        ({"neck": {"name": "fpn"}}, "config.model.neck.name is 'fpn'; accepted: semantic_fpn"),
        ({"neck": {"channels": 64}}, "no key config.model.neck.channels"),
        ({"auxiliary_channels": 64}, "auxiliary_channels is 64; accepted: 0 with a neck without a"),
    ):
        with pytest.raises(UserError, match=message):
            make_model(**few | changes)
    with pytest.raises(UserError, match=r"config\.model\.num_things is missing"):
        make_model(num_proposals=10, num_stuff=2)


# Values.


def test_rules():
    """Values that pass a rule; and that do not, beside None, texts and what is beyond all measure."""
    for rule, good, bad in (
        (rules.PATH, ("", "a/b"), (1,)),
        (rules.YES_NO, (True,), (1, 0)),
        (rules.ZERO, (0, 3, 65536), (-1, 1.0, True, 65537)),
        (rules.NONE, (0,), (1, False)),
        (rules.EVEN, (2, 100), (0, 3)),
        (rules.EPOCHS, (0, 12.5), (-1, 1e7)),
        (rules.POSITIVE, (1, 1e-9), (0, -1.0, float("nan"), float("inf"), True)),
        (rules.NON_NEGATIVE, (0, 0.5), (-0.1, float("inf"))),
        (rules.DIVISOR, (1, 10.0), (0.1,)),
        (rules.SHARE, (0, 0.5, 1), (-0.1, 1.1)),
        (rules.ABOVE_0, (0.5, 1), (0.0, 1.1)),
        (rules.BELOW_1, (0, 0.5), (1.0, -0.1)),
        (rules.RANGE, ((1, 1), (0.5, 2.0)), ((2, 1), (0, 1), (1,), 1, [1, 2], (1, 1e9))),
        (rules.FOUR, ((3, 4, 6, 3),), ((3, 4, 6), (3, 4, 6, 0), (3, 4, 6, 10**5))),
        (rules.SOME, ((1,), (1, 2)), ((), (0, 1), 1, (1,) * 17)),
        (rules.SCALES, ((1.0,), (0.5, 2)), ((), (1.0, 0.0), (17,))),
        (rules.ASCENDING, ((), (8, 11)), ((11, 8), (0, 1))),
        (rules.SIZE, ((2048, 512),), ((512, 2048), (1,), (10**9, 1))),
        (
            rules.CANVAS,
            ((64, 96), (96, 64)),
            ((500, 512), (0, 512), (64,), ("a", "b"), (2**20, 32)),
        ),
        (rules.LANDSCAPE, ((64, 96),), ((96, 64), (800, 1333))),
        (rules.WINDOW, ((), (64, 96)), ((500, 512), (64,))),
        (rules.MULTIPLE, (0, 64), (-32, 16, 33, 32.0, 2**15)),
        (
            rules.PARAMETER_GROUPS,
            ((("a", "x", 0.0, 1.0), ("b", ".*", 1.0, 1)),),
            (
                (),
                (("a", ".*", 1.0),),
                (("a", "(", 1.0, 1.0),),
                (("a", "(" * 10**5, 1.0, 1.0),),
                (("a", 5, 1.0, 1.0),),
                (("a", ".*", -1.0, 1.0),),
                (("a", ".*", 0.0, 1.0),),
                (("a", ".*", True, 1.0),),
                (("a", "x", 1.0, 1.0), ("a", ".*", 1.0, 1.0)),
            ),
        ),
    ):
        for value in good:
            assert schema.passes(rule, value), (rule[1], value)
        for value in (*bad, None, 10**400, [], {}):
            assert not schema.passes(rule, value), (rule[1], value)


BAD = {
    "coco_panoptic": (
        (
            "model.num_proposals",
            0,
            "is 0; accepted: .*from 1 to 65536 where config.task is 'panoptic'",
        ),
        ("model.dtype", "float16", "model.dtype is 'float16'; accepted: float32, bfloat16"),
        ("model.channels", 100, "config.model.channels is 100; accepted: multiples of config.mo"),
        ("model.auxiliary_channels", 256, "auxiliary_channels is 256; accepted: 0 where"),
        ("model.neck.name", "uper", "no key config.model.neck.(sine|coordinates)"),
        (
            "train.steps",
            10**30,
            "train.steps is 10+; accepted: a whole number from 0 to 21474",
        ),
        ("data.canvas", (800, 1333), r"data.canvas is \(800, 1333\); .*multiples of 32"),
        ("data.short_side", (640, 801), r"data.short_side \(640, 801\) .* do not fit"),
        ("data.long_side", 1345, "long_side 1345 do not fit into config.data.canvas"),
        ("data.max_things", 101, "max_things is 101; accepted: at most .*num_proposals, 100"),
        ("data.dataset", "ade20k", "'panoptic'; accepted: semantic where config.data.dataset is"),
        ("data.crop", (1, 1), "no key config.data.crop; "),
        ("data.canvas", None, "config.data.canvas is missing; accepted: "),
        ("train.batch_size", 18, "train.batch_size is 18; accepted: multiples of the 4 devices"),
        ("train.microbatch", 3, "train.microbatch is 3; accepted: a divisor of the 4 images"),
        ("eval.batch_size", 6, "eval.batch_size is 6; accepted: multiples of the 4 devices"),
        ("train.epochs", 0.0, "config.train.epochs and config.train.steps are both 0"),
    ),
    "coco_instance": (
        ("model.num_stuff", 53, "num_stuff is 53; accepted: 0 where config.task is 'instance'"),
        ("eval.window", (512, 500), r"eval.window is \(512, 500\); accepted: \(\) for none"),
    ),
    "ade20k_semantic": (
        ("model.num_proposals", 100, "num_proposals is 100; accepted: 0 where .*'semantic'"),
        ("model.num_stuff", 0, "num_stuff is 0; accepted: a whole number from 1 to 65536"),
        ("model.neck.scales", (1, 2), "no key config.model.neck.scales"),
        ("data.ignore_index", 1, "no key config.data.ignore_index; "),
        ("eval.window", (512, 512), r"window_step is \(\); accepted .*no pixel is left out"),
        ("eval.window_step", (32, 32), r"window_step is \(32, 32\); accepted .*is \(\): \(\)$"),
        ("eval.overlap_threshold", 0.5, "no key config.eval.overlap_threshold; "),
    ),
    "folder_semantic": (
        ("data.ignore_index", 65536, "is 65536; accepted: a whole number from 0 to 65535"),
    ),
}


def test_what_makes_no_sense_is_named():
    for spec, cases in BAD.items():
        validate(load_config(spec), num_devices=4)
        for key, value, message in cases:
            refuse(change(spec, key, value), message, num_devices=4)


def test_what_makes_sense_together():
    for spec in SMALL.values():
        for num_stages in (0, 1, 7):
            validate(load_config(spec, {"model.num_stages": num_stages}))
    # Without interaction there are no heads to divide channels by.
    validate(
        load_config(SMALL["instance"], {"model.channels": 62, "model.kernel_interaction": False})
    )
    # What a training fills in must be there where there is none.
    config = load_config("coco_panoptic", {"data.canvas": None})
    validate(config)
    refuse(config, "config.data.canvas is None, which a training", parts=("eval",))
    # What is only evaluated need not fit the devices in training.
    validate(load_config("coco_panoptic", {"train.batch_size": 3}), 4, parts=("eval",))


def test_windows_may_touch_but_leave_no_gap():
    config = load_config("ade20k_semantic")
    config.eval.update({"window": (512, 512), "window_step": (512, 352)})
    validate(config)
    config.data.eval_multiple = 8
    refuse(config, "eval_multiple is 8; accepted with .*multiples of 32")
    config.data.eval_multiple = 64
    config.eval.window_step = (512, 544)
    refuse(config, r"window_step is \(512, 544\).*window is \(512, 512\): .*at most these")


def test_preparing_data_needs_no_devices():
    config = load_config("coco_panoptic", {"train.batch_size": 3})
    check_data(config)
    config.data.flip = 2.0
    refuse(config, "data.flip is 2.0", check_data)
