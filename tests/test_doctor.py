"""Every kind of damage is planted, on built-in and real photographs, and found under its name."""

import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from page_code import page_module
from PIL import Image, ImageEnhance, ImageOps

from deimv2_tfg import cli
from deimv2_tfg.copies import base_name, same_pairs
from deimv2_tfg.core import read_json, write_json
from deimv2_tfg.data import SPLITS, annotation_file, check_dataset, load_dataset
from deimv2_tfg.doctor import fix_dataset, write_report
from deimv2_tfg.photographs import KINDS, look_at_all
from deimv2_tfg.synthetic import make_dataset

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL, NEU = SHARED / "industrial6", SHARED / "neu-det"
no_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real photographs {REAL} are not there")


def subset(source, there, counts):
    "The first photographs of each split, an even share a class, with their annotations."
    for split, n in zip(SPLITS, counts, strict=True):
        coco = read_json(annotation_file(source, split))
        chosen, classes = [], sorted({c["id"] for c in coco["categories"]})
        for k in range(n):
            having = {
                a["image_id"]
                for a in coco["annotations"]
                if a["category_id"] == classes[k % len(classes)]
            }
            chosen.append(next(i for i in coco["images"] if i["id"] in having and i not in chosen))
        ids = {i["id"] for i in chosen}
        write_json(
            annotation_file(there, split),
            coco
            | {
                "images": chosen,
                "annotations": [a for a in coco["annotations"] if a["image_id"] in ids],
            },
        )
        (there / split / "images").mkdir()
        for i in chosen:
            shutil.copy(
                source / split / "images" / i["file_name"],
                there / split / "images" / i["file_name"],
            )
    return there


@pytest.fixture(scope="module", params=["synthetic", pytest.param("real", marks=no_real)])
def base(request, tmp_path_factory):
    "A small sound data set and what the check says of it."
    there = tmp_path_factory.mktemp("base") / "set"
    make_dataset(
        there, profile="smoke", counts=(6, 6, 6)
    ) if request.param == "synthetic" else subset(REAL, there, (6, 6, 6))
    return there, check_dataset(there)


class Victim:
    "A copy of a data set that is about to be damaged, in `val` unless said."

    def __init__(self, root):
        self.root, self.coco = root, read_json(annotation_file(root, "val"))

    @property
    def images(self):
        return self.root / "val" / "images"

    @property
    def name(self):
        return self.coco["images"][0]["file_name"]

    @property
    def photo(self):
        return self.images / self.name

    @property
    def box(self):
        return self.coco["annotations"][0]["bbox"]

    @property
    def its(self):
        return next(
            i for i in self.coco["images"] if i["id"] == self.coco["annotations"][0]["image_id"]
        )

    def store(self):
        write_json(annotation_file(self.root, "val"), self.coco)

    def open(self):
        with Image.open(self.photo) as i:
            return i.convert("RGB")


DAMAGE = {}
JSON, PHOTO = "val/val.json", "val/images/{name}"


def damage(kind, file=JSON, field=""):
    def keep(f):
        DAMAGE[f"{kind}:{f.__name__}"] = (kind, file, field, f)
        return f

    return keep


def entry(kind, field, change, name="entry"):
    "Damage of the json alone: `change(victim)`, then it is stored."

    def f(v):
        change(v)
        v.store()

    f.__name__ = name
    damage(kind, JSON, field)(f)


def ann(kind, field="annotations[0].bbox", name="entry", **values):
    entry(kind, field, lambda v: v.coco["annotations"][0].update(values), name)


@damage("root-missing", ".")
def no_folder(v):
    shutil.rmtree(v.root)


@damage("json-missing")
def renamed(v):
    annotation_file(v.root, "val").rename(v.root / "val" / "annotations.json")


@damage("json-invalid")
def cut(v):
    p = annotation_file(v.root, "val")
    p.write_text(p.read_text()[:200])


