"""Images as users have them: every mode, orientation and kind of damage."""

import io
import os
import struct
import zlib

import datasets
import numpy as np
import pytest
from PIL import Image, ImageOps

from ballad_hf import as_image_dataset
from ballad_hf.data import images
from ballad_hf.data.images import (
    UnreadableImageError,
    check_image,
    check_images,
    image_digest,
    image_path,
    open_image,
)

from .conftest import load_splits


@pytest.fixture
def photo():
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((80, 60), Image.Resampling.BICUBIC)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_a_photo_comes_as_it_is(photo, tmp_path):
    (tmp_path / "photo.png").write_bytes(saved(photo, "png"))
    for source in (tmp_path / "photo.png", str(tmp_path / "photo.png"), saved(photo, "png"), photo):
        opened = open_image(source)
        assert opened.mode == "RGB"
        assert opened.tobytes() == photo.tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_becomes_what_pillow_makes_of_it(photo, mode):
    source = photo.convert("L").convert("PA") if mode == "PA" else photo.convert("RGB")
    source = source if mode == "PA" else source.convert(mode) if mode != "LAB" else Image.new("LAB", (4, 4), 0)
    opened = open_image(source)
    assert (opened.mode, opened.size) == ("RGB", source.size)
    if mode != "LAB":
        assert opened.tobytes() == source.convert("RGB").tobytes()


def test_a_palette_with_transparency_drops_it(photo):
    palette = photo.quantize(16)
    opened = open_image(saved(palette, "png", transparency=0))
    assert opened.tobytes() == palette.convert("RGB").tobytes()


def test_a_cmyk_jpeg_keeps_its_colours(photo):
    opened = open_image(saved(photo.convert("CMYK"), "jpeg", quality=95))
    assert np.abs(np.asarray(opened, int) - np.asarray(photo, int)).mean() < 3


def test_sixteen_bits_are_scaled_not_cut_off():
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    expected = [[0, 0, 1, 128, 255]]
    opened = np.asarray(open_image(saved(Image.fromarray(values), "png")))
    assert opened[..., 0].tolist() == opened[..., 2].tolist() == expected
    wide = Image.fromarray(values.astype(np.int32))
    assert np.asarray(open_image(wide))[..., 1].tolist() == expected


def test_eight_bits_in_a_wide_type_stay_as_they_are():
    assert np.asarray(open_image(Image.fromarray(np.array([[0, 7, 255]], np.int32))))[0, :, 0].tolist() == [
        0,
        7,
        255,
    ]


