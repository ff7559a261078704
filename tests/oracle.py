"""The same eviction rule on Hugging Face's model: an independent oracle for the engine. Shares no code with the
product.

Knows Llama; EXAONE 4, whose layers without a sliding window have no RoPE; Gemma 3, whose layers with one have another
RoPE; SmolLM3, with layers without RoPE; Laguna, whose layers differ in their query heads, and in how much of them
turns; MiMo-V2, whose values are narrower than its keys;
DeepSeek-V3, whose cache holds a latent and a rotary part per token, which together stand for the key and the
value of one KV head; Qwen2.5-VL and Qwen3-VL, see :class:`TextModel`; Gemma 2, which caps its logits;
GPT-OSS, which has a sink beside its tokens; LFM2, Qwen3-Next, Qwen3.5 and Nemotron-H, with layers that keep a state in
place of keys and values, of which nothing is evicted; Falcon-H1 and Zamba2, with layers that keep both; MiniCPM3, see
:func:`caching_heads`."""

import dataclasses
from types import SimpleNamespace

import torch


@dataclasses.dataclass
class Rule:
    budget: int
    window: int
    sinks: int
    interval: int
    block: int
    chunk: int | None  # None: the prompt is attended whole
    prefill_interval: int | None
    shared_by_heads: bool
    keep_prompt: bool = False
    prompt_share: float = 0.0
    distinct_share: float = 0.0
    method: str = "qfilters"
    filter: str = "static"
    rank: int = 0
    observed: int = 0
    whole_pages: bool = False
    has_fp8_cache: bool = False
    spares_windows: bool = True  # layers with a sliding window evict nothing, if others have none

    def evicts_from(self, model, layer: int) -> bool:
        has_other_layers = not all(_slides(model, i) for i in with_caches(model))
        is_spared = self.spares_windows and has_other_layers and _slides(model, layer)
        return attends(model, layer) and not is_spared


def caching_heads(model):
    """MiniCPM3, which makes keys and values of heads of latents, with those in its cache, as vLLM has it."""
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.head_dim = attention.qk_head_dim

        def forward(*args, cache, of_latents=attention.forward, expand=attention.expand_kv, **kwargs):
            def update(latents, rotary, *rest, **more):
                return cache.update(*expand(latents, rotary), *rest, **more)

            return of_latents(*args, cache=None if cache is None else SimpleNamespace(update=update), **kwargs)

        attention.forward, attention.expand_kv = forward, lambda keys, values: (keys, values)
    return model


class TextModel:
    """The language model of one with images, for prompts of text, as if it were a model of its own."""

    def __init__(self, model) -> None:
        self.model, self.config, self._lm_head = model.model.language_model, model.config.text_config, model.lm_head

    def __call__(self, *args, **kwargs):
        output = self.model(*args, **kwargs)
        output.logits = self._lm_head(output.last_hidden_state)
        return output


