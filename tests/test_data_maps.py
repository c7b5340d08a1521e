"""Semantic datasets of files: index PNGs, `folder`, ADE20K, Cityscapes, and TFDS' scene_parse150."""

import io
import shutil
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny_coco
import tiny_maps
from PIL import Image

from knet_jax.data import pipeline, records
from knet_jax.data.sources import ade20k, by_name, index_maps, scene_parse150
from knet_jax.segmentation import class_lists
from knet_jax.system.errors import UserError

CATEGORIES = class_lists.stuff_categories({1: "wall", 4: "floor"})


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def indices_of(values, size=(6, 8)):
    return np.random.default_rng(0).choice(values, size).astype(np.uint8)


def maps_of(examples):
    """The stored maps of labels."""
    buffers = (np.frombuffer(record.annotation, np.uint8) for record in examples.records)
    return [cv2.imdecode(buffer, cv2.IMREAD_UNCHANGED) for buffer in buffers]


# PNG files of indices.


def grey_png(indices, bits):
    """A grey PNG of few bits a pixel, which no library here writes; tools that shrink files do."""

    def chunk(name, content):
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    height, width = indices.shape
    unpacked = np.unpackbits(indices[..., None], axis=-1)[..., -bits:].reshape(height, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(unpacked, axis=-1))
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return data + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_indices_of_every_depth():
    for bits in (1, 2, 4, 8):
        indices = indices_of(range(min(2**bits, 200)))
        image = Image.fromarray(indices)
        image.putpalette(np.random.default_rng(1).integers(0, 256, 768).astype(np.uint8).tobytes())
        data = encoded(image, bits=bits)
        assert data[24] == bits and data[25] == 3
        np.testing.assert_array_equal(index_maps.read_indices(data, "x.png"), indices)
    for bits in (1, 2, 4):  # decoders return multiples of 255, 85 or 17
        indices = indices_of(range(2**bits))
        read = index_maps.read_indices(grey_png(indices, bits), "x.png")
        np.testing.assert_array_equal(read, indices)
    indices = indices_of((0, 3, 255)).astype(np.uint16)
    data = cv2.imencode(".png", indices * 257)[1].tobytes()
    assert data[24] == 16
    np.testing.assert_array_equal(index_maps.read_indices(data, "x.png"), indices * 257)


def test_what_holds_no_indices():
    image = Image.fromarray(indices_of((1, 4)))
    color = encoded(Image.fromarray(np.zeros((4, 5, 3), np.uint8)))
    for data, message in (
        (encoded(image, "JPEG"), "is a JPEG; accepted: PNG"),
        (encoded(image)[:12], "cannot be decoded"),
        (color, "has pixels of mode RGB, expected one index"),
    ):
        with pytest.raises(UserError, match=f"x.png {message}"):
            index_maps.read_indices(data, "x.png")


# Pairs of a picture and a PNG.


def write_pairs(folder):
    found = []
    for i, size in enumerate(tiny_maps.SIZES):
        path, png = folder / f"{i}.jpg", folder / f"{i}.png"
        tiny_maps.write_pair(path, png, *tiny_maps.draw(i, size, (0, 1, 4)))
        found.append(index_maps.LabelledPicture(path, png, path.name))
    return found


def examine(pairs, remedy=""):
    def list_pairs():
        return index_maps.examine_pairs(pairs, CATEGORIES, (0,), Path("the folder"), remedy)

    return tiny_coco.examined(records.Source("folder", "name", "train", "semantic", list_pairs))


STRANGE = tiny_maps.draw(1, tiny_maps.SIZES[1], (0, 1, 9))[1].astype(np.uint8)
PROBLEMS = [
    (lambda pair: pair.png.unlink(), "1.png is missing, left out", 2),
    (
        lambda pair: shutil.copy(pair.png.with_name("0.png"), pair.png),
        "is 60x80 where 80x60 is expected, left out",
        2,
    ),
    (
        lambda pair: cv2.imwrite(str(pair.png), STRANGE),
        "1.jpg: indices [9] are no class, ignored",
        3,
    ),
    (
        lambda pair: cv2.imwrite(str(pair.png), np.zeros((80, 60), np.uint8)),
        "1.jpg: every pixel is ignored",
        3,
    ),
]


