"""What the doctor and the search for copies need on large data sets, in time and memory.

By hand: `python tests/scale.py [CASE ...]`, each case in a process of its own. It prints wall time,
CPU time (user and system) and the most memory above what the imports take, against the limit.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from deimv2_tfg.copies import same_pairs
from deimv2_tfg.data import SPLITS, annotation_file
from deimv2_tfg.doctor import check_dataset, fix_dataset
from deimv2_tfg.photographs import look_at_all

CASES = {}  # name: (seconds, MiB above the base, make, work)
RNG = np.random.default_rng(0)


def case(name, seconds, memory, make):
    """Name what is measured: `make` writes its files into a folder, the function works on them."""

    def named(work):
        CASES[name] = (seconds, memory, make, work)
        return work

    return named


# Photographs -----------------------------------------------------------------------------------


def grain(k):
    """Fine grain, independent from pixel to pixel."""
    return RNG.integers(0, 256, (64, 64), np.uint8)


def patches(k):
    """Coarse patches with soft borders: few independent cells, so that many look alike."""
    cells = Image.fromarray(RNG.integers(40, 216, (8, 8), np.uint8))
    return np.asarray(cells.resize((64, 64), Image.Resampling.BICUBIC))


def brushed(k):
    """Stripes along one axis, as on brushed metal."""
    rows = RNG.integers(60, 200, (64, 1)) + RNG.integers(-6, 7, (64, 64))
    return rows.astype(np.uint8)


BOARD = Image.effect_noise((40, 40), 90).resize((160, 160)).filter(ImageFilter.GaussianBlur(1))


def board(k):
    """One part in a jig under a fixed camera, with two pixels of play and a defect of its own."""
    dx, dy = RNG.integers(-1, 2, 2)
    moved = BOARD.transform(BOARD.size, Image.Transform.AFFINE, (1, 0, dx, 0, 1, dy))
    x, y = (int(v) for v in RNG.integers(5, 150, 2))
    ImageDraw.Draw(moved).ellipse([x, y, x + 6, y + 6], fill=20)
    return np.asarray(moved)


def many(texture, n):
    """A function that writes `n` photographs of a texture."""

    def write(folder):
        for k in range(n):
            Image.fromarray(texture(k)).save(folder / f"{k:05d}.png", compress_level=1)

    return write


def search(folder):
    pairs = same_pairs(look_at_all(sorted(folder.glob("*.png"))))
    return f"{len(pairs)} pairs"


for texture in (grain, patches, brushed):
    case(f"copies-{texture.__name__}", 90, 1200, many(texture, 5000))(search)
case("copies-board", 60, 1200, many(board, 1000))(search)


# Annotations -----------------------------------------------------------------------------------


def annotated(folder, images=2000, each=100):
    """A data set of 2,000 photographs with 100 sound boxes each."""
    number = 0
    for split, share in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
        (folder / split / "images").mkdir(parents=True)
        coco = {"images": [], "annotations": [], "categories": []}
        coco["categories"] = [{"id": k, "name": f"class {k}"} for k in (1, 2, 3)]
        for k in range(1, round(images * share) + 1):
            name = f"{split}{k:05d}.png"
            Image.fromarray(patches(k)).save(folder / split / "images" / name, compress_level=1)
            coco["images"].append({"id": k, "file_name": name, "width": 64, "height": 64})
            boxes = np.c_[RNG.integers(0, 32, (each, 2)), RNG.integers(3, 32, (each, 2))].tolist()
            for box in boxes:
                number += 1
                a = {"id": number, "image_id": k, "category_id": 1 + number % 3, "bbox": box}
                coco["annotations"].append(a | {"area": box[2] * box[3], "iscrowd": 0})
        annotation_file(folder, split).write_text(json.dumps(coco))


def damaged(change):
    """A function that writes that set with a change to every annotation or image entry."""

    def write(folder):
        annotated(folder)
        for split in SPLITS:
            coco = json.loads(annotation_file(folder, split).read_text())
            change(coco)
            annotation_file(folder, split).write_text(json.dumps(coco))

    return write


def without_ids(coco):
    for a in coco["annotations"]:
        del a["id"], a["iscrowd"]


def sizes_as_text(coco):
    for image in coco["images"]:
        image["width"], image["height"] = "64", 0


def references_as_text(coco):
    for a in coco["annotations"]:
        a |= {"image_id": str(a["image_id"]), "bbox": [str(v) for v in a["bbox"]]}


def polygons_alone(coco):
    for a in coco["annotations"]:
        x, y, w, h = a.pop("bbox")
        a["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]


def names_of_windows(coco):
    for image in coco["images"]:
        image["file_name"] = f"images\\{image['file_name']}"


def one_id_for_all(coco):
    for a in coco["annotations"]:
        a["id"] = 1


@case("doctor-annotations", 15, 700, annotated)
def check(folder):
    return f"{len(check_dataset(folder).errors)} errors"


def fix(folder):
    return f"{len(fix_dataset(folder)[1])} changes"


case("fix-sound", 20, 700, annotated)(fix)
for change in (
    without_ids,
    sizes_as_text,
    references_as_text,
    polygons_alone,
    names_of_windows,
    one_id_for_all,
):
    case(f"fix-{change.__name__.replace('_', '-')}", 20, 900, damaged(change))(fix)


# One large photograph --------------------------------------------------------------------------


def large(folder):
    """12,000 x 9,000 pixels as JPEG."""
    Image.effect_noise((1200, 900), 60).resize((12000, 9000)).convert("RGB").save(folder / "p.jpg")


@case("photograph-108-mp", 30, 700, large)
def look(folder):
    return str(look_at_all([folder / "p.jpg"])[0].size)


# Measuring -------------------------------------------------------------------------------------


def peak() -> float:
    """The most memory that this process has had, MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(name, folder):
    """One case in this process, on files that are there."""
    seconds, memory, _, work = CASES[name]
    base, busy, began = peak(), cpu(), time.time()
    said = work(Path(folder))
    wall, used, more = time.time() - began, cpu() - busy, peak() - base
    print(
        f"{name:24s} {wall:6.1f} s wall, {used:6.1f} s CPU (limit {seconds}),"
        f" {more:6.0f} MiB above {base:.0f} (limit {memory}): {said}",
        flush=True,
    )


def main(names):
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            files = Path(folder) / "set"
            files.mkdir()
            CASES[name][2](files)
            subprocess.run([sys.executable, __file__, "--measure", name, files], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        main(sys.argv[1:])
