"""Weights of another backbone than the config has are named as such."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from knet_jax.config.files import load_config
from knet_jax.model import make_model, variable_shapes
from knet_jax.saved.fitting import check_backbone
from knet_jax.saved.parameter_names import to_reference
from knet_jax.system.errors import UserError

RESNET = "coco_panoptic:tiny"
FILES = {
    "resnet50": (RESNET, {"model.backbone.depths": (3, 4, 6, 3)}),
    "resnet50_v1c": (
        RESNET,
        {"model.backbone.depths": (3, 4, 6, 3), "model.backbone.deep_stem": True},
    ),
    "convnext_t": (
        "coco_panoptic:small,convnext_t",
        {"model.num_things": 1, "model.num_stuff": 1},
    ),
    "vit_s": ("coco_panoptic:small,vit_s", {"model.num_things": 1, "model.num_stuff": 1}),
    "swin_t": ("coco_panoptic:small,swin_t", {"model.num_things": 1, "model.num_stuff": 1}),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of weights as their authors name them."""
    folder = tmp_path_factory.mktemp("weights")
    for name, (spec, changes) in FILES.items():
        params = variable_shapes(make_model(**load_config(spec, changes).model))["params"]
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params["backbone"])
        tensors = to_reference({"params": {"backbone": zeros}})
        tensors = {k.removeprefix("backbone."): np.ascontiguousarray(x) for k, x in tensors.items()}
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize(
    "spec, name, flags",
    [
        ("coco_panoptic", "resnet50", ""),
        ("folder_semantic:small", "resnet50_v1c", ""),
        ("coco_panoptic:small,swin_t", "swin_t", ""),
        ("ade20k_semantic", "resnet50", '"--config.model.backbone.deep_stem=False"'),
        ("coco_panoptic", "resnet50_v1c", '"--config.model.backbone.deep_stem=True"'),
        ("coco_panoptic:r101", "resnet50", '"--config.model.backbone.depths=(3, 4, 6, 3)"'),
        ("coco_panoptic:swin_l", "swin_t", '(2, 2, 6, 2)" "--config.model.backbone.channels=96"'),
        ("folder_semantic:convnext_t", "convnext_t", ""),
        ("coco_panoptic:swin_t", "convnext_t", '"--config.model.backbone.name=convnext"'),
        ("coco_panoptic:small,vit_s", "vit_s", ""),
        ("coco_panoptic:vit_b", "vit_s", '--config.model.backbone.channels=384"'),
        ("coco_panoptic:dinov3_b", "vit_s", '--config.model.backbone.positions=learned"'),
        ("coco_panoptic", "vit_s", '"--config.model.backbone.name=vit"'),
        ("folder_semantic:swin_t", "resnet50", '"--config.model.backbone.name=resnet"'),
    ],
)
def test_another_backbone_is_named_with_the_flag_that_fits(weights, spec, name, flags):
    path = weights / f"{name}.safetensors"
    if not flags:
        return check_backbone(path, load_config(spec).model)
    with pytest.raises(UserError) as raised:
        check_backbone(path, load_config(spec).model)
    assert f"{path}: it holds another backbone" in str(raised.value) and flags in str(raised.value)


def test_what_holds_no_backbone_is_named(tmp_path):
    save_file({"head.weight": np.zeros((2, 2), np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors: it holds no backbone that is known here"):
        check_backbone(tmp_path / "a.safetensors", load_config("coco_panoptic").model)
