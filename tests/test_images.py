"""Pictures as users have them: every mode, orientation and kind of damage."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from ballad_hf.data import images
from ballad_hf.data.images import UnreadablePictureError, check_picture, open_picture


@pytest.fixture
def photo():
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((80, 60), Image.Resampling.BICUBIC)


def saved(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_a_photo_comes_as_it_is(photo, tmp_path):
    (tmp_path / "photo.png").write_bytes(saved(photo, "png"))
    for source in (tmp_path / "photo.png", str(tmp_path / "photo.png"), saved(photo, "png"), photo):
        opened = open_picture(source)
        assert opened.mode == "RGB"
        assert opened.tobytes() == photo.tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_becomes_what_pillow_makes_of_it(photo, mode):
    source = photo.convert("L").convert("PA") if mode == "PA" else photo.convert("RGB")
    source = source if mode == "PA" else source.convert(mode) if mode != "LAB" else Image.new("LAB", (4, 4), 0)
    opened = open_picture(source)
    assert (opened.mode, opened.size) == ("RGB", source.size)
    if mode != "LAB":
        assert opened.tobytes() == source.convert("RGB").tobytes()


def test_a_palette_with_transparency_drops_it(photo):
    palette = photo.quantize(16)
    opened = open_picture(saved(palette, "png", transparency=0))
    assert opened.tobytes() == palette.convert("RGB").tobytes()


def test_a_cmyk_jpeg_keeps_its_colours(photo):
    opened = open_picture(saved(photo.convert("CMYK"), "jpeg", quality=95))
    assert np.abs(np.asarray(opened, int) - np.asarray(photo, int)).mean() < 3


def test_sixteen_bits_are_scaled_not_cut_off():
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    expected = [[0, 0, 1, 128, 255]]
    opened = np.asarray(open_picture(saved(Image.fromarray(values), "png")))
    assert opened[..., 0].tolist() == opened[..., 2].tolist() == expected
    wide = Image.fromarray(values.astype(np.int32))
    assert np.asarray(open_picture(wide))[..., 1].tolist() == expected


def test_eight_bits_in_a_wide_type_stay_as_they_are():
    assert np.asarray(open_picture(Image.fromarray(np.array([[0, 7, 255]], np.int32))))[0, :, 0].tolist() == [
        0,
        7,
        255,
    ]


def test_values_without_a_range_are_refused():
    with pytest.raises(UnreadablePictureError, match="floating-point"):
        open_picture(Image.fromarray(np.ones((2, 2), np.float32)))
    with pytest.raises(UnreadablePictureError, match="from -1 to 5"):
        open_picture(Image.fromarray(np.array([[-1, 5]], np.int32)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_upright(photo, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = saved(photo, "png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(stored)))
    opened = open_picture(stored)
    assert opened.size == ((80, 60) if orientation < 5 else (60, 80))
    assert opened.tobytes() == expected.tobytes()


def test_an_orientation_holds_for_other_modes_too(photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = open_picture(saved(photo.convert("L"), "jpeg", exif=exif))
    assert (opened.size, opened.mode) == ((60, 80), "RGB")


def test_damaged_exif_does_not_lose_the_picture(photo):
    for exif in (b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b""):
        assert open_picture(saved(photo, "jpeg", exif=exif)).size == (80, 60)
    nonsense = Image.Exif()
    nonsense[0x0112] = 77
    assert open_picture(saved(photo, "png", exif=nonsense)).size == (80, 60)


@pytest.mark.parametrize("kind", ["jpeg", "png", "bmp", "tiff"])
def test_a_truncated_file_is_refused_by_name(photo, kind, tmp_path):
    path = tmp_path / f"half.{kind}"
    content = saved(photo, kind)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UnreadablePictureError, match=rf"half\.{kind} can't be read"):
        open_picture(path)


@pytest.fixture
def decoded(monkeypatch):
    """The pictures that were decoded."""
    names = []
    monkeypatch.setattr(images, "open_picture", lambda source, name=None: names.append(name) or open_picture(source))
    return names


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_a_check_tells_a_whole_file_from_a_cut_one_without_decoding_it(photo, kind, tmp_path, decoded):
    content = saved(photo, kind)
    check_picture(content, "bytes")
    (tmp_path / "whole").write_bytes(content)
    check_picture(tmp_path / "whole", "file")
    assert decoded == []
    for length in (0, 1, len(content) // 2, len(content) - 40):
        with pytest.raises(UnreadablePictureError):
            check_picture(content[:length], f"{length} bytes")
    with pytest.raises(UnreadablePictureError, match="there is no such file"):
        check_picture(tmp_path / "nowhere.jpg")


def test_a_check_refuses_nothing_that_can_be_read(photo, decoded):
    check_picture(saved(photo, "jpeg") + b"\0" * 16, "padded")
    check_picture(saved(photo, "bmp"), "bmp")
    check_picture(saved(photo, "png")[:-3], "a PNG that lacks the end of its end mark")
    assert len(decoded) == 3


def test_a_check_refuses_a_bomb():
    with pytest.raises(UnreadablePictureError, match="bomb.png can't be read.*pixels"):
        check_picture(bomb(60_000, 50_000), name="bomb.png")


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "it is empty"), (b"<html>404</html>", "it is no picture that Pillow knows")]
)
def test_what_is_no_picture_is_refused(content, reason, tmp_path):
    with pytest.raises(UnreadablePictureError, match=f"cat.jpg can't be read: {reason}"):
        open_picture(content, name="cat.jpg")
    (tmp_path / "cat.jpg").write_bytes(content)
    with pytest.raises(UnreadablePictureError, match="cat.jpg can't be read"):
        open_picture(tmp_path / "cat.jpg")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UnreadablePictureError, match="there is no such file"):
        open_picture(tmp_path / "nowhere.jpg")
    with pytest.raises(UnreadablePictureError):
        open_picture(tmp_path)


def bomb(width, height):
    """A PNG of a few bytes that claims to be huge."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    with pytest.raises(UnreadablePictureError, match="bomb.png can't be read.*pixels"):
        open_picture(bomb(60_000, 60_000), name="bomb.png")
    # Pillow only warns about this one.
    with pytest.raises(UnreadablePictureError, match="12000 x 10000 pixels, more than max_pixels"):
        open_picture(bomb(12_000, 10_000), max_pixels=100_000_000)


def test_max_pixels_is_the_users_choice(photo):
    with pytest.raises(UnreadablePictureError, match="80 x 60 pixels, more than max_pixels=1000"):
        open_picture(photo, max_pixels=1000)


def test_a_jpeg_is_decoded_smaller_where_that_is_enough():
    large = Image.linear_gradient("L").resize((1600, 1200)).convert("RGB")
    stored = saved(large, "jpeg", quality=95)
    assert open_picture(stored).size == (1600, 1200)
    smaller = open_picture(stored, enough=250)
    assert smaller.size == (400, 300)
    difference = np.asarray(smaller, int) - np.asarray(large.resize((400, 300), Image.Resampling.BOX), int)
    assert np.abs(difference).max() <= 3
    assert open_picture(saved(large, "png"), enough=250).size == (1600, 1200)
