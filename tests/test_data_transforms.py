import io
import json

import cv2
import numpy as np
import pytest
from PIL import Image

from knet_jax.data import transforms
from knet_jax.segmentation import image_files


def smooth(height, width, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 5, channels), np.uint8)
    return cv2.resize(small, (width, height)).reshape(height, width, channels)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def difference(a, b):
    return np.abs(a.astype(int) - b.astype(int)).mean()


def test_rgb_order():
    red = np.zeros((6, 9, 3), np.uint8)
    red[..., 0] = 200
    data = encoded(Image.fromarray(red), "PNG")
    np.testing.assert_array_equal(image_files.load_image(data, (6, 9)), red)


@pytest.mark.parametrize(
    "mode, format", [("L", "JPEG"), ("L", "PNG"), ("CMYK", "JPEG"), ("P", "PNG"), ("1", "PNG")]
)
def test_pictures_of_other_modes_become_rgb(mode, format):
    picture = Image.fromarray(smooth(40, 60)).convert(mode)
    expected = np.array(picture.convert("RGB"))
    image = image_files.load_image(encoded(picture, format), (40, 60))
    assert image.shape == (40, 60, 3) and image.dtype == np.uint8
    assert difference(image, expected) < 4


def test_a_truncated_picture_that_says_it_is_huge_is_refused():
    data = encoded(Image.fromarray(smooth(40, 60)), "JPEG")
    frame = data.index(b"\xff\xc0")
    huge = data[: frame + 5] + b"\xff\xdc" * 2 + data[frame + 9 : -50]
    with pytest.raises(ValueError, match="truncated"):
        image_files.decode_image(huge)


def test_alpha_is_dropped():
    rgb = smooth(20, 30)
    alpha = np.dstack([rgb, np.full((20, 30), 77, np.uint8)])
    data = encoded(Image.fromarray(alpha), "PNG")
    np.testing.assert_array_equal(image_files.load_image(data, (20, 30)), rgb)