def teacher_forced_logprobs(
    model, prompt: list[int], forced: list[int], filters, rule: Rule, positions: list[torch.Tensor] | None = None
) -> tuple[list[float], list[int]]:
    """Log-probabilities of ``forced`` after ``prompt``, and the resident tokens at each of these steps.

    filters: filters and statistics of the queries, as the product's Filters holds them.
    positions: an empty list that becomes the positions resident in each layer at the end, ``[kv_heads, resident]``.
    """
    from transformers import DynamicCache

    keeps_states = any(keeps_state(model, i) for i in range(len(model.model.layers)))
    cache = DynamicCache(config=model.config) if keeps_states else DynamicCache()  # whatever the model slides
    if rule.has_fp8_cache:
        _store_in_fp8(cache)
    budget = rule.budget + (len(prompt) if rule.keep_prompt else 0)
    sinks = max(rule.sinks, len(prompt)) if rule.keep_prompt else rule.sinks
    tokens = prompt + forced
    logprobs, residents = [], []
    position = 0
    seen = _Queries(model, rule.observed)
    held = [torch.zeros(_kv_heads(model, i), 0, dtype=torch.int64) for i in with_caches(model)]
    first = next(i for i in range(len(held)) if rule.evicts_from(model, i))
    observed, is_observed_after_prompt = None, False
    with torch.no_grad(), seen:
        while position < len(tokens) - 1:
            resident = held[first].shape[1]
            if position < len(prompt):
                every = rule.prefill_interval
                end = len(prompt) if rule.chunk is None else min(len(prompt), (position // every + 1) * every)
                surplus = 0 if rule.chunk is None else resident + every - budget - rule.chunk
                evicted = -(-surplus // rule.block) * rule.block if surplus > 0 else 0
            else:
                end = position + 1
                surplus = resident + 1 - budget
                evicted = max(rule.interval, -(-surplus // rule.block) * rule.block) if surplus > 0 else 0
            if evicted:
                window = rule.window
                if rule.prompt_share and position >= len(prompt):
                    of_prompt = int((held[0][0] < len(prompt)).sum())
                    share = max(rule.sinks, int(rule.prompt_share * rule.budget))
                    if of_prompt - share >= rule.block:
                        evicted = min(evicted, (of_prompt - share) // rule.block * rule.block)
                        window = max(window, position - len(prompt))
                    else:
                        sinks = max(rule.sinks, of_prompt)
                window = resident - evicted - sinks if rule.method == "streaming" else window
                distinct = max(0, resident - evicted - budget) if rule.method == "qfilters" else 0
                distinct += int(rule.distinct_share * rule.budget)
                distinct = min(distinct, resident - evicted - sinks - window)
                looks = position >= len(prompt) or not distinct
                if rule.observed and not is_observed_after_prompt and looks:
                    observed, peaks = seen.attention(cache, rule, newer=max(0, position - len(prompt)))
                    is_observed_after_prompt = position >= len(prompt)
                    if rule.shared_by_heads:
                        peaks = [peak if peak is None else peak.max(0).values for peak in peaks]
                    looked_at = peaks if is_observed_after_prompt else observed
                else:
                    looked_at = observed
                scores = score(model, cache, filters, rule, position, looked_at)
                if rule.whole_pages:
                    kept = evict_pages(model, cache, scores, filters, evicted // rule.block, sinks, rule)
                else:
                    kept, observed = evict(model, cache, scores, evicted, sinks, window, rule, observed, distinct)
                held = [
                    rows if kept_rows is None else rows.gather(1, kept_rows)
                    for rows, kept_rows in zip(held, kept, strict=True)
                ]
                resident -= evicted
            if position >= len(prompt) and not keeps_states:  # as many as there is room for before the next cut
                end = min(len(tokens) - 1, position + max(1, budget - resident))
            n = end - position
            mask = torch.zeros(1, 1, n, resident + n)
            mask[..., resident:] = torch.triu(torch.full((n, n), float("-inf")), 1)
            masks = mask
            sliding = next((i for i in range(len(held)) if _slides(model, i)), None)
            if sliding is not None:  # what lies behind a window lies there for every head
                positions_held = torch.cat((held[sliding][0], torch.arange(position, end)))
                distance = torch.arange(position, end)[:, None] - positions_held
                is_outside = (distance < 0) | (distance >= model.config.sliding_window)
                within = torch.zeros(1, 1, *distance.shape).masked_fill(is_outside, float("-inf"))
                masks = {"full_attention": mask, "sliding_attention": within}
            if keeps_states:
                masks = {"full_attention": mask, **dict.fromkeys(STATES)}
            seen.is_prompt = position < len(prompt)
            out = model(
                input_ids=torch.tensor([tokens[position:end]]),
                position_ids=torch.arange(position, end)[None],
                past_key_values=cache,
                attention_mask=masks,
                use_cache=True,
            )
            held = [torch.cat((rows, torch.arange(position, end).expand(len(rows), -1)), 1) for rows in held]
            if position < len(prompt):
                seen.end = end
            if observed is not None:
                observed = [
                    rows if rows is None else torch.nn.functional.pad(rows, (0, n), value=-1) for rows in observed
                ]
            first_forced = max(position + 1, len(prompt))
            for row, token in zip(out.logits[0, first_forced - end - 1 :], tokens[first_forced : end + 1]):
                logprobs.append(float(row.float().log_softmax(-1)[token]))
            residents += range(resident + first_forced - position, resident + n + 1)
            position = end
    if positions is not None:
        positions.extend(held)
    return logprobs, residents


def _store_in_fp8(cache) -> None:
    """From now on keys and values are stored, and attended to, as an fp8 cache of vLLM on a CPU holds them: it cuts off
    what does not fit into the 3 bits after the first one, of multiples of 2^-9."""
    update = cache.update

    def cut_off(states):
        bits = (states.view(torch.int32) & 0xFFF00000 - 2**32).view(torch.float32)
        return torch.where(states.abs() < 2**-6, (states * 2**9).trunc() / 2**9, bits)

    def update_in_fp8(keys, values, *args, **kwargs):
        return update(cut_off(keys), cut_off(values), *args, **kwargs)

    cache.update = update_in_fp8


def _kv_heads(model, layer: int) -> int:
    if has_latents(model):
        return 1
    if model.config.model_type == "mimo_v2_flash":
        return model.config.num_attention_heads // model.model.layers[layer].self_attn.num_key_value_groups
    differ = getattr(model.config, "is_heterogeneous", False)
    return (model.config.per_layer_config[layer] if differ else model.config).num_key_value_heads


def has_latents(model) -> bool:
    return model.config.model_type == "deepseek_v3"


def _slides(model, layer: int) -> bool:
    return (
        getattr(model.config, "layer_types", None) is not None
        and model.config.layer_types[layer] == "sliding_attention"
    )


STATES = ("conv", "linear_attention")  # names of layers that keep one and do not attend


def with_caches(model) -> range:
    """Indices of layers; later ones attend to what the last of these of their kind holds (Gemma 4 E2B)."""
    return range(len(model.model.layers) - (getattr(model.config, "num_kv_shared_layers", None) or 0))


def attends(model, layer: int) -> bool:
    types = getattr(model.config, "layer_types", None)
    return not types or types[layer] in ("full_attention", "sliding_attention", "hybrid")


def keeps_state(model, layer: int) -> bool:
    types = getattr(model.config, "layer_types", None) or ()
    return bool(types) and types[layer] in (*STATES, "hybrid")


def attention_of(layer):
    layer = getattr(layer, "shared_transformer", layer)  # Zamba2
    return layer.mixer if hasattr(layer, "mixer") else layer.self_attn


def _scale(model) -> float:
    return next(attention_of(layer) for i, layer in enumerate(model.model.layers) if attends(model, i)).scaling


def rotate(model, layer: int, vectors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """vectors: ``[..., len(positions), head_size]``."""
    if has_latents(model):
        latent, rotary = vectors.split((model.config.kv_lora_rank, model.config.qk_rope_head_dim), -1)
        return torch.cat((latent, _turn(rotary, *model.model.rotary_emb(vectors, positions[None]))), -1)
    of_layer, family = (), model.config.model_type
    if (
        family == "nemotron_h"
        or (family == "exaone4" and not _slides(model, layer))
        or (family == "smollm3" and not model.config.no_rope_layers[layer])
    ):
        return vectors
    if family in ("gemma3_text", "gemma3n_text", "gemma4_text", "laguna", "mimo_v2_flash"):
        of_layer = (model.config.layer_types[layer],)
    if (
        "vl" in family or family == "qwen3_5_text"
    ):  # three components, of text the same; Qwen2.5-VL gives cosines and sines for each of them
        cos, sin = (
            part.reshape(-1, 1, *part.shape[-2:])[0]
            for part in model.model.rotary_emb(vectors, positions.expand(3, 1, -1))
        )
    else:
        cos, sin = model.model.rotary_emb(vectors, positions[None], *of_layer)
    if family == "gpt_oss":  # one number for both halves
        cos, sin = (torch.cat((part, part), -1) for part in (cos, sin))
    if family == "minicpm3":  # the last elements turn
        still, turned = vectors[..., : -cos.shape[-1]], vectors[..., -cos.shape[-1] :]
        return torch.cat((still, _turn(turned, cos, sin)), -1)
    turned, still = vectors[..., : cos.shape[-1]], vectors[..., cos.shape[-1] :]
    return torch.cat((_turn(turned, cos, sin), still), -1)


def _turn(vectors: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = vectors.chunk(2, -1)
    return vectors * cos[0] + torch.cat((-second, first), -1) * sin[0]


def in_order_of(model, vectors: torch.Tensor) -> torch.Tensor:
    """Vectors of a filters file, ``[..., head_size]``, as Hugging Face has the elements of queries: those of DeepSeek
    that RoPE turns together stand side by side, and in Hugging Face's cache in two halves.
    """
    if not has_latents(model):
        return vectors
    latent, rotary = vectors.split((model.config.kv_lora_rank, model.config.qk_rope_head_dim), -1)
    return torch.cat((latent, rotary[..., ::2], rotary[..., 1::2]), -1)


def heads_of(model, layer: int) -> int:
    """That attend to the keys of a layer."""
    by_layer = getattr(model.config, "num_attention_heads_per_layer", None)
    return len(attending_to(model, layer)) * (by_layer[layer] if by_layer else model.config.num_attention_heads)


def attending_to(model, layer: int) -> list[int]:
    """Indices of the layers that attend to the keys of a layer, in order."""
    num_layers, own = len(model.model.layers), with_caches(model)
    if num_layers == len(own):
        return [layer]
    types = model.config.layer_types
    of_kind = [i for i in range(num_layers) if types[i] == types[layer]]
    is_last = layer == max(i for i in of_kind if i in own)
    return [layer, *(i for i in of_kind if is_last and i not in own)]


def joined(model, layer: int, heads: list[torch.Tensor]) -> torch.Tensor:
    """Vectors ``[heads, ...]`` of layers that attend to the keys of one: those of each KV head side by side."""
    return torch.cat([each.unflatten(0, (_kv_heads(model, layer), -1)) for each in heads], 1).flatten(0, 1)


def soft_cap(model) -> float:
    return getattr(model.config, "attn_logit_softcapping", None) or 0.0


def with_sink(model, layer: int, logits: torch.Tensor) -> torch.Tensor:
    """The softmax of ``[heads, ..., resident]`` logits; some of the attention goes to a sink, where there is one."""
    sinks = getattr(attention_of(model.model.layers[layer]), "sinks", None)
    most = logits.amax(-1, keepdim=True)
    weights = (logits - most).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks.view(-1, *[1] * (logits.dim() - 1)) - most).exp()
    return weights / total


BY_TOKEN = (
    "LagunaAttention",
    "Gemma3nTextAttention",
    "Gemma4TextAttention",
    "Qwen3VLTextAttention",
    "Qwen3NextAttention",
    "Qwen3_5Attention",
)


def hook_queries(layer, see):
    """Shows ``see`` the queries of a layer before RoPE, ``[heads, n, head_size]``, whenever the model runs; returns the
    hook.
    """
    attention = attention_of(layer)
    if hasattr(attention, "kv_b_proj") and not hasattr(attention, "head_dim"):
        return attention.q_b_proj.register_forward_hook(lambda _, __, out: see(_absorbed(attention, out[0])))
    if hasattr(attention, "q_layernorm"):
        return attention.q_layernorm.register_forward_hook(lambda _, __, out: see(out[0].transpose(0, 1)))
    if hasattr(attention, "q_norm"):
        # Some models normalise [1, heads, n, head_size], others [1, n, heads, head_size].
        is_by_token = type(attention).__name__ in BY_TOKEN
        return attention.q_norm.register_forward_hook(
            lambda _, __, out: see(out[0].transpose(0, 1) if is_by_token else out[0])
        )
    return (attention.q_proj or attention.q_b_proj).register_forward_hook(
        lambda _, __, out: see(out[0].unflatten(-1, (-1, attention.head_dim)).transpose(0, 1))
    )


def _absorbed(attention, queries: torch.Tensor) -> torch.Tensor:
    """Queries of DeepSeek, ``[n, heads * size]``, as they attend to latents: ``[heads, n, head_size]``."""
    config, num_heads = attention.config, attention.num_heads
    queries = queries.unflatten(-1, (num_heads, -1)).transpose(0, 1)
    nope, rotary = queries.split((config.qk_nope_head_dim, config.qk_rope_head_dim), -1)
    to_keys = attention.kv_b_proj.weight.unflatten(0, (num_heads, -1))[:, : config.qk_nope_head_dim]
    return torch.cat((nope @ to_keys, rotary[..., ::2], rotary[..., 1::2]), -1)


def _head_size(model, layer) -> int:
    if has_latents(model):
        return model.config.kv_lora_rank + model.config.qk_rope_head_dim
    return attention_of(layer).head_dim


def _keys_and_values(model, layer) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer of the cache holds, each ``[kv_heads, resident, size]``."""
    keys, values = layer.keys[0].float(), layer.values[0].float()
    return (torch.cat((keys, values), -1), keys) if has_latents(model) else (keys, values)


class _Queries:
    """The last queries of the prompt, per layer ``[heads, n, head_size]`` before RoPE, while the model runs."""

    def __init__(self, model, count: int) -> None:
        self.model, self.count, self.is_prompt, self.end = model, count, True, 0
        layers = [model.model.layers[i] for i in with_caches(model)]
        sizes = [_head_size(model, layer) if attends(model, i) else 0 for i, layer in enumerate(layers)]
        self.rows = [torch.zeros(heads_of(model, i), 0, size) for i, size in enumerate(sizes)]
        self.seen: list[list[torch.Tensor]] = [[] for _ in layers]

    def __enter__(self):
        self.hooks = [
            hook_queries(self.model.model.layers[attending], lambda queries, i=i: self._see(i, queries))
            for i in with_caches(self.model)
            if self.count and attends(self.model, i)
            for attending in attending_to(self.model, i)
        ]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def _see(self, layer: int, queries: torch.Tensor) -> None:
        if self.is_prompt and self.count:
            self.seen[layer].append(queries)
            if len(self.seen[layer]) == len(attending_to(self.model, layer)):
                queries = joined(self.model, layer, self.seen[layer])
                self.rows[layer] = torch.cat((self.rows[layer], queries), 1)[:, -self.count :]
                self.seen[layer] = []

    def attention(self, cache, rule: Rule, newer: int) -> list[torch.Tensor]:
        """Per layer ``[kv_heads, resident]``, -1 for newer tokens: what the last queries pay, averaged over 7
        neighbours; the most that one of them pays to a token, to one of 12 before it or to one of 6 behind it. None for
        layers that evict nothing."""
        means, peaks = [], []
        for index, (layer, rows) in enumerate(zip(cache.layers, self.rows, strict=True)):
            if not rule.evicts_from(self.model, index):
                means.append(None)
                peaks.append(None)
                continue
            keys, _ = _keys_and_values(self.model, layer)
            keys = keys[:, : keys.shape[1] - newer]
            num_kv_heads, seen, _ = keys.shape
            n = rows.shape[1]
            queries = rotate(self.model, index, rows, torch.arange(self.end - n, self.end)).unflatten(
                0, (num_kv_heads, -1)
            )
            logits = queries @ keys[:, None].mT * _scale(self.model)  # [kv_heads, group, n, seen]
            cap = soft_cap(self.model)
            logits = cap * torch.tanh(logits / cap) if cap else logits
            for i in range(n):
                logits[:, :, i, seen - n + i + 1 :] = float("-inf")
            paid = with_sink(self.model, index, logits.flatten(0, 1)).view(logits.shape)
            paid = torch.nn.functional.pad(paid, (12, 6 + newer))
            mean = sum(paid[..., 12 + shift : 12 + shift + seen] for shift in range(-3, 4)).mean((1, 2)) / 7
            means.append(torch.nn.functional.pad(mean, (0, newer), value=-1))
            peak = paid.unfold(-1, 19, 1).amax((1, 2, 4))
            peaks.append(torch.nn.functional.pad(peak[:, :seen], (0, newer), value=-1))
        return means, peaks


def score(model, cache, filters, rule: Rule, position: int, observed) -> list[torch.Tensor]:
    """Per layer ``[kv_heads, resident]``; None for layers that evict nothing."""
    scores = []
    for index, layer in enumerate(cache.layers):
        if not rule.evicts_from(model, index):
            scores.append(None)
            continue
        keys, values = _keys_and_values(model, layer)
        if rule.method == "random":
            drawn = torch.rand(len(cache.layers), *keys.shape[:2], generator=torch.Generator().manual_seed(position))
            scores.append(drawn[index])
            continue
        if rule.method == "keydiff":
            scores.append(unlikeness(keys, neighbours=0))
            continue
        if rule.method == "streaming":
            scores.append(torch.zeros(keys.shape[:2]))
            continue
        if rule.filter == "static":
            scores.append(torch.einsum("hrd,hd->hr", keys, in_order_of(model, filters.filters[index])))
            continue
        size = keys.shape[-1]
        basis = torch.eye(size)
        num_heads = heads_of(model, index)
        group = num_heads // len(keys)
        rows = []
        coming = torch.arange(position, position + 128)
        means = in_order_of(model, filters.query_mean_before_rope[index][:num_heads])
        future_means = rotate(model, index, means[:, None].expand(-1, 128, -1), coming).mean(1)
        for head, future_mean in enumerate(future_means):
            k = keys[head // group]
            if rule.filter == "rotary":
                rows.append(k @ future_mean)
                continue
            logits = k @ future_mean * _scale(model)
            variance = torch.zeros_like(logits)
            if rule.rank:
                assert rule.rank == size, "the oracle knows the whole covariance or none"
                turn = rotate(model, index, basis[:, None].expand(-1, 128, -1), coming)  # [from, position, to]
                second = filters.query_second_before_rope[index][head]
                future_second = torch.einsum("dpe,df,fpg->eg", turn, second, turn) / 128
                covariance = future_second - torch.outer(future_mean, future_mean)
                variance = torch.einsum("rd,de,re->r", k, covariance, k) * _scale(model) ** 2
            cap = soft_cap(model)
            if cap:  # the integrand is largest where the slope of the cap, times the variance, leads away from the mean
                shift = variance / torch.cosh((logits + variance / 2) / cap) ** 2
                spent = torch.where(variance > 0, shift**2 / (2 * variance), 0)
                rows.append(cap * torch.tanh((logits + shift) / cap) - spent)
            else:
                rows.append(logits + variance / 2)
        if rule.filter == "expected":
            rows = with_sink(model, index, torch.stack(rows)).unbind()
        rows = torch.stack(list(rows)).unflatten(0, (-1, group)).mean(1)
        if rule.filter == "expected":
            if observed is not None:
                rows = torch.where(observed[index] < 0, rows, (rows + observed[index]) / 2)
            rows = rows * values.norm(dim=-1)
        scores.append(rows)
    return scores


def unlikeness(vectors: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Of ``[heads, tokens, size]``: how far a key or value turns away from the mean direction, averaged over its
    neighbours to either side."""
    unit = vectors / vectors.norm(dim=-1, keepdim=True)
    turned_away = -torch.nn.functional.cosine_similarity(unit, unit.mean(1, keepdim=True), dim=-1)
    tokens = turned_away.shape[1]
    return torch.stack([turned_away[:, max(0, i - neighbours) : i + neighbours + 1].mean(1) for i in range(tokens)], 1)


def evict(model, cache, scores, evicted: int, sinks: int, window: int, rule: Rule, observed, distinct: int):
    """Keeps the best of each head, in the order of the text, and of the rest the ``distinct`` ones most
    unlike the others; returns these, and ``observed`` of those kept."""
    kept_of_layers, kept_observed = [], []
    for index, layer in enumerate(cache.layers):
        if scores[index] is None:
            kept_of_layers.append(None)
            kept_observed.append(None)
            continue
        resident = layer.keys.shape[2]
        _, values = _keys_and_values(model, layer)
        turned_away = unlikeness(values, neighbours=7 if rule.distinct_share else 3)
        rows, others = (values[:, sinks : resident - window] for values in (scores[index], turned_away))
        if rule.shared_by_heads:
            rows, others = (
                ((values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True, unbiased=False))
                .mean(0)
                .repeat(len(values), 1)
                for values in (rows, others)
            )
        kept = []
        for row, other in zip(rows, others, strict=True):
            order = row.argsort(descending=True)
            num_best = resident - evicted - sinks - window - distinct
            rest = order[num_best:]
            best = torch.cat((order[:num_best], rest[other[rest].argsort(descending=True)[:distinct]])) + sinks
            is_kept = torch.ones(resident, dtype=torch.bool)
            is_kept[sinks : resident - window] = False
            is_kept[best] = True
            kept.append(is_kept.nonzero()[:, 0])
        kept_rows = torch.stack(kept)
        kept_index = kept_rows[None, :, :, None]
        layer.keys, layer.values = (
            states.gather(2, kept_index.expand(-1, -1, -1, states.shape[-1])) for states in (layer.keys, layer.values)
        )
        kept_of_layers.append(kept_rows)
        if observed is not None:
            kept_observed.append(observed[index].gather(1, kept_rows))
    return kept_of_layers, None if observed is None else kept_observed


def evict_pages(model, cache, scores, filters, num_pages: int, sinks: int, rule: Rule) -> list[torch.Tensor]:
    """The pages that score lowest on the mean over layers, heads and tokens go; StreamingLLM's go oldest first. Layers
    with a sliding window are not asked.

    Returns the tokens kept, per layer ``[kv_heads, kept]``, None for layers that evict nothing.
    """
    evicting = [i for i in range(len(cache.layers)) if rule.evicts_from(model, i)]
    judges = [i for i in evicting if not _slides(model, i)]
    resident = cache.layers[evicting[0]].keys.shape[2]
    pages = [range(start, start + rule.block) for start in range(0, resident, rule.block)]
    if rule.method == "streaming":
        out = [page for page in pages if page[0] >= sinks][:num_pages]
    else:
        token_scores = 0
        for layer in judges:
            rows, mean, std = scores[layer], filters.score_mean[layer], filters.score_std[layer]
            token_scores = token_scores + ((rows - mean[:, None]) / std[:, None]).mean(0)
        evictable = [page for page in pages if page[0] >= sinks and page[-1] < resident - rule.window]
        assert len(evictable) >= num_pages
        out = sorted(evictable, key=lambda page: float(token_scores[list(page)].mean()))[:num_pages]
    gone = {token for page in out for token in page}
    kept = torch.tensor([token for token in range(resident) if token not in gone])
    for layer in (cache.layers[i] for i in evicting):
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
    return [kept.expand(layer.keys.shape[1], -1) if i in evicting else None for i, layer in enumerate(cache.layers)]
