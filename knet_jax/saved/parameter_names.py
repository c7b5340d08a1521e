"""Parameters under the names of the reference, in both directions.

The reference is the authors' PyTorch code on MMDetection 2 (instance, panoptic) and MMSegmentation
(semantic); its ResNets have torchvision's names, Swin and ConvNeXt those of OpenMMLab,
its vision transformers nearly those of DINOv2. Each of its tensors
belongs to one array here, or to three: attention packs its query, key and value matrices in one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sized
from contextlib import suppress
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from knet_jax.nn.swin import resize_position_bias
from knet_jax.system.errors import UserError

Variables = dict[str, Any]
"""Flax variables: {"params": …, "batch_stats": …}."""

# Patterns of the path of a module here, each with the reference's name for the module. The first that
# matches the whole path is taken.
MODULES = tuple(
    line.split()
    for line in r"""
backbone/stem_conv                           backbone.conv1
backbone/stem_norm                           backbone.bn1
backbone/stem_conv1                          backbone.stem.0
backbone/stem_norm1                          backbone.stem.1
backbone/stem_conv2                          backbone.stem.3
backbone/stem_norm2                          backbone.stem.4
backbone/stem_conv3                          backbone.stem.6
backbone/stem_norm3                          backbone.stem.7
backbone/layer(\d)_block(\d+)/conv(\d)       backbone.layer\1.\2.conv\3
backbone/layer(\d)_block(\d+)/conv2/conv_offset backbone.layer\1.\2.conv2.conv_offset
backbone/layer(\d)_block(\d+)/norm(\d)       backbone.layer\1.\2.bn\3
backbone/layer(\d)_block(\d+)/shortcut_conv  backbone.layer\1.\2.downsample.0
backbone/layer(\d)_block(\d+)/shortcut_norm  backbone.layer\1.\2.downsample.1
backbone/patches                             backbone.patch_embed.projection
backbone/patches_norm                        backbone.patch_embed.norm
backbone/stage(\d)_block(\d+)/norm(\d)       backbone.stages.\1.blocks.\2.norm\3
backbone/stage(\d)_block(\d+)/attention      backbone.stages.\1.blocks.\2.attn.w_msa
backbone/stage(\d)_block(\d+)/attention/qkv  backbone.stages.\1.blocks.\2.attn.w_msa.qkv
backbone/stage(\d)_block(\d+)/attention/output backbone.stages.\1.blocks.\2.attn.w_msa.proj
backbone/stage(\d)_block(\d+)/ffn_hidden     backbone.stages.\1.blocks.\2.ffn.layers.0.0
backbone/stage(\d)_block(\d+)/ffn_output     backbone.stages.\1.blocks.\2.ffn.layers.1
backbone/stage(\d)_merge/(norm|reduction)    backbone.stages.\1.downsample.\2
backbone/downsample0_conv                    backbone.downsample_layers.0.0
backbone/downsample0_norm                    backbone.downsample_layers.0.1
backbone/downsample(\d)_norm                 backbone.downsample_layers.\1.0
backbone/downsample(\d)_conv                 backbone.downsample_layers.\1.1
backbone/stage(\d)_block(\d+)                backbone.stages.\1.\2
backbone/stage(\d)_block(\d+)/depthwise      backbone.stages.\1.\2.depthwise_conv
backbone/stage(\d)_block(\d+)/norm           backbone.stages.\1.\2.norm
backbone/stage(\d)_block(\d+)/pixel_hidden   backbone.stages.\1.\2.pointwise_conv1
backbone/stage(\d)_block(\d+)/pixel_output   backbone.stages.\1.\2.pointwise_conv2
backbone/norm(\d?)                           backbone.norm\1
backbone                                     backbone
backbone/block(\d+)                          backbone.blocks.\1
backbone/block(\d+)/norm(\d)                 backbone.blocks.\1.norm\2
backbone/block(\d+)/qkv                      backbone.blocks.\1.attn.qkv
backbone/block(\d+)/output                   backbone.blocks.\1.attn.proj
backbone/block(\d+)/ffn_hidden               backbone.blocks.\1.mlp.fc1
backbone/block(\d+)/ffn_output               backbone.blocks.\1.mlp.fc2
backbone/(pyramid_\w+)                       backbone.\1
neck/fpn/lateral(\d)                         neck.lateral_convs.\1.conv
neck/fpn/output(\d)                          neck.fpn_convs.\1.conv
neck/level(\d)_conv(\d)/(\w+)                rpn_head.localization_fpn.convs_all_levels.\1.conv\2.\3
neck/localization/(\w+)                      rpn_head.localization_fpn.conv_pred.\1
neck/semantic/(\w+)                          rpn_head.localization_fpn.aux_convs.0.\1
initial/localization/(\w+)                   rpn_head.loc_convs.0.\1
initial/semantic/(\w+)                       rpn_head.seg_convs.0.\1
initial/proposals                            rpn_head.init_kernels
initial/class                                initial.conv_seg
neck/conv(\d)/(\w+)                          decoder.convs.\1.\2
neck/fuse/(\w+)                              decoder.conv_cat.\1
neck/(?:psp/)?pool(\d)/(\w+)                 decoder.psp_modules.\1.1.\2
neck/image_pool/(\w+)                        decoder.image_pool.1.\1
neck/atrous(\d)/(\w+)                        decoder.aspp_modules.\1.\2
neck/(?:psp/)?bottleneck/(\w+)               decoder.bottleneck.\1
neck/lateral(\d)/(\w+)                       decoder.lateral_convs.\1.\2
neck/output(\d)/(\w+)                        decoder.fpn_convs.\1.\2
neck/pyramid/(\w+)                           decoder.fpn_bottleneck.\1
auxiliary/conv/(\w+)                         auxiliary_head.convs.0.\1
auxiliary/classifier                         auxiliary_head.conv_seg
(stage\d+)/transform                         \1.feat_transform.conv
(stage\d+)/update/from_pixels                \1.kernel_update_conv.dynamic_layer
(stage\d+)/update/from_kernel                \1.kernel_update_conv.input_layer
(stage\d+)/update/kernel_gate                \1.kernel_update_conv.input_gate
(stage\d+)/update/kernel_gate_norm           \1.kernel_update_conv.input_norm_in
(stage\d+)/update/kernel_norm                \1.kernel_update_conv.input_norm_out
(stage\d+)/update/pixel_gate                 \1.kernel_update_conv.update_gate
(stage\d+)/update/pixel_gate_norm            \1.kernel_update_conv.norm_in
(stage\d+)/update/pixel_norm                 \1.kernel_update_conv.norm_out
(stage\d+)/update/output                     \1.kernel_update_conv.fc_layer
(stage\d+)/update/output_norm                \1.kernel_update_conv.fc_norm
(stage\d+)/interaction/attention/(query|key|value) \1.attention.attn.in_proj
(stage\d+)/interaction/attention/out         \1.attention.attn.out_proj
(stage\d+)/interaction/attention_norm        \1.attention_norm
(stage\d+)/interaction/ffn_hidden            \1.ffn.layers.0.0
(stage\d+)/interaction/ffn_output            \1.ffn.layers.1
(stage\d+)/interaction/ffn_norm              \1.ffn_norm
(stage\d+)/class_head/hidden                 \1.cls_fcs.0
(stage\d+)/class_head/norm                   \1.cls_fcs.1
(stage\d+)/class_head/output                 \1.fc_cls
(stage\d+)/mask_head/hidden                  \1.mask_fcs.0
(stage\d+)/mask_head/norm                    \1.mask_fcs.1
(stage\d+)/mask_head/output                  \1.fc_mask
""".strip().splitlines()
)

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "kernels": "weight",
    "proposals": "weight",
    "position_bias": "relative_position_bias_table",
    "layer_scale": "gamma",
    "attention_scale": "ls1.gamma",
    "ffn_scale": "ls2.gamma",
    "class_token": "cls_token",
    "register_tokens": "register_tokens",
    "position_table": "pos_embed",
}

DERIVED = ("num_batches_tracked", "relative_position_index")
"""Tensors of the reference that are no weights: counters, and what follows from the architecture."""

CLASSES = re.compile(r"(.*\.)?(conv_seg|fc_cls)\.(weight|bias)")
"""Tensors that have a part for each class."""

PACKED = ("query", "key", "value")

AS_THEIRS = ("position_bias", "class_token", "register_tokens", "position_table")
"""Arrays whose axes are the reference's."""


