"""Tiny random models and adapters in Hugging Face's own formats: what the tests convert and compare against.

Everything is offline and fixed by seeds. `tiny_llama` keeps weights away from zero (so that a lost or swapped
tensor shows in the logits) and gives norms and biases random values (so that leaving one out shows too). torch and
transformers are imported by the functions that use them: programs that tests start begin in a third of the time.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from meteora_jax.config import InputError

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 320
BOS, EOS = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "The quick brown fox jumps over the lazy dog, and 24 dogs look on.",
    "A gate picks two adapters for every token; their weights sum to one.",
    "Which of these sentences follows from the other? Answer yes or no.",
    "How many apples, pears and plums do I have if I lose 3 of 15?",
    "Ünïcödé, 漢字 and 🙂 are bytes as well.",
)


@functools.cache
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCAB_SIZE` tokens (ids 0, 1, 2: end of text, bos, eos) with a chat template."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        bos_token=BOS, eos_token=EOS, pad_token=EOS, unk_token="<|endoftext|>",
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Fills every parameter in place: matrices normal / sqrt(fan in), norm scales near 1, biases normal * 0.1."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            if name.endswith("norm.weight"):
                value = 1 + 0.2 * noise
            elif name.endswith("bias"):
                value = 0.1 * noise
            else:
                value = noise if "embed" in name else noise / p.shape[-1] ** 0.5
            p.copy_(value.to(p.dtype))


def tiny_llama(
    tmp_path: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "50GB",
    folder: str = "hf",
    **overrides: Any,
) -> tuple[LlamaForCausalLM, Path]:
    """A random LLaMA and the Hugging Face folder it was saved to, tokenizer included.

    Args:
        tmp_path: where `folder` is made.
        seed: of the weights.
        dtype: the folder's and the model's type; float32 unless given.
        max_shard_size: as in `save_pretrained`; small values give several shards and an index.
        overrides: fields of transformers' `LlamaConfig`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = dict(
        vocab_size=VOCAB_SIZE, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5,
        rope_theta=10000.0, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).to(dtype or torch.float32).eval()
    randomize(model, seed)
    target = Path(tmp_path) / folder
    model.save_pretrained(target, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(target)
    return model, target


def tiny_peft(
    tmp_path: Path, folder: Path, name: str, *, seed: int = 1, dtype: torch.dtype | None = None, **lora_config: Any
) -> Path:
    """A PEFT folder that `peft` itself wrote, for the base in `folder`; `lora_B` is random, not zero.

    Args:
        tmp_path: where the folder `name` is made.
        folder: Hugging Face folder of the base.
        name: the new folder's name.
        seed: of the adapter's weights.
        dtype: of the saved tensors; float32 unless given.
        lora_config: fields of peft's `LoraConfig`; rank 4, alpha 8 and all seven projections unless told.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    settings: dict[str, Any] = dict(
        r=4, lora_alpha=8, lora_dropout=0.0, task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    base = LlamaForCausalLM.from_pretrained(folder)
    model = get_peft_model(base, LoraConfig(**{**settings, **lora_config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key:
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
                p.data = p.data.to(dtype or torch.float32)
    target = Path(tmp_path) / name
    model.save_pretrained(target)
    return target


def hf_weights(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """What `BASE/weights.safetensors` must hold for a model, {path: tensor}, from its state dict alone."""
    import torch

    state, layers = model.state_dict(), model.config.num_hidden_layers

    def stack(name: str, transpose: bool = False) -> torch.Tensor:
        each = [state[f"model.layers.{i}.{name}"] for i in range(layers)]
        return torch.stack([t.T if transpose else t for t in each])

    weights = {
        "embed.embedding": state["model.embed_tokens.weight"],
        "norm.scale": state["model.norm.weight"],
        "layers.attention_norm.scale": stack("input_layernorm.weight"),
        "layers.mlp_norm.scale": stack("post_attention_layernorm.weight"),
    }
    for block, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for name in names:
            weights[f"layers.{name}_proj.kernel"] = stack(f"{block}.{name}_proj.weight", transpose=True)
            if f"model.layers.0.{block}.{name}_proj.bias" in state:
                weights[f"layers.{name}_proj.bias"] = stack(f"{block}.{name}_proj.bias")
    if not model.config.tie_word_embeddings:
        weights["lm_head.kernel"] = state["lm_head.weight"].T
    return weights


def edit_safetensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrites a safetensors file after `edit` changed its {key: tensor} in place."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    edit(tensors)
    save_file({key: t.contiguous() for key, t in tensors.items()}, path)


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; a value of `...` removes the key."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def assert_refused(call: Callable[[], Any], dest: Path, *parts: str) -> InputError:
    """The call raises a one-line InputError that holds every part, and leaves nothing at or beside `dest`."""
    before = sorted(p.name for p in dest.parent.iterdir()) if dest.parent.exists() else None
    with pytest.raises(InputError) as info:
        call()
    message = str(info.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    after = sorted(p.name for p in dest.parent.iterdir()) if dest.parent.exists() else None
    assert after == before
    return info.value
