"""Reading files of weights, whoever wrote them, under the names of the reference.

Read are checkpoints of PyTorch, safetensors and npz: of K-Net by its authors or by OpenMMLab, of
other segmentation networks, and of ImageNet models by torchvision, timm, OpenMMLab and the authors
of Swin.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from knet_jax.saved import torch_file
from knet_jax.saved.parameter_names import DERIVED
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError, one_line, suggest

Tensors = dict[str, np.ndarray]

ENTRIES = ("state_dict", "model", "model_state_dict", "", "model_ema", "state_dict_ema", "ema")
"""Entries in which the network of a checkpoint may be, "" for the top; others come last."""

LEAST_SHARE = 0.25
"""An entry with fewer kernels than this share of the largest entry's is not taken for a network."""

BUFFERS = "ema_buffers"
"""Name for the second set of weights that MMCV keeps among the first: buffers such as
`ema_backbone_conv1_weight` for `backbone.conv1.weight`."""

CLASSES_KEY = "classes"
"""Key in the metadata of safetensors: the names of the classes, a JSON list."""

MODEL_KEY = "knet_jax"
"""Key in the metadata of safetensors: what makes the file a model, `About` as JSON."""

MAX_COMPRESSION = 100
"""The most by which a file of arrays may be compressed: numbers of weights are hardly ever alike."""

WRAPPED = re.compile(r"^((module|model|_orig_mod)\.)+")
"""Beginnings of names if a network was trained within another module."""

NETWORK = ("backbone.", "neck.", "rpn_head.", "roi_head.", "decode_head.", "auxiliary_head.")
"""Beginnings of the names of a segmentation network. Other files hold a classifier."""

SURPLUS = re.compile(
    rf".*({'|'.join(DERIVED)}|attn_mask|mask_token|periods)|(data_preprocessor|criterion)\..*"
)
"""Tensors that are no weights, or belong to the loss. Nor is a number without axes: it is a counter."""

CLASSIFIER = re.compile(r"(fc|head|classifier|norm)\..*")
"""Tensors of an ImageNet model after its backbone, which segmentation does not need."""

NEW = re.compile(r"backbone\.(.*\.conv_offset\..*|norm\d\..*|pyramid_.*)")
"""Tensors of a backbone that no classifier has: offsets, and norms and layers of levels."""