@damage("json-invalid")
def other_encoding(v):
    p = annotation_file(v.root, "val")
    p.write_bytes(p.read_text().encode("utf-16"))


@damage("folder-missing", "val/images")
def no_images_folder(v):
    shutil.rmtree(v.images)


@damage("file-missing", JSON, "images[0].file_name")
def deleted(v):
    v.photo.unlink()


@damage("orphan", "val/images/extra.png")
def extra(v):
    Image.effect_noise((80, 60), 60).save(v.images / "extra.png")


entry("not-coco", "categories", lambda v: v.coco.pop("categories"), "no_categories")
entry("not-coco", "annotations", lambda v: v.coco.update(annotations={}), "a_dict")
entry("no-images", "images", lambda v: v.coco["images"].clear())
entry("image-incomplete", "images[0]", lambda v: v.coco["images"][0].pop("width"))
entry(
    "image-incomplete", "images[1]", lambda v: v.coco["images"].insert(1, "x.jpg"), "not_an_object"
)
entry("image-id-type", "images[0].id", lambda v: v.coco["images"][0].update(id="one"))
entry(
    "image-id-twice",
    "images[6].id",
    lambda v: v.coco["images"].append(
        v.coco["images"][0] | {"file_name": v.coco["images"][1]["file_name"]}
    ),
)
entry(
    "file-name-twice",
    "images[6].file_name",
    lambda v: v.coco["images"].append(v.coco["images"][0] | {"id": 999}),
)
entry(
    "file-outside",
    "images[0].file_name",
    lambda v: v.coco["images"][0].update(file_name="../../secret.jpg"),
)
entry(
    "file-outside",
    "images[0].file_name",
    lambda v: v.coco["images"][0].update(file_name="images\\" + v.name),
    "windows",
)
entry(
    "file-name-case",
    "images[0].file_name",
    lambda v: v.coco["images"][0].update(file_name=v.name.replace(".jpg", ".JPG")),
)
entry(
    "file-missing",
    "images[0].file_name",
    lambda v: v.coco["images"][0].update(file_name="images/" + v.name),
    "with_folder",
)
entry(
    "image-size-invalid", "images[0].width, height", lambda v: v.coco["images"][0].update(width=0)
)
entry(
    "annotation-incomplete",
    "annotations[0]",
    lambda v: v.coco["annotations"].__setitem__(0, {"bbox": v.box}),
)
entry("annotation-id-missing", "annotations[0].id", lambda v: v.coco["annotations"][0].pop("id"))
entry(
    "annotation-id-twice",
    "annotations[1].id",
    lambda v: v.coco["annotations"][1].update(id=v.coco["annotations"][0]["id"]),
)
ann("annotation-id-zero", "annotations[0].id", id=0)
ann("image-id-unknown", "annotations[0].image_id", image_id=12345)
ann("category-id-unknown", "annotations[0].category_id", category_id=77)
ann("category-id-unknown", "annotations[0].category_id", "as_text", category_id="1")
ann("box-malformed", bbox=[1, 2, 3])
ann("box-malformed", name="text", bbox="1 2 3 4")
ann("box-malformed", name="none", bbox=None)
entry("box-nan", "annotations[0].bbox", lambda v: None)
ann("box-empty", bbox=[1, 2, 0, 4])
ann("box-outside", bbox=[5000, 5000, 10, 10])
entry(
    "box-negative",
    "annotations[0].bbox",
    lambda v: v.coco["annotations"][0].update(
        bbox=[v.box[0] + v.box[2], v.box[1], -v.box[2], v.box[3]]
    ),
)
ann("box-fraction", bbox=[0.2, 0.2, 0.5, 0.5])
entry(
    "box-over-edge",
    "annotations[0].bbox",
    lambda v: v.coco["annotations"][0].update(bbox=[v.its["width"] - 10, 2, 40, 20]),
)
ann("box-tiny", bbox=[3, 3, 1, 9])
entry(
    "box-whole-image",
    "annotations[0].bbox",
    lambda v: v.coco["annotations"][0].update(
        bbox=[0, 0, v.its["width"], v.its["height"]], area=v.its["width"] * v.its["height"]
    ),
)
entry(
    "box-twice",
    "bbox",
    lambda v: v.coco["annotations"].append(v.coco["annotations"][0] | {"id": 900}),
)
entry(
    "box-two-classes",
    "bbox",
    lambda v: v.coco["annotations"].append(
        v.coco["annotations"][0]
        | {"id": 900, "category_id": (v.coco["annotations"][0]["category_id"] + 1) % 6}
    ),
)
ann("area-wrong", "annotations[0].area", area=7)
ann("area-wrong", "annotations[0].area", "negative", area=-1)
entry("area-missing", "annotations[0].area", lambda v: v.coco["annotations"][0].pop("area"))
entry("crowd-missing", "annotations[0].iscrowd", lambda v: v.coco["annotations"][0].pop("iscrowd"))
ann("crowd-invalid", "annotations[0].iscrowd", iscrowd=2)
ann("crowd", "annotations[0].iscrowd", iscrowd=1)
entry(
    "id-type",
    "annotations[0].image_id",
    lambda v: v.coco["annotations"][0].update(image_id=float(v.its["id"])),
)
entry(
    "crowd-most",
    "annotations",
    lambda v: [a.update(iscrowd=1) for a in v.coco["annotations"]],
)
entry("nothing-annotated", "annotations", lambda v: v.coco["annotations"].clear())
entry("no-categories", "categories", lambda v: v.coco["categories"].clear())
entry("category-incomplete", "categories[0]", lambda v: v.coco["categories"][0].pop("name"))
entry(
    "category-id-twice",
    "categories[1].id",
    lambda v: v.coco["categories"][1].update(id=v.coco["categories"][0]["id"]),
)
entry(
    "category-name-twice",
    "categories[1].name",
    lambda v: v.coco["categories"][1].update(name=v.coco["categories"][0]["name"]),
)
entry(
    "category-name-alike",
    "categories[1].name",
    lambda v: v.coco["categories"][1].update(name=v.coco["categories"][0]["name"].lower() + " "),
    "case",
)
entry(
    "category-name-alike",
    "categories[1].name",
    lambda v: v.coco["categories"][1].update(name=v.coco["categories"][1]["name"] + " "),
    "space",
)
entry("categories-differ", "categories", lambda v: v.coco["categories"][0].update(name="OTHER"))
entry(
    "categories-differ",
    "categories",
    lambda v: [c.update(id=c["id"] + 1) for c in v.coco["categories"]],
    "ids_from_1",
)
entry(
    "class-absent",
    "annotations",
    lambda v: v.coco.update(
        annotations=[a for a in v.coco["annotations"] if a["category_id"] != 2]
    ),
)
entry("size-differs", "width, height", lambda v: None)


