"""Decoded photographs in memory, on disk or not kept: the same pixels, the same weights."""

import dataclasses
import errno
import multiprocessing
import os
import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from page_code import page_module
from PIL import Image
from torch.utils.data import DataLoader

from deimv2_tfg import data, evaluation, training
from deimv2_tfg.batches import augmented, epoch_batches
from deimv2_tfg.data import (
    CACHES,
    CacheError,
    Photographs,
    PhotographsOnDisk,
    Reading,
    load_dataset,
    photograph_cache,
)
from deimv2_tfg.detector import DetectorConfig, build_detector
from deimv2_tfg.photographs import read_photograph
from deimv2_tfg.recipes import TrainConfig
from deimv2_tfg.runs import load_state
from deimv2_tfg.training import find_run, train
from deimv2_tfg.transforms import (
    MixingDataset,
    TrainTransform,
    collate,
    eval_transform,
    normalised,
)


@pytest.fixture
def on_disk(tmp_path):
    return PhotographsOnDisk(tmp_path / "cache", 2**24, spare=0)


@pytest.fixture
def photograph(tmp_path):
    Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / "photograph.jpg")
    return tmp_path / "photograph.jpg"


def test_the_same_pixels_from_all_three(smoke_data, tmp_path):
    sets = [
        load_dataset(smoke_data, "train", cache=photograph_cache(kind, folder=tmp_path / "cache"))
        for kind in CACHES
    ]
    for _ in range(2):
        for i in range(len(sets[0])):
            assert len({(d.photograph(i).size, d.photograph(i).tobytes()) for d in sets}) == 1
    assert len(list((tmp_path / "cache").glob("*.rgb"))) == len(sets[0])


def test_the_same_weights_and_the_same_run_from_all_three(smoke_data, tmp_path):
    small = {"model": "tiny", "image_size": 64, "epochs": 1, "batch_size": 4, "lr": 1e-3}
    config = TrainConfig(str(smoke_data), mosaic=0.5, copy_blend=0.5, **small)
    folder = tmp_path / "cache"
    weights = []
    for kind in CACHES:
        kept = {"cache": kind, "cache_dir": str(folder), "runs_dir": str(tmp_path / kind)}
        run = train(dataclasses.replace(config, **kept))
        assert run.name == find_run(config).name
        weights.append(load_state(run)["model"])
    for other in weights[1:]:
        assert all(torch.equal(weights[0][k], other[k]) for k in other)
    assert len(list(folder.glob("*.rgb"))) == 12 + 6  # train, and val at the input's size


