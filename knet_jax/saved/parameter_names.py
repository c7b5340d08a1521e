"""Parameters under the reference's names: one mapping, in both directions.

The reference is the authors' PyTorch code on MMDetection 2 (instance, panoptic) and MMSegmentation
(semantic); its ResNets carry torchvision's names, its Swin those of OpenMMLab. A tensor of theirs
belongs to exactly one of our arrays, or to three in the case of the packed query, key and value
matrices of attention.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sized
from contextlib import suppress
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from knet_jax.nn.swin import resize_position_bias
from knet_jax.system.errors import UserError

Variables = dict[str, Any]
"""Flax variables: {"params": …, "batch_stats": …}."""

# (pattern of our module path, their module). The first that matches the whole path wins.
MODULES = (
    (r"backbone/stem_conv", r"backbone.conv1"),
    (r"backbone/stem_norm", r"backbone.bn1"),
    (r"backbone/stem_conv1", r"backbone.stem.0"),
    (r"backbone/stem_norm1", r"backbone.stem.1"),
    (r"backbone/stem_conv2", r"backbone.stem.3"),
    (r"backbone/stem_norm2", r"backbone.stem.4"),
    (r"backbone/stem_conv3", r"backbone.stem.6"),
    (r"backbone/stem_norm3", r"backbone.stem.7"),
    (r"backbone/layer(\d)_block(\d+)/conv(\d)", r"backbone.layer\1.\2.conv\3"),
    (
        r"backbone/layer(\d)_block(\d+)/conv2/conv_offset",
        r"backbone.layer\1.\2.conv2.conv_offset",
    ),
    (r"backbone/layer(\d)_block(\d+)/norm(\d)", r"backbone.layer\1.\2.bn\3"),
    (r"backbone/layer(\d)_block(\d+)/shortcut_conv", r"backbone.layer\1.\2.downsample.0"),
    (r"backbone/layer(\d)_block(\d+)/shortcut_norm", r"backbone.layer\1.\2.downsample.1"),
    (r"backbone/patches", r"backbone.patch_embed.projection"),
    (r"backbone/patches_norm", r"backbone.patch_embed.norm"),
    (r"backbone/stage(\d)_block(\d+)/norm(\d)", r"backbone.stages.\1.blocks.\2.norm\3"),
    (r"backbone/stage(\d)_block(\d+)/attention", r"backbone.stages.\1.blocks.\2.attn.w_msa"),
    (
        r"backbone/stage(\d)_block(\d+)/attention/qkv",
        r"backbone.stages.\1.blocks.\2.attn.w_msa.qkv",
    ),
    (
        r"backbone/stage(\d)_block(\d+)/attention/output",
        r"backbone.stages.\1.blocks.\2.attn.w_msa.proj",
    ),
    (
        r"backbone/stage(\d)_block(\d+)/ffn_hidden",
        r"backbone.stages.\1.blocks.\2.ffn.layers.0.0",
    ),
    (r"backbone/stage(\d)_block(\d+)/ffn_output", r"backbone.stages.\1.blocks.\2.ffn.layers.1"),
    (r"backbone/stage(\d)_merge/(norm|reduction)", r"backbone.stages.\1.downsample.\2"),
    (r"backbone/norm(\d)", r"backbone.norm\1"),
    (r"neck/fpn/lateral(\d)", r"neck.lateral_convs.\1.conv"),
    (r"neck/fpn/output(\d)", r"neck.fpn_convs.\1.conv"),
    (
        r"neck/level(\d)_conv(\d)/(\w+)",
        r"rpn_head.localization_fpn.convs_all_levels.\1.conv\2.\3",
    ),
    (r"neck/localization/(\w+)", r"rpn_head.localization_fpn.conv_pred.\1"),
    (r"neck/semantic/(\w+)", r"rpn_head.localization_fpn.aux_convs.0.\1"),
    (r"initial/localization/(\w+)", r"rpn_head.loc_convs.0.\1"),
    (r"initial/semantic/(\w+)", r"rpn_head.seg_convs.0.\1"),
    (r"initial/proposals", r"rpn_head.init_kernels"),
    (r"initial/class", r"initial.conv_seg"),
    (r"neck/conv(\d)/(\w+)", r"decoder.convs.\1.\2"),
    (r"neck/fuse/(\w+)", r"decoder.conv_cat.\1"),
    (r"neck/(?:psp/)?pool(\d)/(\w+)", r"decoder.psp_modules.\1.1.\2"),
    (r"neck/image_pool/(\w+)", r"decoder.image_pool.1.\1"),
    (r"neck/atrous(\d)/(\w+)", r"decoder.aspp_modules.\1.\2"),
    (r"neck/(?:psp/)?bottleneck/(\w+)", r"decoder.bottleneck.\1"),
    (r"neck/lateral(\d)/(\w+)", r"decoder.lateral_convs.\1.\2"),
    (r"neck/output(\d)/(\w+)", r"decoder.fpn_convs.\1.\2"),
    (r"neck/pyramid/(\w+)", r"decoder.fpn_bottleneck.\1"),
    (r"auxiliary/conv/(\w+)", r"auxiliary_head.convs.0.\1"),
    (r"auxiliary/classifier", r"auxiliary_head.conv_seg"),
    (r"(stage\d+)/transform", r"\1.feat_transform.conv"),
    (r"(stage\d+)/update/from_pixels", r"\1.kernel_update_conv.dynamic_layer"),
    (r"(stage\d+)/update/from_kernel", r"\1.kernel_update_conv.input_layer"),
    (r"(stage\d+)/update/kernel_gate", r"\1.kernel_update_conv.input_gate"),
    (r"(stage\d+)/update/kernel_gate_norm", r"\1.kernel_update_conv.input_norm_in"),
    (r"(stage\d+)/update/kernel_norm", r"\1.kernel_update_conv.input_norm_out"),
    (r"(stage\d+)/update/pixel_gate", r"\1.kernel_update_conv.update_gate"),
    (r"(stage\d+)/update/pixel_gate_norm", r"\1.kernel_update_conv.norm_in"),
    (r"(stage\d+)/update/pixel_norm", r"\1.kernel_update_conv.norm_out"),
    (r"(stage\d+)/update/output", r"\1.kernel_update_conv.fc_layer"),
    (r"(stage\d+)/update/output_norm", r"\1.kernel_update_conv.fc_norm"),
    (r"(stage\d+)/interaction/attention/(query|key|value)", r"\1.attention.attn.in_proj"),
    (r"(stage\d+)/interaction/attention/out", r"\1.attention.attn.out_proj"),
    (r"(stage\d+)/interaction/attention_norm", r"\1.attention_norm"),
    (r"(stage\d+)/interaction/ffn_hidden", r"\1.ffn.layers.0.0"),
    (r"(stage\d+)/interaction/ffn_output", r"\1.ffn.layers.1"),
    (r"(stage\d+)/interaction/ffn_norm", r"\1.ffn_norm"),
    (r"(stage\d+)/class_head/hidden", r"\1.cls_fcs.0"),
    (r"(stage\d+)/class_head/norm", r"\1.cls_fcs.1"),
    (r"(stage\d+)/class_head/output", r"\1.fc_cls"),
    (r"(stage\d+)/mask_head/hidden", r"\1.mask_fcs.0"),
    (r"(stage\d+)/mask_head/norm", r"\1.mask_fcs.1"),
    (r"(stage\d+)/mask_head/output", r"\1.fc_mask"),
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
}

DERIVED = ("num_batches_tracked", "relative_position_index")
"""Tensors of the reference that are no weights: counters, and what follows from the architecture."""

CLASSES = re.compile(r"(.*\.)?(conv_seg|fc_cls)\.(weight|bias)")
"""Tensors of which a part belongs to each class."""

PACKED = ("query", "key", "value")


class Places(NamedTuple):
    """What differs between the code bases that the reference consists of."""

    initial: str
    """Where the classifier of pixels is."""
    decoder: str
    stage: str
    norm: str
    """How they call the norm of a convolution block."""

    @classmethod
    def of(cls, variables: Variables) -> Places:
        """Instance and panoptic networks, semantic ones, and semantic ones without updates."""
        params = variables["params"]
        if "proposals" in params.get("initial", {}):
            return cls("rpn_head", "", "roi_head.mask_head", "gn")
        decoder = "decode_head.kernel_generate_head" if "stage1" in params else "decode_head"
        return cls(decoder, decoder, "decode_head.kernel_update_head", "bn")


def reference_name(path: str, places: Places) -> tuple[str, int | None]:
    """The reference's tensor for one of our arrays, and the third of it that is meant, if packed.

    Args:
      path: of the array below "params" or "batch_stats", such as `stage1/class_head/norm/scale`.
      places: of the network.
    """
    module, _, leaf = path.rpartition("/")
    # Four parameters belong to no submodule of ours: name them as if they did.
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
    """Our array as (its part of) the reference's tensor: outputs first, then inputs, then space."""
    module, _, leaf = path.rpartition("/")
    if leaf in ("proposals", "class_kernels"):  # [n, c]: the weight of a 1x1 convolution
        return array[:, :, None, None]
    if leaf == "transform_kernel":
        return array.T[:, :, None, None]
    if leaf == "position_bias":  # [relative positions, heads], as theirs
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
    """Variables, or gradients of the same structure, as {the reference's name: tensor}."""
    tensors: dict[str, Any] = {}
    places = Places.of(variables)
    for key, array in traverse_util.flatten_dict(variables, sep="/").items():
        path = key.partition("/")[2]
        name, part = reference_name(path, places)
        tensor = to_reference_layout(path, np.asarray(array))
        if part is None:
            tensors[name] = tensor
        else:
            tensors.setdefault(name, [None] * len(PACKED))[part] = tensor
    return {k: np.concatenate(v) if isinstance(v, list) else v for k, v in tensors.items()}


