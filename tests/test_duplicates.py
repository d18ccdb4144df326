import io

import numpy as np
import pytest
from PIL import Image

from ballad_hf.data.duplicates import exact_duplicates, near_duplicates, pixel_digest, thumbnail


def photo(seed, size=(120, 90)):
    """Smooth shapes and some grain, as a photograph has."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 6, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8))


def recompressed(picture, quality):
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=quality)
    return Image.open(file).convert("RGB")


def near(*pictures):
    return near_duplicates(np.stack([thumbnail(picture) for picture in pictures]))


def digests(*pictures):
    return np.stack([np.frombuffer(pixel_digest(picture), np.uint8) for picture in pictures])


def test_exact_copies_name_the_first_of_their_kind():
    one, other = photo(1), photo(2)
    assert exact_duplicates(digests(one, other, one.copy(), one, other)) == [(0, 2), (0, 3), (1, 4)]
    assert exact_duplicates(digests(one, other)) == []
    assert exact_duplicates(np.empty((0, 16), np.uint8)) == []


def test_the_same_bytes_in_another_shape_are_another_picture():
    assert pixel_digest(Image.new("RGB", (2, 3))) != pixel_digest(Image.new("RGB", (3, 2)))


@pytest.mark.parametrize(
    "change",
    [
        lambda picture: recompressed(picture, 40),
        lambda picture: picture.resize((60, 45), Image.Resampling.BICUBIC),
        lambda picture: picture.resize((300, 225), Image.Resampling.LANCZOS),
        lambda picture: recompressed(picture.resize((80, 60)), 60),
    ],
)
def test_copies_that_were_resized_or_recompressed_are_found(change):
    originals = [photo(seed) for seed in range(20)]
    pairs = near(*originals, *(change(picture) for picture in originals))
    found = {tuple(pair) for pair in pairs}
    assert found <= {(index, 20 + index) for index in range(20)}
    assert len(found) >= 19


def test_other_pictures_are_not_taken_for_copies():
    assert near(*(photo(seed) for seed in range(200))) == []
    mirrored = photo(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert near(photo(0), mirrored) == []
    # One hash, other pictures: a ramp, and a steeper one.
    ramp = Image.linear_gradient("L").convert("RGB")
    assert near(ramp, ramp.point(lambda value: value // 2)) == []


def test_pictures_of_one_colour_are_left_out():
    assert near(*(Image.new("RGB", (30, 30), (7, 7, 7)) for _ in range(3))) == []


def test_the_search_in_bands_finds_what_comparing_all_pairs_finds():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (40, 9, 9)).astype(np.int16)
    noisy = [np.clip(base + rng.integers(-width, width + 1, base.shape), 0, 255) for width in (1, 3, 5)]
    thumbnails = np.concatenate([base, *noisy]).astype(np.uint8)
    right = thumbnails[:, :-1, 1:] > thumbnails[:, :-1, :-1]
    down = thumbnails[:, 1:, :-1] > thumbnails[:, :-1, :-1]
    bits = np.concatenate([right.reshape(len(thumbnails), -1), down.reshape(len(thumbnails), -1)], axis=1)
    expected = []
    for later in range(len(thumbnails)):
        for earlier in range(later):
            grey = np.abs(thumbnails[later].astype(int) - thumbnails[earlier]).mean()
            if (bits[later] != bits[earlier]).sum() <= 7 and grey <= 3:
                expected.append((earlier, later))
                break
    assert len(expected) > 60
    assert near_duplicates(thumbnails) == expected
