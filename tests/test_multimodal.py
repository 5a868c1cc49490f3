"""Fusion: text is used, the frozen detector stays as it is, and no cache answers for another."""

import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
import torch
from page_code import page_module
from safetensors.torch import load_file, save_file

from deimv2_tfg import fusion, multimodal
from deimv2_tfg.core import read_json
from deimv2_tfg.criterion import Criterion, assign, matching_cost, pack_targets
from deimv2_tfg.data import load_dataset
from deimv2_tfg.deployment import export_onnx, predict_files
from deimv2_tfg.detector import (
    DetectorConfig,
    build_detector,
    count_parameters,
    load_detector,
    save_detector,
)
from deimv2_tfg.evaluation import coco_metrics, evaluate, open_detector, predict
from deimv2_tfg.fusion import (
    ClassText,
    build_head,
    cached_queries,
    class_text_of,
    fusion_loss,
    orthogonal_rows,
    query_key,
    query_results,
)
from deimv2_tfg.multimodal import (
    FusedDetector,
    fusion_data,
    fusion_text,
    head_logits,
    load_fused,
    load_head,
    train_fusion,
)
from deimv2_tfg.recipes import FusionConfig, TrainConfig
from deimv2_tfg.results import compare
from deimv2_tfg.runs import Run, data_hash
from deimv2_tfg.statistics import Effect, stratified_weights
from deimv2_tfg.text import class_texts, load_descriptions
from deimv2_tfg.training import train

CLASSES = list(load_descriptions())
page = page_module("05_multimodal")
random_queries = page_module("04c_fusion").random_queries


# ---- queries and heads


@pytest.fixture(scope="module")
def phase1(smoke_data, tmp_path_factory):
    runs = tmp_path_factory.mktemp("fusion")
    small = {"model": "tiny", "image_size": 64, "epochs": 1, "batch_size": 4, "lr": 1e-3}
    return train(TrainConfig(str(smoke_data), str(runs), **small))


@pytest.fixture
def config(phase1, smoke_data):
    short = {"epochs": 2, "batch_size": 4, "lr": 3e-3, "warmup_steps": 0, "views": 1}
    return FusionConfig(str(phase1), str(smoke_data), encoder="minilm", **short)


@pytest.fixture(scope="module")
def material(phase1, smoke_data):
    return fusion_data(FusionConfig(str(phase1), str(smoke_data), views=1))


def test_cached_queries_give_the_detectors_predictions(phase1, smoke_data, material):
    dataset = load_dataset(smoke_data, "test")
    queries = material.splits["test"]
    found = query_results(queries, queries.logits, dataset.category_ids)
    assert found == predict(load_detector(phase1 / "best"), dataset, 64)


@pytest.mark.parametrize("kind", ["residual", "cross_attention"])
def test_a_residual_starts_as_phase_1_exactly(kind, phase1, smoke_data, material):
    head = build_head(kind, 48, class_text_of("true", CLASSES, "minilm", tokens=True))
    queries = material.splits["test"]
    found = query_results(queries, head_logits(head, queries), material.category_ids)
    theirs = evaluate(phase1, smoke_data, "test")
    assert coco_metrics(material.coco["test"], found) == pytest.approx(theirs, abs=0, nan_ok=True)
    assert found == Run(phase1).predictions("test")


def test_cached_matches_are_the_criterions(material, smoke_data):
    part = material.splits["train"]
    truth = {t["image_id"]: t for t in load_dataset(smoke_data, "train").targets}
    packed = pack_targets([truth[i] for i in part.image_id.tolist()])
    c = Criterion(6)
    cost = matching_cost(
        part.logits[None],
        part.boxes[None],
        packed.labels,
        packed.boxes,
        torch.from_numpy(packed.image),
        False,
        c.matcher_weights,
        c.matcher_alpha,
        c.matcher_gamma,
    )
    _, image, query, target = assign(cost.numpy(), packed.counts)
    place = target - (np.cumsum(packed.counts) - packed.counts)[image]
    assert (part.query[image, place].numpy() == query).all()
    assert (part.label[image, place] == packed.labels[target]).all()
    assert (part.query >= 0).sum() == len(target)
    assert torch.equal(part.target[image, place], packed.boxes[target])