@damage("box-nan", JSON, "annotations[0].bbox")
def entry_nan(v):
    v.coco["annotations"][0]["bbox"][2] = float("nan")
    annotation_file(v.root, "val").write_text(json.dumps(v.coco))


@damage("box-corners", JSON, "bbox")
def corners(v):
    for a in v.coco["annotations"]:
        x, y, w, h = a["bbox"]
        a["bbox"] = [x, y, x + w, y + h]
    v.store()


@damage("category-id-gaps", JSON, "categories")
def gaps(v):
    for split in SPLITS:
        coco = read_json(annotation_file(v.root, split))
        for c in coco["categories"]:
            c["id"] = 1 + 2 * c["id"]
        for a in coco["annotations"]:
            a["category_id"] = 1 + 2 * a["category_id"]
        write_json(annotation_file(v.root, split), coco)


@damage("category-parent", JSON, "categories")
def heading(v):
    "How Roboflow exports: a category 0 above all others, without objects."
    for split in SPLITS:
        coco = read_json(annotation_file(v.root, split))
        for c in coco["categories"]:
            c["supercategory"] = "defects"
        coco["categories"].append({"id": 100, "name": "defects", "supercategory": "none"})
        write_json(annotation_file(v.root, split), coco)


@damage("class-few", JSON, "annotations")
def few(v):
    "A class with one object, beside one that has many."
    v.coco["annotations"] = [
        a
        for a in v.coco["annotations"]
        if a["category_id"] != 1
        or a is next(b for b in v.coco["annotations"] if b["category_id"] == 1)
    ]
    v.coco["annotations"].append(
        v.coco["annotations"][-1] | {"id": 991, "bbox": [4, 4, 9, 9], "area": 81}
    )
    v.store()


