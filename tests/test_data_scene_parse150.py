import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny_coco
import tiny_maps
from PIL import Image

from knet_jax.data import pipeline
from knet_jax.data.sources import scene_parse150


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


class SceneParse150(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What the catalog's builder of this name writes, from a few pictures."""

    name = scene_parse150.CATALOG_NAME
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "annotation": tfds.features.Image(encoding_format="png"),
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
            annotation = np.stack([things, *others], -1)
            yield i, {"image": io.BytesIO(png(image)), "annotation": io.BytesIO(png(annotation))}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("catalog")
    SceneParse150(data_dir=folder).download_and_prepare(file_format="array_record")
    return folder


def load(data_dir, split="train"):
    config = tiny_coco.data_config(data_dir, dataset="scene_parse150")
    return pipeline.load_split(config, split, "semantic")


def test_things_are_mapped_to_the_150_classes(data_dir):
    split = load(data_dir)
    assert len(split) == 3 and len(split.categories.names) == 150
    for index, size in enumerate(tiny_maps.SIZES):
        image, things = tiny_maps.draw(index, size, (0, 1, 2, 100))
        expected = np.select([things == 1, things == 2, things == 100], [8, 9, 150], 0)
        np.testing.assert_array_equal(split.truth(index), expected)
        np.testing.assert_array_equal(split.image(index), image)


def test_slices(data_dir):
    assert len(load(data_dir, "test[:2]")) == 2


def test_there_are_100_things():
    assert len(scene_parse150.THINGS) == 100 and scene_parse150.THINGS[-1] == 150
    assert scene_parse150.THINGS[3] == 13  # person


def test_grey_annotations_are_those_of_ade20k():
    indices = np.array([[0, 1], [17, 150]])
    np.testing.assert_array_equal(scene_parse150.read_annotation(png(indices)), indices)
    with pytest.raises(ValueError, match="has class 151 of 150"):
        scene_parse150.read_annotation(png(indices + 1))
    with pytest.raises(ValueError, match="has class 101 of 100"):
        scene_parse150.read_annotation(png(np.full((2, 2, 3), 101)))
    with pytest.raises(ValueError, match="its annotation cannot be decoded"):
        scene_parse150.read_annotation(png(indices)[:20])


def test_what_is_not_prepared_is_named(data_dir, tmp_path):
    with pytest.raises(ValueError, match=r"config\.data\.data_dir: TFDS has not prepared scene"):
        load(tmp_path)
    with pytest.raises(ValueError, match="split 'val' of .* its splits are train, test"):
        load(data_dir, "val")
