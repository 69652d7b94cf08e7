"""Gate training's loss and the gates' gradients in torch and float64, from the files that transformers and peft
wrote: a second transcription of the formulas, which shares no code with ours."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch  # slow to import, and processes that have meshes need only the files that import this one

ORDER = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def read_adapter(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """{"layer.projection": (A [R, I], B [O, R], scale)} of a PEFT folder."""
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)
    tensors = {k: v.double() for k, v in load_file(folder / "adapter_model.safetensors").items()}
    found = {}
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            parts = key.split(".")
            layer, projection = parts[parts.index("layers") + 1], parts[-3]
            found[f"{layer}.{projection}"] = (a, tensors[key.replace("lora_A", "lora_B")], scale)
    return found


def previous_tasks(tasks, segments, none):
    """Token by token, in plain Python: whose run came before, from the beginning of each block."""
    found = np.full(tasks.shape, none)
    for b in range(len(tasks)):
        block: list[int] = []
        for t in range(tasks.shape[1]):
            if t == 0 or segments[b, t] != segments[b, t - 1] or tasks[b, t] == -1:
                block = []
            if tasks[b, t] == -1:
                continue
            if not block or block[-1] != tasks[b, t]:
                block.append(tasks[b, t])
            found[b, t] = none if block[-1] == block[0] else block[-2]
    return found


def segment_indices(tasks, segments, count):
    """Token by token, in plain Python: how many runs ago its block's first task last began, at most count - 1."""
    found = np.zeros(tasks.shape, int)
    for b in range(len(tasks)):
        first = number = last = -1
        for t in range(tasks.shape[1]):
            task = tasks[b, t]
            if t == 0 or segments[b, t] != segments[b, t - 1] or last == -1:
                first, last = task, -1
            if task != last:
                number = 0 if task == first else number + 1
            last = task
            found[b, t] = min(number, count - 1)
    return found


def response_starts(s: Any) -> list[int]:
    """The first two tokens of each stretch of one task's tokens that carry loss."""
    found, length = [], 0
    for t, (task, loss) in enumerate(zip(s.tasks.tolist(), s.loss.tolist(), strict=True)):
        if not loss or task < 0:
            length = 0
            continue
        goes_on = length and s.tasks[t - 1] == task
        length = length + 1 if goes_on else 1
        found += [t] if length <= 2 else []
    return found


