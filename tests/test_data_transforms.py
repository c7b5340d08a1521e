"""Pixels on the host: pictures decoded, resized and distorted, annotations sampled."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from knet_jax.data import photometric, transforms
from knet_jax.data.photometric import Distortion
from knet_jax.segmentation import image_files
from knet_jax.system.errors import UserError


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


# Decoding.


def test_pictures_of_every_mode_become_rgb():
    red = np.zeros((6, 9, 3), np.uint8)
    red[..., 0] = 200
    data = encoded(Image.fromarray(red), "PNG")
    np.testing.assert_array_equal(image_files.load_image(data, (6, 9)), red)
    for mode, format in (
        *(("L", "JPEG"), ("L", "PNG"), ("CMYK", "JPEG"), ("P", "PNG"), ("1", "PNG")),
    ):
        picture = Image.fromarray(smooth(40, 60)).convert(mode)
        image = image_files.load_image(encoded(picture, format), (40, 60))
        assert image.shape == (40, 60, 3) and image.dtype == np.uint8
        assert difference(image, np.array(picture.convert("RGB"))) < 4
    rgb = smooth(20, 30)
    alpha = np.dstack([rgb, np.full((20, 30), 77, np.uint8)])
    for format in ("PNG", "TIFF"):
        data = encoded(Image.fromarray(alpha), format)
        np.testing.assert_array_equal(image_files.load_image(data, (20, 30)), rgb)
    for format in ("TGA", "PCX", "SGI", "PPM", "ICNS"):  # most of which cv2 does not read
        data = encoded(Image.fromarray(smooth(512, 512)), format)
        image = image_files.decode_image(data)
        np.testing.assert_array_equal(image, np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    turned = encoded(Image.fromarray(rgb), "TIFF", tiffinfo={0x0112: 6})
    np.testing.assert_array_equal(image_files.decode_image(turned), np.rot90(rgb, -1))
    deep = rgb.astype(np.uint16) * 257
    data = cv2.imencode(".png", deep[..., ::-1])[1].tobytes()
    assert np.abs(image_files.load_image(data, (20, 30)).astype(int) - rgb).max() <= 1
    grey = cv2.imencode(".png", deep[..., 0])[1].tobytes()
    image = image_files.load_image(grey, (20, 30))
    assert np.abs(image.astype(int) - rgb[..., :1]).max() <= 1


def turned_picture(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(smooth(40, 60))
    return picture, encoded(picture, "JPEG", quality=95, exif=exif)


def test_exif_follows_the_annotation():
    picture, data = turned_picture(6)
    # What is stored must be turned clockwise by 90 degrees to be seen upright.
    upright = np.array(picture.transpose(Image.Transpose.ROTATE_270))
    assert difference(image_files.load_image(data, (60, 40)), upright) < 4
    assert difference(image_files.load_image(data, (40, 60)), np.array(picture)) < 4
    picture, data = turned_picture(3)
    upright = np.array(picture.transpose(Image.Transpose.ROTATE_180))
    assert difference(image_files.load_image(data, (40, 60)), upright) < 4


def test_damaged_pictures_are_refused():
    for format in ("JPEG", "PNG", "TGA", "GIF"):
        data = encoded(Image.fromarray(smooth(80, 90)), format)
        for keep in (0.0, 0.3, 0.9):
            with pytest.raises(UserError, match="truncated|decoded"):
                image_files.load_image(data[: int(keep * len(data))], (80, 90))
    data = encoded(Image.fromarray(smooth(40, 60)), "JPEG")
    frame = data.index(b"\xff\xc0")
    huge = data[: frame + 5] + b"\xff\xdc" * 2 + data[frame + 9 : -50]  # as its header says
    with pytest.raises(UserError, match="truncated"):
        image_files.decode_image(huge)
    data = encoded(Image.fromarray(smooth(20, 30)), "PNG")
    with pytest.raises(UserError, match="is 30x20 where 31x20 is expected"):
        image_files.load_image(data, (20, 31))
    with pytest.raises(UserError, match="is 30x20 where 20x30 is expected"):
        image_files.load_panoptic(data, (30, 20))


def test_jpeg_with_thumbnail_and_trailing_bytes_is_whole():
    picture = Image.fromarray(smooth(40, 60))
    thumbnail = encoded(picture.resize((6, 4)), "JPEG")
    whole = encoded(picture, "JPEG", comment=thumbnail)
    assert image_files.load_image(whole + b"trailing", (40, 60)).shape == (40, 60, 3)
    with pytest.raises(UserError, match="truncated"):
        image_files.load_image(whole[:-30], (40, 60))


def test_ids_and_colors_are_inverse():
    ids = np.array([[0, 1, 255, 256], [65535, 65536, 8_345_037, (1 << 24) - 1]], np.int32)
    colors = image_files.segment_colors(ids)
    assert colors[1, 2].tolist() == [8_345_037 % 256, 8_345_037 // 256 % 256, 8_345_037 // 65536]
    np.testing.assert_array_equal(image_files.segment_ids(colors), ids)
    assert image_files.segment_ids(colors[:, :0]).shape == (2, 0)


# Resizing.


def test_a_side_of_a_long_picture_is_never_nothing():
    assert transforms.resized_size((1, 3000), 800, 1333) == (1, 1333)


def test_sampled_pixels_average_to_the_bilinear_quarter():
    ids = np.kron(np.arange(48).reshape(6, 8) % 3, np.ones((5, 7), int)).astype(np.int32)
    mask = np.pad(ids == 1, ((0, 2), (0, 0)))
    rows, columns = transforms.sampled_source(transforms.whole((30, 56)), (16, 28), ids.shape)
    sampled = np.pad(mask[rows][:, columns], ((0, 1), (0, 0)))
    quarter = cv2.resize(mask.astype(np.float32), (14, 8), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(sampled.reshape(8, 2, 14, 2).mean((1, 3)), quarter)


# Photometric distortion.


def test_each_change_of_colors():
    image = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    np.testing.assert_array_equal(photometric.apply(image, Distortion()), image)
    for brightness in (-20.0, 31.5):
        expected = np.clip(image + brightness, 0, 255).astype(np.uint8)
        np.testing.assert_array_equal(photometric.apply(image, Distortion(brightness)), expected)
    expected = np.clip(image * 1.5, 0, 255).astype(np.uint8)
    for last in (False, True):
        distorted = photometric.apply(image, Distortion(contrast=1.5, contrast_last=last))
        np.testing.assert_array_equal(distorted, expected)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV).astype(float)
    hsv[..., 0] = (hsv[..., 0] - 18) % 180
    hsv[..., 1] = np.minimum(hsv[..., 1] * 0.5, 255)
    expected = cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)
    distorted = photometric.apply(image, Distortion(saturation=0.5, hue=-18))
    np.testing.assert_array_equal(distorted, expected)
    # Red that is turned by a third of the circle is green.
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 200
    np.testing.assert_array_equal(photometric.apply(red, Distortion(hue=60)), red[..., [1, 0, 2]])
    # Contrast that comes last is seen beyond what the colors cut off.
    image = np.full((1, 1, 3), (250, 100, 100), np.uint8)
    first, last = (
        photometric.apply(image, Distortion(0.0, 1.5, 0.5, 0, last)) for last in (False, True)
    )
    assert first.tolist() != last.tolist() and last[0, 0, 0] == 255 and last[0, 0, 1] > 250


def test_draws_fill_the_ranges_and_each_change_is_made_half_the_time():
    rng = np.random.default_rng(0)
    drawn = np.array([photometric.draw(rng) for _ in range(4000)], float)
    made = drawn[:, :4] != np.array(Distortion(), float)[:4]
    # Some turns of the hue are 0: one in 37.
    np.testing.assert_allclose(made.mean(0), [0.5, 0.5, 0.5, 0.5 * 36 / 37], atol=0.03)
    assert abs(np.corrcoef(made.T) - np.eye(4)).max() < 0.06
    np.testing.assert_allclose(drawn.min(0), [-32, 0.5, 0.5, -18, 0], atol=0.1)
    np.testing.assert_allclose(drawn.max(0), [32, 1.5, 1.5, 18, 1], atol=0.1)
    np.testing.assert_allclose(drawn[:, 4].mean(), 0.5, atol=0.03)
    draws = [photometric.draw(np.random.default_rng(7)) for _ in range(2)]
    assert draws[0] == draws[1]