# (pattern in the names of the authors of Swin, which timm shares, the reference's).
SWIN_NAMES = (
    (r"^backbone\.patch_embed\.proj\b", "backbone.patch_embed.projection"),
    (r"^backbone\.layers\.", "backbone.stages."),
    (r"\.attn\.", ".attn.w_msa."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
)

# The first convolution of a ConvNeXt's blocks to its authors, timm and torchvision.
CONVNEXT = ("stages.0.0.dwconv", "stages.0.blocks.0.conv_dw", "features.1.0.block.0")
# (pattern in their names, the reference's).
CONVNEXT_NAMES = (
    (r"^backbone\.(stem|features\.0)\.", "backbone.downsample_layers.0."),
    *((rf"^backbone\.features\.{2 * i}\.", f"backbone.downsample_layers.{i}.") for i in (1, 2, 3)),
    *((rf"^backbone\.features\.{2 * i + 1}\.", f"backbone.stages.{i}.") for i in range(4)),
    (r"^backbone\.stages\.(\d)\.downsample\.", r"backbone.downsample_layers.\1."),
    (r"^backbone\.stages\.(\d)\.blocks\.", r"backbone.stages.\1."),
    (r"\.(dwconv|conv_dw|block\.0)\.", ".depthwise_conv."),
    (r"\.block\.2\.", ".norm."),
    (r"\.(pwconv1|mlp\.fc1|block\.3)\.", ".pointwise_conv1."),
    (r"\.(pwconv2|mlp\.fc2|block\.5)\.", ".pointwise_conv2."),
    (r"\.layer_scale$", ".gamma"),
)

VIT = "blocks.0.attn.qkv.weight"
"""What every vision transformer has."""
# (pattern in the names of DINOv2, DINOv3 or timm, the reference's).
VIT_NAMES = (
    (r"\.patch_embed\.proj\b", ".patch_embed.projection"),
    (r"\.(reg_token|storage_tokens)$", ".register_tokens"),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
)

# (pattern in timm's names of a stem of three convolutions, OpenMMLab's).
STEM_NAMES = ((r"^backbone\.conv1\.", "backbone.stem."), (r"^backbone\.bn1\.", "backbone.stem.7."))


class About(NamedTuple):
    """What belongs to the weights of a model, in the metadata of its file."""

    config: dict[str, Any]
    categories: Categories
    step: int


class WeightFile(NamedTuple):
    """What a file holds, under the reference's names."""

    tensors: Tensors
    original: dict[str, str]
    """The name that each of them has in the file."""
    surplus: tuple[str, ...]
    """Names in the file of tensors that no network takes."""
    entry: str
    """The entry of the file that they are from; "" is the top."""
    entries: tuple[str, ...]
    """All entries of the file that hold tensors."""
    classes: tuple[str, ...]
    """Names of the classes, empty if the file does not say."""
    about: About | None
    """What else makes it a model, if it is one."""


def read_weights(path: str | Path, entry: str = "") -> WeightFile:
    """Reads a file of weights.

    Args:
        path: npz, safetensors, or a checkpoint of PyTorch (pth, pt or bin).
        entry: which set of tensors, if the file holds several; "" takes the first of `ENTRIES` that
            holds a network.

    Raises:
        UserError: there is no such file, or it is of another kind, or broken, or has no such entry.
    """
    content, listed, about = _read(Path(path))
    entries = _find_entries(content)
    if not entries:
        top = content[""]
        keys = ", ".join(str(key)[:40] for key in top) if isinstance(top, Mapping) else ""
        raise UserError(
            f"it holds no tensors by name but {keys[:200] or f'a {type(top).__name__}'}"
        )
    sizes = {name: sum(x.ndim > 1 for x in named.values()) for name, named in entries.items()}
    least = LEAST_SHARE * max(sizes.values())
    entries = {name: named for name, named in entries.items() if sizes[name] >= least}
    chosen = entry or next(name for name in (*ENTRIES, *entries) if name in entries)
    if chosen not in entries:
        raise UserError(
            f"it has no entry {entry!r} of tensors; {suggest(entry, filter(None, entries))}"
        )
    tensors, original, surplus = bring_to_reference(entries[chosen])
    names = listed if isinstance(listed, list | tuple) else ()
    classes = tuple(name.strip() for name in names if isinstance(name, str))
    return WeightFile(tensors, original, surplus, chosen, tuple(entries), classes, about)


# Kinds of files.

Content = tuple[dict[str, Any], Any, About | None]
"""What may be a set of tensors, by the name of its entry, "" being the top; what may be a list of the
names of classes; and what makes the file a model."""


def _read(path: Path) -> Content:
    if path.suffix not in READERS:
        raise UserError(f"accepted are {', '.join(READERS)} files")
    if not path.is_file():
        raise UserError("there is no such file")
    try:
        return READERS[path.suffix](path)
    except Exception as error:
        # Readers raise whatever a broken file leads them to.
        raise UserError(f"the file cannot be read: {one_line(error)[:300]}") from error


def _read_npz(path: Path) -> Content:
    if not zipfile.is_zipfile(path):  # which numpy would offer to unpickle
        raise UserError("it is no npz")
    with zipfile.ZipFile(path) as archive:
        size = sum(info.file_size for info in archive.infolist())
    if size > MAX_COMPRESSION * path.stat().st_size:  # and might fill the memory
        raise UserError("it is compressed further than weights can be")
    return {"": dict(np.load(path, allow_pickle=False))}, None, None


def _read_safetensors(path: Path) -> Content:
    with safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    classes = about = None
    with suppress(ValueError):  # the metadata of others may mean anything by this name
        classes = json.loads(metadata.get(CLASSES_KEY, "[]"))
    if MODEL_KEY in metadata:
        content = json.loads(metadata[MODEL_KEY])
        categories = Categories.of(content["categories"])
        about = About(dict(content["config"]), categories, int(content["step"]))
    return {"": tensors}, classes, about


def _read_torch(path: Path) -> Content:
    content = torch_file.read(path)
    named = content if isinstance(content, Mapping) else {}
    # OpenMMLab writes the names of the classes; its later versions, one level further down.
    meta = named.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    dataset = meta.get("dataset_meta", meta)
    dataset = dataset if isinstance(dataset, Mapping) else {}
    return {"": content, **named}, dataset.get("classes", dataset.get("CLASSES")), None


READERS = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".bin": _read_torch,
}


def _find_entries(found: Mapping[str, Any]) -> dict[str, Tensors]:
    """Every set of tensors in a file by the name of its entry, as the network calls them."""
    entries = {}
    for entry, named in found.items():
        if not isinstance(named, Mapping):
            continue
        tensors = {
            WRAPPED.sub("", name): x
            for name, x in named.items()
            if isinstance(name, str) and isinstance(x, np.ndarray)
        }
        plain = {name: x for name, x in tensors.items() if not name.startswith("ema_")}
        if plain:
            entries[entry] = plain
        buffers = {f"ema_{name.replace('.', '_')}": name for name in plain}
        average = {buffers[name]: x for name, x in tensors.items() if name in buffers}
        if average:
            entries[BUFFERS] = plain | average
    return entries


