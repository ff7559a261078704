"""The command ``vllm-qfilters size``: reckons what sequences hold, and how many fit, from the configuration alone."""

import argparse
import dataclasses
import math
import pathlib
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_qfilters.budget import cdiv
from vllm_qfilters.commands.arguments import UsageError, at_least, check_writable
from vllm_qfilters.commands.engine import one_line, read_engine_args
from vllm_qfilters.commands.sizing.cache import (
    STATE,
    STATE_WITH_PREFIX_CACHE,
    CompressedPool,
    Held,
    Layers,
    PlainPool,
    fitting,
)
from vllm_qfilters.config import ADDITIONAL_CONFIG_KEY, KVCompressionConfig
from vllm_qfilters.filters.format import head_size_of, kv_shapes, most_query_heads
from vllm_qfilters.groups import LayerKinds
from vllm_qfilters.policy import Policy, resolve

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import EngineArgs

BLOCK_SIZE = 16  # tokens; vLLM's default on GPUs
BUDGETS = (1024, 2048, 4096, 8192)
LENGTHS = (4096, 32_768, 131_072)
# vLLM's defaults for servers on GPUs of less memory, and from this much on (EngineArgs.get_batch_defaults, 0.32).
LARGE_GPU = 70 << 30
MAX_NUM_SEQS = (256, 1024)
MAX_NUM_BATCHED_TOKENS = (2048, 8192)

USAGE = "MODEL --memory SIZE [--budget N ...] [--length N ...] [-o FILE]"
DESCRIPTION = (
    "Reckons what sequences hold in the KV cache with and without compression, and how many fit\n"
    "into the memory of a device. It reads the model's configuration: no weights, no engine, no GPU."
)
EXAMPLES = (
    "Examples:\n"
    "  vllm-qfilters size Qwen/Qwen3-8B --memory 80GiB\n"
    "  vllm-qfilters size Qwen/Qwen3-8B --memory 24GiB --budget 1024 2048 --length 32768 -o sizes.png\n"
    "  vllm-qfilters size Qwen/Qwen3-8B --kv-cache-memory-bytes 8G --block-size 128"
)
ENGINE_DEFAULTS: dict[str, Any] = {"kv_compression": "qfilters"}

_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_UNITS |= {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size(text: str) -> int:
    """Is a type of argument: a number of bytes, such as 80GiB, 24GB or 1073741824."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give it as 80GiB, 24GB or a number of bytes")
    return int(float(found[1]) * unit)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``size``."""
    parser.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="memory of one device, such as 80GiB; vLLM takes --gpu-memory-utilization of it. Instead of it "
        "--kv-cache-memory-bytes says what the cache alone gets",
    )
    parser.add_argument(
        "--weights",
        type=size,
        metavar="SIZE",
        help="memory of the weights of the whole model; reckoned from the configuration unless given",
    )
    budgets = " ".join(map(str, BUDGETS))
    parser.add_argument(
        "--budget",
        type=at_least(1),
        nargs="+",
        metavar="N",
        help=f"budgets in tokens; default the one of --kv-compression-config, else {budgets}",
    )
    parser.add_argument(
        "--length",
        type=at_least(1),
        nargs="+",
        metavar="N",
        help=f"lengths of sequences in tokens; default {' '.join(map(str, LENGTHS))}, where the model reads as many, "
        "and its longest",
    )
    parser.add_argument(
        "-o", "--output", type=pathlib.Path, metavar="FILE", help="plot to draw (PNG): how many fit against length"
    )


class Row(NamedTuple):
    """A line of the table: sequences of one length under one budget, None for plain vLLM."""

    length: int
    budget: int | float | None
    held: Held
    page_bytes: int
    num_fitting: int


class Beside(NamedTuple):
    """What goes beside the cache on one device, in bytes.

    Attributes:
        weights, compaction: of the device.
        observed: queries of one prompt, in the memory of the host until it is cut.
    """

    weights: int
    compaction: int
    observed: int


