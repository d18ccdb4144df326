import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ballad_hf.data.transforms import (
    CropSchedule,
    PixelFormat,
    _random_box,
    _random_box_of_shape,
    evaluation_transform,
    five_crop_transform,
    train_transform,
)
from ballad_hf.features.cache import preprocessing_fingerprint


pytestmark = pytest.mark.numeric


def processor(**options):
    return CLIPImageProcessorPil(
        **{"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, **options}
    )


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def grey_levels(pixel_values, image_processor):
    """Pixel values back as numbers of 0 to 255."""
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
    )
    return (pixel_values * std + mean) * 255


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(8, 64), st.integers(8, 64), st.integers(8, 64))
def test_evaluation_is_what_the_processor_does(width, height, edge, crop_height, crop_width):
    image_processor = processor(size={"shortest_edge": edge}, crop_size={"height": crop_height, "width": crop_width})
    picture = noise(width, height)
    expected = image_processor(picture, return_tensors="pt")["pixel_values"][0]
    made = evaluation_transform(image_processor)(picture)
    assert made.dtype == torch.float32
    assert made.shape == expected.shape
    assert (grey_levels(made, image_processor) - grey_levels(expected, image_processor)).abs().max() < 0.01


@pytest.mark.parametrize(
    "options",
    [
        {"size": {"height": 24, "width": 40}, "do_center_crop": False},
        {"do_resize": False},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"resample": Image.Resampling.BILINEAR},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "rescale_factor": 1 / 127.5},
    ],
)
def test_every_step_of_the_processor_is_followed(options):
    image_processor = processor(**options)
    picture = noise(70, 51)
    expected = image_processor(picture, return_tensors="pt")["pixel_values"][0].float()
    torch.testing.assert_close(evaluation_transform(image_processor)(picture), expected, rtol=1e-5, atol=1e-5)


def test_a_whole_number_is_a_square():
    plain = SimpleNamespace(
        do_resize=True, size=20, do_center_crop=True, crop_size=16, resample=3, do_rescale=False, do_normalize=False
    )
    assert evaluation_transform(plain)(noise(40, 30)).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_center_crop": False}, "images differ in size"),
        ({"do_resize": False, "do_center_crop": False}, "resizes to nothing and crops to nothing"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "images differ in size"),
        ({"size": {"height": 50, "width": 50}}, "whatever the shape, then crops"),
        ({"do_pad": True}, "do_pad set"),
    ],
)
def test_processors_that_can_not_be_followed_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PixelFormat.of(processor(**options))


def test_training_draws_from_its_generator_alone():
    transform = train_transform(processor())
    picture = noise(60, 50)
    first, again, other = (transform(picture, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (3, 32, 32)


def test_without_any_augmentation_it_is_the_whole_image():
    transform = train_transform(processor(), scale=(1.0, 1.0), horizontal_flip=0, color_jitter=0)
    picture = noise(50, 50)
    torch.testing.assert_close(
        transform(picture, np.random.default_rng(0)), evaluation_transform(processor())(picture)
    )


def test_flips_come_as_often_as_they_should():
    picture = Image.linear_gradient("L").rotate(90).convert("RGB")  # dark on one side
    transform = train_transform(processor(), horizontal_flip=0.25, color_jitter=0)
    rng = np.random.default_rng(0)
    flipped = 0
    for _ in range(400):
        pixel_values = transform(picture, rng)
        flipped += bool(pixel_values[0, :, 0].mean() < pixel_values[0, :, -1].mean())
    unflipped_is_dark_left = evaluation_transform(processor())(picture)[0, 0, 0] < 0
    share = flipped / 400 if not unflipped_is_dark_left else 1 - flipped / 400
    assert abs(share - 0.25) < 0.07


def test_jitter_keeps_to_its_strength():
    picture = Image.new("RGB", (40, 40), (100, 100, 100))
    transform = train_transform(processor(), color_jitter=0.4)
    rng = np.random.default_rng(0)
    # One grey everywhere: only brightness acts on it.
    levels = [grey_levels(transform(picture, rng), processor()).mean().item() for _ in range(300)]
    assert 59 <= min(levels) < 64
    assert 136 < max(levels) <= 141


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500), st.floats(0.05, 1), st.integers(0, 2**32))
def test_a_random_box_lies_in_the_image_and_keeps_its_share(width, height, low, seed):
    left, top, right, bottom = _random_box(width, height, (low, 1.0), np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if min(width, height) > 50 and max(width, height) / min(width, height) < 4 / 3:
        share = (right - left) * (bottom - top) / (width * height)
        assert low - 0.05 <= share <= 1
        assert 0.7 < (right - left) / (bottom - top) < 1.4


def test_boxes_reach_every_part_of_the_image():
    rng = np.random.default_rng(0)
    boxes = np.array([_random_box(100, 80, (0.5, 1.0), rng) for _ in range(500)])
    assert boxes[:, :2].min(axis=0).tolist() == [0, 0]
    assert boxes[:, 2:].max(axis=0).tolist() == [100, 80]
    shares = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 8000
    # Areas are drawn evenly; the largest don't fit at every aspect ratio, so that the mean lies below 0.75.
    assert 0.65 < shares.mean() < 0.76
    assert shares.min() < 0.53


def test_five_views_are_the_centre_and_the_corners():
    picture = noise(36, 36)
    views = five_crop_transform(processor(), expand=4)(picture)
    whole = evaluation_transform(processor(size={"shortest_edge": 36}, crop_size={"height": 36, "width": 36}))(picture)
    assert views.shape == (5, 3, 32, 32)
    for view, (top, left) in zip(views, [(2, 2), (0, 0), (0, 4), (4, 0), (4, 4)], strict=True):
        torch.testing.assert_close(view, whole[:, top : top + 32, left : left + 32])


@pytest.mark.parametrize(("margin", "start"), [(1, 0), (3, 2), (5, 2), (7, 4)])  # halves round to even
def test_the_centre_of_five_crops_is_that_of_torchvision(margin, start):
    picture = noise(32 + margin, 32 + margin)
    centre = five_crop_transform(processor(), expand=margin)(picture)[0]
    side = 32 + margin
    whole = evaluation_transform(processor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}))
    torch.testing.assert_close(centre, whole(picture)[:, start : start + 32, start : start + 32])


