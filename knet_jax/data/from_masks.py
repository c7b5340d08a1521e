"""Turns maps of classes and of instances into COCO's layout, panoptic and instance."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tqdm

from knet_jax.data.sources import examine, folder, index_maps
from knet_jax.segmentation import class_lists, image_files, rle
from knet_jax.segmentation.coco_files import PanopticResults, image_entry
from knet_jax.segmentation.segments import Categories, PanopticMap, SegmentInfo
from knet_jax.system.errors import UserError
from knet_jax.system.output_files import write_json_lists


def write_panoptic_dataset(
    images: Path,
    class_maps: Path,
    names: Path,
    things: Sequence[str],
    root: Path,
    split: str,
    instance_maps: Path | None = None,
    void: int = 255,
) -> list[str]:
    """Writes a split of a dataset in COCO's layout, panoptic and instance, showing progress.

    Args:
        images: folder of pictures; its subfolders are followed.
        class_maps: folder of PNG files named like the pictures: the class of each pixel.
        names: text file; line i, counted from 0, names class i.
        things: names of the classes whose things are told apart.
        root: the dataset, `config.data.root` of the training.
        split: name of the split.
        instance_maps: folder of PNG files: the number of the thing at each pixel, 0 for a crowd;
            without it every connected region of a thing class is one thing.
        void: the index of pixels of unknown class.

    Returns:
        what is wrong with the pictures that were left out, a line each.

    Raises:
        UserError: a folder or file is missing, the classes make no sense, or no picture can be
            used.
    """
    check_places(split, images=images, class_maps=class_maps, instance_maps=instance_maps)
    if not names.is_file():
        raise UserError(f"--names: there is no file {names}")
    named, colors = class_lists.read_class_list(names, void, source="--names")
    indices, categories = order_classes(named, things)
    pairs = folder.find_pairs(images, class_maps)
    if not pairs:
        raise UserError(f"--images: no picture ({', '.join(image_files.PICTURES)}) in {images}")

    panoptic = PanopticResults(root / f"annotations/panoptic_{split}.json", categories)
    pictures, annotations, problems = [], [], []
    for number, pair in enumerate(tqdm.tqdm(pairs, "Converting", unit="img"), 1):
        try:
            found = read_maps(pair, instance_maps, indices, categories, void, colors)
            panoptic.add(number, pair.name, found)
        except UserError as error:
            problems.append(f"{pair.name}: {error}, left out")
            continue
        link(pair.path, root / split / pair.name)
        pictures.append(image_entry(number, pair.name, found.ids.shape))
        annotations.extend(describe_things(found, number, len(annotations), categories))
    if not pictures:
        raise UserError(f"no picture of {images} can be used; {problems[0]}")
    panoptic.close()
    listed = dict(zip(categories.dataset_ids[: categories.num_things], categories.names))
    write_instances(root, split, pictures, annotations, listed, problems)
    return problems


def order_classes(named: Categories, things: Sequence[str]) -> tuple[dict[int, int], Categories]:
    """Puts the things before the stuff, which all of the named classes are.

    Returns:
        {index in the maps: label}, and the classes, things first; the id of a class is its index
        in the maps + 1.

    Raises:
        UserError: a thing is no class, or is named twice.
    """
    for name in things:
        if name not in named.names or things.count(name) > 1:
            raise UserError(f"--things: {name!r}; accepted, each once: {', '.join(named.names)}")
    is_stuff = [name not in things for name in named.names]
    order = sorted(range(len(is_stuff)), key=is_stuff.__getitem__)
    indices = {named.dataset_ids[i]: label for label, i in enumerate(order)}
    names = tuple(named.names[i] for i in order)
    return indices, Categories(names, tuple(1 + index for index in indices), len(things))


def read_maps(
    pair: index_maps.LabelledPicture,
    instance_maps: Path | None,
    indices: Mapping[int, int],
    categories: Categories,
    void: int,
    colors: Mapping[int, int],
) -> PanopticMap:
    """The segments of a picture. Raises UserError where a map is missing, broken or does not fit.

    `indices` and `categories` are as of `order_classes`, `colors` as of `index_maps.read_indices`;
    without a folder of maps of instances regions are things.
    """
    classes = index_maps.read_indices(examine.read_file(pair.png), str(pair.png), colors)
    examine.read_picture(pair.path, classes.shape)
    strange = set(np.unique(classes).tolist()) - set(indices) - {void}
    if strange:
        raise UserError(
            f"{pair.png} holds {sorted(strange)[:10]}, which --names has no line for "
            f"and which is not --void={void}"
        )
    instances = None
    if instance_maps:
        path = instance_maps / Path(pair.name).with_suffix(".png")
        instances = index_maps.read_indices(examine.read_file(path), str(path))
        if instances.shape != classes.shape:
            raise UserError(f"{path} is {instances.shape}, the map of classes {classes.shape}")
    ids, segments = np.zeros(classes.shape, np.int32), []
    for index in sorted(set(np.unique(classes).tolist()) - {void}):
        label, mask = indices[index], classes == index
        for part, is_crowd in split_class(mask, instances, label < categories.num_things):
            segments.append(SegmentInfo(len(segments) + 1, label, is_crowd))
            ids[part] = len(segments)
    return PanopticMap(ids, tuple(segments))


def split_class(
    mask: np.ndarray, instances: np.ndarray | None, is_thing: bool
) -> Iterator[tuple[np.ndarray, bool]]:
    """The segments of a class that has the pixels of a mask, bool [H, W].

    Things have numbers, int [H, W]; None where connected regions are things.

    Yields:
        (mask of a segment, whether it is a crowd).
    """
    if not is_thing:
        yield mask, False
        return
    if instances is None:
        instances = cv2.connectedComponents(mask.astype(np.uint8))[1]
    for number in np.unique(instances[mask]).tolist():
        yield mask & (instances == number), number == 0


def describe_things(
    found: PanopticMap, image_id: int, num_before: int, categories: Categories
) -> Iterator[dict]:
    """The things of a picture as COCO's instance annotations."""
    things = [info for info in found.segments if info.label < categories.num_things]
    for number, info in enumerate(things, num_before + 1):
        encoded = rle.encode(found.ids == info.id)
        id = categories.dataset_ids[info.label]
        yield describe_thing(number, image_id, id, rle.to_json(encoded), encoded, info.iscrowd)