def loss_and_gradients(
    world: dict[str, Any],
    gates: dict[str, Any],
    sequences: Sequence[Any],
    beta: float,
    top_k: int,
    lm_loss: bool = True,
    response_weight: float | None = None,
    start_weight: float = 0.0,
    segment_weight: float = 0.0,
) -> tuple[float, float, dict[str, Any]]:
    """(LM term, gate term, {gate: gradient of lm + beta * gate [L, I, A]}) over whole sequences.

    The gates' names say their form: "q_proj" and so on those at the projections, "token_router.embed" and so on.
    """
    import torch

    hf = world["hf"]
    state = {k: v.double() for k, v in hf.state_dict().items()}
    config, heads, kv = hf.config, hf.config.num_attention_heads, hf.config.num_key_value_heads
    width = config.hidden_size // heads
    adapters = [read_adapter(folder) for folder in world["peft"].values()]
    columns = {p: torch.tensor(g, dtype=torch.float64, requires_grad=True) for p, g in gates.items()}
    lm, gate, ordered, earlier, predicted = 0.0, 0.0, 0.0, 0.0, 0
    judged = sum(int((s.tasks >= 0).sum()) for s in sequences)
    answers = sum(int(((s.tasks >= 0) & s.loss).sum()) for s in sequences)

    def norm(x: torch.Tensor, key: str) -> torch.Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps) * state[key]

    for s in sequences:
        tokens, tasks = torch.tensor(s.tokens.tolist()), torch.tensor(s.tasks.tolist())
        length = len(tokens)
        has_task = tasks >= 0
        counted = torch.full((length,), 1 / judged, dtype=torch.float64)
        if response_weight is not None:
            counted[:] = (1 - response_weight) / (judged - answers)
            counted[torch.tensor(s.loss.tolist())] = response_weight * (1 - start_weight) / answers
            for t in response_starts(s):
                counted[t] += response_weight * start_weight / sum(len(response_starts(s)) for s in sequences)
        routed: dict[str, Any] = {}
        angles = torch.arange(length).double()[:, None] / 10000.0 ** (torch.arange(0, width, 2).double() / width)
        cos, sin = torch.cos(angles), torch.sin(angles)

        def rotate(x: torch.Tensor, cos=cos, sin=sin) -> torch.Tensor:  # [N, T, H]
            a, b = x[..., : width // 2], x[..., width // 2 :]
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        def linear(
            x: torch.Tensor,
            layer: int,
            block: str,
            p: str,
            has_task=has_task,
            tasks=tasks,
            routed=routed,
            counted=counted,
        ) -> torch.Tensor:
            nonlocal gate
            y = x @ state[f"model.layers.{layer}.{block}.{p}.weight"].T
            g = routed["logits"] if "logits" in routed else x @ columns[p][layer]
            if has_task.any():
                chosen = torch.log_softmax(g, -1)[has_task].gather(1, tasks[has_task][:, None])
                gate = gate - (chosen[:, 0] * counted[has_task]).sum() / (config.num_hidden_layers * 7)
            best, index = torch.topk(g, top_k, -1)
            weights = torch.zeros_like(g).scatter(1, index, torch.softmax(best, -1))
            for i, adapter in enumerate(adapters):
                if f"{layer}.{p}" in adapter:
                    a, b, scale = adapter[f"{layer}.{p}"]
                    y = y + weights[:, i : i + 1] * scale * (x @ a.T @ b.T)
            return y

        def unit(u: torch.Tensor) -> torch.Tensor:
            return u / torch.sqrt((u * u).mean(-1, keepdim=True) + 1e-6)

        def token_router(x: torch.Tensor, length=length, routed=routed) -> torch.Tensor:
            weight = {name.removeprefix("token_router."): w for name, w in columns.items()}
            x, places = unit(x), torch.arange(length).double()
            turns = places[:, None] / 10000.0 ** (torch.arange(0, 32, 2).double() / 32)

            def turn(z: torch.Tensor) -> torch.Tensor:  # [heads, T, 32]
                a, b = z[..., :16], z[..., 16:]
                return torch.cat([a * turns.cos() - b * turns.sin(), b * turns.cos() + a * turns.sin()], -1)

            def behind(z: torch.Tensor, n: int) -> torch.Tensor:  # n tokens before
                return torch.cat([torch.zeros(n, z.shape[1], dtype=z.dtype), z])[:length]

            def long(w: torch.Tensor) -> torch.Tensor:
                return w / torch.sqrt((w * w).sum(0) + 1e-6)

            def look_up(u: torch.Tensor) -> torch.Tensor:
                before = torch.cat([weight["previous"], weight["first"]], 1)
                previous, own, segment = unit(u) @ before, unit(u) @ weight["task"], unit(u) @ weight["segment"]
                routed.setdefault("order", []).append([torch.log_softmax(z, -1) for z in (previous, segment)])
                key = torch.softmax(previous, -1) @ long(before).T
                value = torch.softmax(own, -1) @ long(weight["task"]).T
                key = key + torch.softmax(segment, -1) @ long(weight["segment"]).T
                sharpness, much = weight["lookup"]
                scores = sharpness * key @ key.T
                scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
                return own + much * torch.softmax(scores, -1) @ value @ long(weight["task"])

            read = x @ weight["embed"]
            u = read + sum(behind(read, n) @ matrix for n, matrix in enumerate(weight["shift"], 1))
            for i in range(len(weight["o"])):
                if i == len(weight["o"]) - 1:
                    routed["first"] = look_up(u)
                    found = torch.softmax(routed["first"], -1) @ long(weight["task"]).T
                    u = u + sum(behind(found, n) @ matrix for n, matrix in enumerate(weight["hop"]))
                c = torch.einsum("td,dpe->pte", x, weight["qkv_embed"][i])
                c = c + torch.einsum("te,epf->ptf", unit(u), weight["qkv"][i])
                q, k, v = (z.reshape(length, -1, 32).transpose(0, 1) for z in c)
                scores = turn(q) @ turn(k).transpose(1, 2) / math.sqrt(32)
                scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
                u = u + (torch.softmax(scores, -1) @ v).transpose(0, 1).reshape(length, -1) @ weight["o"][i]
                both = torch.einsum("te,epf->ptf", unit(u), weight["gate_up"][i])
                u = u + (torch.nn.functional.silu(both[0]) * both[1]) @ weight["down"][i]
            return look_up(u)

        x = state["model.embed_tokens.weight"][tokens]
        if "token_router.embed" in columns:
            routed["logits"] = token_router(x)
            if not lm_loss:  # each hop has its own loss, and the mean of both is trained
                chosen = torch.log_softmax(routed["first"], -1)[has_task].gather(1, tasks[has_task][:, None])
                earlier = earlier - (chosen[:, 0] * counted[has_task]).sum()
            if segment_weight:
                count, block, one = columns["token_router.segment"].shape[1], s.tasks[None], np.ones((1, length))
                labels = previous_tasks(block, one, len(adapters))[0], segment_indices(block, one, count)[0]
                for hop in routed["order"]:
                    for logp, label in zip(hop, labels, strict=True):
                        chosen = logp[has_task].gather(1, torch.tensor(label)[has_task][:, None])
                        ordered = ordered - chosen.sum() / judged / len(routed["order"])
        for layer in range(config.num_hidden_layers):
            h = norm(x, f"model.layers.{layer}.input_layernorm.weight")
            q, k, v = (
                linear(h, layer, "self_attn", p).reshape(length, -1, width).transpose(0, 1)
                for p in ("q_proj", "k_proj", "v_proj")
            )
            q, k = rotate(q), rotate(k)
            k, v = (t.repeat_interleave(heads // kv, 0) for t in (k, v))
            scores = (q @ k.transpose(1, 2) / math.sqrt(width)).masked_fill(
                torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf
            )
            y = (torch.softmax(scores, -1) @ v).transpose(0, 1).reshape(length, -1)
            x = x + linear(y, layer, "self_attn", "o_proj")
            h = norm(x, f"model.layers.{layer}.post_attention_layernorm.weight")
            up = torch.nn.functional.silu(linear(h, layer, "mlp", "gate_proj")) * linear(h, layer, "mlp", "up_proj")
            x = x + linear(up, layer, "mlp", "down_proj")
        logp = torch.log_softmax(norm(x, "model.norm.weight") @ state["lm_head.weight"].T, -1)
        wanted = torch.tensor(s.loss.tolist())[1:]
        lm = lm - logp[:-1][wanted].gather(1, tokens[1:][wanted][:, None]).sum()
        predicted += int(wanted.sum())

    lm = lm / predicted
    trained = gate if isinstance(earlier, float) else (gate + earlier) / 2
    (beta * (trained + segment_weight * ordered) + (lm if lm_loss else 0)).backward()
    return (
        float(lm.detach()),
        float(gate.detach()),
        {p: c.grad.numpy() for p, c in columns.items() if c.grad is not None},
    )
