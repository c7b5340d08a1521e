"""Writes small semantic datasets of pictures and index PNGs, in the layouts of real ones."""

from pathlib import Path

import cv2
import numpy as np

SIZES = ((60, 80), (80, 60), (64, 64))


def draw(index: int, size, values) -> tuple[np.ndarray, np.ndarray]:
    """A picture and a map of blocks of some values."""
    rng = np.random.default_rng(index)
    image = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), size[::-1])
    blocks = rng.choice(values, (5, 7))
    rows, columns = np.arange(size[0]) * 5 // size[0], np.arange(size[1]) * 7 // size[1]
    return image, blocks[rows][:, columns]


def write_pair(picture: Path, png: Path, image: np.ndarray, indices: np.ndarray) -> None:
    """Writes a picture and its PNG, with the folders that they need."""
    for path, pixels in ((picture, image), (png, indices)):
        path.parent.mkdir(parents=True, exist_ok=True)
        dtype = np.uint16 if pixels.max() > 255 else np.uint8
        assert cv2.imwrite(str(path), pixels.astype(dtype))


def write_folder(root: Path, values=(0, 1, 2, 255), splits=("train", "val")) -> Path:
    """`images/<split>/<i>.jpg`, `labels/<split>/<i>.png` and three classes in `classes.txt`."""
    for split in splits:
        for i, size in enumerate(SIZES):
            paths = (root / f"images/{split}/{i}.jpg", root / f"labels/{split}/{i}.png")
            write_pair(*paths, *draw(i, size, values))
    (root / "classes.txt").write_text("wall\nfloor\nlamp\n")
    return root


FOLDER = {
    "dataset": "folder",
    "images": "images/{split}",
    "labels": "labels/{split}",
    "classes": "classes.txt",
    "ignore_index": 255,
}


def write_ade20k(root: Path, values=(0, 1, 2, 17, 150)) -> Path:
    """The layout of ADEChallengeData2016."""
    for split in ("training", "validation"):
        for i, size in enumerate(SIZES):
            name = f"ADE_{split[:5]}_{i:08d}"
            paths = (root / f"images/{split}/{name}.jpg", root / f"annotations/{split}/{name}.png")
            write_pair(*paths, *draw(i, size, values))
    header = "Idx\tRatio\tTrain\tVal\tStuff\tName\n"
    rows = (f"{i}\t0.01\t10\t1\t1\tthing {i}, also {i}\n" for i in range(1, 151))
    (root / "objectInfo150.txt").write_text(header + "".join(rows))
    return root


def write_cityscapes(root: Path, values=(0, 4, 7, 11, 26, 33)) -> Path:
    """The layout of Cityscapes, two cities."""
    for split in ("train", "val"):
        for i, size in enumerate(SIZES):
            city = ("aachen", "bochum")[i % 2]
            stem = f"{split}/{city}/{city}_{i:06d}_000019"
            picture = root / f"leftImg8bit/{stem}_leftImg8bit.png"
            png = root / f"gtFine/{stem}_gtFine_labelIds.png"
            write_pair(picture, png, *draw(i, size, values))
    return root
