"""The readers of foreign files: whatever the bytes, a value or a refusal that names the file."""

import io
import os
import random

import numpy as np
import pytest
from PIL import Image

from deimv2_tfg.photographs import (
    PhotographError,
    header_of,
    look_at,
    read_json_file,
    read_photograph,
)

FUZZ = int(os.environ.get("FUZZ", 600))  # files; FUZZ=10000 by hand
FORMATS = ("JPEG", "PNG", "TIFF", "GIF", "BMP", "WEBP", "PPM")


def sound_files() -> list[bytes]:
    "A small photograph in each format and mode that it takes."
    noise = np.random.default_rng(0).integers(0, 255, (20, 24, 3)).astype(np.uint8)
    found = []
    for kind in FORMATS:
        for mode in ("RGB", "L", "P"):
            written = io.BytesIO()
            try:
                Image.fromarray(noise).convert(mode).save(written, kind)
            except (OSError, ValueError):
                continue
            found.append(written.getvalue())
    return found


def harmed(content: bytes, rng: random.Random) -> bytes:
    "Bytes that were cut, changed, swapped or made up."
    raw = bytearray(content)
    way = rng.randrange(5)
    if way == 0:
        return bytes(raw[: rng.randrange(len(raw))])
    if way == 1:
        for _ in range(rng.randint(1, 8)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    elif way == 2:
        a, b = sorted(rng.sample(range(len(raw)), 2))
        raw[a:b] = raw[a:b][::-1]
    elif way == 3:
        for k in rng.sample(range(min(64, len(raw))), 4):
            raw[k] = rng.randrange(256)
    else:
        raw[rng.randrange(len(raw)) :] = rng.randbytes(200)
    return bytes(raw)


@pytest.mark.filterwarnings("ignore:::PIL")  # what Pillow says of damaged tags
def test_no_bytes_break_the_reader(tmp_path):
    rng, sound = random.Random(0), sound_files()
    refused = 0
    for k in range(FUZZ):
        file = tmp_path / f"{k}.bin"
        file.write_bytes(harmed(rng.choice(sound), rng))
        seen = look_at(file)
        assert header_of(file).problem in ("", seen.problem)
        try:
            photograph = read_photograph(file)
        except PhotographError as e:
            refused += 1
            assert seen.problem or seen.deep, f"{file} is refused ({e}), the doctor said nothing"
            assert e.kind and str(file) in str(e)
        else:
            assert photograph.mode == "RGB" and not seen.problem
            assert seen.size in (photograph.size, photograph.size[::-1])
        file.unlink()
    assert 0.2 * FUZZ < refused < 0.99 * FUZZ


@pytest.mark.parametrize("seed", range(3))
def test_no_bytes_break_the_reader_of_json(tmp_path, seed):
    rng = random.Random(seed)
    sound = b'{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [], "categories": []}'
    for _ in range(100):
        (tmp_path / "x.json").write_bytes(harmed(sound, rng))
        try:
            read_json_file(tmp_path / "x.json")
        except ValueError as e:
            assert "x.json" in str(e)


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
