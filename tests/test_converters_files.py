"""safetensors reading and writing, and folders that appear whole or not at all."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny import assert_refused, tiny_llama

from converters import import_base
from converters.folders import new_folder
from converters.tensor_files import DTYPES, TensorWriter, read_safetensors
from meteora_jax.config import InputError

BF16 = np.dtype(ml_dtypes.bfloat16)


def write_raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **others) -> bytes:
    return json.dumps({"x": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}, **others}).encode()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin", "model.gguf"])
def test_pipes_are_refused(tmp_path: Path, name: str):
    """Reading one would wait for ever."""
    _, folder = tiny_llama(tmp_path)
    (folder / ("model.safetensors" if name.endswith(".bin") else name)).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    source, dest = folder / name if name.endswith(".gguf") else folder, tmp_path / "base"
    assert_refused(lambda: import_base(source, dest), dest, f"{name}: expected a file, found a pipe")


def test_writer_fills_slices_that_others_read(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    specs = {"a": (np.float16, (3,)), "b": (np.float32, (2, 3, 4)), "c": (BF16, (5, 2)), "d": (np.float32, (2,))}
    writer = TensorWriter(path, specs)
    writer.slice("a")[:] = [1, 2, 3]
    writer.slice("b", 1)[:] = np.arange(12).reshape(3, 4)
    writer.slice("b", 0, 2)[:] = 7
    writer.slice("c").T[1] = 2.5
    writer.slice("d", 1)[0] = 9
    with safe_open(path, "pt") as file:
        found = {key: file.get_tensor(key).float().numpy() for key in specs}
    b = np.zeros((2, 3, 4))
    b[1], b[0, 2] = np.arange(12).reshape(3, 4), 7
    np.testing.assert_array_equal(found["a"], [1, 2, 3])
    np.testing.assert_array_equal(found["b"], b)
    np.testing.assert_array_equal(found["c"], [[0, 2.5]] * 5)
    np.testing.assert_array_equal(found["d"], [0, 9])
    with pytest.raises(IndexError, match="b: index"):
        writer.slice("b", 2)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=5), seed=st.integers(0)
)
def test_what_safetensors_writes_is_read_back(tmp_path: Path, shapes: list[list[int]], seed: int):
    random = np.random.default_rng(seed)
    tensors = {f"t{i}": random.normal(size=shape).astype(np.float32) for i, shape in enumerate(shapes)}
    save_file(tensors, tmp_path / "x.safetensors")
    for tensor in read_safetensors(tmp_path / "x.safetensors"):
        np.testing.assert_array_equal(tensor.read(), tensors[tensor.key])
        np.testing.assert_array_equal(tensor.rows(1, tensor.shape[0]), tensors[tensor.key][1:])


BROKEN = {
    "empty": (lambda p: p.write_bytes(b""), "expected a safetensors header, found 0 bytes (truncated?)"),
    "short": (lambda p: p.write_bytes(b"\1\0\0"), "expected a safetensors header, found 3 bytes (truncated?)"),
    "oversized": (lambda p: write_raw(p, b"{}", length=2**62), "header: expected at most 2 bytes, found a length of"),
    "not json": (lambda p: write_raw(p, b"{nope}"), "header: expected JSON"),
    "not utf-8": (lambda p: write_raw(p, b"\xff\xfe{}"), "header: expected JSON"),
    "deep": (lambda p: write_raw(p, b"[" * 100_000), "header: expected JSON"),
    "list": (lambda p: write_raw(p, b"[]"), "header: expected an object, found list"),
    "twice": (lambda p: write_raw(p, b'{"x": 1, "x": 2}'), "key 'x' appears twice"),
    "entry": (lambda p: write_raw(p, b'{"x": 1}'), "x: expected an object, found int"),
    "dtype": (lambda p: write_raw(p, entry("F31"), bytes(8)), "x: dtype: expected one of F64", "'F31'"),
    "shape": (lambda p: write_raw(p, entry(shape=(-2,)), bytes(8)), "x: shape: expected a list of sizes, found [-2]"),
    "bool": (lambda p: write_raw(p, entry(shape=(True, 2)), bytes(8)), "x: shape: expected a list of sizes"),
    "offsets": (lambda p: write_raw(p, entry(offsets=(0,)), bytes(8)), "x: data_offsets: expected two offsets"),
    "size": (lambda p: write_raw(p, entry(shape=(3,)), bytes(8)), "expected 12 bytes for F32 (3,), found 8"),
    "huge": (lambda p: write_raw(p, entry(shape=(2**60, 2**60)), bytes(8)), "x: data_offsets: expected"),
    "hole": (lambda p: write_raw(p, entry(offsets=(4, 12)), bytes(12)), "x: data_offsets: expected data from 0"),
    "overlap": (
        lambda p: write_raw(p, entry(y={"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}), bytes(8)),
        "y: data_offsets: expected data from 8, found 4",
    ),
    "truncated": (lambda p: write_raw(p, entry(), bytes(7)), "expected 8 bytes of tensor data, found 7 (truncated?)"),
    "trailing": (lambda p: write_raw(p, entry(), bytes(9)), "expected 8 bytes of tensor data, found 9"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_refused(tmp_path: Path, kind: str):
    make, *parts = BROKEN[kind]
    make(tmp_path / "x.safetensors")
    with pytest.raises(InputError) as info:
        read_safetensors(tmp_path / "x.safetensors")
    assert str(info.value).startswith("x.safetensors: ")
    assert all(part in str(info.value) for part in parts), str(info.value)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 200), byte=st.integers(0, 255), cut=st.integers(0, 300))
def test_mutated_files_are_read_or_refused(tmp_path: Path, at: int, byte: int, cut: int):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}, path)
    raw = bytearray(path.read_bytes())
    raw[at % len(raw)] = byte
    path.write_bytes(raw[: len(raw) - cut] if cut < 20 else raw)
    try:
        tensors = read_safetensors(path)
    except InputError:
        return
    for tensor in tensors:
        assert tensor.dtype in DTYPES.values()
        if tensor.shape:
            assert tensor.read().shape == tensor.shape


def test_file_that_shrinks_while_it_is_read(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.ones((20, 3), np.float32)}, path)
    (tensor,) = read_safetensors(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match="expected 240 bytes"):
        tensor.read()


def write_half(dest: Path, error: BaseException) -> None:
    with new_folder(dest, False, []) as folder:
        (folder / "file").write_text("half")
        raise error


def test_failing_inside_leaves_nothing(tmp_path: Path):
    for error in (RuntimeError("stop"), KeyboardInterrupt(), InputError("stop")):
        with pytest.raises(type(error)):
            write_half(tmp_path / "new" / "dest", error)
        assert list(tmp_path.iterdir()) == []


def test_one_import_at_a_time(tmp_path: Path):
    with new_folder(tmp_path / "dest", False, []) as folder:
        (folder / "file").write_text("first")
        with pytest.raises(InputError, match="found another"), new_folder(tmp_path / "dest", False, []):
            pass
    assert (tmp_path / "dest" / "file").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["dest"]


def test_a_killed_import_leaves_no_destination_and_the_next_one_cleans_up(tmp_path: Path):
    script = (
        "import sys, time; from pathlib import Path; from converters.folders import new_folder\n"
        "with new_folder(sys.argv[1], False, []) as f:\n"
        "    (f / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)"
    )
    root = Path(__file__).resolve().parents[1]
    child = subprocess.Popen([sys.executable, "-c", script, tmp_path / "dest"], stdout=subprocess.PIPE, cwd=root)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=30)
    child.stdout.close()
    assert not (tmp_path / "dest").exists()
    with new_folder(tmp_path / "dest", False, []) as folder:
        (folder / "whole").write_text("y")
    assert [p.name for p in (tmp_path / "dest").iterdir()] == ["whole"]
    assert [p.name for p in tmp_path.iterdir()] == ["dest"]


def test_destinations_that_are_refused(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="found a file"), new_folder(tmp_path / "file", True, []):
        pass
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(InputError, match="one that holds files"), new_folder(tmp_path / "full", False, []):
        pass
    with (
        pytest.raises(InputError, match="apart from its source"),
        new_folder(tmp_path / "full", True, [tmp_path / "full" / "x"]),
    ):
        pass
    assert (tmp_path / "full" / "x").read_text() == "x"
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty", False, []) as folder:
        (folder / "x").write_text("x")
    assert os.listdir(tmp_path / "empty") == ["x"]


MEMORY_SCRIPT = """
import resource, sys, threading, time
from pathlib import Path
from converters import import_base
import converters.gguf_llama, tokenizers
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {l.split(":")[0]: int(l.split()[1]) for l in lines if l.startswith("Rss")}
start = anonymous()
peak = dict(start)
def watch():
    while True:
        for key, value in anonymous().items(): peak[key] = max(peak[key], value)
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
import_base(sys.argv[1], sys.argv[2])
print((peak["RssAnon"] - start["RssAnon"]) // 1024, (peak["RssFile"] - start["RssFile"]) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_far_below_a_shard(tmp_path: Path):
    """256 MB in two bfloat16 shards: the heap grows by a few blocks, mapped pages by about one tensor."""
    layers, hidden, ffn, vocab = 8, 1024, 4096, 8192
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": vocab, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden),
    }  # fmt: skip
    for i in range(layers):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
            shapes[f"model.layers.{i}.{name}.weight"] = (hidden, hidden)
        for name, shape in (("gate", (ffn, hidden)), ("up", (ffn, hidden)), ("down", (hidden, ffn))):
            shapes[f"model.layers.{i}.mlp.{name}_proj.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{name}.weight"] = (hidden,)
    weight_map = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(shapes)}
    for shard in set(weight_map.values()):
        TensorWriter(source / shard, {k: (BF16, shapes[k]) for k, name in weight_map.items() if name == shard})
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shard_mb = max(p.stat().st_size for p in source.glob("*.safetensors")) / 2**20
    assert shard_mb > 120

    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", MEMORY_SCRIPT, source, tmp_path / "base"]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    heap_mb, mapped_mb = map(int, output.split())
    assert heap_mb < 0.4 * shard_mb, output
    assert mapped_mb < 0.4 * shard_mb, output