def test_sixteen_bits_become_eight():
    deep = smooth(20, 30).astype(np.uint16) * 257
    data = cv2.imencode(".png", deep[..., ::-1])[1].tobytes()
    assert np.abs(image_files.load_image(data, (20, 30)).astype(int) - deep // 257).max() <= 1
    grey = cv2.imencode(".png", deep[..., 0])[1].tobytes()
    image = image_files.load_image(grey, (20, 30))
    assert np.abs(image.astype(int) - deep[..., :1] // 257).max() <= 1


def turned_picture(orientation=6):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(smooth(40, 60))
    return picture, encoded(picture, "JPEG", quality=95, exif=exif)


def test_exif_follows_the_annotation():
    picture, data = turned_picture()
    # Orientation 6: what is stored must be turned clockwise by 90 degrees to be seen upright.
    upright = np.array(picture.transpose(Image.Transpose.ROTATE_270))
    assert difference(image_files.load_image(data, (60, 40)), upright) < 4
    assert difference(image_files.load_image(data, (40, 60)), np.array(picture)) < 4


def test_exif_upside_down_is_turned():
    picture, data = turned_picture(3)
    upright = np.array(picture.transpose(Image.Transpose.ROTATE_180))
    assert difference(image_files.load_image(data, (40, 60)), upright) < 4


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_damaged_pictures_are_refused(format, keep):
    data = encoded(Image.fromarray(smooth(80, 90)), format)
    with pytest.raises(ValueError, match="truncated|decoded"):
        image_files.load_image(data[: int(keep * len(data))], (80, 90))


def test_other_size_is_refused():
    data = encoded(Image.fromarray(smooth(20, 30)), "PNG")
    with pytest.raises(ValueError, match="is 30x20 where 31x20 is expected"):
        image_files.load_image(data, (20, 31))
    with pytest.raises(ValueError, match="is 30x20 where 20x30 is expected"):
        image_files.load_panoptic(data, (30, 20))


def test_jpeg_with_thumbnail_and_trailing_bytes_is_whole():
    picture = Image.fromarray(smooth(40, 60))
    thumbnail = encoded(picture.resize((6, 4)), "JPEG")
    whole = encoded(picture, "JPEG", comment=thumbnail)
    assert image_files.load_image(whole + b"trailing", (40, 60)).shape == (40, 60, 3)
    with pytest.raises(ValueError, match="truncated"):
        image_files.load_image(whole[:-30], (40, 60))


def test_ids_and_colors_are_inverse():
    ids = np.array([[0, 1, 255, 256], [65535, 65536, 8_345_037, (1 << 24) - 1]], np.int32)
    colors = image_files.segment_colors(ids)
    assert colors[1, 2].tolist() == [8_345_037 % 256, 8_345_037 // 256 % 256, 8_345_037 // 65536]
    np.testing.assert_array_equal(image_files.segment_ids(colors), ids)


def test_resized_size_equals_the_reference(fixtures):
    cases = json.loads((fixtures / "transforms_resize.json").read_text())["det_1333x800"]
    for case in cases:
        size = transforms.resized_size((case["h"], case["w"]), 800, 1333)
        assert size == (case["out_h"], case["out_w"])


def test_resized_size_never_vanishes():
    assert transforms.resized_size((1, 3000), 800, 1333) == (1, 1333)


@pytest.mark.parametrize("flip", [False, True])
def test_place_image(flip):
    image = smooth(30, 40)
    canvas = np.full((64, 96, 3), 9, np.uint8)
    transforms.place_image(image, transforms.whole((48, 64), flip), canvas)
    expected = cv2.resize(image, (64, 48), interpolation=cv2.INTER_LINEAR)
    expected = expected[:, ::-1] if flip else expected
    np.testing.assert_array_equal(canvas[:48, :64], expected)
    assert np.all(canvas[48:] == 9) and np.all(canvas[:, 64:] == 9)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(61, 93), (30, 41), (96, 117), (3, 128), (7, 1)])
def test_sampling_equals_resizing_everything(flip, size):
    rng = np.random.default_rng(0)
    canvas, (height, width) = (96, 128), (30, 41)
    known = np.array([5, 300, 70_000, 12_000_000])
    ids = rng.choice([0, 5, 300, 70_000, 12_000_000, 999], (height, width)).astype(np.int32)
    sampled = transforms.sample_segments(
        image_files.segment_colors(ids),
        transforms.whole(size, flip),
        canvas,
        known,
        [1, 2, 3, 200],
        np.uint8,
    )

    values = np.select([ids == id for id in known], [1, 2, 3, 200], 0)
    rows = np.floor((np.arange(size[0]) + 0.5) * height / size[0]).astype(int)
    columns = np.floor((np.arange(size[1]) + 0.5) * width / size[1]).astype(int)
    resized = values[rows][:, columns]
    resized = resized[:, ::-1] if flip else resized
    padded = np.zeros(canvas, int)
    padded[: size[0], : size[1]] = resized
    expected = padded.reshape(24, 4, 32, 4)[:, 1:3, :, 1:3].reshape(48, 64)
    assert sampled.dtype == np.uint8
    np.testing.assert_array_equal(sampled, expected)


def test_sampled_pixels_average_to_the_bilinear_quarter():
    ids = np.kron(np.arange(48).reshape(6, 8) % 3, np.ones((5, 7), int)).astype(np.int32)
    mask = np.pad(ids == 1, ((0, 2), (0, 0)))
    sampled = transforms.sample_segments(
        image_files.segment_colors(ids), transforms.whole((30, 56)), mask.shape, [1], [1], np.uint8
    )
    quarter = cv2.resize(mask.astype(np.float32), (14, 8), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(sampled.reshape(8, 2, 14, 2).mean((1, 3)), quarter)
