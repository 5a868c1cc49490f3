"""Small data sets with damage by chance, and what must hold after `doctor --fix`.

By hand: `python tests/damage.py 10000 [SEED]` tries so many sets and prints what failed.
"""

import hashlib
import json
import math
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from deimv2_tfg.data import SPLITS, DatasetError, annotation_file, load_dataset
from deimv2_tfg.doctor import check_dataset, fix_dataset
from deimv2_tfg.findings import id_key
from deimv2_tfg.photographs import PhotographError, read_photograph

SIZE = (48, 36)  # width, height of a photograph
DAMAGE = {}


def damage(change):
    """Name a function (coco, folder of the split, random generator) that damages a split."""
    DAMAGE[change.__name__] = change
    return change


def sound_set(root: Path, rng: random.Random) -> Path:
    """Two classes, three photographs per split, dark patches on noise with boxes around them.

    Every entry carries a `uid`, every annotation its `truth` (box) and the uid of its image.
    """
    noise = np.random.default_rng(rng.randrange(2**32))
    for split in SPLITS:
        (root / split / "images").mkdir(parents=True)
        coco = {"images": [], "annotations": []}
        coco["categories"] = [{"id": 1, "name": "dent"}, {"id": 2, "name": "scratch"}]
        for k in range(3):
            pixels = noise.integers(110, 150, (SIZE[1], SIZE[0])).astype(np.uint8)
            uid = f"{split}{k}"
            image = {"id": k + 1, "file_name": f"{uid}.png", "uid": uid}
            coco["images"].append(image | {"width": SIZE[0], "height": SIZE[1]})
            for corner in ((4, 5), (26, 18))[: rng.choice((1, 2, 2))]:
                x, y = corner
                w, h = rng.randint(6, 14), rng.randint(6, 12)
                pixels[y : y + h, x : x + w] = 20
                coco["annotations"].append(
                    annotation(len(coco["annotations"]) + 1, image, [x, y, w, h], rng)
                )
            Image.fromarray(pixels).save(root / split / "images" / image["file_name"])
        write(root, split, coco)
    return root


def annotation(number, image, box, rng):
    """An annotation with its box, a polygon around it, and what tells it apart afterwards."""
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    found = {"id": number, "image_id": image["id"], "category_id": rng.choice((1, 2))}
    found |= {"bbox": box, "area": w * h, "iscrowd": 0, "truth": box}
    if rng.random() < 0.5:
        found["segmentation"] = [polygon]
    return found | {"uid": f"{image['uid']}-{number}", "image_uid": image["uid"]}


def write(root, split, coco):
    annotation_file(root, split).write_text(json.dumps(coco), encoding="utf-8")


def read(root, split):
    return json.loads(annotation_file(root, split).read_text(encoding="utf-8-sig"))


def dicts(entries):
    return [entry for entry in entries if isinstance(entry, dict)]


def some(entries, rng):
    """One entry that is a dictionary, or an empty one."""
    entries = dicts(entries)
    return rng.choice(entries) if entries else {}


# Ids and numbers -------------------------------------------------------------------------------


def written(value, rng):
    """A number as another tool writes it."""
    return rng.choice((str, float, "{}.0".format))(value) if isinstance(value, int) else value


@damage
def image_ids_as_text(coco, folder, rng):
    for image in dicts(coco["images"]):
        image["id"] = str(image.get("id"))
    if rng.random() < 0.5:
        for a in dicts(coco["annotations"]):
            a["image_id"] = str(a.get("image_id"))


@damage
def image_ids_as_words(coco, folder, rng):
    for entry, key in [
        *((i, "id") for i in coco["images"]),
        *((a, "image_id") for a in coco["annotations"]),
    ]:
        if isinstance(entry, dict):
            entry[key] = f"frame_{entry.get(key)}"


@damage
def references_as_text(coco, folder, rng):
    for a in dicts(coco["annotations"]):
        key = rng.choice(("image_id", "category_id"))
        a[key] = written(a.get(key), rng)


@damage
def category_ids_as_text(coco, folder, rng):
    for c in dicts(coco["categories"]):
        c["id"] = written(c.get("id"), rng)


@damage
def annotation_ids(coco, folder, rng):
    for a in dicts(coco["annotations"]):
        a["id"] = rng.choice((0, 1, "7", 2.0, None, "x", a.get("id")))


@damage
def sizes_as_text(coco, folder, rng):
    for image in dicts(coco["images"]):
        key = rng.choice(("width", "height"))
        image[key] = written(image.get(key), rng)


@damage
def sizes_missing(coco, folder, rng):
    image = some(coco["images"], rng)
    if image:
        image["width"] = rng.choice((0, None, -3, "wide"))