class Places(NamedTuple):
    """Module names in which the code bases of the reference differ."""

    initial: str
    """The module with the classifier of pixels."""
    decoder: str
    stage: str
    norm: str
    """The norm in a block of convolution and norm."""

    @classmethod
    def of(cls, variables: Variables) -> Places:
        """Chooses the names by what a network has: proposals, or stages, or neither."""
        params = variables["params"]
        if "proposals" in params.get("initial", {}):
            return cls("rpn_head", "", "roi_head.mask_head", "gn")
        decoder = "decode_head.kernel_generate_head" if "stage1" in params else "decode_head"
        return cls(decoder, decoder, "decode_head.kernel_update_head", "bn")


def reference_name(path: str, places: Places) -> tuple[str, int | None]:
    """The name of the reference's tensor for an array.

    Args:
        path: the array below "params" or "batch_stats", such as `stage1/class_head/norm/scale`.
        places: the names that fit the network.

    Returns:
        The name, and which third of the tensor the array is, or None if it is all of it.
    """
    module, _, leaf = path.rpartition("/")
    # Four parameters belong to no submodule here: name them as if they did.
    if leaf in ("class_kernels", "class_bias", "transform_kernel", "transform_bias"):
        owner, leaf = leaf.split("_")
        module = f"{module}/{owner}"
    elif leaf == "proposals":
        module = f"{module}/{leaf}"
    leaf = LEAVES[leaf]

    for pattern, theirs in MODULES:
        match = re.fullmatch(pattern, module)
        if match:
            break
    else:
        raise UserError(f"the reference has no name for the parameter {path}")
    name = match.expand(theirs)
    name = re.sub(r"^stage(\d+)", lambda m: f"{places.stage}.{int(m[1]) - 1}", name)
    name = re.sub(r"^(initial|decoder)\b", lambda m: getattr(places, m[1]), name)
    name = re.sub(r"^(?!backbone)(.*)\.norm$", rf"\1.{places.norm}", name)
    part = module.rpartition("/")[2]
    if part in PACKED:
        return f"{name}_{leaf}", PACKED.index(part)
    return f"{name}.{leaf}", None