def test_values_without_a_range_are_refused():
    with pytest.raises(UnreadableImageError, match="floating-point"):
        open_image(Image.fromarray(np.ones((2, 2), np.float32)))
    with pytest.raises(UnreadableImageError, match="from -1 to 5"):
        open_image(Image.fromarray(np.array([[-1, 5]], np.int32)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_upright(photo, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = saved(photo, "png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(stored)))
    opened = open_image(stored)
    assert opened.size == ((80, 60) if orientation < 5 else (60, 80))
    assert opened.tobytes() == expected.tobytes()


def test_an_orientation_holds_for_other_modes_too(photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = open_image(saved(photo.convert("L"), "jpeg", exif=exif))
    assert (opened.size, opened.mode) == ((60, 80), "RGB")


def test_damaged_exif_does_not_lose_the_image(photo):
    for exif in (b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b""):
        assert open_image(saved(photo, "jpeg", exif=exif)).size == (80, 60)
    nonsense = Image.Exif()
    nonsense[0x0112] = 77
    assert open_image(saved(photo, "png", exif=nonsense)).size == (80, 60)


@pytest.mark.parametrize("kind", ["jpeg", "png", "bmp", "tiff"])
def test_a_truncated_file_is_refused_by_name(photo, kind, tmp_path):
    path = tmp_path / f"half.{kind}"
    content = saved(photo, kind)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UnreadableImageError, match=rf"half\.{kind} can't be read"):
        open_image(path)


@pytest.fixture
def decoded(monkeypatch):
    """The images that were decoded."""
    names = []
    monkeypatch.setattr(images, "open_image", lambda source, name=None: names.append(name) or open_image(source))
    return names


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_a_check_tells_a_whole_file_from_a_cut_one_without_decoding_it(photo, kind, tmp_path, decoded):
    content = saved(photo, kind)
    check_image(content, "bytes")
    (tmp_path / "whole").write_bytes(content)
    check_image(tmp_path / "whole", "file")
    assert decoded == []
    for length in (0, 1, len(content) // 2, len(content) - 40):
        with pytest.raises(UnreadableImageError):
            check_image(content[:length], f"{length} bytes")
    with pytest.raises(UnreadableImageError, match="there is no such file"):
        check_image(tmp_path / "nowhere.jpg")


def test_a_check_refuses_nothing_that_can_be_read(photo, decoded):
    check_image(saved(photo, "jpeg") + b"\0" * 16, "padded")
    check_image(saved(photo, "bmp"), "bmp")
    check_image(saved(photo, "png")[:-3], "a PNG that lacks the end of its end mark")
    assert len(decoded) == 3


def test_a_check_refuses_a_bomb():
    with pytest.raises(UnreadableImageError, match="bomb.png can't be read.*pixels"):
        check_image(bomb(60_000, 50_000), name="bomb.png")


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "it is empty"), (b"<html>404</html>", "it is not an image that Pillow knows")]
)
def test_what_is_no_image_is_refused(content, reason, tmp_path):
    with pytest.raises(UnreadableImageError, match=f"cat.jpg can't be read: {reason}"):
        open_image(content, name="cat.jpg")
    (tmp_path / "cat.jpg").write_bytes(content)
    with pytest.raises(UnreadableImageError, match="cat.jpg can't be read"):
        open_image(tmp_path / "cat.jpg")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UnreadableImageError, match="there is no such file"):
        open_image(tmp_path / "nowhere.jpg")
    with pytest.raises(UnreadableImageError):
        open_image(tmp_path)


def bomb(width, height):
    """A PNG of a few bytes that claims to be huge."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    with pytest.raises(UnreadableImageError, match="bomb.png can't be read.*pixels"):
        open_image(bomb(60_000, 60_000), name="bomb.png")
    # Pillow only warns about this one.
    with pytest.raises(UnreadableImageError, match="12000 x 10000 pixels, more than max_pixels"):
        open_image(bomb(12_000, 10_000), max_pixels=100_000_000)


def test_max_pixels_is_the_users_choice(photo):
    with pytest.raises(UnreadableImageError, match="80 x 60 pixels, more than max_pixels=1000"):
        open_image(photo, max_pixels=1000)


def test_a_jpeg_is_decoded_smaller_where_that_is_enough():
    large = Image.linear_gradient("L").resize((1600, 1200)).convert("RGB")
    stored = saved(large, "jpeg", quality=95)
    assert open_image(stored).size == (1600, 1200)
    smaller = open_image(stored, min_size=250)
    assert smaller.size == (400, 300)
    difference = np.asarray(smaller, int) - np.asarray(large.resize((400, 300), Image.Resampling.BOX), int)
    assert np.abs(difference).max() <= 3
    assert open_image(saved(large, "png"), min_size=250).size == (1600, 1200)


def test_a_named_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "p.png")
    for read in (open_image, check_image):
        with pytest.raises(UnreadableImageError, match=r"p\.png can't be read: it is not a regular file"):
            read(tmp_path / "p.png")


def test_a_path_that_is_not_utf8_survives_as_text(photo, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9 %25.png")
    path.write_bytes(saved(photo, "png"))
    text = image_path(path)
    assert text.encode().startswith(b"file:///")
    assert open_image(text).tobytes() == photo.tobytes()
    check_image(text)
    assert image_digest(text) == image_digest(path)
    assert image_path(tmp_path / "é %25.png") == str(tmp_path / "é %25.png")


def test_digests_are_of_the_whole_content(photo, tmp_path):
    path = tmp_path / "photo.bmp"
    path.write_bytes(saved(photo, "bmp"))
    first = image_digest(path)
    assert len(first) == 16
    assert first == image_digest(saved(photo, "bmp")) == image_digest(str(path))
    changed = bytearray(saved(photo, "bmp"))
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=(1, 1))  # a change within one tick of the clock is not seen
    assert image_digest(path) != first
    red, blue = (Image.new("P", (2, 2)) for _ in range(2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    assert image_digest(red) != image_digest(blue)
    assert image_digest(np.zeros((2, 8), np.uint8)) != image_digest(np.zeros((4, 4), np.uint8))


def image_splits(dataset, **options):
    splits = load_splits(dataset, **options)
    return {"train": splits.train, "validation": splits.validation, "test": splits.test}


@pytest.fixture
def folder(tmp_path):
    for part, count in (("train", 12), ("val", 3), ("test", 3)):
        for name in ("fox", "owl"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                Image.effect_noise((32, 32), 50).save(tmp_path / part / name / f"{index}.jpg")
    return tmp_path


def cut(file):
    file.write_bytes(file.read_bytes()[:-40])


def test_whole_images_pass(folder):
    check_images(image_splits(folder))
    check_images(image_splits("digits"))


def test_every_part_is_looked_at_and_the_message_names_what_is_wrong_and_the_remedies(folder):
    splits = image_splits(folder)
    cut(folder / "train" / "fox" / "5.jpg")
    (folder / "val" / "owl" / "1.jpg").write_bytes(b"<html>404</html>")
    (folder / "test" / "fox" / "2.jpg").unlink()
    with pytest.raises(UnreadableImageError) as raised:
        check_images(splits)
    first, *named, remedies, audit = str(raised.value).replace("`ballad audit", "\n`ballad audit").splitlines()
    assert first == "3 of 36 images can't be read:"
    places = [("train", "fox", "5.jpg"), ("val", "owl", "1.jpg"), ("test", "fox", "2.jpg")]
    for line, place in zip(named, places, strict=True):
        assert line.startswith(f"{folder.joinpath(*place)} can't be read: ")
    assert "--on_unreadable skip" in remedies
    assert "ballad audit" in audit
    check_images(image_splits(folder, on_unreadable="skip"))


def test_many_bad_images_are_counted_and_ten_are_shown(folder):
    for file in (folder / "train").rglob("*.jpg"):
        cut(file)
    with pytest.raises(UnreadableImageError, match=r"^24 of 36 images") as raised:
        check_images(image_splits(folder))
    assert str(raised.value).count(".jpg can't be read") == 10
    assert "... and 14 more." in str(raised.value)


def test_images_in_a_column_are_looked_at_too(folder):
    whole = (folder / "train" / "fox" / "0.jpg").read_bytes()
    stored = [{"bytes": whole, "path": None}, {"bytes": whole[:-9], "path": None}, None]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    stored = datasets.Dataset.from_dict({"image": stored, "label": ["fox", "owl", "owl"]}, features=features)
    with pytest.raises(UnreadableImageError, match="^2 of 3 images") as raised:
        check_images({"train": as_image_dataset(stored)})
    assert "image 1 can't be read" in str(raised.value)
    assert "image 2 can't be read: it is empty" in str(raised.value)


@pytest.mark.parametrize("name", ["a.eps", "a.png"])
def test_postscript_is_never_run(tmp_path, name, monkeypatch):
    def run(*_):
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", run)
    Image.new("RGB", (8, 8)).save(tmp_path / name, "EPS")
    with pytest.raises(UnreadableImageError, match=f"{name} can't be read: it is not an image that Pillow knows"):
        open_image(tmp_path / name)
