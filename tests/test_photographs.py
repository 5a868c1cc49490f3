"""The readers of foreign files: whatever the bytes, a value or a refusal that names the file."""

import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from fuzz import fuzz
from PIL import Image

from deimv2_tfg.data import Photographs
from deimv2_tfg.photographs import (
    UPRIGHT,
    PhotographError,
    header_of,
    look_at,
    number,
    read_json_file,
    read_photograph,
    read_text,
    safe_path,
    whole_number,
)


def test_no_damaged_file_breaks_a_reader():
    """Of the kinds of `tests/fuzz.py`, which tries more by hand."""
    outcomes, failed = fuzz(range(200))
    assert not failed
    for kind in ("photograph accepted", "photograph refused", "text accepted", "text refused"):
        assert outcomes[kind] > 5
    imports = Counter(key.split()[-1] for key in outcomes if key.startswith("import"))
    assert imports["refused"] >= 8 and imports["accepted"] >= 3


def test_nesting_that_is_too_deep_is_refused(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="deep.json: not valid JSON"):
        read_json_file(tmp_path / "deep.json")


def test_a_photograph_that_would_fill_the_memory_is_refused(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(PhotographError) as e:
        read_photograph(tmp_path / "bomb.png")
    assert e.value.kind == "photo-too-large"


def test_a_missing_file_stays_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_photograph(tmp_path / "nothing.png")


# --- what a photograph is read as ---

GREY = np.tile(np.linspace(0, 4095, 64, dtype=np.uint16), (48, 1))


def rgb_of_sixteen_bits(path):
    "A PNG of 16 bits a channel in RGB, which Pillow does not write."
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in GREY)
    header = struct.pack(">IIBBBBB", 64, 48, 16, 2, 0, 0, 0)
    chunks = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        crc = struct.pack(">I", zlib.crc32(name + content))
        chunks += struct.pack(">I", len(content)) + name + content + crc
    path.write_bytes(chunks)


@pytest.mark.finding("data.md:R1", "data.md:R1b", "data.md:R2")
@pytest.mark.parametrize("kind", ["png", "tif", "big", "float", "rgb"])
def test_more_than_eight_bits_are_refused_everywhere(tmp_path, kind):
    file = tmp_path / f"deep.{kind if kind in ('png', 'tif') else 'tif'}"
    if kind == "rgb":
        file = tmp_path / "deep.png"
        rgb_of_sixteen_bits(file)
    elif kind == "big":
        Image.frombytes("I;16B", (64, 48), GREY.astype(">u2").tobytes()).save(file)
    else:
        Image.fromarray(GREY.astype(np.float32) if kind == "float" else GREY).save(file)
    wanted = "mode-float" if kind == "float" else "mode-16-bit"
    assert header_of(file).deep == look_at(file).deep == wanted
    for read in (read_photograph, Photographs()):  # prediction's, and training's
        with pytest.raises(PhotographError) as e:
            read(file)
        assert e.value.kind == wanted and "8 bits a channel" in e.value.way_out


@pytest.mark.finding("data.md:R3", "data.md:I6")
@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
def test_a_photograph_is_turned_as_viewers_show_it(tmp_path, kind):
    upright = Image.new("RGB", (64, 48), (120, 120, 120))
    upright.paste((250, 0, 0), (0, 0, 24, 16))  # red in the upper left
    for tag in range(1, 9):
        back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
        way = back.get(tag, UPRIGHT.get(tag))
        stored = upright.transpose(way) if way is not None else upright
        exif = Image.Exif()
        exif[274] = tag
        stored.save(tmp_path / f"{tag}.{kind}", exif=exif, quality=95)
        read = read_photograph(tmp_path / f"{tag}.{kind}")
        assert read.size == (64, 48), tag
        assert np.abs(np.asarray(read).astype(int)[4:12, 4:20] - (250, 0, 0)).max() < 20, tag


@pytest.mark.finding("data.md:R3")
def test_of_several_pages_the_first_is_read_and_they_are_counted(tmp_path):
    pages = [Image.new("L", (40, 40), level) for level in (50, 150, 250)]
    pages[0].save(tmp_path / "scan.tif", save_all=True, append_images=pages[1:])
    assert header_of(tmp_path / "scan.tif").frames == 3
    assert read_photograph(tmp_path / "scan.tif").getpixel((5, 5)) == (50, 50, 50)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_eight_bits_in_any_mode_are_rgb(tmp_path, mode):
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new("RGB", (40, 40), (255, 255, 255)).convert(mode).save(file)
    read = read_photograph(file)
    assert read.mode == "RGB" and np.asarray(read).min() > 250


@pytest.mark.finding("data.md:B1", "data.md:B2")
def test_text_with_a_byte_order_mark_and_in_another_encoding(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xb1"}')
    assert read_json_file(tmp_path / "a.json") == {"a": "ñ"}
    for content, found in (("ñ".encode("cp1252"), "byte 0 is 0xf1"), ("ñ".encode("utf-16"), "16")):
        (tmp_path / "b.txt").write_bytes(content)
        with pytest.raises(ValueError, match=f"b.txt: not UTF-8 text.*{found}"):
            read_text(tmp_path / "b.txt")


@pytest.mark.finding("data.md:F3", "data.md:F5", "data.md:V6")
def test_what_says_a_number_and_what_does_not():
    assert [whole_number(v) for v in (3, 3.0, "3", " 3.0 ", "+3")] == [3] * 5
    for value in (None, True, "3,0", "0x3", "1_000", "٣", 3.5, "nan", [3], {}, float("inf")):
        assert whole_number(value) is None
    assert [number(v) for v in ("61", "6.1e1", 61)] == [61.0] * 3
    for value in (None, True, "6,1", "1_0", "inf", "٣", [1], 10**400):
        assert number(value) is None


def test_a_number_of_too_many_digits_is_refused(tmp_path):
    (tmp_path / "long.json").write_text("[" + "9" * 5000 + "]")
    with pytest.raises(ValueError, match="long.json: not valid JSON"):
        read_json_file(tmp_path / "long.json")


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "C:/x", "C:x", "a\\x", "", " ", "a\0"])
def test_no_name_leads_out_of_its_folder(tmp_path, name):
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="not the name of a file"):
        safe_path(tmp_path / "in", name)
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="leads out"):
        safe_path(tmp_path / "in", "link/x.png")
