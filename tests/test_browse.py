"""The pile is filtered by class, kind and threshold; the widget survives an empty pile."""

import io

import pytest
from page_code import page_module
from PIL import Image

from deimv2_tfg.core import read_json, write_json
from deimv2_tfg.data import annotation_file

browse = page_module("07d_browse")


def found_in(coco, split):
    "Every object of every second photograph, an invention on the first, the last unsure."
    ids = [i["id"] for i in coco["images"]]
    found = []
    for a in coco["annotations"]:
        if split == "val" or ids.index(a["image_id"]) % 2 or a["image_id"] == ids[-1]:
            result = {key: a[key] for key in ("image_id", "category_id", "bbox")}
            result["score"] = 0.3 if a["image_id"] == ids[-1] else 0.9
            found.append(result)
    if split == "test":
        invented = {"image_id": ids[0], "category_id": coco["categories"][1]["id"]}
        found.append(invented | {"bbox": [1, 1, 5, 5], "score": 0.95})
    return found


@pytest.fixture
def run(smoke_data, tmp_path):
    for split in ("val", "test"):
        coco = read_json(annotation_file(smoke_data, split))
        write_json(tmp_path / f"predictions_{split}.json", found_in(coco, split))
    write_json(tmp_path / "config.json", {"data_dir": str(smoke_data)})
    return tmp_path


def test_the_pile_is_what_was_asked_for(run, smoke_data):
    pile = browse.Pile(run, smoke_data)
    coco = read_json(annotation_file(smoke_data, "test"))
    sizes = {
        which: len(browse.shown_photographs(pile, which=which, threshold=0.5))
        for which in browse.SHOWN
    }
    assert sizes["all"] == len(coco["images"]) == sizes["something wrong"] + sizes["all right"]
    assert sizes["false"] == 1
    assert sizes["missed"] >= 2
    # the unsure one is found now
    assert len(browse.shown_photographs(pile, which="missed", threshold=0.2)) < sizes["missed"]
    first = coco["categories"][0]
    own = {a["image_id"] for a in coco["annotations"] if a["category_id"] == first["id"]}
    assert set(browse.shown_photographs(pile, first["name"], threshold=0.5)["image_id"]) == own


def test_the_pair_shows_what_is_over_the_threshold(run, smoke_data):
    pile = browse.Pile(run, smoke_data)
    last = pile.annotations["images"][-1]["id"]
    sure, unsure = browse.pair(pile, last, 0.5), browse.pair(pile, last, 0.2)
    assert unsure.tobytes() != sure.tobytes()
    assert sure.width > sure.height


def test_the_widget_turns_filters_and_survives_an_empty_pile(run, smoke_data):
    browser = browse.Browser(browse.Pile(run, smoke_data))
    browser.which.value = "all"
    seen = {browser.picture.value}
    for _ in range(browser.place.max):
        browser.on.click()
        seen.add(browser.picture.value)
    assert len(seen) == len(browser.pile.annotations["images"]) == browser.place.value + 1
    browser.on.click()
    assert browser.place.value == browser.place.max
    browser.own.value = False
    browser.which.value = "false"
    browser.threshold.value = 1.0
    assert browser.place.value == 0
    assert "no photograph" in browser.said.value
    assert browser.picture.layout.display == "none"
    browser.which.value = "missed"
    browser.threshold.value = 0.5
    assert "1 of" in browser.said.value
    assert Image.open(io.BytesIO(browser.picture.value)).width > 320
