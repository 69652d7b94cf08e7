"""The model `meteora` of EleutherAI's lm-evaluation-harness (lm_eval 0.4): its tasks, this project's models.

    python -m meteora_jax.harness run --model meteora --tasks ... \\
        --model_args base=BASE,bank=BANK,gates=GATES,router=gates --batch_size 8

is the harness' own command with this model registered; importing this module registers it for a program of one's
own. What is asked, and how a text becomes tokens, is as in the harness' `hf` model, so that figures compare.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from meteora_jax.config import InputError
from meteora_jax.execution import Dtype
from meteora_jax.likelihood import scores
from meteora_jax.loading import load
from meteora_jax.padding import bucket
from meteora_jax.prompts import render_chat
from meteora_jax.routing.named import read_router
from meteora_jax.text import check_text

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as e:
    raise InputError(f"lm-evaluation-harness: needs {e.name}, found none: pip install 'meteora-jax[harness]'") from None

LOG = logging.getLogger(__name__)

# (its text, context ids, continuation ids), as the harness hands a request to `_loglikelihood_tokens`
Request = tuple[Any, list[int], list[int]]


@register_model("meteora")
class MeteoraLM(TemplateLM):
    """A base with bank, gates and one router for all requests, as the harness sees it."""

    def __init__(
        self,
        base: str,
        bank: str | None = None,
        gates: str | None = None,
        router: str | None = None,
        top_k: int | None = None,
        temperature: float | None = None,
        dtype: Dtype | None = None,
        adapter_slots: int | Literal["auto"] | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """Loads the folders.

        Args:
            router: "gates", "none", an adapter's name, or from Python NAME=WEIGHT,NAME=WEIGHT; by default the gates if
                given.
            top_k, temperature: of the gates, by default as they were trained.
            dtype: bfloat16 on an accelerator, float32 on a CPU unless given.
            adapter_slots: so many of the bank's adapters are on the device, as of `load`.
            max_length: tokens a request may have; by default the base's context.
            max_gen_toks: longest response of a task that names no length.
            add_bos_token: whether texts get one; by default as the tokenizer does by itself.
            prefix_token_id: what precedes a text without context; by default the beginning of a sequence, else its end.
            seed: of tasks that sample.
            device: not read; the harness says "cuda:0" on every machine, and JAX_PLATFORMS chooses.
            max_batch_size: of batch sizes found by trial, which are not supported.

        Raises:
            InputError: a folder or value was refused.
        """
        super().__init__()
        size = str(batch_size)
        if max_batch_size is not None or not size.isdecimal() or int(size) < 1:
            raise InputError(
                f"batch_size, max_batch_size: expected a number and nothing else, found {batch_size}, {max_batch_size}"
            )
        del device
        self.batch_size = int(size)
        self.model = load(base, bank, gates, dtype=dtype, adapter_slots=adapter_slots)
        self.tokenizer = self.model.tokenizer
        self.router = read_router(router, self.model.gates, self.model.adapter_names, top_k, temperature)
        if bank is not None and router is None and self.router is None:
            LOG.warning("%s: no adapter acts: of a bank alone none is chosen; router= or gates= chooses one", bank)
        self.max_length = max_length or self.model.config.max_position_embeddings
        self._base, self.max_gen_toks, self.add_bos_token, self.seed = base, max_gen_toks, add_bos_token, seed
        self._prefix = prefix_token_id

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_token_id is not None:
            return self.tokenizer.eos_token_id
        if not self.model.config.eos_token_ids:
            raise InputError(f"{self._base}: expected an end token, found none in the tokenizer and in config.json")
        return self.model.config.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        known = (self._prefix, self.tokenizer.bos_token_id)
        return next((i for i in known if i is not None), self.eot_token_id)

    @property
    def tokenizer_name(self) -> str:
        return str(self._base).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; a text that begins with the prefix token's own text gets no second one."""
        check_text(string, "text")
        if add_special_tokens is None:
            twice = string.startswith(self.tokenizer.decode([self.prefix_token_id]))
            add_special_tokens = False if twice else self.add_bos_token
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, **special)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as one text, by the tokenizer's template; one that refuses a system message gets none."""
        where = f"{self._base}: chat history"
        how = dict(add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt)
        try:
            return render_chat(self.tokenizer, chat_history, where, **how)
        except InputError as e:
            others = [m for m in chat_history if m.get("role") != "system"]
            if len(others) == len(chat_history) or not self.tokenizer.chat_template:
                raise
            LOG.warning("%s: the system message is left out", e)
            return render_chat(self.tokenizer, others, where, **how)

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        wrong = [len(target) for _, _, target in requests if not 0 < len(target) <= self.max_length]
        if wrong:
            raise InputError(f"continuation: expected 1 to {self.max_length} tokens, found {wrong[0]}")

        def answer(part: Sequence[Request]) -> list[tuple[float, bool]]:
            # as much context as fits, cut on the left; the last token is only ever a target
            rows = [[*context, *target][-(self.max_length + 1) :][:-1] for _, context, target in part]
            width = bucket(max(len(target) for _, _, target in part))
            at, targets = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.int32)
            for b, (row, (_, _, target)) in enumerate(zip(rows, part, strict=True)):
                at[b, : len(target)] = np.arange(len(row) - len(target), len(row))
                targets[b, : len(target)] = target
            logprobs, best, _ = scores(self.model, rows, at, targets, self.router)
            greedy = best[:, :, 0] == targets
            sizes = [len(target) for _, _, target in part]
            return [
                (float(p[:n].sum(dtype=np.float64)), bool(g[:n].all()))
                for p, g, n in zip(logprobs, greedy, sizes, strict=True)
            ]

        found = self._batched(requests, lambda r: len(r[1]) + len(r[2]), answer)
        for (text, _, _), said in zip(requests, found, strict=True):
            if text is not None:  # a window of a rolling request has none
                self.cache_hook.add_partial("loglikelihood", text, said)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[Request] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for context, target in map(make_disjoint_window, rolling):
                windows.append((None, list(context), list(target)))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[i] += logprob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        kinds: dict[str, list[int]] = {}  # requests of like settings share batches
        for i, request in enumerate(requests):
            kinds.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for settings, members in kinds.items():
            options = self._options(json.loads(settings))
            longest = self.max_length - options["max_new_tokens"]
            if longest < 1:
                raise InputError(
                    f"max_gen_toks: expected less than {self.max_length} (max_length), found "
                    f"{options['max_new_tokens']}"
                )
            prompts = [self.tok_encode(requests[i].args[0])[-longest:] for i in members]

            def answer(part: Sequence[list[int]], options: dict[str, Any] = options) -> list[str]:
                return [c.text for c in self.model.generate(part, self.router, **options)]

            for i, text in zip(members, self._batched(prompts, len, answer), strict=True):
                texts[i] = text
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _options(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The harness' generation settings as `Meteora.generate` takes them; whatever is unknown is refused."""
        settings = dict(settings)
        until = settings.pop("until", None) or []
        lengths = [settings.pop(k, None) for k in ("max_gen_toks", "max_new_tokens", "max_tokens")]
        length = next((n for n in lengths if n is not None), self.max_gen_toks)
        sample, warmth = settings.pop("do_sample", None), settings.pop("temperature", None) or 0.0
        try:
            temperature, length = float(warmth), int(length)  # YAML reads 1e-3 as a text
        except (TypeError, ValueError):
            found = f"{warmth!r}, {length!r}"
            raise InputError(f"generation_kwargs: temperature, max_gen_toks: expected numbers, found {found}") from None
        if sample and not temperature:
            temperature = 1.0  # transformers' own
        options: dict[str, Any] = {
            "stop": until,
            "max_new_tokens": length,
            "temperature": 0.0 if sample is False else temperature,
            "seed": self.seed,
        }
        for name in ("top_k", "top_p"):
            if (value := settings.pop(name, None)) is not None:
                options[name] = value
        if settings.pop("num_beams", 1) != 1 or settings:
            raise InputError(
                "generation_kwargs: expected until, max_gen_toks, do_sample, temperature, top_k, top_p and no beams, "
                f"found {', '.join(settings) or 'num_beams'}"
            )
        return options

    def _batched(self, items: Sequence[Any], length: Callable[[Any], int], answer: Callable[..., list]) -> list:
        """`answer` over all items, in batches of like length and of one size; results in the items' order."""
        order = sorted(range(len(items)), key=lambda i: -length(items[i]))  # the largest first: it fits or fails now
        results: list[Any] = [None] * len(items)
        size = min(self.batch_size, len(items))
        for start in range(0, len(items), max(size, 1)):
            part = order[start : start + size]
            padded = [items[i] for i in part] + [items[part[-1]]] * (size - len(part))
            for i, result in zip(part, answer(padded)[: len(part)], strict=True):
                results[i] = result
        return results


def main() -> None:
    """The harness' own command line; a refused input is one line and status 1."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