@damage
def areas_and_crowds(coco, folder, rng):
    for a in dicts(coco["annotations"]):
        a["area"] = rng.choice((None, -1, "12", 1e9, a.get("area")))
        a["iscrowd"] = rng.choice((None, 0, 2, "1", False, a.get("iscrowd")))


# Boxes -----------------------------------------------------------------------------------------


@damage
def boxes_as_text(coco, folder, rng):
    for a in dicts(coco["annotations"]):
        if isinstance(a.get("bbox"), list):
            a["bbox"] = [written(v, rng) for v in a["bbox"]]


@damage
def boxes_missing(coco, folder, rng):
    for a in dicts(coco["annotations"]):
        if rng.random() < 0.6:
            a["bbox"] = rng.choice((None, [], "none", [1, 2, 3], [float("nan")] * 4))


@damage
def boxes_as_run_lengths(coco, folder, rng):
    a = some(coco["annotations"], rng)
    if "truth" in a:
        x, y, w, h = a["truth"]
        mask = np.zeros((SIZE[1], SIZE[0]), np.uint8)
        mask[y : y + h, x : x + w] = 1
        flat = np.r_[0, mask.T.ravel(), 2]  # column by column
        edges = np.flatnonzero(np.diff(np.r_[0, mask.T.ravel()]))
        counts = np.diff(np.r_[0, edges, mask.size]).tolist()
        assert len(flat) == mask.size + 2
        a["segmentation"] = {"size": [SIZE[1], SIZE[0]], "counts": counts}
        a.pop("bbox", None)


@damage
def boxes_drawn_backwards(coco, folder, rng):
    a = some(coco["annotations"], rng)
    if "truth" in a:
        x, y, w, h = a["truth"]
        a["bbox"] = [x + w, y + h, -w, -h]


@damage
def boxes_over_the_edge(coco, folder, rng):
    a = some(coco["annotations"], rng)
    if a:
        a["bbox"], a["truth"] = [40, 20, 30, 30], [40, 20, 8, 16]
        a.pop("segmentation", None)


@damage
def boxes_of_nothing(coco, folder, rng):
    a = some(coco["annotations"], rng)
    if a:
        a["bbox"] = rng.choice(([3, 3, 0, 5], [500, 500, 9, 9], [0, 0, 1, 1], [5, math.inf, 2, 2]))
        a.pop("segmentation", None)


@damage
def boxes_as_corners(coco, folder, rng):
    for a in dicts(coco["annotations"]):
        if "truth" in a:
            x, y, w, h = a["truth"]
            a["bbox"] = [x, y, x + w, y + h]


@damage
def boxes_as_centres(coco, folder, rng):
    every = rng.random() < 0.7
    for a in dicts(coco["annotations"])[: None if every else 1]:
        if "truth" in a:
            x, y, w, h = a["truth"]
            a["bbox"] = [(x + w / 2) / SIZE[0], (y + h / 2) / SIZE[1], w / SIZE[0], h / SIZE[1]]


@damage
def boxes_twice(coco, folder, rng):
    a = some(coco["annotations"], rng)
    if a:
        coco["annotations"].append(a | {"id": 900, "uid": f"{a.get('uid')}-twice"})


# Names and photographs -------------------------------------------------------------------------


@damage
def names_of_windows(coco, folder, rng):
    for image in dicts(coco["images"]):
        image["file_name"] = "images\\" + str(image.get("file_name"))


@damage
def names_with_folders(coco, folder, rng):
    for k, image in enumerate(dicts(coco["images"])):
        image["file_name"] = f"cam{k}/{image.get('file_name')}"


@damage
def names_in_sub_folders(coco, folder, rng):
    for image in dicts(coco["images"]):
        file = folder / "images" / str(image.get("file_name"))
        if file.is_file():
            (folder / "images" / "batch0").mkdir(exist_ok=True)
            file.rename(folder / "images" / "batch0" / file.name)
            image["file_name"] = (
                f"batch0/{file.name}" if rng.random() < 0.5 else f"batch0\\{file.name}"
            )


@damage
def names_in_capitals(coco, folder, rng):
    image = some(coco["images"], rng)
    image["file_name"] = str(image.get("file_name")).upper()


@damage
def names_that_lead_out(coco, folder, rng):
    image = some(coco["images"], rng)
    outside = ("../../secret.png", "/etc/passwd", "C:\\x.png", "", 7, ["a"], "a\0b.png")
    image["file_name"] = rng.choice(outside)


@damage
def one_file_for_two(coco, folder, rng):
    first, second = (
        rng.choice(dicts(coco["images"]) or [{}]),
        rng.choice(dicts(coco["images"]) or [{}]),
    )
    second["file_name"] = first.get("file_name")