# Names.


def bring_to_reference(
    tensors: Mapping[str, np.ndarray],
) -> tuple[Tensors, dict[str, str], tuple[str, ...]]:
    """Gives tensors the reference's names and order, whoever named them.

    Returns:
        The tensors, the name that each of them had, and the names of those that no network takes.
    """
    surplus = [name for name, x in tensors.items() if SURPLUS.fullmatch(name) or not x.ndim]
    named = {name: (name, x) for name, x in tensors.items() if name not in set(surplus)}
    if not any(name.startswith(NETWORK) for name in named):
        head = set(filter(CLASSIFIER.fullmatch, named))
        if VIT in named:  # whose last norm belongs to the backbone
            head = {name for name in head if not name.startswith("norm.")}
        surplus += [name for name in named if name in head]
        named = {f"backbone.{name}": pair for name, pair in named.items() if name not in head}
    if any(name.startswith("backbone.layers.") for name in named):
        named = _from_swin_authors(named)
    if any(f"backbone.{block}.weight" in named for block in CONVNEXT):
        # torchvision's scales have axes for the map.
        named = {
            _rename(name, CONVNEXT_NAMES): (old, x.reshape(-1) if "layer_scale" in name else x)
            for name, (old, x) in named.items()
        }
    if f"backbone.{VIT}" in named:
        named = _from_vit(named)
    if "backbone.conv1.0.weight" in named:
        named = {_rename(name, STEM_NAMES): pair for name, pair in named.items()}
    found = {name: x for name, (_, x) in named.items()}
    return found, {name: old for name, (old, _) in named.items()}, tuple(surplus)


def _rename(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for pattern, theirs in pairs:
        name = re.sub(pattern, theirs, name)
    return name


def _from_swin_authors(named: dict[str, tuple[str, np.ndarray]]) -> dict[str, Any]:
    """Renames tensors of a backbone from the names of the authors of Swin or of timm.

    They merge four pixels column by column, each with all its channels, where the reference goes
    channel by channel and row by row. Of timm, later versions have the merging at the beginning of
    a stage instead of at the end of the one before.
    """
    is_late = not any(name.startswith("backbone.layers.0.downsample.") for name in named)
    renamed = {}
    for name, (old, tensor) in named.items():
        if match := re.fullmatch(r"backbone\.layers\.(\d+)\.downsample\.(.*)", name):
            name = f"backbone.layers.{int(match[1]) - is_late}.downsample.{match[2]}"
            if tensor.ndim and tensor.shape[-1] % 4 == 0:  # others are of the wrong shape
                columns = tensor.reshape(*tensor.shape[:-1], 2, 2, -1)
                tensor = np.moveaxis(columns, (-1, -2), (-3, -2)).reshape(tensor.shape)
        is_backbone = name.startswith("backbone.")
        renamed[_rename(name, SWIN_NAMES) if is_backbone else name] = old, tensor
    return renamed


def _from_vit(named: dict[str, tuple[str, np.ndarray]]) -> dict[str, Any]:
    """Renames tensors of a vision transformer, and adds what some versions leave out.

    Those of DINOv3 have no bias of the keys: a mask beside it says so, or timm has the two others, or
    none. Of timm, those of DINOv2 with registers learn no position of the class's token.
    """
    renamed = {_rename(name, VIT_NAMES): pair for name, pair in named.items()}
    for name in [name for name in renamed if name.endswith(".attn.qkv.weight")]:
        block, weight = name.removesuffix("qkv.weight"), renamed[name][1]
        nothing = "", np.zeros(len(weight) // 3, weight.dtype)
        (_, query), (_, value) = (renamed.pop(f"{block}{x}_bias", nothing) for x in "qv")
        split = f"{block}qkv.bias", np.concatenate([query, nothing[1], value])
        old, bias = renamed.get(f"{block}qkv.bias", split)
        _, mask = renamed.pop(f"{block}qkv.bias_mask", ("", np.ones_like(bias)))
        if mask.shape == bias.shape:
            renamed[f"{block}qkv.bias"] = old, np.where(mask == 0, 0, bias)
    old, table = renamed.get("backbone.pos_embed", ("", np.zeros((1, 0, 0))))
    if table.ndim == 3 and table.shape[1] and math.isqrt(table.shape[1]) ** 2 == table.shape[1]:
        renamed["backbone.pos_embed"] = old, np.pad(table, ((0, 0), (1, 0), (0, 0)))
    return renamed