def test_the_frozen_detector_stays_as_it_is(config, phase1, smoke_data):
    model = load_detector(phase1 / "best").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cached_queries(phase1, smoke_data, "val", cache=phase1 / "fresh", model=model)
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value), name  # running means of batch norms too
    weights = phase1 / "best" / "model.safetensors"
    bytes_before = weights.read_bytes()
    run = train_fusion(config)
    assert weights.read_bytes() == bytes_before
    fused = load_fused(run).train()
    fused(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(before[k], v) for k, v in fused.detector.state_dict().items())
    trainable = [n for n, p in fused.named_parameters() if p.requires_grad]
    assert all(n.startswith("head.") for n in trainable)


def test_the_query_cache_answers_for_one_detector_and_data_set_only(phase1, smoke_data, tmp_path):
    data = data_hash(smoke_data)
    keys = {query_key(phase1, data, split) for split in ("train", "val")}
    keys |= {query_key(phase1, data, "train", view) for view in (0, 1)}
    keys.add(query_key(phase1, data, "train", 0, seed=1))
    changed = tmp_path / "changed"
    shutil.copytree(phase1 / "best", changed / "best")
    shutil.copy(phase1 / "config.json", changed)
    assert query_key(changed, data, "train") in keys
    weights = load_file(changed / "best" / "model.safetensors")
    first = next(v for v in weights.values() if v.is_floating_point())
    first.view(-1)[0] += 1e-3
    save_file(weights, changed / "best" / "model.safetensors", {"format": "pt"})
    keys.add(query_key(changed, data, "train"))
    Run(changed).write("config.json", Run(changed).config | {"image_size": 96})
    keys.add(query_key(changed, data, "train"))
    shutil.copytree(smoke_data, tmp_path / "data")
    image = next((tmp_path / "data" / "train" / "images").iterdir())
    image.write_bytes(image.read_bytes() + b"\0")
    keys.add(query_key(phase1, data_hash(tmp_path / "data"), "train"))
    assert len(keys) == 8