def test_problems_of_pairs(tmp_path):
    for number, (change, message, count) in enumerate(PROBLEMS):
        pairs = write_pairs(tmp_path / str(number))
        change(pairs[1])
        examples = examine(pairs)
        [problem] = examples.problems
        assert problem.startswith("1.jpg: ") and message in problem
        assert examples.count == count == len(list(examples.records))
        if "[9]" in message:
            np.testing.assert_array_equal(maps_of(examples)[1], STRANGE == 1)
            with pytest.raises(UserError, match=r"1\.png has indices \[9\] .* no class: do this"):
                examine(pairs, remedy="do this")
    with pytest.raises(UserError, match="no picture in the folder"):
        examine([])
    for pair in pairs:
        pair.png.unlink()
    with pytest.raises(UserError, match="the first of 3 problems: 0.jpg: .*0.png is missing"):
        examine(pairs)


# `folder`.


def config_of(root, dataset="folder", **changes):
    values = tiny_maps.FOLDER | {"dataset": dataset} | changes
    return tiny_coco.data_config(root.parent / "prepared", root, **values)


def scan(root, dataset="folder", split="train", **changes):
    return tiny_coco.examined(by_name.find(config_of(root, dataset, **changes), split, "semantic"))


def test_folder_of_pictures(tmp_path):
    root = tiny_maps.write_folder(tmp_path / "maps")
    for part in ("images", "labels"):
        (root / part / "train" / "deep").mkdir()
        [file] = (root / part / "train").glob("2.*")
        file.rename(file.parent / "deep" / file.name)
    (root / "images/train/notes.txt").touch()
    (root / "images/train/0.jpg").rename(root / "images/train/0.JPG")
    examples = scan(root)
    assert examples.categories == (("wall", "floor", "lamp"), (0, 1, 2), 0)
    assert examples.problems == [] and examples.count == 3
    for i, (record, name) in enumerate(zip(examples.records, ("0.JPG", "1.jpg", "deep/2.jpg"))):
        assert (record.image_id, record.file_name) == (i, name)
        assert record.size == tiny_maps.SIZES[i]
        assert record.image == (root / "images/train" / name).read_bytes()
    for i, stored in enumerate(maps_of(examples)):
        _, indices = tiny_maps.draw(i, tiny_maps.SIZES[i], (0, 1, 2, 255))
        np.testing.assert_array_equal(stored, np.where(indices == 255, 0, indices + 1))
    # One folder can serve all splits.
    examples = scan(root, split="anything", images="images/train", labels="labels/train")
    assert examples.count == 3
    # A listed class may be ignored.
    examples = scan(tiny_maps.write_folder(tmp_path / "other", values=(0, 1, 2)), ignore_index=0)
    assert examples.categories == (("floor", "lamp"), (1, 2), 0)
    _, indices = tiny_maps.draw(1, tiny_maps.SIZES[1], (0, 1, 2))
    np.testing.assert_array_equal(maps_of(examples)[1], indices)


