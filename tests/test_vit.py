"""Vision transformers against timm's, whose numbers are in data/vit.npz, and weights of anyone's names.

The file holds timm 1.0.31's DINOv2 with registers (`learned`, 3 x 3 patches) and DINOv3 (`rotary`, 2 x 4)
of 16 channels, two blocks, two heads and patches of 16, with random weights, a picture of each, NHWC, and
the map of its patches after the last norm.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_model import MODEL
from tiny_weights import fill, shapes_of

from knet_jax.nn.vit import ViT
from knet_jax.saved.fitting import load_backbone
from knet_jax.saved.parameter_names import to_reference

TIMM = np.load(Path(__file__).parent / "data" / "vit.npz")
BACKBONE = {"name": "vit", "channels": 16, "depth": 2, "num_heads": 2, "patch": 16, "grid": 3}
KINDS = {
    "learned": {"positions": "learned", "registers": 2},
    "rotary": {"positions": "rotary", "registers": 4},
}


def weights_of_timm(kind):
    beginning = f"{kind}/weights/"
    return {k.removeprefix(beginning): TIMM[k] for k in TIMM if k.startswith(beginning)}


def load(folder, tensors, kind):
    variables = fill(shapes_of(MODEL | {"backbone": BACKBONE | KINDS[kind]}))
    path = folder / "weights.safetensors"
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)
    return load_backbone(path, variables)["params"]["backbone"]


def levels(kind, params, image, **changes):
    values = BACKBONE | KINDS[kind] | {"remat": False, "frozen_trunk": False} | changes
    del values["name"]
    network = ViT(**values, drop_path=0.1, dtype="float32")
    return jax.jit(partial(network.apply, train=False))({"params": params}, image)


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_is_that_of_timm(tmp_path, kind):
    params, image = load(tmp_path, weights_of_timm(kind), kind), TIMM[f"{kind}/image"]
    found = levels(kind, params, image)
    h, w = image.shape[1] // 16, image.shape[2] // 16
    assert [x.shape[1:] for x in found[:2]] == [(4 * h, 4 * w, 4), (2 * h, 2 * w, 8)]
    np.testing.assert_allclose(found[2], TIMM[f"{kind}/map"], atol=2e-5)
    padded = jnp.pad(found[2], ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), constant_values=-np.inf)
    assert found[3].shape == (1, -(-h // 2), -(-w // 2), 16)
    np.testing.assert_array_equal(found[3][0, 0, 0], padded[0, :2, :2].max((0, 1)))


def test_pictures_of_any_size_and_other_patches(tmp_path):
    params = load(tmp_path, weights_of_timm("learned"), "learned")
    for size in (33, 47), (16, 80):
        shapes = [x.shape[1:3] for x in levels("learned", params, np.ones((1, *size, 3)))]
        assert shapes == [tuple(-(-n // s) for n in size) for s in (4, 8, 16, 32)]
    # A patch of 8 of half the picture sees what a patch of 16 sees where pixels come in twos.
    kernel = params["patches"]["kernel"]
    pooled = kernel.reshape(8, 2, 8, 2, 3, 16).sum((1, 3))
    small = np.random.default_rng(0).standard_normal((1, 24, 24, 3)).astype(np.float32)
    image = small.repeat(2, 1).repeat(2, 2)
    halved = params | {"patches": params["patches"] | {"kernel": pooled}}
    ours, wanted = levels("learned", halved, image, patch=8)[2], levels("learned", params, image)[2]
    np.testing.assert_allclose(ours, wanted, atol=2e-5)


def test_weights_of_others(tmp_path):
    """Of DINOv2 with a position of the class, and of DINOv3 with masked biases of the keys."""
    tensors = weights_of_timm("learned")
    named = {k.replace("reg_token", "register_tokens"): x for k, x in tensors.items()}
    named["pos_embed"] = np.pad(named["pos_embed"], ((0, 0), (1, 0), (0, 0)))
    named["mask_token"] = np.zeros((1, 16), np.float32)
    for ours, wanted in zip(*map(jax.tree.leaves, (
        load(tmp_path, named, "learned"), load(tmp_path, tensors, "learned")
    ))):  # fmt: skip
        np.testing.assert_array_equal(ours, wanted)

    named = {
        k.replace("reg_token", "storage_tokens"): x for k, x in weights_of_timm("rotary").items()
    }
    named["rope_embed.periods"] = np.ones(2, np.float32)
    bias, mask = np.arange(48, dtype=np.float32), np.repeat(np.float32([1, 0, 1]), 16)
    for i in range(2):
        for number in "12":
            named[f"blocks.{i}.ls{number}.gamma"] = named.pop(f"blocks.{i}.gamma_{number}")
        named |= {f"blocks.{i}.attn.qkv.bias": bias, f"blocks.{i}.attn.qkv.bias_mask": mask}
    loaded = load(tmp_path, named, "rotary")
    np.testing.assert_array_equal(loaded["block1"]["qkv"]["bias"], bias * mask)
    again = to_reference({"params": {"backbone": loaded}})
    np.testing.assert_array_equal(again["backbone.blocks.1.ls2.gamma"], named["blocks.1.ls2.gamma"])


def test_a_frozen_transformer_has_no_gradient_to_keep_anything_for():
    def num_products(depth, frozen):
        values = BACKBONE | KINDS["learned"] | {"depth": depth, "frozen_trunk": frozen}
        del values["name"]
        network = ViT(**values, drop_path=0.0, remat=False, dtype="float32")
        image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        init = partial(network.init, train=True)
        params = jax.eval_shape(init, jax.random.key(0), image)["params"]

        def loss(params, image):
            return sum(x.sum() for x in network.apply({"params": params}, image, train=True))

        return str(jax.make_jaxpr(jax.grad(loss))(params, image)).count("dot_general")

    # A block has four layers and two products in its attention, and two gradients for each.
    assert num_products(3, True) - num_products(2, True) == 6
    assert num_products(3, False) - num_products(2, False) == 18
