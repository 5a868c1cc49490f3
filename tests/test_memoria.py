"""The memoria: what the text names is there, as the csv has it, or said as missing."""

import json
import re

import pandas as pd
import pytest
from pypdf import PdfReader

from deimv2_tfg import memoria
from deimv2_tfg.detector import DetectorConfig
from deimv2_tfg.figures import LANGUAGES

ENGLISH = "the and with of not run boxes text head class seeds images mean true words without by"
ENGLISH += " none missed rate network layers against model more photograph classes queries"
SECTION = """#import "../memoria.typ": *
= Uno
#numero("07c_thesis/results", (run: "detector-1"), "AP", interval: true)
#numero("07c_thesis/results", "faster_rcnn-1", "difference")
#numero("07c_thesis/results", 7, "AP")
#numero("07c_thesis/results", 0, "no such column")
#tabla("07c_thesis/results")
#tabla("memoria/quality")
#tabla("memoria/costs")
#figura("07c_thesis/lost")
#figura("memoria/detector")
#figura("memoria/head")
#figura("07c_thesis/input_size")
"""


def write(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)


def record(name, kind, caption, runs):
    about = {"commit": "0123456789abcdef", "code": {}, "seed": 0, "profile": "smoke"}
    return about | {"name": name, "kind": kind, "caption": caption, "runs": runs}


@pytest.fixture
def folder(tmp_path):
    """A study of two runs, by hand; one record's files are missing."""
    folder = tmp_path / "thesis_figures" / "tiny"
    rows = [
        ("detector-1", "DEIMv2 small, 192 px", 100, 1, 0.4949, 0.4593, 0.5441, None),
        ("faster_rcnn-1", "Faster R-CNN resnet18, 192 px", 100, 1, 0.5824, 0.55, 0.61, 0.0875),
    ]
    columns = ["run", "model", "images seen", "seeds", "AP", "AP low", "AP high", "difference"]
    write(folder / "07c_thesis/results.csv", pd.DataFrame(rows, columns=columns))
    classes = {"class": ["NORMAL", "ROTURA_FRACTURA", "mean"], "AP": [0.9, 0.3, 0.6]}
    classes |= dict.fromkeys(("AP75", "AP_small", "AR100"), [0.5, 0.25, 0.375])
    write(folder / "07c_thesis/class_metrics.csv", pd.DataFrame(classes))
    cost = {"network": ["Faster R-CNN, resnet18"], "GFLOPs": [3.684], "parameters (M)": [12.3]}
    write(folder / "06_baselines/baseline_cost.csv", pd.DataFrame(cost))
    runs = {"run": ["detector-1"], "minutes": [126.9]}
    runs["configuration"] = ["model=tiny image_size=96"]
    write(folder / "runs.csv", pd.DataFrame(runs))
    one = {"detector-1": None}
    records = [
        record("07c_thesis/class_metrics", "table", "", one),
        record("07c_thesis/lost", "figure", "A training step by its batch.", one),
        record("07c_thesis/results", "table", "A training step by its batch.", one),
    ]
    lines = "\n".join(json.dumps(r) for r in records)
    (folder / "provenance.jsonl").write_text(lines + "\n")
    return folder


@pytest.fixture
def texts(tmp_path):
    """The layout of the repository with one section."""
    texts = tmp_path / "memoria"
    texts.mkdir()
    (texts / "memoria.typ").write_text((memoria.TEXTS / "memoria.typ").read_text())
    for language in LANGUAGES:
        (texts / language).mkdir()
        (texts / language / "4_1.typ").write_text(SECTION)
    return texts


def text_of(pdf):
    told = "\n".join(page.extract_text() for page in PdfReader(pdf).pages)
    return re.sub(r"\s+", " ", told)


def test_numbers_are_those_of_the_csv(folder, texts, tmp_path):
    told = text_of(memoria.make_memoria(folder, "en", tmp_path / "en.pdf", texts))
    assert "0.495 [0.459; 0.544]" in told and "+8.75" in told
    assert "detector-1" in told and "0123456" in told and "0123456789" not in told


def test_spanish_has_decimal_commas_and_no_english(folder, texts, tmp_path):
    told = text_of(memoria.make_memoria(folder, "es", tmp_path / "es.pdf", texts))
    assert "0,495 [0,459; 0,544]" in told and "+8,75" in told
    assert not re.search(r"\d\.\d\d\d\b", told)
    words = set(re.findall(r"[a-z]+", told.lower()))
    assert not words & set(ENGLISH.split())