class Misfit(NamedTuple):
    """The shape of a tensor, and another one that is needed."""

    given: tuple[int, ...]
    needed: tuple[int, ...]


class Fit(NamedTuple):
    """What of a state dict belongs where in a network. Tensors have the reference's names."""

    arrays: dict[str, np.ndarray]
    """Ours, by their paths from "params" or "batch_stats" on, in the types of the tensors."""
    used: tuple[str, ...]
    resized: tuple[str, ...]
    """Those that were interpolated: position biases of Swin for another window."""
    missing: dict[str, str]
    """The paths of arrays that have no tensor, by the name it should have."""
    misfits: dict[str, Misfit]
    """Tensors of another shape."""
    left: tuple[str, ...]
    """Tensors that belong nowhere."""

    def check(self, original: Mapping[str, str] | None = None) -> None:
        """Raises ValueError where not all belongs together.

        Args:
          original: names of the tensors in their file, where they are others.
        """
        known = original or {}
        problems = []
        if self.missing:
            name, path = next(iter(self.missing.items()))
            problems.append(f"the weights have no tensor {name} (for {path}){_more(self.missing)}")
        if self.misfits:
            name, (given, needed) = next(iter(self.misfits.items()))
            problems.append(
                f"the tensor {known.get(name, name)} has shape {list(given)}; "
                f"the network needs {list(needed)}{_more(self.misfits)}"
            )
        if self.left:
            shown = ", ".join(known.get(name, name) for name in self.left[:5])
            problems.append(
                f"the network has no place for {len(self.left)} tensors of the weights: {shown}"
                + (", …" if len(self.left) > 5 else "")
            )
        if problems:
            raise UserError("; ".join(problems))