@damage("photo-empty", PHOTO)
def emptied(v):
    v.photo.write_bytes(b"")


@damage("photo-unreadable", PHOTO)
def overwritten(v):
    v.photo.write_bytes(b"<html>not found</html>" * 20)


@damage("photo-truncated", PHOTO)
def cut_jpeg(v):
    d = v.photo.read_bytes()
    v.photo.write_bytes(d[: int(len(d) * 0.6)])


@damage("photo-truncated", PHOTO)
def cut_png(v):
    v.open().save(v.images / "x.png")
    d = (v.images / "x.png").read_bytes()
    (v.images / "x.png").unlink()
    v.photo.write_bytes(d[: int(len(d) * 0.6)])


@damage("photo-too-large", PHOTO)
def bomb(v):
    Image.new("1", (20000, 20000)).save(v.photo, "PNG")


@damage("size-differs", PHOTO, "width, height")
def swapped(v):
    v.open().resize((77, 91)).save(v.photo)


@damage("size-differs", PHOTO, "width, height")
def turned_by_tag(v):
    i = v.open().crop((0, 0, 60, 48))
    e = Image.Exif()
    e[274] = 6
    i.save(v.photo, exif=e)
    v.coco["images"][0].update(width=48, height=60)
    v.store()


@damage("exif-rotated", PHOTO, "EXIF orientation")
def tagged(v):
    i = v.open()
    e = Image.Exif()
    e[274] = 3
    i.save(v.photo, exif=e)


@damage("mode-16-bit", PHOTO, "mode")
def deep(v):
    Image.fromarray(np.asarray(v.open().convert("L")).astype(np.uint16) * 257).save(v.photo, "PNG")


@damage("mode-16-bit", PHOTO, "mode")
def deep_colours(v):
    "16 bits a channel, which Pillow reads as 8 without a word."
    v.photo.write_bytes(png_of_16_bits(96, 72))


@damage("exif-tag", "val/images/turned.jpg", "EXIF orientation")
def tagged_without_boxes(v):
    exif = Image.Exif()
    exif[274] = 3
    plant(v, "val", "turned.jpg", Image.effect_noise((80, 60), 60), exif=exif)


@damage("mode-float", PHOTO, "mode")
def floating(v):
    Image.fromarray(np.asarray(v.open().convert("L"), np.float32)).save(v.photo, "TIFF")


@damage("mode-palette", PHOTO, "mode")
def palette(v):
    v.open().quantize(16).save(v.photo, "PNG")


@damage("mode-bilevel", PHOTO, "mode")
def bilevel(v):
    v.open().convert("1").save(v.photo, "PNG")


@damage("mode-cmyk", PHOTO, "mode")
def cmyk(v):
    v.open().convert("CMYK").save(v.photo, "JPEG")


@damage("mode-alpha", PHOTO, "mode")
def alpha(v):
    i = v.open()
    i.putalpha(100)
    i.save(v.photo, "PNG")


@damage("frames", PHOTO)
def frames(v):
    i = v.open()
    i.save(v.photo, "TIFF", save_all=True, append_images=[ImageOps.invert(i)])


@damage("format-differs", PHOTO)
def png_named_jpg(v):
    v.open().save(v.photo, "PNG")


@damage("photo-small", PHOTO)
def small(v):
    v.open().resize((20, 20)).save(v.photo)


