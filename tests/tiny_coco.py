"""Writes small datasets in COCO's layout, sound or broken as a test wants."""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import cv2
import ml_collections
import numpy as np
from pycocotools import mask as run_lengths

from knet_jax.data import prepared_split
from knet_jax.segmentation import image_files

# Deliberately not things first, and with gaps.
CATEGORIES = [
    {"id": 7, "name": "grass", "isthing": 0},
    {"id": 3, "name": "dog", "isthing": 1},
    {"id": 90, "name": "sky", "isthing": 0},
    {"id": 12, "name": "cat", "isthing": 1},
]
GRASS, DOG, SKY, CAT = 7, 3, 90, 12
THINGS = (
    (DOG, 0, (slice(10, 30), slice(5, 25))),
    (CAT, 0, (slice(20, 45), slice(15, 45))),
    (CAT, 1, (slice(5, 12), slice(40, 60))),
)
"""Category, crowd and place of the things of every picture; the dog and the cat overlap."""


def data_config(data_dir: Path, root: Path | str = "", **changes) -> ml_collections.ConfigDict:
    """`config.data` for pictures of about 100 pixels."""
    values = {
        "dataset": "coco" if root else "shapes",
        "root": str(root),
        "data_dir": str(data_dir),
        "train_split": "train",
        "val_split": "val",
        "canvas": (96, 128),
        "short_side": (64, 96),
        "long_side": 128,
        "flip": 0.5,
        "max_things": 8,
        "min_things": 0,
        "num_workers": 0,
        "max_broken_share": 0.01,
        "num_train": 24,
        "num_val": 10,
        "image_side": (64, 96),
        "supercategories": False,
        # What crops need.
        "scale": (128, 96),
        "ratio": (0.5, 2.0),
        "crop": (64, 96),
        "max_class_share": 0.75,
        "photometric": True,
        "eval_multiple": 32,
    }
    return ml_collections.ConfigDict(values | changes)


def examined(source) -> SimpleNamespace:
    """What is written of a dataset, and what is said of it."""
    with tempfile.TemporaryDirectory() as folder:
        directory, _ = prepared_split.prepare(source, Path(folder))
        split = prepared_split.Split(directory, source.split)
        metadata = json.loads((directory / "metadata.json").read_text())
        return SimpleNamespace(
            categories=split.categories,
            count=len(split),
            records=[split.record(index) for index in range(len(split))],
            problems=metadata["problems"],
        )


def draw(index: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """A picture, its map of ids and its segments: sky above grass, a dog, a cat and a crowd."""
    rng = np.random.default_rng(index)
    image = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (width, height))
    ids = np.zeros((height, width), np.int32)
    base = 70_000 * (index + 1)
    regions = [
        (SKY, 0, (slice(0, height // 2), slice(None))),
        (GRASS, 0, (slice(height // 2, height - 3), slice(None))),
        *THINGS,
    ]
    segments = []
    for number, (category, crowd, region) in enumerate(regions, start=1):
        ids[region] = base + 256 * number
        segments.append({"id": base + 256 * number, "category_id": category, "iscrowd": crowd})
    return image, ids, segments


SIZES = ((60, 80), (80, 60), (64, 64), (50, 90), (90, 50))


def write(root: Path, sizes=SIZES, splits=("train", "val"), categories=tuple(CATEGORIES)) -> Path:
    """Writes a sound panoptic dataset, pictures named `<split>_<position>.jpg`."""
    for split in splits:
        folder = root / "annotations" / f"panoptic_{split}2017"
        folder.mkdir(parents=True)
        content = _write_pictures(root, split, sizes) | {"categories": list(categories)}
        for index, (image, size) in enumerate(zip(content["images"], sizes)):
            _, ids, segments = draw(index, *size)
            png = image["file_name"].replace(".jpg", ".png")
            write_panoptic(folder / png, ids)
            content["annotations"].append(
                {"image_id": image["id"], "file_name": png, "segments_info": segments}
            )
        folder.with_suffix(".json").write_text(json.dumps(content))
    return root


def _write_pictures(root: Path, split: str, sizes) -> dict:
    """The pictures of a split; what a JSON says of them, without annotations yet."""
    folder = root / f"{split}2017"
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for index, (height, width) in enumerate(sizes):
        name = f"{split}_{index}.jpg"
        cv2.imwrite(str(folder / name), draw(index, height, width)[0])
        entry = {"id": 100 + index, "file_name": name, "height": height, "width": width}
        images.append(entry)
    return {"images": images, "annotations": []}


def write_panoptic(path: Path, ids: np.ndarray) -> None:
    """Writes a map of ids as COCO's PNG."""
    cv2.imwrite(str(path), image_files.segment_colors(ids)[..., ::-1])


def instance_masks(height: int, width: int) -> list[tuple[int, int, np.ndarray]]:
    """Category, crowd and mask of the things of a picture."""
    masks = []
    for category, crowd, region in THINGS:
        mask = np.zeros((height, width), np.uint8)
        mask[region] = 1
        masks.append((category, crowd, mask))
    return masks


def write_instances(root: Path, sizes=SIZES, splits=("train", "val")) -> Path:
    """Writes pictures, and instances as a polygon, as plain and as compressed run lengths."""
    things = [{"id": c["id"], "name": c["name"]} for c in CATEGORIES if c["isthing"]]
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split in splits:
        content = _write_pictures(root, split, sizes) | {"categories": things}
        for image, size in zip(content["images"], sizes):
            for category, crowd, mask in instance_masks(*size):
                rle = run_lengths.encode(np.asfortranarray(mask))
                forms = (
                    [[5, 10, 25, 10, 25, 30, 5, 30]],
                    {"size": list(size), "counts": runs_of(mask)},
                    rle | {"counts": rle["counts"].decode()},
                )
                number = len(content["annotations"])
                content["annotations"].append(
                    {
                        "id": number,
                        "image_id": image["id"],
                        "category_id": category,
                        "iscrowd": crowd,
                        "area": float(mask.sum()),
                        "segmentation": forms[number % 3],
                    }
                )
        path = root / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(content))
    return root


def runs_of(mask: np.ndarray) -> list[int]:
    """Run lengths down the columns, zeros first, as COCO writes them."""
    flat = mask.T.ravel()
    ends = np.append(np.flatnonzero(np.diff(flat)) + 1, flat.size)
    return ([0] if flat[0] else []) + np.diff(ends, prepend=0).tolist()


def edit(root: Path, change, split: str = "train", prefix: str = "panoptic_") -> None:
    """Applies a function to the content of an annotation file."""
    path = root / "annotations" / f"{prefix}{split}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