def _more(problems: Sized) -> str:
    return f", and {len(problems) - 1} more" if len(problems) > 1 else ""


def fit(state: Mapping[str, np.ndarray], template: Variables) -> Fit:
    """Finds the place of every tensor of a state dict. Every tensor is used once.

    Args:
      state: {the reference's name: tensor}; those of `DERIVED` are ignored.
      template: variables of the network, arrays or shapes (`jax.eval_shape` of `init` will do).

    Raises:
      ValueError: a tensor holds no floating-point numbers.
    """
    arrays, used, resized, missing, misfits = {}, {}, {}, {}, {}
    places = Places.of(template)
    for key, leaf in traverse_util.flatten_dict(template, sep="/").items():
        path = key.partition("/")[2]
        name, part = reference_name(path, places)
        if name not in state:
            missing.setdefault(name, path)
            continue
        tensor = np.asarray(state[name])
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise UserError(f"the tensor {name} holds {tensor.dtype}; accepted are floating-point")
        needed = to_reference_layout(path, np.broadcast_to(np.float32(0), leaf.shape)).shape
        if part is not None:
            needed = (len(PACKED) * needed[0], *needed[1:])
        is_table = path.endswith("position_bias") and tensor.shape[1:] == needed[1:]
        if is_table and tensor.shape != needed:
            with suppress(ValueError):  # a table of no window at all is of the wrong shape
                tensor = resize_position_bias(tensor, window=(math.isqrt(needed[0]) + 1) // 2)
                resized[name] = None
        if tensor.shape != needed:
            misfits[name] = Misfit(tensor.shape, needed)
            continue
        if part is not None:
            tensor = np.split(tensor, len(PACKED))[part]
        arrays[key] = from_reference_layout(path, tensor, leaf.shape)
        used[name] = None
    left = sorted(
        name for name in state.keys() - used.keys() - misfits.keys() if not name.endswith(DERIVED)
    )
    return Fit(arrays, tuple(used), tuple(resized), missing, misfits, tuple(left))


def from_reference(state: Mapping[str, np.ndarray], template: Variables) -> Variables:
    """Variables from a state dict in the reference's names, all of them.

    Args:
      state: as for `fit`.
      template: as for `fit`.

    Raises:
      ValueError: a tensor is missing, of another shape or type, or belongs to nothing in the
        network.
    """
    found = fit(state, template)
    found.check()
    return traverse_util.unflatten_dict(found.arrays, sep="/")