@pytest.mark.parametrize(("language", "words"), [("en", "not run"), ("es", "no ejecutado")])
def test_what_is_missing_is_said(folder, texts, tmp_path, language, words):
    told = text_of(memoria.make_memoria(folder, language, tmp_path / "out.pdf", texts))
    assert told.count(words) == 4  # two numbers, two figures
    assert f"{words}: 07c_thesis/lost" in told


def test_an_empty_study_is_a_pdf_too(tmp_path):
    """Every section of the repository, in both languages."""
    for language in LANGUAGES:
        out = memoria.make_memoria(tmp_path / "nothing", language, tmp_path / f"{language}.pdf")
        assert text_of(out).count(memoria.gettext("not run", language)) > 30


def test_the_sections_are_the_same_in_both_languages():
    numbers = {}
    for language in LANGUAGES:
        paths = sorted((memoria.TEXTS / language).glob("*.typ"))
        names = [re.findall(r'#\w+\("([^"]+)"', p.read_text()) for p in paths]
        numbers[language] = [(p.name[:3], n) for p, n in zip(paths, names, strict=True)]
    assert numbers["es"] == numbers["en"] and len(numbers["es"]) == 12


def test_unknown_language(folder):
    with pytest.raises(ValueError, match="choose one of"):
        memoria.make_memoria(folder, "fr")


def test_comparison_joins_by_run_and_by_name(folder):
    table = memoria.comparison(folder).set_index("run")
    detector, baseline = table.loc["detector-1"], table.loc["faster_rcnn-1"]
    assert detector["AP without NORMAL"] == 0.3 and detector["AP75"] == 0.375
    assert detector["minutes"] == 126.9 and pd.isna(detector["GFLOPs"])
    assert baseline["GFLOPs"] == 3.684 and pd.isna(baseline["AP75"])
    assert len(memoria.QUALITY) + 2 <= 8 and len(memoria.COST) + 2 <= 8


def test_diagrams_follow_the_configuration(folder):
    figure = memoria.plot_detector(DetectorConfig.named("tiny", num_queries=17), 96, "es")
    drawn = " ".join(t.get_text() for t in figure.axes[0].texts)
    assert "consultas: 17" in drawn and "3 x 96 x 96" in drawn
    assert memoria.settings_of(folder, "detector") == {"model": "tiny", "image_size": "96"}


def test_every_backbone_has_its_diagram():
    drawn = {}
    for name in ("small", "lite"):
        figure = memoria.plot_detector(DetectorConfig.named(name, 6), 128, "es")
        drawn[name] = " ".join(t.get_text() for t in figure.axes[0].texts).replace("\n", " ")
    assert "ViT" in drawn["small"] and "adaptador" in drawn["small"]
    assert "EfficientNet-Lite0" in drawn["lite"] and "ViT" not in drawn["lite"]
    assert "etapas congeladas: 2" in drawn["lite"] and "codificador" in drawn["lite"]


def test_the_text_names_networks_by_their_part(folder):
    roles = memoria.roles(memoria.comparison(folder))
    assert roles["cnn"] == {"run": "faster_rcnn-1", "model": "Faster R-CNN resnet18, 192 px"}
    assert roles["detector"]["run"] == roles["detector_as_cnn"]["run"] == "detector-1"
    assert "fusion" not in roles and "other_cnn" not in roles


def test_no_section_names_a_run_or_a_network_of_one_study():
    for path in memoria.TEXTS.glob("*/*.typ"):
        text = path.read_text()
        assert not re.search(r"(detector|fusion|faster_rcnn)-[0-9a-f]{10}", text), path
        assert not re.search(r"\d px|resnet|efficientnet|industrial6", text, re.I), path


@pytest.mark.parametrize("head", ["concat", "cross_attention", "residual", "linear"])
def test_captions_are_spanish_for_every_head_and_encoder(head):
    caption = (
        f"Effect on AP per class, interval over photographs and seeds, sign-flip p ({head} head)."
    )
    assert memoria.caption_in(caption, "es").startswith("Efecto en el AP por clase")
    assert "cabezal" in memoria.caption_in(caption, "es")
    caption = "A class that the contrastive head never saw, added by its text at inference: "
    caption += "AP on test (encoder: siglip2)."
    assert memoria.caption_in(caption, "es").endswith("AP en prueba (codificador: siglip2).")
