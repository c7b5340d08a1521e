"""Files of weights, whoever wrote them, brought to the reference's names.

Read are checkpoints of PyTorch, safetensors and npz: of K-Net by its authors or by OpenMMLab, of
other segmentation networks, and of ImageNet models by torchvision, timm, OpenMMLab and the authors
of Swin.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import safe_open

from knet_jax.saved import torch_file
from knet_jax.saved.parameter_names import DERIVED, Variables, fit, to_reference
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError, one_line, suggest

Tensors = dict[str, np.ndarray]

ENTRIES = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_ema",
    "state_dict_ema",
    "ema_state_dict",
    "ema",
)
"""Where a checkpoint keeps its tensors, if not at the top: the first that is there."""

BUFFERS = "ema_buffers"
"""Stands for what MMCV keeps of a second set of weights: buffers such as `ema_backbone_conv1_weight`
for `backbone.conv1.weight`."""

CLASSES_KEY = "classes"
"""Of the metadata of safetensors: a JSON list of names."""

MODEL_KEY = "knet_jax"
"""Of the metadata of safetensors: what makes the file a model, `About` as a JSON object."""

MAX_COMPRESSION = 100
"""Of a file of arrays, whose numbers are hardly ever alike."""

WRAPPED = re.compile(r"((module|model|_orig_mod)\.)+")
"""What a name begins with where a network was trained within another module."""

NETWORK = ("backbone.", "neck.", "rpn_head.", "roi_head.", "decode_head.", "auxiliary_head.")
"""What the names of a segmentation network begin with. Other files hold a classifier."""

SURPLUS = re.compile(rf".*({'|'.join(DERIVED)}|attn_mask)|(data_preprocessor|criterion)\..*|steps")
"""Tensors that are no weights, or of the loss."""

CLASSIFIER = re.compile(r"(fc|head|classifier|norm)\..*")
"""What follows the backbone of an ImageNet model, which segmentation has no use for."""

NEW = re.compile(r"backbone\.(.*\.conv_offset\..*|norm\d\..*)")
"""Tensors of a backbone that no classifier has: offsets, and the norms of Swin's levels."""

# (pattern in the names of the authors of Swin, which timm shares, the reference's).
SWIN_NAMES = (
    (r"^backbone\.patch_embed\.proj\b", "backbone.patch_embed.projection"),
    (r"^backbone\.layers\.", "backbone.stages."),
    (r"\.attn\.", ".attn.w_msa."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
)

# (pattern in timm's names of a stem of three convolutions, OpenMMLab's).
STEM_NAMES = ((r"^backbone\.conv1\.", "backbone.stem."), (r"^backbone\.bn1\.", "backbone.stem.7."))


class About(NamedTuple):
    """What a file of weights says of its model, where this project wrote it."""

    config: dict[str, Any]
    categories: Categories
    step: int

    def to_json(self) -> str:
        """For `MODEL_KEY`."""
        return json.dumps(self._replace(categories=self.categories._asdict())._asdict())

    @staticmethod
    def from_json(text: str) -> About:
        """The same again."""
        content = json.loads(text)
        categories = Categories.of(content["categories"])
        return About(dict(content["config"]), categories, int(content["step"]))


class Content(NamedTuple):
    """A file as its reader leaves it."""

    entries: dict[str, Any]
    """What may be a set of tensors, by the name of its entry, "" for the top."""
    classes: Any = ()
    """Names of the classes, if it is a list of names."""
    about: About | None = None


class WeightFile(NamedTuple):
    """What a file holds, with as much of the reference's names as can be told without a network."""

    tensors: Tensors
    """By the reference's names."""
    original: dict[str, str]
    """What the file calls them."""
    surplus: tuple[str, ...]
    """Names, in the file, of tensors that no network takes."""
    entry: str
    """Where in the file they stood, "" for at the top."""
    entries: tuple[str, ...]
    """All places that hold tensors."""
    classes: tuple[str, ...]
    """Names of the classes, empty where the file does not say."""
    about: About | None = None


def read_weights(path: str | Path, entry: str = "") -> WeightFile:
    """Reads a file of weights.

    Args:
      path: npz, safetensors, or a checkpoint of PyTorch (pth, pt or bin).
      entry: which set of tensors, where the file holds several; "" takes the first of `ENTRIES`.

    Raises:
      ValueError: there is no such file, or it is of another kind, or broken, or has no such entry.
    """
    content = _read(Path(path))
    entries = find_entries(content.entries)
    if not entries:
        top = content.entries[""]
        keys = ", ".join(str(key)[:40] for key in top) if isinstance(top, Mapping) else ""
        raise UserError(
            f"it holds no tensors by name but {keys[:200] or f'a {type(top).__name__}'}"
        )
    chosen = entry or next(
        (name for name in ("", *ENTRIES) if name in entries), next(iter(entries))
    )
    if chosen not in entries:
        raise UserError(
            f"it has no entry {entry!r} of tensors; {suggest(entry, filter(None, entries))}"
        )
    tensors, original, surplus = bring_to_reference(entries[chosen])
    names = content.classes if isinstance(content.classes, list | tuple) else ()
    classes = tuple(name.strip() for name in names if isinstance(name, str))
    return WeightFile(tensors, original, surplus, chosen, tuple(entries), classes, content.about)


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
    return Content({"": dict(np.load(path, allow_pickle=False))})


def _read_safetensors(path: Path) -> Content:
    with safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    classes = None
    with suppress(ValueError):  # the metadata of others may mean anything by this name
        classes = json.loads(metadata.get(CLASSES_KEY, "[]"))
    about = About.from_json(metadata[MODEL_KEY]) if MODEL_KEY in metadata else None
    return Content({"": tensors}, classes, about)


def _read_torch(path: Path) -> Content:
    content = torch_file.read(path)
    named = content if isinstance(content, Mapping) else {}
    return Content({"": content, **named}, _class_names(named.get("meta")))


def find_entries(found: Mapping[str, Any]) -> dict[str, Tensors]:
    """Every set of tensors in a file by the name of its entry."""
    entries = {}
    for entry, named in found.items():
        tensors = _tensors(named)
        plain = {name: x for name, x in tensors.items() if not name.startswith("ema_")}
        if plain:
            entries[entry] = plain
        buffers = {f"ema_{name.replace('.', '_')}": name for name in plain}
        average = {buffers[name]: x for name, x in tensors.items() if name in buffers}
        if average:
            entries[BUFFERS] = plain | average
    return entries


def _tensors(named: Any) -> Tensors:
    """The tensors of a dict, without what their names have from modules around the network."""
    if not isinstance(named, Mapping):
        return {}
    return {
        WRAPPED.sub("", name) if WRAPPED.match(name) else name: x
        for name, x in named.items()
        if isinstance(name, str) and isinstance(x, np.ndarray)
    }


def _class_names(meta: Any) -> Any:
    """What a checkpoint of OpenMMLab says of the classes that it was trained with."""
    if not isinstance(meta, Mapping):
        return ()
    about = meta.get("dataset_meta", meta)
    names = [about.get(key) for key in ("classes", "CLASSES")] if isinstance(about, Mapping) else []
    return next((x for x in names if isinstance(x, list | tuple)), ())


READERS = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".bin": _read_torch,
}