def describe_thing(
    id: int, image_id: int, category_id: int, segmentation: Any, mask: dict, iscrowd: bool = False
) -> dict:
    """One of COCO's instance annotations, of a mask as run lengths and what stands for it."""
    return {
        "id": id,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": segmentation,
        "area": float(rle.area(mask)),
        "bbox": rle.box(mask),
        "iscrowd": int(iscrowd),
    }


def write_instances(
    root: Path,
    split: str,
    pictures: Iterable[dict],
    annotations: Iterable[dict],
    categories: Mapping[int, str],
    problems: Sequence[str],
) -> None:
    """Writes COCO's instance file of a split, and says so; categories are {id: name}."""
    content = {
        "images": pictures,
        "annotations": annotations,
        "categories": [{"id": id, "name": name} for id, name in categories.items()],
    }
    counts = write_json_lists(root / f"annotations/instances_{split}.json", content)
    print(
        "wrote {images} pictures with {annotations} things of {categories} classes".format(
            **counts
        ),
        f"to {root}; {len(problems)} problems",
    )


def check_places(split: str, **folders: Path | None) -> None:
    """Raises UserError where the name of a split would lead to another folder, or one is missing."""
    if Path(split).name != split or split == "..":
        raise UserError(f"--split={split}; accepted: a name without folders, such as train")
    for flag, path in folders.items():
        if path and not path.is_dir():
            raise UserError(f"--{flag}: there is no folder {path}")


def link(picture: Path, place: Path) -> None:
    """Makes a picture appear at `place`, as a hard link where the file system can, else as a copy."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists() and place.samefile(picture):
        return
    place.unlink(missing_ok=True)
    try:
        os.link(picture, place)
    except OSError:
        shutil.copyfile(picture, place)


if __name__ == "__main__":  # `python -m knet_jax.data.from_masks`, the same as `knet from-masks`
    sys.argv.insert(1, "from-masks")
    runpy.run_module("knet_jax.cli.main", run_name="__main__")
