import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import tiny_maps
from PIL import Image

from knet_jax.data.sources import index_maps
from knet_jax.segmentation import class_lists

CATEGORIES = class_lists.stuff_categories({1: "wall", 4: "floor"})


def encoded(image, **options):
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def indices_of(values, size=(6, 9)):
    return np.random.default_rng(0).choice(values, size).astype(np.uint8)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_are_read_as_indices(bits):
    indices = indices_of(range(min(2**bits, 200)))
    image = Image.fromarray(indices)
    image.putpalette(np.random.default_rng(1).integers(0, 256, 768).astype(np.uint8).tobytes())
    data = encoded(image, bits=bits)
    assert data[24] == bits and data[25] == 3
    np.testing.assert_array_equal(index_maps.read_indices(data, "x.png"), indices)


def test_grey_of_eight_and_of_sixteen_bits():
    indices = indices_of((0, 3, 255)).astype(np.uint16)
    data = encoded(Image.fromarray(indices.astype(np.uint8)))
    np.testing.assert_array_equal(index_maps.read_indices(data, "x.png"), indices)
    deep = indices * 257
    data = cv2.imencode(".png", deep)[1].tobytes()
    assert data[24] == 16
    np.testing.assert_array_equal(index_maps.read_indices(data, "x.png"), deep)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits_is_not_spread(bits):
    """Tools that shrink PNG files write so; decoders return multiples of 255, 85 or 17."""
    indices = indices_of(range(2**bits), (6, 8))
    unpacked = np.unpackbits(indices[..., None], axis=-1)[..., -bits:].reshape(6, -1)
    packed = np.packbits(unpacked, axis=-1)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)

    def chunk(name, content):
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 8, 6, bits, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    data += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(index_maps.read_indices(data, "x.png"), indices)


def test_what_is_no_png():
    image = Image.fromarray(indices_of((1, 4)))
    for kind in ("JPEG", "BMP"):
        stream = io.BytesIO()
        image.save(stream, kind)
        with pytest.raises(ValueError, match="x.png is no PNG"):
            index_maps.read_indices(stream.getvalue(), "x.png")
    with pytest.raises(ValueError, match="x.png cannot be decoded"):
        index_maps.read_indices(encoded(image)[:12], "x.png")


def test_colors_are_no_indices():
    data = encoded(Image.fromarray(np.zeros((4, 5, 3), np.uint8)))
    with pytest.raises(ValueError, match="x.png has pixels of mode RGB, expected one index"):
        index_maps.read_indices(data, "x.png")
    with pytest.raises(ValueError, match="x.png cannot be decoded"):
        index_maps.read_indices(data[:30], "x.png")


# Datasets.


@pytest.fixture
def pairs(tmp_path):
    found = []
    for i, size in enumerate(tiny_maps.SIZES):
        path, png = tmp_path / f"{i}.jpg", tmp_path / f"{i}.png"
        tiny_maps.write_pair(path, png, *tiny_maps.draw(i, size, (0, 1, 4)))
        found.append(index_maps.Pair(path, png, path.name))
    return found


def scan(pairs, ignored=(0,), remedy=""):
    return index_maps.scan(pairs, CATEGORIES, ignored, "the folder", remedy)


def test_sound_dataset(pairs):
    examples = scan(pairs)
    assert examples.categories == (("wall", "floor"), (1, 4), 0)
    assert examples.problems == [] and examples.count == 3
    for i, record in enumerate(examples.records):
        assert record.image == pairs[i].path.read_bytes()
        assert (record.image_id, record.file_name, record.size) == (
            i,
            f"{i}.jpg",
            tiny_maps.SIZES[i],
        )
        _, indices = tiny_maps.draw(i, record.size, (0, 1, 4))
        stored = cv2.imdecode(np.frombuffer(record.annotation, np.uint8), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(stored, np.select([indices == 1, indices == 4], [1, 2], 0))


def check_problem(pairs, pattern, count):
    examples = scan(pairs)
    [problem] = examples.problems
    assert pattern in problem
    assert examples.count == count == len(list(examples.records))


def test_missing_png_is_left_out(pairs):
    pairs[1].png.unlink()
    check_problem(pairs, f"1.jpg: {pairs[1].png} is missing, left out", 2)


def test_missing_picture_is_left_out(pairs):
    pairs[1].path.unlink()
    check_problem(pairs, f"1.jpg: {pairs[1].path} is missing, left out", 2)


def test_png_of_another_size_is_left_out(pairs):
    pairs[1].png.write_bytes(pairs[0].png.read_bytes())
    check_problem(pairs, "1.jpg: picture is 60x80 but its index PNG 80x60, left out", 2)


def test_damaged_png_is_left_out(pairs):
    pairs[1].png.write_bytes(pairs[1].png.read_bytes()[:60])
    check_problem(pairs, "1.png is not a picture, left out", 2)


def test_color_png_is_left_out(pairs):
    cv2.imwrite(str(pairs[1].png), np.zeros((80, 60, 3), np.uint8))
    check_problem(pairs, "1.png has pixels of mode RGB", 2)


def test_strange_indices_are_named_and_ignored(pairs):
    _, indices = tiny_maps.draw(1, tiny_maps.SIZES[1], (0, 1, 9))
    cv2.imwrite(str(pairs[1].png), indices.astype(np.uint8))
    check_problem(pairs, "1.jpg: indices [9] are no class, ignored", 3)
    record = list(scan(pairs).records)[1]
    stored = cv2.imdecode(np.frombuffer(record.annotation, np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(stored, indices == 1)
    with pytest.raises(ValueError, match=r"1\.png has indices \[9\] that are no class: do this"):
        scan(pairs, remedy="do this")


def test_picture_without_labels_is_named(pairs):
    cv2.imwrite(str(pairs[1].png), np.zeros((80, 60), np.uint8))
    check_problem(pairs, "1.jpg: every pixel is ignored", 3)


def test_nothing_can_be_used(pairs):
    with pytest.raises(ValueError, match="no picture in the folder"):
        scan([])
    for pair in pairs:
        pair.png.unlink()
    with pytest.raises(ValueError, match="the first of 3 problems: 0.jpg: .*0.png is missing"):
        scan(pairs)


def test_pictures_are_found_in_subfolders_by_name(tmp_path):
    for name in ("b/2.JPG", "a/1.png", "3.webp", "a/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = [str(p.relative_to(tmp_path)) for p in index_maps.find_pictures(tmp_path)]
    assert found == ["3.webp", "a/1.png", "b/2.JPG"]