@damage("photo-flat", PHOTO)
def flat(v):
    Image.new("RGB", v.open().size, (90, 90, 90)).save(v.photo)


def png_of_16_bits(width, height):
    "Bytes of an RGB PNG with 16 bits a channel, dim as a 12-bit camera writes it."
    rows = np.random.default_rng(0).integers(0, 4096, (height, width, 3)).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)

    def chunk(name, data):
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def plant(v, split, name, image, boxes=None, **options):
    "A new photograph in a split, with boxes of its own."
    coco = read_json(annotation_file(v.root, split))
    image.save(v.root / split / "images" / name, **options)
    coco["images"].append(
        {"id": 7000, "file_name": name, "width": image.width, "height": image.height}
    )
    for k, b in enumerate(boxes or []):
        coco["annotations"].append(
            {
                "id": 7000 + k,
                "image_id": 7000,
                "category_id": b[0],
                "bbox": b[1],
                "area": b[1][2] * b[1][3],
                "iscrowd": 0,
            }
        )
    write_json(annotation_file(v.root, split), coco)


@damage("copy-exact-across", "test/images/zz.png")
def resaved_pixels(v):
    plant(v, "test", "zz.png", Image.open(v.photo))


@damage("copy-exact-across", "test/images/zz.jpg")
def same_bytes(v):
    plant(v, "test", "zz.jpg", Image.open(v.photo))
    shutil.copy(v.photo, v.root / "test/images/zz.jpg")


@damage("copy-exact", "val/images/zz.png")
def twice(v):
    plant(v, "val", "zz.png", Image.open(v.photo))


@damage("copy-boxes-differ", "test/images/zz.png")
def other_boxes(v):
    plant(v, "test", "zz.png", Image.open(v.photo), [(3, [1, 1, 9, 9])])


@damage("copy-near-across", "test/images/zz.jpg")
def mirrored(v):
    plant(v, "test", "zz.jpg", ImageOps.mirror(v.open()), quality=90)


@damage("copy-near-across", "test/images/zz.jpg")
def brightened(v):
    plant(v, "test", "zz.jpg", ImageEnhance.Brightness(v.open()).enhance(1.25), quality=90)


@damage("copy-near-across", "test/images/zz.png")
def shrunk(v):
    i = v.open()
    plant(
        v,
        "test",
        "zz.png",
        i.resize((round(i.width * 0.7), round(i.height * 0.7)), Image.Resampling.BILINEAR),
    )


@damage("copy-near-across", "test/images/zz.jpg")
def recoded(v):
    plant(v, "test", "zz.jpg", v.open(), quality=40)


@damage("copy-near", "val/images/zz.png")
def turned_copy(v):
    plant(v, "val", "zz.png", v.open().transpose(Image.Transpose.ROTATE_90))


@damage("name-augmented-across", "test/images/part_aug2.png")
def named_across(v):
    plant(v, "val", "part.png", Image.effect_noise((90, 70), 60))
    plant(v, "test", "part_aug2.png", Image.effect_noise((90, 70), 60))


@damage("name-augmented", "val/images/part_hflip.png")
def named_within(v):
    plant(v, "val", "part_hflip.png", Image.effect_noise((90, 70), 60))
    plant(v, "val", "part.png", Image.effect_noise((90, 70), 60))


@damage("name-in-two-splits", "test/images/shared.png")
def shared_name(v):
    for split in ("val", "test"):
        plant(v, split, "shared.png", Image.effect_noise((90, 70), 60))


for noop in ("box-nan:entry", "size-differs:entry"):
    DAMAGE.pop(noop)  # written out above


def test_every_kind_is_planted():
    assert {kind for kind, *_ in DAMAGE.values()} == set(KINDS) and len(KINDS) >= 40