def to_reference_layout(path: str, array: np.ndarray) -> np.ndarray:
    """An array with its axes in the reference's order: outputs first, then inputs, then space."""
    module, _, leaf = path.rpartition("/")
    if leaf in ("proposals", "class_kernels"):  # [n, c]: the weight of a 1x1 convolution
        return array[:, :, None, None]
    if leaf == "transform_kernel":
        return array.T[:, :, None, None]
    if leaf in AS_THEIRS:
        return array
    if leaf != "kernel":
        return array.reshape(-1)
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    if module.endswith("/out"):  # attention: [heads, width, c]
        return array.reshape(-1, array.shape[-1]).T
    return array.reshape(array.shape[0], -1).T


def from_reference_layout(path: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `to_reference_layout` for an array of `shape`."""
    if path.endswith("kernel"):
        tensor = np.moveaxis(tensor, (0, 1), (-1, -2))
    return np.ascontiguousarray(tensor.reshape(shape))


def to_reference(variables: Variables) -> dict[str, np.ndarray]:
    """Variables, or gradients of the same structure, as tensors by the reference's names."""
    tensors: dict[str, Any] = {}
    places = Places.of(variables)
    for key, array in flatten_dict(variables, sep="/").items():
        path = key.partition("/")[2]
        name, part = reference_name(path, places)
        tensor = to_reference_layout(path, np.asarray(array))
        if part is None:
            tensors[name] = tensor
        else:
            tensors.setdefault(name, [None] * len(PACKED))[part] = tensor
    return {k: np.concatenate(v) if isinstance(v, list) else v for k, v in tensors.items()}


class Fit(NamedTuple):
    """Which tensor belongs where in a network. Tensors have the reference's names."""

    arrays: dict[str, np.ndarray]
    """Arrays of the network by their paths from "params" or "batch_stats" on, in the tensors' types."""
    used: tuple[str, ...]
    """Tensors that have a place."""
    resized: tuple[str, ...]
    """Those that were interpolated: position biases of Swin for another window."""
    missing: dict[str, str]
    """Tensors that the network needs and the file lacks, each with the path of its array."""
    misfits: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Tensors of another shape, each with that shape and the needed one."""
    left: tuple[str, ...]
    """Tensors that belong nowhere."""

    def check(self, original: Mapping[str, str]) -> None:
        """Raises UserError if anything is missing, of another shape, or left over.

        Args:
            original: what the file calls the tensors; may lack those whose name is the same.
        """
        problems = []
        if self.missing:
            name, path = next(iter(self.missing.items()))
            problems.append(f"the weights have no tensor {name} (for {path}){_more(self.missing)}")
        if self.misfits:
            name, (given, needed) = next(iter(self.misfits.items()))
            problems.append(
                f"the tensor {original.get(name, name)} has shape {list(given)}; "
                f"the network needs {list(needed)}{_more(self.misfits)}"
            )
        if self.left:
            shown = ", ".join(original.get(name, name) for name in self.left[:5])
            problems.append(
                f"the network has no place for {len(self.left)} tensors of the weights: {shown}"
                + (", …" if len(self.left) > 5 else "")
            )
        if problems:
            raise UserError("; ".join(problems))


def _more(problems: Sized) -> str:
    return f", and {len(problems) - 1} more" if len(problems) > 1 else ""


def fit(state: Mapping[str, np.ndarray], template: Variables) -> Fit:
    """Finds the place of every tensor. Every tensor is used once.

    Args:
        state: tensors by the reference's names; those of `DERIVED` are ignored.
        template: variables of the network, arrays or shapes.

    Raises:
        UserError: a tensor holds no floating-point numbers, or such as are not finite.
    """
    arrays, used, resized, missing, misfits = {}, {}, {}, {}, {}
    places = Places.of(template)
    for key, leaf in flatten_dict(template, sep="/").items():
        path = key.partition("/")[2]
        name, part = reference_name(path, places)
        if name not in state:
            missing.setdefault(name, path)
            continue
        tensor = np.asarray(state[name])
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise UserError(f"the tensor {name} holds {tensor.dtype}; accepted are floating-point")
        if not np.isfinite(tensor).all():
            raise UserError(f"its numbers for {key} are not all finite")
        needed = to_reference_layout(path, np.broadcast_to(np.float32(0), leaf.shape)).shape
        if part is not None:
            needed = (len(PACKED) * needed[0], *needed[1:])
        is_table = path.endswith("position_bias") and tensor.shape[1:] == needed[1:]
        if is_table and tensor.shape != needed:
            with suppress(ValueError):  # a table of no window at all is of the wrong shape
                tensor = resize_position_bias(tensor, window=(math.isqrt(needed[0]) + 1) // 2)
                resized[name] = None
        if tensor.shape != needed:
            misfits[name] = tensor.shape, needed
            continue
        if part is not None:
            tensor = np.split(tensor, len(PACKED))[part]
        arrays[key] = from_reference_layout(path, tensor, leaf.shape)
        used[name] = None
    left = sorted(
        name for name in state.keys() - used.keys() - misfits.keys() if not name.endswith(DERIVED)
    )
    return Fit(arrays, tuple(used), tuple(resized), missing, misfits, tuple(left))


def from_reference(
    state: Mapping[str, np.ndarray],
    template: Variables,
    original: Mapping[str, str] = MappingProxyType({}),
) -> Variables:
    """Makes variables of tensors, all of which must belong together, see `fit` and `Fit.check`.

    Returns:
        The variables, in the types of the tensors.

    Raises:
        UserError: a tensor is missing, of another shape or type, or belongs nowhere.
    """
    found = fit(state, template)
    found.check(original)
    return unflatten_dict(found.arrays, sep="/")
