"""The same eviction rule on Hugging Face's model: an independent oracle for the engine. Shares no code with the product."""

import dataclasses

import torch


@dataclasses.dataclass
class Rule:
    budget: int
    window: int
    sinks: int
    interval: int
    block: int
    chunk: int | None  # None: the prompt is attended whole
    shared_by_heads: bool
    keep_prompt: bool = False
    method: str = "qfilters"


def teacher_forced_logprobs(model, prompt: list[int], forced: list[int], filters: torch.Tensor, rule: Rule) -> tuple[list[float], list[int]]:
    """Log-probabilities of ``forced`` after ``prompt``, and the resident tokens at each of these steps."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    budget = rule.budget + (len(prompt) if rule.keep_prompt else 0)
    sinks = max(rule.sinks, len(prompt)) if rule.keep_prompt else rule.sinks
    tokens = prompt + forced
    logprobs, residents = [], []
    position = 0
    with torch.no_grad():
        while position < len(tokens) - 1:
            resident = cache.get_seq_length()
            if position < len(prompt):
                end = len(prompt) if rule.chunk is None else min(len(prompt), (position // rule.chunk + 1) * rule.chunk)
                surplus = resident - budget
                evicted = -(-surplus // rule.block) * rule.block if surplus > 0 else 0
            else:
                end = position + 1
                surplus = resident + 1 - budget
                evicted = max(rule.interval, -(-surplus // rule.block) * rule.block) if surplus > 0 else 0
            if evicted:
                window = resident - evicted - sinks if rule.method == "streaming" else rule.window
                evict(cache, filters, evicted, sinks, window, rule.shared_by_heads)
                resident -= evicted
            n = end - position
            mask = torch.zeros(1, 1, n, resident + n)
            mask[..., resident:] = torch.triu(torch.full((n, n), float("-inf")), 1)
            out = model(
                input_ids=torch.tensor([tokens[position:end]]),
                position_ids=torch.arange(position, end)[None],
                past_key_values=cache,
                attention_mask=mask.to(model.dtype),
                use_cache=True,
            )
            if end >= len(prompt):
                logprobs.append(float(out.logits[0, -1].float().log_softmax(-1)[tokens[end]]))
                residents.append(resident + n)
            position = end
    return logprobs, residents


def evict(cache, filters: torch.Tensor, evicted: int, sinks: int, window: int, shared_by_heads: bool) -> None:
    for layer, head_filters in zip(cache.layers, filters, strict=True):
        keys = layer.keys[0].float()  # [kv_heads, resident, head_size]
        resident = keys.shape[1]
        scores = torch.einsum("hrd,hd->hr", keys, head_filters)[:, sinks : resident - window]
        if shared_by_heads:
            z = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True, unbiased=False)
            scores = z.mean(0, keepdim=True).repeat(scores.shape[0], 1)
        kept = []
        for row in scores:
            best = row.argsort(descending=True)[: resident - evicted - sinks - window] + sinks
            kept.append(torch.cat((torch.arange(sinks), best.sort().values, torch.arange(resident - window, resident))))
        kept_index = torch.stack(kept)[None, :, :, None].expand(-1, -1, -1, keys.shape[-1])
        layer.keys, layer.values = layer.keys.gather(2, kept_index), layer.values.gather(2, kept_index)