def test_a_crop_schedule_by_hand():
    at = [CropSchedule(3, shape).at_epoch((0.2, 1.0), 1)[0] for shape in ("linear", "convex", "concave")]
    half = np.sqrt(0.75)
    assert at == pytest.approx([0.6, 0.2 + 0.8 * (1 - half), 0.2 + 0.8 * half])
    for shape in ("linear", "convex", "concave"):
        assert CropSchedule(5, shape).at_epoch((0.2, 1.0), 0) == (0.2, 1.0)
        assert CropSchedule(5, shape).at_epoch((0.2, 1.0), 4) == (1.0, 1.0)
        assert CropSchedule(5, shape).at_epoch((0.2, 1.0), 9) == (1.0, 1.0)
        assert CropSchedule(1, shape).at_epoch((0.2, 1.0), 0) == (0.2, 1.0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500), st.floats(0.05, 1), st.integers(0, 2**32))
def test_a_box_of_the_towers_shape_is_a_square_in_the_image(width, height, low, seed):
    box = _random_box_of_shape(width, height, 32, 32, (low, 1.0), np.random.default_rng(seed))
    left, top, right, bottom = box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert right - left == bottom - top
    least = min(np.sqrt(low * width * height), width, height)
    assert right - left >= max(1, np.floor(least))


def test_a_schedule_ends_with_the_largest_square_and_squeezes_nothing():
    """Red, green and blue thirds of a wide image: its height is a third of its width."""
    stripes = np.zeros((60, 180, 3), dtype=np.uint8)
    for third in range(3):
        stripes[:, 60 * third : 60 * (third + 1), third] = 255
    image = Image.fromarray(stripes)
    last = train_transform(processor(), (0.08, 1.0), 0, 0, crop_schedule=CropSchedule(5)).at_epoch(4)
    for seed in range(20):
        grey = grey_levels(last(image, np.random.default_rng(seed)), processor())
        assert (grey.mean(dim=(1, 2)) > 25).sum() <= 2  # a square covers two thirds at most
    boxes = {_random_box_of_shape(180, 60, 32, 32, (1.0, 1.0), np.random.default_rng(seed)) for seed in range(20)}
    assert {(box[2] - box[0], box[3] - box[1]) for box in boxes} == {(60, 60)}
    assert len(boxes) > 10  # at a random position
    tall = _random_box_of_shape(100, 300, 32, 64, (1.0, 1.0), np.random.default_rng(0))
    assert (tall[2] - tall[0], tall[3] - tall[1]) == (100, 200)  # for a tower that is not square


def test_a_schedule_changes_the_transform_of_an_epoch():
    transform = train_transform(processor(), scale=(0.1, 1.0), crop_schedule=CropSchedule(2))
    assert transform.at_epoch(0).scale == (0.1, 1.0)
    assert transform.at_epoch(1).scale == (1.0, 1.0)
    fixed = train_transform(processor())
    assert fixed.at_epoch(7) is fixed


def test_transforms_can_be_told_apart_by_a_cache():
    made = [
        evaluation_transform(processor()),
        evaluation_transform(processor(resample=2)),
        evaluation_transform(processor(image_mean=[0.5, 0.5, 0.5])),
        train_transform(processor()),
        train_transform(processor(), scale=(0.4, 1.0)),
        train_transform(processor(), color_jitter=0.3),
        train_transform(processor(), crop_schedule=CropSchedule(3)),
        five_crop_transform(processor(), 4),
    ]
    assert len({preprocessing_fingerprint(transform) for transform in made}) == len(made)
    again = evaluation_transform(processor())
    assert preprocessing_fingerprint(again) == preprocessing_fingerprint(made[0])
    assert dataclasses.is_dataclass(again)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (0.0, 1.0)}, "scale is"),
        ({"scale": (0.9, 0.5)}, "scale is"),
        ({"scale": (0.5, 1.5)}, "scale is"),
        ({"horizontal_flip": 1.5}, "probability"),
        ({"color_jitter": -0.1}, "color_jitter is -0.1"),
        ({"color_jitter": float("nan")}, "color_jitter is nan"),
    ],
)
def test_bad_augmentation_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train_transform(processor(), **options)
    with pytest.raises(ValueError, match="expand is 0"):
        five_crop_transform(processor(), 0)
    with pytest.raises(ValueError, match="epochs is 0"):
        CropSchedule(0)
    with pytest.raises(ValueError, match="choose one of"):
        CropSchedule(2, "round")