@pytest.mark.parametrize("planted", DAMAGE, ids=str)
def test_planted_damage_is_found_and_named(base, tmp_path, planted):
    clean, before = base
    kind, file, field, plant_it = DAMAGE[planted]
    shutil.copytree(clean, tmp_path / "set")
    victim = Victim(tmp_path / "set")
    file = file.format(name=victim.name, stem=victim.photo.stem)
    plant_it(victim)
    new = set(check_dataset(tmp_path / "set").findings) - set(before.findings)
    hits = [f for f in new if f.kind == kind and f.file == file and field in f.field]
    assert hits, sorted((f.kind, f.file, f.field) for f in new)
    assert all(f.severity == KINDS[kind][0] and f.message and f.fix for f in hits)


def test_a_sound_set_has_no_error(base):
    root, report = base
    assert report.errors == [] and load_dataset(root, "test").num_classes == 6


@no_real
def test_real_photographs_have_no_error_and_one_is_told_from_another():
    report = check_dataset(REAL)
    assert report.errors == [] and len(report.photographs) == 1021
    assert {f.kind for f in report.warnings} <= {
        "class-few",
        "copy-near",
        "copy-near-across",
        "box-whole-image",
        "box-tiny",
        "name-in-two-splits",
    }
    sources = {
        (s, i["file_name"]): i["source"]
        for s in SPLITS
        for i in read_json(annotation_file(REAL, s))["images"]
    }
    source = [sources[k].startswith("exp") for k in report.photographs]
    assert all(
        source[a] == source[b] for a, b in zip(report.pairs.a, report.pairs.b, strict=True)
    )  # never a tile with a steel sheet
    tiles = report.pairs[[source[a] for a in report.pairs.a]]
    assert (
        tiles.turned == "as it is"
    ).all()  # tiles were photographed upright: pairs by chance would fall on all eight orientations


def recall(files, n, seed=0):
    photographs = look_at_all(sorted(files))
    chosen = np.random.default_rng(seed).permutation(len(photographs))[:n]
    return photographs, page_module("00f_copies").copy_recall(photographs, chosen)


@pytest.mark.skipif(not NEU.is_dir(), reason=f"the real photographs {NEU} are not there")
def test_copies_on_neu_det():
    photographs, found = recall((NEU / "IMAGES").glob("*.jpg"), 40)
    assert (
        found.found.sum() >= 0.95 * found.planted.sum()
        and found["false pairs"].sum() <= 0.01 * found.found.sum()
    )
    assert (
        len(same_pairs(photographs)) <= 18
    )  # of 1800 look-alike textures as they are, at most 1 %


@no_real
def test_copies_on_industrial6():
    _, found = recall(REAL.glob("*/images/*.jpg"), 30)
    assert (
        found.found.sum() >= 0.95 * found.planted.sum()
        and found["false pairs"].sum() <= 0.01 * found.found.sum()
    )


@pytest.mark.parametrize(
    "name,base",
    [
        ("a_aug.jpg", "a"),
        ("a_aug12.png", "a"),
        ("a-flip.png", "a"),
        ("a_hflip_bright2.png", "a"),
        ("a (2).jpg", "a (2)"),
        ("a_copy (2).jpg", "a"),
        ("img_jpg.rf.0123456789abcdef.jpg", "img"),
        ("rotor_1.jpg", "rotor_1"),
        ("exp1_num_22.jpg", "exp1_num_22"),
        ("augusta.png", "augusta"),
        ("noisy.png", "noisy"),
    ],
)
def test_base_names(name, base):
    assert base_name(name) == base


FIXABLE = [
    "file-missing:deleted",
    "file-name-twice:entry",
    "file-name-case:entry",
    "file-missing:with_folder",
    "image-incomplete:entry",
    "annotation-id-missing:entry",
    "annotation-id-twice:entry",
    "annotation-id-zero:entry",
    "image-id-unknown:entry",
    "category-id-unknown:entry",
    "box-malformed:none",
    "box-nan:entry_nan",
    "box-empty:entry",
    "box-outside:entry",
    "box-negative:entry",
    "box-over-edge:entry",
    "area-wrong:entry",
    "area-missing:entry",
    "crowd-missing:entry",
    "crowd-invalid:entry",
    "box-corners:corners",
    "photo-empty:emptied",
    "photo-truncated:cut_jpeg",
]