def test_masks_with_suffixes_or_beside_their_pictures(tmp_path):
    root = tiny_maps.write_folder(tmp_path / "maps", splits=("train",))
    expected = maps_of(scan(root))
    folder = root / "labels/train"
    for path in folder.glob("*.png"):
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    for place in ("labels/train", "images/train"):  # then beside their pictures
        examples = scan(root, labels=place)
        assert examples.problems == [] and examples.count == 3
        for found, wanted in zip(maps_of(examples), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
        shutil.copytree(folder, root / "images/train", dirs_exist_ok=True)
    (root / "images/train/0_mask.png").rename(root / "images/train/0.png")
    assert scan(root, labels="images/train").count == 3
    (root / "images/train/1_mask.png").unlink()
    examples = scan(root, labels="images/train")
    assert examples.count == 2 and "1_mask.png is missing, left out" in examples.problems[0]


def test_masks_in_color(tmp_path):
    root = tiny_maps.write_folder(tmp_path / "maps", splits=("train",))
    expected = maps_of(scan(root))
    colors = np.zeros((256, 3), np.uint8)
    colors[:3] = (0, 0, 0), (250, 50, 83), (255, 255, 255)
    colors[255] = 9
    for path in (root / "labels/train").glob("*.png"):
        Image.fromarray(colors[np.array(Image.open(path))]).save(path)
    for text in (
        "# label:color_rgb:parts:actions\nwall:0,0,0::\nfloor:250,50,83::\nlamp:255,255,255::\nno:9,9,9::",
        "name,r,g,b\nwall,0,0,0\nfloor,250,50,83\nlamp,255,255,255\nno,9,9,9\n",
        "0 0 0\twall\n250 50 83\tfloor\n255 255 255\tlamp\n9 9 9\tno",
    ):
        (root / "classes.txt").write_text(text)
        examples = scan(root, ignore_index=3)
        assert examples.problems == [] and examples.categories.names == ("wall", "floor", "lamp")
        for found, wanted in zip(maps_of(examples), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
    (root / "classes.txt").write_text("wall 0 0 0\nfloor 250 50 83\nlamp 255 255 255")
    with pytest.raises(UserError, match=r"0\.png has the color \[9, 9, 9\], which no class has"):
        scan(root)
    (root / "classes.txt").write_text("wall 0 0 0\nfloor 0 0 0")
    with pytest.raises(UserError, match="must give every class another color"):
        scan(root)


def test_class_lists(tmp_path):
    root = tiny_maps.write_folder(tmp_path / "maps")
    path = root / "classes.txt"
    path.write_text("wall\nsky\nlamp\n", encoding="utf-8-sig")  # as some editors do
    assert class_lists.read_class_list(path, 255)[0].names == ("wall", "sky", "lamp")
    path.write_text("wall\nsky\nlamp\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"config\.data\.classes: .*must be text in UTF-8"):
        scan(root)
    for text in ("", "wall\n\nlamp\n", "wall\nwall\nlamp\n"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"^config\.data\.classes: [^:]*classes\.txt must name"):
            scan(root)
    path.write_text("wall\nfloor\n")
    with pytest.raises(UserError, match=r"\.png has indices \[2\] .* no class: name") as error:
        scan(root)
    message = str(error.value)
    assert "config.data.classes" in message and "config.data.ignore_index, 255" in message
    assert "\n" not in message


def test_mistakes_in_the_paths_of_a_folder(tmp_path):
    root = tiny_maps.write_folder(tmp_path / "maps")
    for key in ("images", "labels", "classes"):
        with pytest.raises(UserError, match=rf"data\.{key}: split 'train' needs the .*nowhere"):
            scan(root, **{key: "nowhere"})
    shutil.rmtree(root / "images/train")
    (root / "images/train").mkdir()
    with pytest.raises(UserError, match=r"config\.data\.images: split 'train': no picture in"):
        scan(root)


def test_names_of_folders_follow_everything_that_matters(tmp_path):
    root = tiny_maps.write_folder(tmp_path / "maps")

    def name(split="train", **changes):
        return by_name.find(config_of(root, **changes), split, "semantic").name

    names = [name(), name(), name("val"), name(ignore_index=0)]
    (root / "classes.txt").write_text("a\nb\nc\n")
    names.append(name())
    (root / "labels/train/more.png").touch()
    names.append(name())
    assert names[0] == names[1] and len(set(names)) == 5


# ADE20K.


def test_ade20k(tmp_path):
    root = tiny_maps.write_ade20k(tmp_path / "ADEChallengeData2016")
    for given in (root, tmp_path):
        examples = scan(given, "ade20k", "training")
        names, ids, num_things = examples.categories
        assert (len(names), num_things, ids) == (150, 0, tuple(range(1, 151)))
        assert names[:2] == ("thing 1", "thing 2")
        files = [record.file_name for record in examples.records]
        assert files == [f"ADE_train_{index:08d}.jpg" for index in range(3)]
        for index, stored in enumerate(maps_of(examples)):
            _, indices = tiny_maps.draw(index, tiny_maps.SIZES[index], (0, 1, 2, 17, 150))
            np.testing.assert_array_equal(stored, indices)
    for text, encoding, words in (
        ("a\nb\n", None, "is not a table"),
        ("Idx\n1\t1\tx\n", None, "lists 1"),
        ("Idx\tName\n", "utf-16", "is not a table of classes"),
    ):
        (root / "objectInfo150.txt").write_text(text, encoding=encoding)
        with pytest.raises(UserError, match=rf"data\.root: .*objectInfo150\.txt {words}"):
            ade20k.read_object_info(root)
    (root / "objectInfo150.txt").unlink()
    tiny_maps.write_ade20k(root, values=(0, 1, 151))
    (root / "objectInfo150.txt").unlink()
    examples = scan(root, "ade20k", "training")
    assert examples.categories.names[148:] == ("clock", "flag")
    assert "ADE_train_00000000.jpg: indices [151] are no class, ignored" in examples.problems
    for wrong in ("", tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"config\.data\.root: no ADE20K at"):
            ade20k.find(tiny_coco.data_config("", wrong), "training")
    with pytest.raises(UserError, match=r"split 'train' needs the folder .*images/train$"):
        scan(root, "ade20k")
    shutil.rmtree(root / "images" / "training")
    (root / "images" / "training").mkdir()
    with pytest.raises(UserError, match=r"config\.data\.root: no picture in .*images/training$"):
        scan(root, "ade20k", "training")


# Cityscapes.

# The ids and the order of the 19 classes, from the table of the dataset's own scripts.
TRAIN_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


def test_cityscapes(tmp_path):
    root = tiny_maps.write_cityscapes(tmp_path / "city", values=range(34))
    examples = scan(root, "cityscapes")
    assert examples.problems == []
    names, _, num_things = examples.categories
    assert (len(names), num_things, names[0], names[18]) == (19, 0, "road", "bicycle")
    files = [record.file_name for record in examples.records]
    assert files[0] == "aachen_000000_000019_leftImg8bit.png" and "bochum" in files[2]
    stored = maps_of(examples)
    for position, index in enumerate((0, 2, 1)):  # by city
        _, indices = tiny_maps.draw(index, tiny_maps.SIZES[index], range(34))
        expected = np.zeros_like(indices)
        for train_id, id in enumerate(TRAIN_IDS):
            expected[indices == id] = 1 + train_id
        np.testing.assert_array_equal(stored[position], expected)
    name = by_name.find(config_of(root, "cityscapes"), "train", "semantic").name
    assert by_name.find(config_of(root, "cityscapes"), "train", "semantic").name == name
    next((root / "gtFine/train/aachen").glob("*_labelIds.png")).unlink()
    examples = scan(root, "cityscapes")
    assert examples.count == 2
    assert "_gtFine_labelIds.png is missing, left out" in examples.problems[0]
    assert by_name.find(config_of(root, "cityscapes"), "train", "semantic").name != name
    with pytest.raises(UserError, match=r"no Cityscapes at .*expected .*leftImg8bit/test"):
        scan(root, "cityscapes", "test")
    with pytest.raises(UserError, match="no Cityscapes at ''"):
        by_name.find(tiny_coco.data_config("", dataset="cityscapes"), "train", "semantic")


# scene_parse150.


class SceneParse150(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What the catalog's builder of this name writes, from a few pictures."""

    name = scene_parse150.CATALOG_NAME
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            name: tfds.features.Image(encoding_format="png") for name in ("image", "annotation")
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        for i, size in enumerate(tiny_maps.SIZES):
            image, things = tiny_maps.draw(i, size, (0, 1, 2, 100))
            others = np.random.default_rng(i).integers(0, 9, (2, *size))
            pixels = {"image": image, "annotation": np.stack([things, *others], -1)}
            yield i, {name: io.BytesIO(png(values)) for name, values in pixels.items()}


def png(pixels):
    return encoded(Image.fromarray(pixels.astype(np.uint8)))


def test_scene_parse150(tmp_path):
    SceneParse150(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    config = tiny_coco.data_config(tmp_path, dataset="scene_parse150")
    split = pipeline.load_split(config, "train[:2]", "semantic")
    assert len(split) == 2 and len(split.categories.names) == 150
    for index, size in enumerate(tiny_maps.SIZES[:2]):
        image, things = tiny_maps.draw(index, size, (0, 1, 2, 100))
        expected = np.select([things == 1, things == 2, things == 100], [8, 9, 150], 0)
        np.testing.assert_array_equal(split.truth(index), expected)
        np.testing.assert_array_equal(split.image(index), image)
    with pytest.raises(UserError, match="split 'val' of .* its splits are train, test"):
        pipeline.load_split(config, "val", "semantic")
    config.data_dir = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config\.data\.data_dir: TFDS has not prepared scene"):
        pipeline.load_split(config, "train", "semantic")


def test_annotations_of_scene_parse150():
    assert len(scene_parse150.THINGS) == 100 and scene_parse150.THINGS[-1] == 150
    assert scene_parse150.THINGS[3] == 13  # person
    indices = np.array([[0, 1], [17, 150]])  # grey ones are those of ADE20K
    np.testing.assert_array_equal(scene_parse150.read_annotation(png(indices)), indices)
    for data, message in (
        (png(indices + 1), "has class 151 of 150"),
        (png(np.full((2, 2, 3), 101)), "has class 101 of 100"),
        (png(indices)[:20], "its annotation cannot be decoded"),
    ):
        with pytest.raises(UserError, match=message):
            scene_parse150.read_annotation(data)
