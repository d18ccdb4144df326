import numpy as np
import pytest
from PIL import Image

from ballad_hf.data.image_dataset import ImageDataset
from ballad_hf.training.phase_a_setup import check_before_training


def dataset_of(names, counts):
    labels = np.repeat(np.arange(len(names)), counts)
    return ImageDataset([Image.new("RGB", (40, 50))] * len(labels), labels, names)


def test_good_data_passes(tiny_clip):
    check_before_training(tiny_clip.clip, dataset_of(["cat", "dog"], [5, 1]), tiny_clip.image_processor)


def test_one_class_is_no_classification(tiny_clip):
    with pytest.raises(ValueError, match=r"one class only \(cat\)"):
        check_before_training(tiny_clip.clip, dataset_of(["cat"], [5]), tiny_clip.image_processor)


def test_every_class_without_a_training_image_is_named(tiny_clip):
    dataset = dataset_of(["cat", "dog", "fox", "owl"], [5, 0, 1, 0])
    with pytest.raises(ValueError, match="2 classes have no training image: dog, owl"):
        check_before_training(tiny_clip.clip, dataset, tiny_clip.image_processor)


def test_an_image_size_that_the_tower_cannot_take_is_named(tiny_clip):
    image_processor = type(tiny_clip.image_processor)(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}
    )
    with pytest.raises(ValueError, match=r"can't take images of 48 x 48 pixels.*32\*32"):
        check_before_training(tiny_clip.clip, dataset_of(["cat", "dog"], [5, 1]), image_processor)


def test_a_batch_larger_than_the_data_is_named_with_one_that_fits(tiny_clip):
    dataset = dataset_of(["cat", "dog"], [30, 10])
    check_before_training(tiny_clip.clip, dataset, tiny_clip.image_processor, batch_size=40)
    with pytest.raises(ValueError, match="batch_size is 512, but there are 40 training images.*such as 10"):
        check_before_training(tiny_clip.clip, dataset, tiny_clip.image_processor, batch_size=512)
