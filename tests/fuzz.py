"""Every reader with damaged files: a value or one clear refusal, never a traceback, never a hang.

By hand: `python tests/fuzz.py COUNT [SEED]` tries so many files and prints what failed.
"""

import faulthandler
import io
import json
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask

from deimv2_tfg.annotations import box_problem
from deimv2_tfg.cli import told
from deimv2_tfg.core import read_json, write_json
from deimv2_tfg.deployment import frames
from deimv2_tfg.findings import ERROR
from deimv2_tfg.formats import read_yolo, yolo_classes
from deimv2_tfg.importing import import_dataset
from deimv2_tfg.photographs import (
    KINDS,
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

SECONDS = 20  # for one file; a hang is what takes longer
MEMORY = 8 * 2**30  # bytes of address space by hand; a bomb is what takes more
SIZE = (40, 30)
NAMES = ("0.png", "1.jpg", "2.bmp")  # of the photographs of a set
ODD = (None, "", "x", -1, 0, 1e300, float("nan"), [], {}, [[]], True, 10**30, "../x", "\0", 0.5)
ODD_TEXTS = ("", "x", "-1", "0", "nan", "1e999", "1,5", "../x", "&b;", "<a>", "9" * 5000, "\0")


# --- sound files ---


def pixels(k: int = 0) -> np.ndarray:
    """A small noisy photograph (H, W, 3) with one dark patch."""
    found = np.random.default_rng(k).integers(100, 160, (SIZE[1], SIZE[0], 3)).astype(np.uint8)
    found[5:20, 8:28] = 20
    return found


def sound_photographs() -> list[tuple[str, bytes]]:
    """(suffix, content) in each format and mode that it takes, with 16 bits, palette, pages."""
    found = []
    for kind in ("JPEG", "PNG", "TIFF", "GIF", "BMP", "WEBP", "PPM"):
        for mode in ("RGB", "L", "P", "RGBA", "1", "CMYK", "I;16", "F"):
            written = io.BytesIO()
            try:
                Image.fromarray(pixels()).convert("L" if mode == "I;16" else mode).convert(
                    mode
                ).save(written, kind)
            except (OSError, ValueError):
                continue
            found.append((f".{kind.lower()}", written.getvalue()))
    first = Image.fromarray(pixels())
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg"):
        written = io.BytesIO()
        more = {"save_all": True, "append_images": [first, first]}
        first.save(written, "TIFF", compression=compression, **more)
        found.append((".tif", written.getvalue()))
    return found


def voc_xml(k: int) -> str:
    corners = "<xmin>9</xmin><ymin>6</ymin><xmax>28</xmax><ymax>20</ymax>"
    thing = f"<object><name>dent</name><bndbox>{corners}</bndbox></object>"
    size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height></size>"
    return f"<annotation><filename>{NAMES[k]}</filename>{size}{thing}</annotation>"


RUNS = [30 * 8, 30 * 20, 30 * 12]  # of a mask of 20 whole columns
COMPRESSED = mask.encode(
    np.asfortranarray(np.r_[8 * [0], 20 * [1], 12 * [0]] * np.ones((30, 1)), np.uint8)
)["counts"].decode()


def coco_json(rng: random.Random) -> dict:
    outline = [[8, 5, 28, 5, 28, 20, 8, 20]]
    codes = {"size": [30, 40], "counts": rng.choice((RUNS, COMPRESSED))}
    images, annotations = [], []
    for k in range(1, 4):
        images.append({"id": k, "file_name": NAMES[k - 1], "width": SIZE[0], "height": SIZE[1]})
        one = {"id": k, "image_id": k, "category_id": 1, "iscrowd": 0, "area": 300}
        one |= (
            {"bbox": [8, 5, 20, 15]} if k == 1 else {"segmentation": codes if k == 2 else outline}
        )
        annotations.append(one | {"attributes": {"rotation": 0.0}})
    category = {"id": 1, "name": "dent", "supercategory": "none"}
    return {"images": images, "annotations": annotations, "categories": [category]}


def sound_sets(root: Path, rng: random.Random) -> dict[str, Path]:
    """A small set in each format that `import` reads."""
    names = ("coco", "voc", "yolo", "cvat", "labelme", "masks", "values", "folders")
    sets = {name: root / name for name in names}
    for name, folder in sets.items():
        place = {"masks": folder / "dent", "folders": folder / "dent", "values": folder / "images"}
        here = place.get(name, folder)
        here.mkdir(parents=True)
        for k, photograph in enumerate(NAMES):
            Image.fromarray(pixels(k)).save(here / photograph)
    write_json(sets["coco"] / "all.json", coco_json(rng))
    images, on = [], np.zeros(SIZE[::-1], np.uint8)
    on[5:20, 8:28] = 1
    (sets["values"] / "masks").mkdir()
    for k in range(3):
        (sets["voc"] / f"{k}.xml").write_text(voc_xml(k))
        (sets["yolo"] / f"{k}.txt").write_text("0 .45 .4167 .5 .5\n1 .1 .1 .1 .2 .3 .4\n")
        shapes = (
            '<box label="dent" xtl="8" ytl="5" xbr="28" ybr="20" rotation="5"/>'
            '<polygon label="dent" points="8,5;28,5;28,20"/><ellipse label="dent" cx="9" cy="9"'
            ' rx="3" ry="4"/>'
        )
        images.append(f'<image name="{NAMES[k]}" width="40" height="30">{shapes}</image>')
        points = [[8, 5], [28, 20]]
        shape = {"label": "dent", "points": points, "shape_type": ("circle", None)[k % 2]}
        said = {"imagePath": NAMES[k], "imageWidth": 40, "imageHeight": 30, "shapes": [shape]}
        write_json(sets["labelme"] / f"{k}.json", said)
        Image.fromarray(255 * on).save(sets["masks"] / "dent" / f"{k}_mask.png")
        Image.fromarray(on).save(sets["values"] / "masks" / f"{k}.png")
    (sets["yolo"] / "data.yaml").write_text("nc: 2\nnames: {0: dent, 1: scratch}\n")
    (sets["yolo"] / "train.txt").write_text("\n".join(NAMES))
    (sets["cvat"] / "annotations.xml").write_text(f"<annotations>{''.join(images)}</annotations>")
    return sets


# --- damage ---


def harmed(content: bytes, rng: random.Random) -> bytes:
    """Bytes that were cut, changed, swapped, taken out or made up."""
    raw = bytearray(content or b"x")
    way = rng.randrange(6)
    a, b = sorted((rng.randrange(len(raw)), rng.randrange(len(raw))))
    if way == 0:
        return bytes(raw[:b])
    if way == 1:
        for _ in range(rng.randint(1, 8)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    elif way == 2:
        raw[a:b] = raw[a:b][::-1]
    elif way == 3:
        for k in rng.sample(range(min(64, len(raw))), min(4, len(raw))):
            raw[k] = rng.randrange(256)
    elif way == 4:
        del raw[a:b]
    else:
        raw[b:] = rng.randbytes(rng.randint(0, 200))
    return bytes(raw)


def harmed_json(content: bytes, rng: random.Random) -> bytes:
    """A JSON in which one value is another, is gone or is there twice."""
    root = json.loads(content)
    places = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(root)
    for _ in range(rng.randint(1, 3)):
        node, key = rng.choice(places)
        way = rng.random()
        if way < 0.2 and isinstance(node, dict):
            node.pop(key, None)
        elif way < 0.3 and isinstance(node, list):
            node.append(rng.choice(ODD))
        elif isinstance(node, dict) or key < len(node):
            node[key] = rng.choice(ODD)
    return json.dumps(root).encode()


def harmed_text(content: bytes, rng: random.Random) -> bytes:
    """A text or XML in which a word, number or attribute is another, or is gone."""
    text = content.decode()
    words = list(re.finditer(r"[\w.\-]+", text))
    for word in sorted(
        rng.sample(words, min(len(words), rng.randint(1, 3))), key=lambda w: -w.start()
    ):
        text = text[: word.start()] + rng.choice(ODD_TEXTS) + text[word.end() :]
    return text.encode()


def damage(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    ways = {".json": harmed_json, ".xml": harmed_text, ".txt": harmed_text, ".yaml": harmed_text}
    way = ways.get(path.suffix, harmed) if rng.random() < 0.6 else harmed
    path.write_bytes(way(content, rng))


# --- what each reader must do ---


def try_photograph(folder: Path, rng: random.Random, sound: list) -> str:
    """Reader, doctor's look and prediction agree on a damaged photograph."""
    suffix, content = rng.choice(sound)
    file = folder / f"photograph{suffix}"
    file.write_bytes(harmed(content, rng))
    seen, header = look_at(file), header_of(file)
    assert header.problem in ("", seen.problem), "header and look differ"
    try:
        photograph = read_photograph(file)
        assert photograph.mode == "RGB" and not seen.problem, "read, but the doctor refuses it"
        assert np.asarray(photograph).ndim == 3
        outcome = "accepted"
    except PhotographError as error:
        assert seen.problem or seen.deep, "refused, but the doctor says nothing"
        assert error.kind and str(file) in str(error), "no kind, or no name"
        outcome = "refused"
    for name, result in frames([file], folder):
        assert name.startswith(file.name)
        if not isinstance(result, Exception):
            assert result.mode == "RGB" and np.asarray(result).ndim == 3
    return outcome


def try_text(folder: Path, rng: random.Random) -> str:
    """Readers of text, JSON, class names, YOLO lines, numbers and file names."""
    json_text = json.dumps(coco_json(rng)).encode()
    way = harmed if rng.random() < 0.5 else harmed_json
    (folder / "x.json").write_bytes(way(json_text, rng))
    names = b"names: {0: dent, 1: scratch}\n"
    (folder / "data.yaml").write_bytes(harmed_text(names, rng) if rng.random() < 0.5 else names)
    lines = harmed_text(b"0 .5 .5 .1 .1\n1 .1 .1 .2 .2 .3 .3\n", rng).decode()
    outcome = "accepted"
    for file, read in (("x.json", read_json_file), ("x.json", read_text), ("", yolo_classes)):
        try:
            read(folder / file)
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error), f"does not name the file: {error}"
            outcome = "refused"
    try:
        for name, *box in read_yolo(lines, *SIZE, ["dent", "scratch"]):
            assert name in ("dent", "scratch") and np.isfinite(box).all()
    except ValueError as error:
        assert re.match(r"line \d", str(error)), f"does not name the line: {error}"
    for value in (rng.choice(ODD), rng.choice(ODD_TEXTS)):
        assert whole_number(value) is None or isinstance(whole_number(value), int)
        assert number(value) is None or isinstance(number(value), float)
        try:
            assert safe_path(folder, value).resolve().is_relative_to(folder.resolve())
        except ValueError:
            pass
    return outcome


def assert_sound(out: Path) -> None:
    """What was imported can be decoded to its end, and has boxes that the doctor accepts."""
    coco = read_json(out / "annotations.json")
    sizes = {}
    for image in coco["images"]:
        photograph = read_photograph(out / "images" / image["file_name"])
        assert photograph.size == (image["width"], image["height"]), "another size"
        sizes[image["id"]] = photograph.size
    names = {category["id"] for category in coco["categories"]}
    for annotation in coco["annotations"]:
        assert annotation["category_id"] in names, "no such class"
        problem = box_problem(annotation["bbox"], *sizes[annotation["image_id"]])
        assert not problem or KINDS[problem[0]][0] != ERROR, f"accepted: {problem[1]}"


def try_import(folder: Path, rng: random.Random) -> str:
    """`import` of one set, in which one file or two are damaged."""
    sets = sound_sets(folder / "sets", rng)
    name = rng.choice(sorted(sets))
    files = [path for path in sorted(sets[name].rglob("*")) if path.is_file()]
    labels = [path for path in files if path.name not in NAMES] or files
    rng.shuffle(files)
    for path in {rng.choice(labels), files[0]} if rng.random() < 0.3 else {files[0]}:
        damage(path, rng)
    before = {path: path.read_bytes() for path in files}
    kind = "folders" if name == "folders" else ""
    allow = ("unlabelled", "labels", "masks", "unlisted", "small") if rng.random() < 0.5 else ()
    out = folder / "out"
    try:
        with redirect_stdout(io.StringIO()):
            import_dataset(sets[name], out, kind, one_piece=True, allow=allow)
        assert_sound(out)
        outcome = "accepted"
    except Exception as error:
        if isinstance(error, AssertionError) or not told(error):
            raise
        assert not out.exists(), "refused, but something was written"
        outcome = "refused"
    assert before == {path: path.read_bytes() for path in files}, "the source was changed"
    left = {path.name for path in folder.iterdir()} - {"sets", "out"}
    assert not left, f"left behind: {left}"
    return f"{name} {outcome}"


TRIES = {"photograph": try_photograph, "text": try_text, "import": try_import}


def too_long(*_):
    raise TimeoutError(f"took more than {SECONDS} s")


def fuzz(numbers: range, seed: int = 0) -> tuple[Counter, list[str]]:
    """Try the damaged files of these numbers; how often each came out how, and what failed."""
    sound, outcomes, failed = sound_photographs(), Counter(), []
    signal.signal(signal.SIGALRM, too_long)
    for k in numbers:
        rng = random.Random(f"{seed} {k}")
        kind = rng.choice(sorted(TRIES))
        folder = Path(tempfile.mkdtemp(prefix="fuzz"))
        signal.alarm(SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what Pillow says of damaged tags
                more = (sound,) if kind == "photograph" else ()
                outcomes[f"{kind} {TRIES[kind](folder, rng, *more)}"] += 1
        except Exception as error:  # whatever comes up is what is looked for
            failed.append(f"seed {seed}, file {k}: {kind}: {type(error).__name__}: {error}")
        finally:
            signal.alarm(0)
        shutil.rmtree(folder)
    return outcomes, failed


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    faulthandler.enable()  # a crash in a library, too, says where
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    start, outcomes, failed = time.process_time(), Counter(), []
    for first in range(0, count, 500):
        more, wrong = fuzz(range(first, min(first + 500, count)), seed)
        outcomes.update(more)
        failed += wrong
        print(*wrong, f"{first + 500} files, {len(failed)} failed", sep="\n", flush=True)
    for what, n in sorted(outcomes.items()):
        print(f"{n:6d} {what}")
    print(f"{count} files, {len(failed)} failed, {time.process_time() - start:.0f} s of CPU")
    sys.exit(bool(failed))