def test_a_damaged_file_is_told_of_and_made_again(on_disk, photograph):
    right, rng = read_photograph(photograph).tobytes(), random.Random(0)
    assert on_disk(photograph).tobytes() == right
    (kept,) = on_disk.folder.glob("*.rgb")
    whole = kept.read_bytes()
    for k in range(30):
        raw = bytearray(whole)
        if k < 10:
            raw[rng.randrange(16) if k < 5 else rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        elif k < 20:
            raw = raw[: rng.randrange(len(raw)) if k > 10 else 0]
        else:
            raw += bytes(rng.randrange(1, 40))
        kept.write_bytes(raw)
        with pytest.warns(UserWarning, match="damaged"):
            assert on_disk(photograph).tobytes() == right
        assert kept.read_bytes() == whole


def test_another_photograph_under_the_old_name_size_and_time(on_disk, photograph):
    before, stat = on_disk(photograph).tobytes(), photograph.stat()
    content = bytearray(photograph.read_bytes())
    content[-200] ^= 1
    photograph.write_bytes(content)
    os.utime(photograph, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert on_disk(photograph).tobytes() == read_photograph(photograph).tobytes() != before


def test_a_budget_is_checked_before_anything_is_decoded(smoke_data, tmp_path, monkeypatch):
    with pytest.raises(CacheError, match="Raise cache_gb"):
        load_dataset(smoke_data, "train", cache=photograph_cache("disk", 1e-5, tmp_path / "cache"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        data.shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**28 - 5000, 2**28 + 5000)
    )
    with pytest.raises(
        CacheError, match="of the disk, 256.00 MiB are free, of which 256.00 MiB stay so"
    ):
        load_dataset(smoke_data, "train", cache=photograph_cache("disk", 1, tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("*.rgb"))
    with pytest.raises(CacheError, match="auto, memory, disk, off"):
        photograph_cache("ram")


def test_a_set_that_is_in_the_cache_needs_no_room(smoke_data, tmp_path, monkeypatch):
    dataset = load_dataset(
        smoke_data, "train", cache=photograph_cache("disk", 1, tmp_path / "cache")
    )
    for i in range(len(dataset)):
        dataset.photograph(i)
    taken = dataset.cache.used()
    again = load_dataset(smoke_data, "train", cache=PhotographsOnDisk(tmp_path / "cache", taken))
    assert (
        again.cache.left() <= 0
        and again.photograph(3).tobytes() == dataset.photograph(3).tobytes()
        and again.cache.used() == taken
    )


def test_a_disk_that_fills_up_meanwhile_costs_time_and_no_photograph(
    on_disk, photograph, monkeypatch
):
    def full(*a):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data, "atomic_write", full)
    with pytest.warns(UserWarning, match="full"):
        assert on_disk(photograph).tobytes() == read_photograph(photograph).tobytes()
    assert on_disk(photograph).tobytes() == read_photograph(photograph).tobytes() and not list(
        on_disk.folder.glob("*.rgb")
    )  # not warned of twice


def test_memory_keeps_what_its_budget_holds(smoke_data):
    dataset = load_dataset(smoke_data, "train")
    size = 3 * dataset.photograph(0).width * dataset.photograph(0).height
    dataset.cache = Photographs(budget=2 * size)
    for i in range(4):
        dataset.photograph(i)
    assert (
        dataset.cache.used() == 2 * size
        and dataset.photograph(0) is dataset.photograph(0)
        and dataset.photograph(3) is not dataset.photograph(3)
    )


def open_all(root, folder, names):
    dataset = load_dataset(root, "train", cache=photograph_cache("disk", 1, folder))
    names.put([hash(dataset.photograph(i).tobytes()) for i in range(len(dataset))])


def test_processes_share_a_folder(smoke_data, tmp_path):
    context = multiprocessing.get_context("fork")
    names = context.Queue()
    children = [
        context.Process(target=open_all, args=(smoke_data, tmp_path / "cache", names))
        for _ in range(3)
    ]
    for c in children:
        c.start()
    found = [names.get(timeout=60) for _ in children]
    for c in children:
        c.join(60)
    dataset = load_dataset(smoke_data, "train")
    assert found == 3 * [[hash(dataset.photograph(i).tobytes()) for i in range(len(dataset))]] and {
        c.exitcode for c in children
    } == {0}
    assert sorted(
        p.suffix for p in (tmp_path / "cache").iterdir() if not p.name.startswith(".")
    ) == 12 * [".rgb"]


@pytest.fixture
def large(smoke_data, tmp_path):
    "A data set of JPEGs of four times the side that a training at 64 px asks for."
    return page_module("04d_levers").enlarged(smoke_data, tmp_path / "large", (256, 256))


def test_workers_read_each_photograph_once_and_train_the_same(large, tmp_path, monkeypatch):
    "Whatever reads, how many there are, and where it was cut off."
    small = {"model": "tiny", "image_size": 64, "epochs": 3, "batch_size": 4, "lr": 1e-3}
    config = TrainConfig(str(large), cache_dir=str(tmp_path / "cache"), multi_scale=0.5, **small)
    ordinary = data.read_photograph

    def read(source, *rest):
        with (tmp_path / f"reads{kind}").open("a") as file:
            file.write(f"{source}\n")
        return ordinary(source, *rest)

    monkeypatch.setattr(data, "read_photograph", read)
    weights = []
    for kind, workers in (("one", 0), ("workers", 2), ("cut", 2)):
        run = {"runs_dir": str(tmp_path / kind), "num_workers": workers}
        run = dataclasses.replace(config, cache_dir=str(tmp_path / f"cache{kind}"), **run)
        if kind == "cut":
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(training, "train_batch", cut_at(4, training.train_batch))
                train(run)
        weights.append(load_state(train(run))["model"])
        reads = [
            line for line in (tmp_path / f"reads{kind}").read_text().split() if "train" in line
        ]
        assert len(reads) == 12
    for other in weights[1:]:
        assert all(torch.equal(weights[0][k], other[k]) for k in other)


def cut_at(step, ordinary):
    def batch(trainer, *rest):
        if trainer.step == step:
            raise KeyboardInterrupt
        return ordinary(trainer, *rest)

    return batch


@pytest.mark.parametrize("sides", [(1600, 1200), (1601, 1200), (400, 300)])
def test_a_photograph_is_shrunk_and_its_boxes_stay(tmp_path, sides):
    "A bright square in the middle of the left half, wherever the decoder may save work or not."
    photograph = Image.new("RGB", sides)
    x, y = sides[0] / 4, sides[1] / 2
    photograph.paste((255, 255, 255), (round(x - 40), round(y - 40), round(x + 40), round(y + 40)))
    photograph.save(tmp_path / "p.jpg", quality=95)
    found = Reading(longest=500)(tmp_path / "p.jpg")
    assert found.size == {1600: (500, 375), 1601: (500, 375), 400: (400, 300)}[sides[0]]
    pixels = np.asarray(found.convert("L"), dtype=float)
    rows, columns = np.indices(pixels.shape)
    centre = (
        ((columns + 0.5) * pixels).sum() / pixels.sum(),
        ((rows + 0.5) * pixels).sum() / pixels.sum(),
    )
    assert centre == pytest.approx((found.width / 4, found.height / 2), abs=0.3)


def test_val_is_read_as_evaluation_sees_it(large):
    plain = load_dataset(large, "val", eval_transform(64))
    kept = photograph_cache(reading=Reading(square=64))
    square = load_dataset(large, "val", eval_transform(64), cache=kept)
    for i in range(len(plain)):
        assert torch.equal(plain[i][0], square[i][0])
    assert kept.used() == len(plain) * 3 * 64 * 64


def test_bytes_are_the_same_numbers(smoke_data):
    sets = []
    for as_bytes in (False, True):
        change = TrainTransform(64, as_bytes=as_bytes)
        mixing = MixingDataset(load_dataset(smoke_data, "train"), change, 64, mixup=0.5)
        torch.manual_seed(1)
        sets.append(collate([mixing[i] for i in range(12)])[0])
    assert torch.equal(*sets)
    torch.manual_seed(1)
    mixing.chances["mixup"] = 0.0
    pixels, _ = collate([mixing[i] for i in range(4)])
    assert pixels.dtype == torch.uint8 and normalised(pixels).dtype == torch.float32


def test_workers_give_the_batches_of_one_process(smoke_data, tmp_path):
    config = TrainConfig(str(smoke_data), image_size=64, batch_size=4)

    def batches(workers, kind):
        cache = photograph_cache(kind, folder=tmp_path / "cache")
        view = augmented(load_dataset(smoke_data, "train", cache=cache), config)
        shared = dataclasses.replace(config, num_workers=workers)
        return [pixel_values for pixel_values, _ in epoch_batches(view, shared, 0)]

    for a, b in zip(batches(0, "off"), batches(2, "disk"), strict=True):
        assert torch.equal(a, b)


def test_evaluation_loads_with_workers_where_there_is_a_card(smoke_data, monkeypatch):
    model = build_detector(DetectorConfig.tiny())
    dataset = load_dataset(smoke_data, "val")
    alone = evaluation.predict(model, dataset, 64)
    assert data.spare_workers() == 0 or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert data.spare_workers() == max(0, min(4, len(os.sched_getaffinity(0)) - 1))
    monkeypatch.undo()
    asked = []

    def loader(*given, **how):
        asked.append(how["num_workers"])
        return DataLoader(*given, **how)

    monkeypatch.setattr(evaluation, "spare_workers", lambda: 2)
    monkeypatch.setattr(evaluation, "DataLoader", loader)
    assert evaluation.predict(model, dataset, 64) == alone and asked == [2]