@damage
def file_gone(coco, folder, rng):
    files = sorted((folder / "images").rglob("*.png"))
    if files:
        rng.choice(files).unlink()


@damage
def file_damaged(coco, folder, rng):
    files = sorted((folder / "images").rglob("*.png"))
    if files:
        file = rng.choice(files)
        content = file.read_bytes()
        file.write_bytes(rng.choice((b"", b"<html>", content[: len(content) // 2])))


@damage
def file_too_deep(coco, folder, rng):
    files = sorted((folder / "images").rglob("*.png"))
    if files:
        deep = np.full((SIZE[1], SIZE[0]), 3000, np.uint16)
        Image.fromarray(deep).save(rng.choice(files))


@damage
def file_turned(coco, folder, rng):
    files = sorted((folder / "images").rglob("*.png"))
    if files:
        exif = Image.Exif()
        exif[274] = rng.choice((3, 6))
        Image.effect_noise(SIZE, 50).save(rng.choice(files), exif=exif)


@damage
def file_resized(coco, folder, rng):
    files = sorted((folder / "images").rglob("*.png"))
    if files:
        double = (2 * SIZE[0], 2 * SIZE[1])
        Image.effect_noise(rng.choice((double, (24, 18))), 50).save(rng.choice(files))


# Entries ---------------------------------------------------------------------------------------


@damage
def entries_of_nothing(coco, folder, rng):
    part = rng.choice(("images", "annotations", "categories"))
    coco[part].insert(0, rng.choice((None, "x", 3, [], {})))


@damage
def keys_gone(coco, folder, rng):
    part = rng.choice(("images", "annotations", "categories"))
    entry = some(coco[part], rng)
    keys = [key for key in entry if key not in ("uid", "image_uid", "truth")]
    if keys:
        entry.pop(rng.choice(keys))


@damage
def entries_twice(coco, folder, rng):
    part = rng.choice(("images", "categories"))
    entry = some(coco[part], rng)
    if entry:
        coco[part].append(dict(entry))


@damage
def unknown_references(coco, folder, rng):
    some(coco["annotations"], rng)[rng.choice(("image_id", "category_id"))] = 77


@damage
def segmentations_of_nothing(coco, folder, rng):
    for a in dicts(coco["annotations"]):
        a["segmentation"] = rng.choice(([[1, 2]], {"counts": "x"}, "no", [["a"] * 6], [[]], {}))


@damage
def a_heading(coco, folder, rng):
    for c in dicts(coco["categories"]):
        c["supercategory"] = "defects"
    coco["categories"].append({"id": 9, "name": "defects"})


@damage
def all_crowds(coco, folder, rng):
    for a in dicts(coco["annotations"]):
        a["iscrowd"] = 1


@damage
def nothing_annotated(coco, folder, rng):
    coco["annotations"] = []


def damaged_set(root: Path, names: list[str], seed: int) -> Path:
    """A sound set to which damage of these names was done, each in one split or in all."""
    rng = random.Random(seed)
    sound_set(root, rng)
    for name in names:
        splits = SPLITS if rng.random() < 0.3 else (rng.choice(SPLITS),)
        for split in splits:
            coco = read(root, split)
            DAMAGE[name](coco, root / split, rng)
            write(root, split, coco)
    if rng.random() < 0.1:
        file = annotation_file(root, rng.choice(SPLITS))
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    return root


# What must hold --------------------------------------------------------------------------------


def fingerprint(root: Path) -> dict:
    """Digest and time of every file below a folder."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return {p: (hashlib.sha256(p.read_bytes()).digest(), p.stat().st_mtime_ns) for p in files}


def uids(coco, part) -> Counter:
    return Counter(entry.get("uid") for entry in dicts(coco[part]))


def check_invariants(root: Path):
    """Raises `AssertionError` where `doctor --fix` lost, guessed or contradicted itself."""
    before = fingerprint(root)
    report = check_dataset(root)
    out, changes = fix_dataset(root, report=report)
    assert fingerprint(root) == before, "the original was touched"
    for split in SPLITS:
        old, new = read(root, split), read(out, split)
        rows = changes[changes["split"] == split]
        nothing_is_lost(old, new, rows)
        boxes_stay(old, new)
        sizes_stay(old, new)
        if not report.errors:
            gone = rows[rows["after"].isna()]
            assert not gone["field"].str.match("images|annotations").any(), "taken from a sound set"
        if not len(rows):
            same = (
                annotation_file(out, split).read_bytes()
                == annotation_file(root, split).read_bytes()
            )
            assert same, "changed without a word"
    after = check_dataset(out)
    agrees_with_the_loader(out, after)
    _, more = fix_dataset(out, out.with_name("again"), after)
    assert more.empty, f"a second time changes {more.to_dict('records')}"


def nothing_is_lost(old, new, rows):
    """What is not in the copy is in the list of changes, and nothing else is."""
    for part in ("images", "annotations"):
        named = rows[rows["after"].isna() & rows["field"].str.startswith(part)]
        gone = Counter()
        for entry in named["before"]:
            entry = json.loads(entry)
            if isinstance(entry, dict):
                gone[entry.get("uid")] += 1
        assert uids(old, part) - uids(new, part) == gone, f"{part}: lost without a word"
        assert not uids(new, part) - uids(old, part), f"{part}: made up"


def same_box(one, other):
    try:
        return bool(
            np.allclose(np.array(one, float), np.array(other, float), atol=1.0, equal_nan=True)
        )
    except (TypeError, ValueError):
        return json.dumps(one) == json.dumps(other)


def images_by_key(coco):
    found = {}
    for image in dicts(coco["images"]):
        found.setdefault(id_key(image.get("id")), set()).add(image.get("uid"))
    return found


def boxes_stay(old, new):
    """A box is what it was, or where the object is; and on the photograph that it was on."""
    before = {a.get("uid"): a for a in dicts(old["annotations"])}
    images, old_images = images_by_key(new), images_by_key(old)
    for a in dicts(new["annotations"]):
        was = before[a.get("uid")]
        kept = same_box(a.get("bbox"), was.get("bbox"))
        assert kept or same_box(a.get("bbox"), a.get("truth")), f"moved: {was} -> {a}"
        home = old_images.get(id_key(was.get("image_id")), set())
        if len(home) == 1 and None not in home:
            assert images.get(id_key(a.get("image_id"))) == home, (
                f"another photograph: {was} -> {a}"
            )
        names = {id_key(c.get("id")): c.get("name") for c in dicts(old["categories"])}
        after = {id_key(c.get("id")): c.get("name") for c in dicts(new["categories"])}
        if len(names) == len(old["categories"]) and id_key(was.get("category_id")) in names:
            name = names[id_key(was.get("category_id"))]
            assert after.get(id_key(a.get("category_id"))) == name, f"another class: {was} -> {a}"


def sizes_stay(old, new):
    """A width and height that say a size are not replaced by another one."""
    before = {image.get("uid"): image for image in dicts(old["images"])}
    for image in dicts(new["images"]):
        was = before[image.get("uid")]
        for key in ("width", "height"):
            said = id_key(was.get(key))
            if isinstance(said, int) and said > 0:
                assert id_key(image.get(key)) == said, f"another size: {was} -> {image}"


def agrees_with_the_loader(root, report):
    """The loader opens what the closed look calls sound, and nothing else; photographs likewise."""
    sound = not check_dataset(root, photographs=False).errors
    try:
        datasets = [load_dataset(root, split) for split in SPLITS]
    except DatasetError:
        datasets = None
    assert sound == (datasets is not None), "the loader and the doctor do not agree"
    if not sound:
        return
    errors = [f for f in report.errors if f.kind.startswith(("photo-", "mode-"))]
    damaged = {f.file for f in errors}
    for split, dataset in zip(SPLITS, datasets, strict=True):
        for i, image in enumerate(dataset.images):
            place = f"{split}/images/{image['file_name']}"
            try:
                read_photograph(dataset.image_path(i))
            except PhotographError:
                assert place in damaged, f"{place} cannot be read, and the doctor did not say so"
            else:
                assert place not in damaged, f"{place} is read, and the doctor calls it damaged"


def try_one(seed: int) -> tuple[list[str], str]:
    """Damage by chance, and what did not hold ("" where all did)."""
    rng = random.Random(seed)
    names = rng.choices(sorted(DAMAGE), k=rng.randint(0, 4))
    with tempfile.TemporaryDirectory() as folder:
        root = damaged_set(Path(folder) / "set", names, seed)
        try:
            check_invariants(root)
        except Exception as e:
            return names, f"{type(e).__name__}: {e}"
    return names, ""


def main(count: int, seed: int = 0):
    began, failed = time.time(), 0
    for k in range(seed, seed + count):
        names, problem = try_one(k)
        if problem:
            failed += 1
            print(f"seed {k}, {', '.join(names)}: {problem[:400]}", flush=True)
        if (k - seed + 1) % 100 == 0:
            print(f"{k - seed + 1} tried, {failed} failed", flush=True)
    print(f"{count} damaged sets, {failed} failed, {time.time() - began:.0f} s")
    return failed


if __name__ == "__main__":
    os.environ.setdefault("IN_TEST", "1")
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
