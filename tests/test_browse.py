"""The pile is filtered by class, kind and threshold; the widget shows what it is told to, and survives an empty pile."""

import io

import pytest
from PIL import Image

from deimv2_tfg.browse import SHOWN, Browser, Pile, pair, shown_photographs
from deimv2_tfg.core import read_json, write_json
from deimv2_tfg.data import annotation_file


@pytest.fixture
def run(smoke_data, tmp_path):
    "A run that finds every object of every second photograph, invents one box on the first, and is unsure of the last."
    for split in ("val", "test"):
        coco = read_json(annotation_file(smoke_data, split))
        ids = [i["id"] for i in coco["images"]]
        found = [
            {
                "image_id": a["image_id"],
                "category_id": a["category_id"],
                "bbox": a["bbox"],
                "score": 0.3 if a["image_id"] == ids[-1] else 0.9,
            }
            for a in coco["annotations"]
            if split == "val" or ids.index(a["image_id"]) % 2 or a["image_id"] == ids[-1]
        ]
        if split == "test":
            found.append(
                {
                    "image_id": ids[0],
                    "category_id": coco["categories"][1]["id"],
                    "bbox": [1, 1, 5, 5],
                    "score": 0.95,
                }
            )
        write_json(tmp_path / f"predictions_{split}.json", found)
    write_json(tmp_path / "config.json", {"data_dir": str(smoke_data)})
    return tmp_path


def test_the_pile_is_what_was_asked_for(run, smoke_data):
    pile, coco = Pile(run, smoke_data), read_json(annotation_file(smoke_data, "test"))
    sizes = {which: len(shown_photographs(pile, which=which, threshold=0.5)) for which in SHOWN}
    assert (
        sizes["all"] == len(coco["images"]) == sizes["something wrong"] + sizes["all right"]
        and sizes["false"] == 1
        and sizes["missed"] >= 2
    )
    assert (
        len(shown_photographs(pile, which="missed", threshold=0.2)) < sizes["missed"]
    )  # the unsure one is found now
    name, own = (
        coco["categories"][0]["name"],
        {
            a["image_id"]
            for a in coco["annotations"]
            if a["category_id"] == coco["categories"][0]["id"]
        },
    )
    assert set(shown_photographs(pile, name, threshold=0.5)["image_id"]) == own


def test_the_pair_shows_what_is_over_the_threshold(run, smoke_data):
    pile = Pile(run, smoke_data)
    last = pile.annotations["images"][-1]["id"]
    assert (
        pair(pile, last, 0.2).tobytes() != pair(pile, last, 0.5).tobytes()
        and pair(pile, last, 0.5).width > pair(pile, last, 0.5).height
    )


def test_the_widget_turns_filters_and_survives_an_empty_pile(run, smoke_data):
    browser = Browser(Pile(run, smoke_data))
    browser.which.value = "all"
    seen = {browser.picture.value}
    for _ in range(browser.place.max):
        browser.on.click()
        seen.add(browser.picture.value)
    assert len(seen) == len(browser.pile.annotations["images"]) == browser.place.value + 1
    browser.on.click()
    assert browser.place.value == browser.place.max
    browser.own.value, browser.which.value, browser.threshold.value = False, "false", 1.0
    assert (
        browser.place.value == 0
        and "no photograph" in browser.said.value
        and browser.picture.layout.display == "none"
    )
    browser.which.value, browser.threshold.value = "missed", 0.5
    assert (
        "1 of" in browser.said.value and Image.open(io.BytesIO(browser.picture.value)).width > 320
    )