def run(args: argparse.Namespace) -> int:
    """Prints the sizes."""
    if args.output is not None:
        check_writable(args.output)
    engine_args = read_engine_args(args)
    if args.memory is None and engine_args.kv_cache_memory_bytes is None:
        raise UsageError("how much memory? Give --memory 80GiB, or --kv-cache-memory-bytes for the cache alone")
    sizes = _Sizes(args, engine_args)
    rows = sizes.rows(_lengths(args, sizes.model_config), _budgets(args))
    print(f"{sizes.description()}\n\n{sizes.memory()}\n\n{table(rows)}")
    if args.output is not None:
        draw(rows, args.output)
        print(f"\nPlot in {args.output}")
    return 0


class _Sizes:
    """What is reckoned for one model on one kind of device.

    Args:
        args: of the command.
        engine_args: of vLLM, with KV compression on.

    Raises:
        UsageError: the model has no configuration that can be read, or is not supported.
    """

    def __init__(self, args: argparse.Namespace, engine_args: "EngineArgs") -> None:
        self._engine_args = engine_args
        self._memory = args.memory
        self._is_large = (args.memory or 0) >= LARGE_GPU
        self._options = KVCompressionConfig.from_dict(engine_args.additional_config[ADDITIONAL_CONFIG_KEY])
        try:
            self.model_config = _model_config(engine_args, self._options)
            self._layers = _layers(self.model_config, engine_args)
            self._block_size = self._layers.page_tokens(engine_args.block_size or BLOCK_SIZE)
            self._policy = self._resolve(self._options)
            self._policy.check_block_size(self._block_size)
        except (ValueError, OSError) as error:
            raise UsageError(one_line(error)) from error
        step_tokens = engine_args.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS[self._is_large]
        state = STATE if engine_args.enable_prefix_caching is False else STATE_WITH_PREFIX_CACHE
        self._plain = PlainPool(self._layers, self._block_size, step_tokens, state)
        self._compressed = CompressedPool(
            self._layers, self._block_size, self._planes_in_pages, self._policy.beside, step_tokens, state
        )
        self._beside = None if args.memory is None else self._reckon_beside(args.weights)

    def rows(self, lengths: list[int], budgets: list[int | float]) -> list[Row]:
        """All lines of the table.

        Raises:
            UsageError: a budget is too small.
        """
        found = []
        for length in lengths:
            found.append(self._row(length, None, self._plain.held(length), self._plain.page_bytes))
            for budget in budgets:
                try:
                    limits = self._with_budget(budget).request_limits(None, length, self._block_size)
                except ValueError as error:
                    raise UsageError(one_line(error)) from error
                assert limits is not None, "a budget on the command line is never 0"
                held = self._compressed.held(length, limits)
                found.append(self._row(length, budget, held, self._compressed.page_bytes))
        return found

    def description(self) -> str:
        """The model, and the bytes of a token."""
        layers = self._layers
        kinds = f"{layers.num_full} layers of full attention" if layers.num_full else ""
        if layers.num_sliding:
            kinds += f"{' and ' if kinds else ''}{layers.num_sliding} with a sliding window of {layers.window:,}"
        if layers.num_states:
            kinds += f" and {layers.num_states} that keep a state of {show(layers.state_bytes)}"
        parallel = self._engine_args.tensor_parallel_size * self._engine_args.pipeline_parallel_size
        where = f", on each of {parallel} devices" if parallel > 1 else ""
        planes = self._planes_in_pages
        heads = f"latents of {layers.head_size}"
        if layers.value_size:
            heads = _heads(layers.num_kv_heads, layers.head_size, layers.value_size, what="KV heads of")
        if layers.sliding_kv_heads:
            heads += f" ({_heads(*layers.sliding_kv_heads)} with a window)"
        plain, compressed = layers.all_token_bytes, layers.number * self._compressed.token_bytes
        of_compression = " and with compression" if compressed == plain else f", {show(compressed)} with compression"
        if planes:
            stats = "token stat" if planes == 1 else "token stats"
            of_compression += f", with {planes} {stats} per KV head beside key and value"
        lines = [
            f"{self._engine_args.model}: {kinds}, {heads}{where}; pages of {self._block_size} tokens",
            f"A token takes {show(plain)} with plain vLLM{of_compression}",
        ]
        if layers.num_full and layers.num_sliding:
            full, sliding = layers.num_full * layers.token_bytes(), layers.num_sliding * layers.sliding_token_bytes
            lines.append(
                f"Of plain vLLM's bytes {show(full)} are in layers of full attention, {show(sliding)} in those with a "
                "window, which give them up again. "
                + (
                    "With compression all layers hold the same tokens"
                    if not self._policy.beside.window
                    else "Tokens are evicted from the former, the latter hold what they hold with plain vLLM"
                )
            )
        return "\n".join(lines)

    def memory(self) -> str:
        """Where the memory goes."""
        plain, compressed = (self._cache_bytes(is_compressed) for is_compressed in (False, True))
        if self._beside is None:
            return f"The cache gets {show(plain)}"
        share = self._engine_args.gpu_memory_utilization
        return (
            f"Of {show(self._memory)} vLLM uses {share:.0%}. Weights take {show(self._beside.weights)}. With "
            f"compression compacting takes up to {show(self._beside.compaction)}, and in the memory of the host the "
            f"observed queries of a prompt that is not cut yet take {show(self._beside.observed)}.\n"
            f"The cache gets at most {show(plain)} with plain vLLM, {show(compressed)} with compression; activations "
            "and CUDA graphs, which vLLM measures when it starts, come off both"
        )

    def num_pages(self, is_compressed: bool) -> int:
        """Pages of the pool, vLLM's null block among them."""
        pool = self._compressed if is_compressed else self._plain
        return self._cache_bytes(is_compressed) // pool.page_bytes

    @property
    def _planes_in_pages(self) -> int:
        """Token stats; those of latents lie beside the cache."""
        return self._policy.num_planes if self._layers.value_size else 0

    def _row(self, length: int, budget: int | float | None, held: Held, page_bytes: int) -> Row:
        return Row(length, budget, held, page_bytes, fitting(held, self.num_pages(budget is not None)))

    def _with_budget(self, budget: int | float) -> Policy:
        config = dataclasses.replace(self._options, budget=budget, max_budget=None)
        policy = self._resolve(config)
        policy.check_block_size(self._block_size)
        return policy

    def _resolve(self, config: KVCompressionConfig) -> Policy:
        return resolve(config, self.model_config, self._block_size, _is_one_group(self._engine_args))

    @property
    def _max_num_seqs(self) -> int:
        return self._engine_args.max_num_seqs or MAX_NUM_SEQS[self._is_large]

    def _cache_bytes(self, is_compressed: bool) -> int:
        fixed: int | None = self._engine_args.kv_cache_memory_bytes
        if fixed is not None:
            return fixed
        assert self._beside is not None, "run() asks for one of the two sizes"
        left = int(self._memory * self._engine_args.gpu_memory_utilization) - self._beside.weights
        if is_compressed:
            left -= self._beside.compaction
        return max(0, left)

    def _reckon_beside(self, weights: int | None) -> Beside:
        from vllm_qfilters.attention.queries import query_bytes
        from vllm_qfilters.worker.compactor import workspace_bytes

        args, layers, policy = self._engine_args, self._layers, self._policy
        devices = args.tensor_parallel_size * args.pipeline_parallel_size
        whole = weight_bytes(self.model_config) if weights is None else weights
        with_windows = not policy.beside.window
        num_heads = most_query_heads(self.model_config.hf_text_config, with_windows) // args.tensor_parallel_size
        in_layer = query_bytes(policy.observed_queries, num_heads, layers.head_size, self.model_config.dtype)
        left = max(0, int(self._memory * args.gpu_memory_utilization) - whole // devices)
        cached_tokens = left // self._compressed.page_bytes * self._block_size
        longest = policy.max_compacted_tokens(self.model_config.max_model_len, self._block_size)
        num_layers = layers.num_full if policy.beside.window else layers.number
        compaction = 0
        if not policy.evicts_whole_pages:
            compaction = workspace_bytes(
                num_layers=num_layers,
                num_heads=num_heads if policy.expects_attention else layers.num_kv_heads,
                num_kv_heads=layers.num_kv_heads,
                head_size=layers.head_size,
                num_sequences=self._max_num_seqs,
                longest_sequence=min(longest, cached_tokens),
                cached_tokens=cached_tokens,
                query_bytes=in_layer,
            )
        if not layers.value_size:
            compaction += cached_tokens * num_layers * 4 * policy.num_planes
        return Beside(whole // devices, compaction, num_layers * in_layer)


def weight_bytes(model_config: "ModelConfig") -> int:
    """Bytes of the weights of the whole model, from its configuration: they are not read.

    Raises:
        UsageError: Transformers cannot make such a model, or its weights are quantised.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if model_config.quantization is not None:
        raise UsageError(f"weights quantised by {model_config.quantization} are not reckoned: give --weights SIZE")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config.hf_text_config)
    except Exception as error:
        raise UsageError(
            f"the weights cannot be reckoned from the configuration ({one_line(error)}): give --weights SIZE"
        ) from error
    return sum(parameter.numel() for parameter in model.parameters()) * _bytes(model_config.dtype)


def table(rows: list[Row]) -> str:
    """The rows as text, a column each: length, budget, what a sequence holds, how many fit."""
    lines = [("length", "budget", "held decoding", "held at most", "pages", "sequences that fit")]
    for row in rows:
        lines.append(
            (
                f"{row.length:,}",
                "plain vLLM" if row.budget is None else f"{row.budget:,}",
                show(row.held.decoding * row.page_bytes),
                show(row.held.reading * row.page_bytes),
                f"{row.held.decoding:,}",
                f"{row.num_fitting:,}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def draw(rows: list[Row], path: pathlib.Path) -> None:
    """Draws how many sequences fit against their length, a line for each budget."""
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("plots need matplotlib: pip install matplotlib, or drop -o") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for budget in dict.fromkeys(row.budget for row in rows):
        points = [(row.length, row.num_fitting) for row in rows if row.budget == budget]
        color, label = ("black", "plain vLLM") if budget is None else (None, f"budget {budget:,}")
        panel.plot(*zip(*points, strict=True), color=color, marker="o", label=label)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    lengths = sorted({row.length for row in rows})
    panel.set_xticks(lengths, [f"{length:,}" for length in lengths])
    panel.minorticks_off()
    panel.set_xlabel("length (tokens)")
    panel.set_ylabel("sequences that fit")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _heads(number: int, head_size: int, value_size: int, what: str = "of") -> str:
    """A number of KV heads, and the elements of each."""
    return f"{number} {what} {head_size}" + (f", values of {value_size}" if value_size != head_size else "")


def show(num_bytes: int) -> str:
    """A size with three digits or four, such as 132 KiB."""
    power = 0 if num_bytes < 1 else min(4, int(math.log2(num_bytes)) // 10)
    unit = ("bytes", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{num_bytes / (1 << 10 * power):.4g} {unit}"


def _model_config(engine_args: "EngineArgs", options: KVCompressionConfig) -> "ModelConfig":
    """vLLM's, of a model that is supported with these options. Neither tokenizer nor weights are looked at."""
    from vllm_qfilters.frontend.support import MODEL_REFUSALS, Start, refuse

    engine_args.skip_tokenizer_init = True
    model_config = engine_args.create_model_config()
    policy = resolve(options, model_config, is_one_group=_is_one_group(engine_args))
    refuse(Start(policy, SimpleNamespace(model_config=model_config)), MODEL_REFUSALS)
    return model_config


def _is_one_group(engine_args: "EngineArgs") -> bool:
    """Whether layers of all kinds are in one KV cache group."""
    return bool(engine_args.disable_hybrid_kv_cache_manager) or engine_args.pipeline_parallel_size > 1


def _layers(model_config: "ModelConfig", engine_args: "EngineArgs") -> Layers:
    """The layers of a device; of the first stage, which has most of them, where there is a pipeline.

    Raises:
        UsageError: it is not known what they hold.
    """
    config, ranks = model_config.hf_text_config, engine_args.tensor_parallel_size
    num_full, num_sliding, num_states, window = LayerKinds.of(model_config)
    if num_states and _is_one_group(engine_args):
        raise UsageError(
            "models that keep states beside attention have several KV cache groups: use --pipeline-parallel-size 1, "
            "and drop --disable-hybrid-kv-cache-manager"
        )
    num_kv_heads, head_size, sliding = model_config.get_total_num_kv_heads(), head_size_of(model_config), None
    if len(kv_shapes(config)) > 1:  # MODEL_REFUSALS let those of full attention be of one shape
        of_full = kv_shapes(config, with_windows=False)
        ((num_kv_heads, head_size),) = of_full
        ((number, size),) = kv_shapes(config) - of_full
        sliding = max(1, number // ranks), size, getattr(config, "swa_v_head_dim", None) or size
    stages = engine_args.pipeline_parallel_size
    cache_dtype = engine_args.kv_cache_dtype
    return Layers(
        num_full=cdiv(num_full, stages),
        num_sliding=cdiv(num_sliding, stages),
        window=window,
        num_kv_heads=1 if model_config.use_mla else max(1, num_kv_heads // ranks),
        head_size=head_size,
        value_size=_value_size(model_config, head_size),
        element_bytes=1 if cache_dtype.startswith("fp8") else _bytes(model_config.dtype),
        sliding_kv_heads=sliding,
        num_states=num_states,
        state_bytes=_state_bytes(model_config, engine_args) if num_states else 0,
    )


def _value_size(model_config: "ModelConfig", head_size: int) -> int:
    """Elements of a value in the cache, whose keys have ``head_size``; 0 with MLA.

    Raises:
        UsageError: values are of another size, and it is not known whether the cache holds them so.
    """
    from vllm_qfilters.frontend.support import HAS_NARROW_VALUES

    config = model_config.hf_text_config
    size: int = getattr(config, "v_head_dim", None) or head_size
    if model_config.use_mla:
        return 0
    if model_config.architecture in HAS_NARROW_VALUES:
        return size
    if size != head_size and not getattr(config, "kv_lora_rank", None):  # values of latents are filled up to keys
        raise UsageError(f"values of another size than keys ({size} and {head_size}) are not supported")
    return head_size


def _state_bytes(model_config: "ModelConfig", engine_args: "EngineArgs") -> int:
    """What the state of one layer takes on a device, as vLLM's class of the model reckons it."""
    from vllm.config import CacheConfig
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.kv_cache_interface import MambaSpec

    model_cls: Any
    model_cls, architecture = ModelRegistry.resolve_model_cls(model_config.architecture, model_config)
    cache_config = CacheConfig(
        mamba_cache_dtype=engine_args.mamba_cache_dtype, mamba_ssm_cache_dtype=engine_args.mamba_ssm_cache_dtype
    )
    config: Any = SimpleNamespace(
        model_config=model_config,
        cache_config=cache_config,
        parallel_config=SimpleNamespace(tensor_parallel_size=engine_args.tensor_parallel_size),
        speculative_config=None,
        num_speculative_tokens=0,
    )
    if architecture in MODELS_CONFIG_MAP:  # which chooses the dtype
        MODELS_CONFIG_MAP[architecture].verify_and_update_config(config)
    spec = MambaSpec(
        shapes=tuple(model_cls.get_mamba_state_shape_from_config(config)),
        dtypes=tuple(model_cls.get_mamba_state_dtype_from_config(config)),
        block_size=-1,
    )
    return int(spec.page_size_bytes)


def _lengths(args: argparse.Namespace, model_config: "ModelConfig") -> list[int]:
    longest = model_config.max_model_len
    if args.length is None:
        return sorted({length for length in LENGTHS if length < longest} | {longest})
    too_long = [length for length in args.length if length > longest]
    if too_long:
        raise UsageError(f"--length {too_long[0]}: the model reads {longest} tokens at most (--max-model-len)")
    return sorted(set(args.length))


def _budgets(args: argparse.Namespace) -> list[int | float]:
    configured = (args.kv_compression_config or {}).get("budget")
    return args.budget or (list(BUDGETS) if configured is None else [configured])


def _bytes(dtype: Any) -> int:
    return int(dtype.itemsize)