# Names.


def bring_to_reference(tensors: Mapping[str, np.ndarray]) -> tuple[Tensors, dict[str, str], tuple]:
    """Tensors in the reference's names and order, whoever named them.

    Returns:
      the tensors, what they were called, and the names of those that no network takes.
    """
    surplus = [name for name in tensors if SURPLUS.fullmatch(name)]
    tensors = {name: x for name, x in tensors.items() if name not in set(surplus)}
    if any(name.startswith(NETWORK) for name in tensors):
        named = {name: (name, x) for name, x in tensors.items()}
    else:
        surplus += filter(CLASSIFIER.fullmatch, tensors)
        named = {
            f"backbone.{name}": (name, x)
            for name, x in tensors.items()
            if not CLASSIFIER.fullmatch(name)
        }
    if any(name.startswith("backbone.layers.") for name in named):
        named = _from_swin_authors(named)
    if "backbone.conv1.0.weight" in named:
        named = {_rename(name, STEM_NAMES): pair for name, pair in named.items()}
    found = {name: x for name, (_, x) in named.items()}
    return found, {name: old for name, (old, _) in named.items()}, tuple(surplus)


def _rename(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for pattern, theirs in pairs:
        name = re.sub(pattern, theirs, name)
    return name


def _from_swin_authors(named: dict[str, tuple[str, np.ndarray]]) -> dict[str, Any]:
    """Tensors of the backbone in the names of the authors of Swin or of timm.

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


# Where training starts.


def load_backbone(path: str | Path, variables: Variables) -> Variables:
    """Variables whose backbone comes from a file, be it of an ImageNet model or a whole network.

    What no classifier has (`NEW`) stays as it was initialized if the file lacks it.

    Args:
      path: as `read_weights` takes it.
      variables: of the network, as initialized.

    Raises:
      ValueError: as `read_weights`, or something does not fit, with the file's name.
    """
    template = {
        kind: {"backbone": tree["backbone"]}
        for kind, tree in variables.items()
        if "backbone" in tree  # a backbone without running statistics has parameters only
    }
    new = {name: x for name, x in to_reference(template).items() if NEW.fullmatch(name)}
    try:
        weights = read_weights(path)
        tensors = {k: x for k, x in weights.tensors.items() if k.startswith("backbone.")}
        found = fit(new | tensors, template)
        found.check(weights.original)
    except ValueError as error:
        message = str(error).replace("backbone.", "")  # an ImageNet model has no such prefix
        raise UserError(f"config.init_weights: {path}: {message}") from error
    loaded = traverse_util.unflatten_dict(found.arrays, sep="/")
    as_ours = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), loaded, template)
    return {kind: tree | as_ours.get(kind, {}) for kind, tree in variables.items()}