@pytest.mark.parametrize("planted", FIXABLE)
def test_fix_mends_a_copy_and_leaves_the_originals(tmp_path, base, planted):
    kind, _, _, plant_it = DAMAGE[planted]
    shutil.copytree(base[0], tmp_path / "set")
    plant_it(Victim(tmp_path / "set"))
    before = {
        p: (p.read_bytes(), p.stat().st_mtime_ns)
        for p in (tmp_path / "set").rglob("*")
        if p.is_file()
    }
    out, changes = fix_dataset(tmp_path / "set")
    assert before == {
        p: (p.read_bytes(), p.stat().st_mtime_ns)
        for p in (tmp_path / "set").rglob("*")
        if p.is_file()
    }
    assert len(changes) and {"findings.csv", "changes.csv"} <= {p.name for p in out.iterdir()}
    after = check_dataset(out)
    assert kind not in {f.kind for f in after.findings} and not after.errors
    assert fix_dataset(out, tmp_path / "again", after)[1].empty  # nothing is left to mend


def test_fix_refuses_to_write_where_it_must_not(tmp_path, base):
    shutil.copytree(base[0], tmp_path / "set")
    with pytest.raises(ValueError, match="not touched"):
        fix_dataset(tmp_path / "set", tmp_path / "set" / "fixed")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="something else"):
        fix_dataset(tmp_path / "set", tmp_path / "mine")


def test_the_command(tmp_path, base, capsys):
    shutil.copytree(base[0], tmp_path / "set")
    assert (
        cli.main(["doctor", str(tmp_path / "set")]) == 0
        and cli.main(["doctor", str(tmp_path / "set"), "--strict"]) == 1
    )
    twice(Victim(tmp_path / "set"))
    deleted(Victim(tmp_path / "set"))
    capsys.readouterr()
    assert (
        cli.main(
            ["doctor", str(tmp_path / "set"), "--json", "--fix", "--out", str(tmp_path / "out")]
        )
        == 1
    )
    said = json.loads(capsys.readouterr().out)
    assert (
        said["errors"] == 1
        and {"severity", "file", "field", "message", "fix", "kind"} <= said["findings"][0].keys()
        and said["fixed"] == str(tmp_path / "out")
    )
    assert (
        cli.main(["doctor", str(tmp_path / "nowhere"), "--json"]) == 1
        and json.loads(capsys.readouterr().out)["findings"][0]["kind"] == "root-missing"
    )


def test_the_report_shows_pairs_as_pictures(tmp_path, base):
    shutil.copytree(base[0], tmp_path / "set")
    mirrored(Victim(tmp_path / "set"))
    write_report(check_dataset(tmp_path / "set"), tmp_path / "report")
    assert (
        Image.open(tmp_path / "report" / "pairs.png").width > 500
        and "test/images/zz.jpg" in (tmp_path / "report" / "pairs.csv").read_text()
    )


def test_every_pass_of_a_check_and_a_correction_has_a_bar(tmp_path, base, monkeypatch):
    shutil.copytree(base[0], tmp_path / "set")
    file = tmp_path / "set" / "train" / "train.json"
    coco = json.loads(file.read_text())
    for annotation in coco["annotations"]:
        del annotation["iscrowd"]
    file.write_text(json.dumps(coco))
    bars = {}

    def bar(iterable, desc, **options):
        bars[desc] = options["delay"]
        return iterable

    monkeypatch.setattr("deimv2_tfg.core.tqdm", bar)
    fix_dataset(tmp_path / "set")
    passes = {"heads of files", "annotations", "looking at photographs", "detail of photographs"}
    passes |= {"comparing photographs", "comparing candidates", "corrections"}
    assert passes <= bars.keys() and max(bars[name] for name in passes) <= 2
