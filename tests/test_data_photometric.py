import cv2
import numpy as np
import pytest

from knet_jax.data import photometric
from knet_jax.data.photometric import Distortion


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (24, 32, 3), np.uint8)


def test_the_default_changes_nothing(image):
    np.testing.assert_array_equal(photometric.apply(image, Distortion()), image)


@pytest.mark.parametrize("brightness", [-20.0, 31.5])
def test_brightness_is_added_and_cut_off(image, brightness):
    expected = np.clip(image + brightness, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(photometric.apply(image, Distortion(brightness)), expected)


def test_contrast_multiplies_and_is_cut_off(image):
    expected = np.clip(image * 1.5, 0, 255).astype(np.uint8)
    for last in (False, True):
        distortion = Distortion(contrast=1.5, contrast_last=last)
        np.testing.assert_array_equal(photometric.apply(image, distortion), expected)


def test_saturation_and_hue_change_their_channels_alone(image):
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV).astype(float)
    hsv[..., 0] = (hsv[..., 0] - 18) % 180
    hsv[..., 1] = np.minimum(hsv[..., 1] * 0.5, 255)
    expected = cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)
    distorted = photometric.apply(image, Distortion(saturation=0.5, hue=-18))
    np.testing.assert_array_equal(distorted, expected)


def test_red_turned_by_a_third_of_the_circle_is_green():
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 200
    green = photometric.apply(red, Distortion(hue=60))
    np.testing.assert_array_equal(green, red[..., [1, 0, 2]])


def test_contrast_last_follows_the_colors():
    image = np.full((1, 1, 3), (250, 100, 100), np.uint8)
    first = photometric.apply(image, Distortion(contrast=1.5, saturation=0.5))
    last = photometric.apply(image, Distortion(contrast=1.5, saturation=0.5, contrast_last=True))
    assert first.ravel().tolist() != last.ravel().tolist()
    assert last[0, 0, 0] == 255 and last[0, 0, 1] > 250


def test_draws_fill_the_ranges_and_each_change_is_made_half_the_time():
    rng = np.random.default_rng(0)
    drawn = np.array([photometric.draw(rng) for _ in range(4000)], float)
    still = np.array(Distortion(), float)
    made = drawn[:, :4] != still[:4]
    # Some turns of the hue are 0: one in 37.
    np.testing.assert_allclose(made.mean(0), [0.5, 0.5, 0.5, 0.5 * 36 / 37], atol=0.03)
    assert abs(np.corrcoef(made.T) - np.eye(4)).max() < 0.06
    np.testing.assert_allclose(drawn.min(0), [-32, 0.5, 0.5, -18, 0], atol=0.1)
    np.testing.assert_allclose(drawn.max(0), [32, 1.5, 1.5, 18, 1], atol=0.1)
    np.testing.assert_allclose(drawn[:, 4].mean(), 0.5, atol=0.03)


def test_the_same_source_of_randomness_gives_the_same_distortion():
    draws = [photometric.draw(np.random.default_rng(7)) for _ in range(2)]
    assert draws[0] == draws[1]