def test_a_query_file_with_another_key_is_refused(phase1, smoke_data, tmp_path):
    cached_queries(phase1, smoke_data, "val", cache=tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    save_file(load_file(file), file, {"format": "pt", "key": "another"})
    with pytest.raises(ValueError, match="another"):
        cached_queries(phase1, smoke_data, "val", cache=tmp_path)


@pytest.mark.parametrize("kind", ["residual", "contrastive", "cross_attention"])
def test_permuting_the_text_changes_what_a_trained_head_predicts(kind, config, material):
    true = train_fusion(dataclasses.replace(config, head=kind, text="true"))
    permuted = train_fusion(dataclasses.replace(config, head=kind, text="permuted"))
    assert true != permuted
    assert Run(true).predictions("test") != Run(permuted).predictions("test")
    head, _, _ = load_head(true / "best" / "head.safetensors")
    before = head_logits(head, material.splits["test"])
    if kind == "cross_attention":
        head.place = head.place.roll(1, 0)
    else:
        head.text = head.text.roll(1, 0)
    assert (head_logits(head, material.splits["test"]) - before).abs().max() > 1e-4


def test_the_thesis_concatenation_cannot_know_whose_text_is_whose(material):
    words = class_text_of("true", CLASSES, "minilm")
    head = build_head("concat", 48, words)
    before = head_logits(head, material.splits["test"])
    head.text = words.pooled.roll(1, 0)
    assert (head_logits(head, material.splits["test"]) - before).abs().max() < 1e-4
    head.text = orthogonal_rows(6, 384, 0)
    assert (head_logits(head, material.splits["test"]) - before).abs().max() > 1e-3


def test_controls_have_the_same_parameters_and_other_texts():
    kinds = {k: class_text_of(k, CLASSES, "minilm", seed=3) for k in fusion.TEXTS}
    counts = {count_parameters(build_head("residual", 48, text)) for text in kinds.values()}
    assert len(counts) == 1
    true = kinds["true"].pooled
    permuted = kinds["permuted"].pooled
    assert not any(torch.equal(a, b) for a, b in zip(permuted, true, strict=True))
    assert sorted(map(tuple, permuted.tolist())) == sorted(map(tuple, true.tolist()))
    orthogonal = kinds["orthogonal"].pooled
    assert torch.allclose(orthogonal @ orthogonal.T, torch.eye(6), atol=1e-5)
    assert (kinds["constant"].pooled == kinds["constant"].pooled[0]).all()
    assert not set(kinds["words"].texts) & set(kinds["true"].texts)


@pytest.mark.parametrize("kind", ["linear", "contrastive", "cosine", "concat"])
def test_heads_start_at_the_prior_with_the_loss_of_a_fresh_detector(kind):
    part = random_queries(4, 20, 48)
    head = build_head(kind, 48, ClassText(orthogonal_rows(6, 32, 0)))
    nothing = torch.zeros_like(part.quality)
    with torch.no_grad():
        logits = head(part.embeddings.float() * 0.1, part.logits, nothing)
    assert 0.001 < logits.sigmoid().median() < 0.05


# ---- runs


def test_a_run_is_a_run_directory_and_is_found_again(config):
    run = train_fusion(config)
    files = {"config.json", "env.json", "metrics.jsonl", "best", "result.json"}
    files |= {
        f"{what}_{split}.json" for what in ("predictions", "metrics") for split in ("val", "test")
    }
    assert {p.name for p in run.iterdir()} - {"tensorboard"} == files
    stamp = (run / "result.json").stat().st_mtime_ns
    assert train_fusion(config) == run and (run / "result.json").stat().st_mtime_ns == stamp
    about = Run(run)
    assert about.environment["detector"] == fusion.detector_hash(config.run)
    assert about.environment["texts"] == class_texts(CLASSES)
    assert about.classes == CLASSES and about.image_size == 64 and about.family == "fusion"
    assert train_fusion(dataclasses.replace(config, language="es")) != run
    assert train_fusion(dataclasses.replace(config, seed=1)) != run


@pytest.mark.finding("training.md:6")
def test_a_fusion_run_opens_and_is_judged_like_every_detector(config, smoke_data, tmp_path):
    run = train_fusion(dataclasses.replace(config, runs_dir=str(tmp_path)))
    model = open_detector(run / "best")
    assert isinstance(model, FusedDetector) and model.classes == CLASSES
    stored = Run(run).scores("test")["AP"]
    found = evaluate(run, smoke_data, "test")
    assert found["AP"] == pytest.approx(stored, abs=0.02)  # the cache is in half precision


@pytest.mark.finding("training.md:6")
def test_a_fusion_run_predicts_and_is_exported_from_any_folder(
    config, smoke_data, tmp_path, monkeypatch
):
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed, reason=f"{needed} is not installed (extra `export`)")
    monkeypatch.chdir(smoke_data.parent)
    lean = build_detector(DetectorConfig.named("tiny", decoder_layers=1))
    save_detector(lean, tmp_path / "lean" / "best", CLASSES, image_size=64)
    places = {"run": str(tmp_path / "lean"), "data_dir": smoke_data.name}
    run = train_fusion(dataclasses.replace(config, **places, runs_dir=str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    assert (run / "best" / "thresholds.json").is_file() and Run(run).data_dir == smoke_data
    photographs = str(smoke_data / "test" / "images")
    for source in (run, run / "best"):
        report = predict_files(str(source), photographs, "found", pictures=False)
        assert not report.errors
        assert read_json(tmp_path / "found" / "settings.json")["classes"] == CLASSES
    path = export_onnx(str(run), "fused.onnx")
    assert read_json(path.with_suffix(".json"))["largest_difference"] < 1e-3


def test_the_same_seed_gives_the_same_numbers(config, tmp_path):
    first = train_fusion(config)
    again = train_fusion(dataclasses.replace(config, runs_dir=str(tmp_path)))
    assert first.parent != again.parent
    predictions = [(run / "predictions_test.json").read_bytes() for run in (first, again)]
    assert predictions[0] == predictions[1]


def test_a_run_that_was_cut_off_is_made_again(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, runs_dir=str(tmp_path), seed=5)

    def cut(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(multimodal, "fit_head", cut)
        with pytest.raises(KeyboardInterrupt):
            train_fusion(config)
    assert Run(train_fusion(config)).finished
    assert len(list(tmp_path.glob("fusion-*"))) == 1


def test_a_held_out_class_teaches_nothing_but_background():
    part = random_queries(4, 20, 48)
    head = build_head("contrastive", 48, ClassText(orthogonal_rows(6, 32, 0)))
    kept = torch.tensor([0, 1, 2, 3, 5])
    logits = head(part.embeddings.float(), part.logits, part.quality).detach().requires_grad_()
    fusion_loss(logits, part, kept).backward()
    assert logits.grad[..., 4].abs().max() == 0 and logits.grad[..., kept].abs().max() > 0
    gone = part.label == 4
    query = torch.where(gone, -1, part.query)
    label = torch.where(gone, -1, part.label)
    relabelled = dataclasses.replace(part, query=query, label=label)
    assert gone.any()
    mine, theirs = (fusion_loss(logits, p, kept) for p in (part, relabelled))
    assert torch.isclose(mine, theirs)


def queries_near_their_text(words: torch.Tensor, image: torch.Tensor) -> fusion.Queries:
    """400 photographs with one object; its query is a linear image of its class's text."""
    generator = torch.Generator().manual_seed(1)
    classes, width = words.shape
    label = torch.randint(classes, (400, 1), generator=generator)
    part = random_queries(400, 4, width, classes, objects=1)
    vectors = 0.3 * torch.randn(400, 4, width, generator=generator)
    noise = 0.2 * torch.randn(400, width, generator=generator)
    vectors[:, 0] = 3 * words[label[:, 0]] @ image + noise
    return dataclasses.replace(
        part,
        embeddings=vectors.half(),
        quality=torch.zeros_like(part.quality),
        query=torch.zeros_like(label),
        label=label,
        target=part.boxes[:, :1].clone(),
    )


def test_where_words_and_queries_agree_a_class_is_found_by_its_text_alone():
    """The positive control: text *can* help, so a class that was never trained is recognised."""
    generator = torch.Generator().manual_seed(0)
    words = torch.nn.functional.normalize(torch.randn(24, 12, generator=generator), dim=-1)
    image = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    part = queries_near_their_text(words, image)
    names = [str(i) for i in range(24)]
    data = multimodal.FusionData(names, list(range(24)), (), {"train": part}, {})
    short = {"epochs": 12, "batch_size": 16, "lr": 1e-2, "warmup_steps": 5}
    config = FusionConfig("", "", held_out="7", head="contrastive", **short)
    rank = {}
    random_row = torch.cat([words[:7], orthogonal_rows(1, 12, 3), words[8:]])
    for name, rows in (("true", words), ("orthogonal", random_row)):
        head = build_head("contrastive", 12, ClassText(rows))
        multimodal.fit_head(head, config, data)
        mine = head_logits(head, part[(part.label == 7)[:, 0]])[:, 0]
        rank[name] = (mine > mine[:, 7:8]).sum(1).float().mean().item()
    assert rank["true"] < 2 and rank["orthogonal"] > rank["true"] + 3


def moved_weights(run, before: dict) -> set[str]:
    weights = load_fused(run).detector.state_dict()
    return {k for k, v in weights.items() if not torch.equal(before[k], v)}


def test_thawing_moves_what_it_says_and_nothing_else(config, phase1):
    before = load_detector(phase1 / "best").state_dict()
    config = dataclasses.replace(config, unfreeze_epochs=1, unfreeze_lr=1e-2)
    run = train_fusion(dataclasses.replace(config, unfreeze="head"))
    layers = [k.split(".")[3] for k in before if k.startswith("model.decoder.class_embed.")]
    layer = f"model.decoder.class_embed.{max(map(int, layers))}"
    assert moved_weights(run, before) == {f"{layer}.weight", f"{layer}.bias"}
    further = train_fusion(dataclasses.replace(config, unfreeze="decoder"))
    moved = moved_weights(further, before)
    assert any("layers" in k for k in moved)
    assert all(k.startswith("model.decoder.") for k in moved)
    assert Run(further).scores("test").keys() == Run(run).scores("test").keys()
    assert isinstance(open_detector(further / "best"), FusedDetector)


def test_a_fused_detector_refuses_another_detector(config, tmp_path):
    run = train_fusion(config)
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    head, words, about = load_head(run / "best" / "head.safetensors")
    multimodal.save_head(head, words, moved / "best", about | {"detector": "another"})
    with pytest.raises(ValueError, match="another"):
        load_fused(moved)


# ---- the comparison


def test_an_effect_has_one_interval_in_every_table(
    config, phase1, smoke_data, material, monkeypatch
):
    evaluate(phase1, smoke_data, "test")
    few = functools.partial(stratified_weights, draws=200)
    monkeypatch.setattr(page, "stratified_weights", few)
    configs = page.grid_configs(config, ("residual",), ("true", "permuted"), (1, 2, 3), ())
    runs = {key: train_fusion(c) for key, c in configs.items()}
    mine = page.fusion_table(runs, page.sample_detector(material)).set_index("text")
    groups = {text: [r for (_, t, _), r in runs.items() if t == text] for text in mine.index}
    theirs = compare({"phase 1": [phase1], **groups}, draws=200).set_index("model")
    for text in mine.index:
        for a, b in (
            ("AP", "AP"),
            ("AP50", "AP50"),
            ("to phase 1", "difference"),
            ("low", "difference low"),
            ("high", "difference high"),
        ):
            assert mine.loc[text, a] == pytest.approx(theirs.loc[text, b], abs=1e-9), (text, a)
    effect = page.effect_table(runs).iloc[0]
    pair = {"permuted": groups["permuted"], "true": groups["true"]}
    against = compare(pair, draws=200).iloc[1]
    for a, b in (("effect", "difference"), ("low", "difference low"), ("p", "p seeds")):
        assert effect[a] == pytest.approx(against[b], abs=1e-9)


def test_effects_in_words():
    real = Effect(0.02, 0.015, 0.025, pairs=6, p=2 / 64, smallest=0.01)
    assert page.verdict(real) == "text helps, by 2.0 points"
    harm = dataclasses.replace(real, difference=-0.02, low=-0.03, high=-0.01)
    assert page.verdict(harm) == "text harms, by 2.0 points"
    wide = dataclasses.replace(real, low=-0.01)
    assert page.verdict(wide) == "no effect can be told from zero: between -1.0 and +2.5 points"
    assert (
        page.verdict(dataclasses.replace(real, pairs=5)) == "cannot be told: 5 seeds, 6 are needed"
    )


def test_a_grid_compares_like_with_like(config):
    grid = page.grid_configs(config, ("residual",), ("true", "permuted"), (0, 1))
    same = {dataclasses.replace(c, head="linear", text="true", seed=0) for c in grid.values()}
    assert len(grid) == 8 and len(same) == 1 and list(grid)[0] == ("residual", "true", 0)
    permuted = [fusion_text(c, CLASSES) for c in grid.values() if c.text == "permuted"]
    assert not torch.equal(permuted[0].pooled, permuted[1].pooled)  # another one for each seed


def test_what_is_wrong_is_said_before_anything_is_computed(config, monkeypatch, tmp_path):
    def never(*args, **kwargs):
        raise AssertionError("queries were read")

    monkeypatch.setattr(multimodal, "cached_queries", never)
    multimodal._fusion_data.cache_clear()
    with pytest.raises(ValueError, match="held_out='OXIDO'"):
        train_fusion(dataclasses.replace(config, held_out="OXIDO"))
    with pytest.raises(ValueError, match="unfreeze='everything'.*"):
        dataclasses.replace(config, unfreeze="everything")
    with pytest.raises(ValueError, match="head='resid'"):
        dataclasses.replace(config, head="resid")
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"NORMAL": {"en": {"description": "clean"}}}))
    with pytest.raises(ValueError, match="no description in 'en' for DEFORMACIONES"):
        train_fusion(dataclasses.replace(config, descriptions=str(mine), seed=77))
