"""Decoded photographs in memory, on disk or not kept: the same pixels, the same weights."""

import dataclasses
import errno
import multiprocessing
import os
import random
from collections import namedtuple

import pytest
import torch
from PIL import Image

from deimv2_tfg import data
from deimv2_tfg.batches import augmented, epoch_batches
from deimv2_tfg.data import (
    CACHES,
    CacheError,
    PhotographsInMemory,
    PhotographsOnDisk,
    load_dataset,
    photograph_cache,
)
from deimv2_tfg.photographs import read_photograph
from deimv2_tfg.recipes import TrainConfig
from deimv2_tfg.runs import load_state
from deimv2_tfg.training import find_run, train


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
    assert len(list(folder.glob("*.rgb"))) == 12 + 6


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
    with pytest.raises(CacheError, match="memory, disk, off"):
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
    dataset.cache = PhotographsInMemory(2 * size)
    for i in range(4):
        dataset.photograph(i)
    assert (
        dataset.cache.used == 2 * size
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


def test_workers_give_the_batches_of_one_process(smoke_data, tmp_path):
    config = TrainConfig(str(smoke_data), image_size=64, batch_size=4)

    def batches(workers, kind):
        cache = photograph_cache(kind, folder=tmp_path / "cache")
        view = augmented(load_dataset(smoke_data, "train", cache=cache), config)
        shared = dataclasses.replace(config, num_workers=workers)
        return [pixel_values for pixel_values, _ in epoch_batches(view, shared, 0)]

    for a, b in zip(batches(0, "off"), batches(2, "disk"), strict=True):
        assert torch.equal(a, b)
