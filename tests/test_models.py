"""A shipped detector is the run's network, with a card of the run's own records."""

import runpy

import pytest
import safetensors.torch
import torch

from deimv2_tfg import Predictor, cli, models, runs
from deimv2_tfg.core import read_json, write_json
from deimv2_tfg.deployment import Exported, input_size, query_difference, run_thresholds
from deimv2_tfg.evaluation import evaluate, open_detector
from deimv2_tfg.recipes import TrainConfig
from deimv2_tfg.results import per_class_table
from deimv2_tfg.runs import Run
from deimv2_tfg.training import train

SMALL = {"model": "tiny", "image_size": 64, "epochs": 1, "batch_size": 4, "lr": 1e-3}


@pytest.fixture(scope="module")
def run(smoke_data, tmp_path_factory):
    run = train(TrainConfig(str(smoke_data), str(tmp_path_factory.mktemp("runs")), **SMALL))
    evaluate(run, smoke_data, "test")
    return Run(run)


@pytest.fixture(scope="module")
def package(run, tmp_path_factory):
    """A package's folder with one shipped detector, "parts"."""
    folder = tmp_path_factory.mktemp("site") / "deimv2_tfg"
    limits = "Drawn parts only.\nOne light."
    models.ship(run.path, "parts", "Drawn here; CC0.", limits, folder=folder / "models")
    return folder


@pytest.fixture
def installed(package, monkeypatch):
    monkeypatch.setattr(runs, "PACKAGE", package)


def test_the_file_in_half_precision_is_the_same_network(run, package, smoke_data):
    shipped = package / "models" / "parts"
    state = safetensors.torch.load_file(shipped / "model.safetensors")
    kinds = {v.dtype for v in state.values() if v.ndim > 1 and v[0].numel() >= 64}
    assert kinds == {torch.float16}
    full = (run.best / "model.safetensors").stat().st_size
    assert (shipped / "model.safetensors").stat().st_size < full
    assert (shipped / "model.safetensors").stat().st_size < models.LARGEST
    pixel_values = torch.randn(2, 3, *input_size(run))
    outputs = []
    for directory in (run.best, shipped):
        with torch.no_grad():
            found = Exported(open_detector(directory))(pixel_values)
        outputs.append(tuple(part.as_subclass(torch.Tensor).numpy() for part in found))
    assert 0 < query_difference(*outputs) < 0.05
    again = evaluate(shipped, smoke_data, "test")["AP"]
    assert again == pytest.approx(run.scores("test")["AP"], abs=1e-3)
    assert run_thresholds(shipped) == run_thresholds(run)


def test_what_half_precision_cannot_hold_keeps_its_bits():
    depthwise, large = torch.full((8, 1, 5, 5), 0.1), torch.full((2, 64), 1e6)
    whole = {"steps": torch.tensor(70_000), "depthwise": depthwise, "large": large}
    small = models.halved(whole | {"dense": torch.full((2, 64), 0.1)})
    assert all(torch.equal(small[name], value) for name, value in whole.items())
    assert small["dense"].dtype == torch.float16


def test_the_card_has_the_figures_of_the_records(run, package):
    card = (package / "models" / "parts" / "README.md").read_text()
    assert "{{" not in card and "\n- Drawn parts only.\n- One light.\n" in card
    environment = run.environment
    for told in ("Drawn here; CC0.", run.name, environment["commit"], environment["data_hash"]):
        assert told in card
    table = per_class_table(run.path)
    rows = [line.split(" | ") for line in card.splitlines() if line.startswith("| ")]
    figures = {row[0].strip("| "): row[1:] for row in rows if len(row) == 5}
    assert list(figures)[1:] == table["class"].tolist()
    for _, row in table.iterrows():
        objects, images, ap, _ = figures[row["class"]]
        assert (int(objects), int(images)) == (row["objects"], row["images"])
        assert ap.split()[0] == f"{row['AP']:.3f}"
    assert "deimv2-tfg train DATA --model tiny --image_size 64 --epochs 1" in card
    assert str(run.data_dir) not in card and str(run.path.parent) not in card


def test_a_shipped_detector_is_opened_by_its_name(installed, run, smoke_data, tmp_path, capsys):
    photograph = sorted((smoke_data / "test" / "images").iterdir())[0]
    assert Predictor.open("parts").names == run.classes
    words = ["--model", "parts", str(photograph), "--out", str(tmp_path / "out")]
    assert cli.main(["predict", *words, "--threshold", "0.01"]) == 0
    assert (tmp_path / "out" / "pictures" / photograph.name).is_file()
    assert read_json(tmp_path / "out" / "settings.json")["classes"] == run.classes
    capsys.readouterr()
    assert cli.main(["predict", "--model", "part", str(photograph)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "part: no such run" in said and "package: parts" in said
    assert cli.main(["predict", str(photograph)]) == 2
    assert "RUN SOURCE" in capsys.readouterr().err


def test_a_wheel_holds_every_file_of_it(package, root, monkeypatch):
    told = {}
    monkeypatch.setattr("setuptools.setup", lambda **given: told.update(given))
    runpy.run_path(str(root / "setup.py"))
    patterns = told["package_data"]["deimv2_tfg"]
    held = {path for pattern in patterns for path in package.glob(pattern)}
    files = {path for path in package.rglob("*") if path.is_file()}
    assert len(files) == 4 and files <= held
    manifest = (root / "MANIFEST.in").read_text()
    assert "recursive-include deimv2_tfg/models *" in manifest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "nowhere.md"}, "nowhere.md"),
        ({"name": "../parts"}, "small letters"),
        ({"name": "parts"}, "is there already"),
    ],
)
def test_nothing_is_shipped_that_is_wrong(run, package, options, message):
    before = sorted(package.rglob("*"))
    given = {"name": "new", "data": "Drawn.", "folder": package / "models"} | options
    with pytest.raises((ValueError, FileExistsError), match=message):
        models.ship(run.path, **given)
    assert sorted(package.rglob("*")) == before


def test_another_ap_than_on_record_is_not_shipped(run, tmp_path):
    record = run.path / "metrics_test.json"
    kept = read_json(record)
    write_json(record, kept | {"AP": kept["AP"] + 0.01})
    try:
        with pytest.raises(ValueError, match="on record: not shipped"):
            models.ship(run.path, "new", "Drawn.", folder=tmp_path)
    finally:
        write_json(record, kept)
    assert not list(tmp_path.iterdir())


def test_the_words_of_a_data_set_are_taken(smoke_data, tmp_path):
    assert models.about_data(tmp_path, "as told") == "as told"
    (tmp_path / "train").mkdir()
    write_json(tmp_path / "train" / "train.json", {"info": {"contributor": "a museum"}})
    with pytest.raises(ValueError, match="give their origin and licence"):
        models.about_data(tmp_path)
    coco = {"info": {"contributor": "a museum"}, "licenses": [{"name": "CC-BY-4.0"}]}
    write_json(tmp_path / "train" / "train.json", coco)
    assert "a museum" in models.about_data(tmp_path) and "CC-BY-4.0" in models.about_data(tmp_path)
    (tmp_path / "README.md").write_text("From the archive.\n")
    assert models.about_data(tmp_path) == "From the archive."
