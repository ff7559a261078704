#!/usr/bin/env python3
"""Says which of vLLM's recipes for language models this package accepts, by what its own checks say of them.

    scripts/count_recipes.py           # one line per family: recipes, verdict, proof
    scripts/count_recipes.py --all     # one per recipe

scripts/recipes.tsv has the recipes. Whether a model has M-RoPE, or states beside its attention, is read from the
classes of vLLM's registry, without importing them: many need what is not installed everywhere. What only a
configuration tells stands in the file. The checks are those of the front end on models, and those of a worker on
layers; no weights are needed. The proof of what is accepted is a test, that of a refusal its words.
"""

import argparse
import ast
import collections
import csv
import dataclasses
import pathlib
import sys
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import vllm
from vllm.model_executor.models.registry import ModelRegistry
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from scripts.check_vllm import Sources
from vllm_qfilters.config import KVCompressionConfig
from vllm_qfilters.frontend.support import MODEL_REFUSALS, Start, refuse
from vllm_qfilters.groups import GroupsBeside
from vllm_qfilters.policy import resolve
from vllm_qfilters.worker.specs import check_layers, check_specs

# What a recipe's traits mean, and the test that models of this kind pass; None: there is none.
TRAITS = {
    "": ("keys and values of one shape", "tests/test_oracle.py::test_engine_matches_hugging_face_with_the_same_rule"),
    "window": (
        "sliding windows",
        "tests/test_architectures.py::test_engine_matches_hugging_face_with_the_same_rule",
    ),
    "sinks": ("attention sinks", "tests/test_architectures.py::test_attention_sinks"),
    "longrope": ("longrope", "tests/test_architectures.py::test_longrope_is_calibrated_by_the_table_in_use"),
    "query_heads": (
        "query heads that differ",
        "tests/test_architectures.py::test_engine_matches_hugging_face_with_the_same_rule",
    ),
    "mrope": ("M-RoPE", "tests/test_mrope.py::test_engine_matches_hugging_face_with_the_same_rule"),
    "kv_shapes": (
        "KV heads that differ",
        "tests/test_architectures.py::test_engine_matches_hugging_face_with_the_same_rule",
    ),
    "own_attention": ("attention layers of its own", None),
    "narrow_values": ("values narrower than keys", "tests/test_gpu_engine.py::test_values_narrower_than_keys"),
    "shared_cache": (
        "layers that share a cache",
        "tests/test_architectures.py::test_engine_matches_hugging_face_with_the_same_rule",
    ),
    "chunked": ("chunked local attention", None),
    "rswa": ("R-SWA", None),
    "mla": ("MLA", "tests/test_mla.py::test_engine_matches_hugging_face_with_the_same_rule"),
    "indexer": ("sparse indexer", None),
    "hybrid": (
        "states beside attention",
        "tests/test_hybrids.py::test_requests_that_preempt_each_other_or_begin_alike_end_as_alone",
    ),
    "conv": ("short convolutions", "tests/test_hybrids.py::test_engine_matches_hugging_face_with_the_same_rule"),
    "gdn": ("gated delta nets", "tests/test_hybrids.py::test_engine_matches_hugging_face_with_the_same_rule"),
    "mamba2": ("Mamba 2", "tests/test_hybrids.py::test_engine_matches_hugging_face_with_the_same_rule"),
}
# Classes of vLLM's that say so of those below them.
TRAITS_OF_BASES = {"SupportsMRoPE": "mrope", "IsHybrid": "hybrid", "HasInnerState": "hybrid"}
STATES = {
    "conv": MambaAttentionBackendEnum.SHORT_CONV,
    "gdn": MambaAttentionBackendEnum.GDN_ATTN,
    "mamba2": MambaAttentionBackendEnum.MAMBA2,
}
WINDOW = 128


class Recipe(NamedTuple):
    """Attributes:

    traits: of ``TRAITS``, in its order; those of the class among them.
    is_known: vLLM's registry has the architecture.
    """

    name: str
    architecture: str
    traits: tuple[str, ...]
    is_known: bool

    @property
    def family(self) -> str:
        return ", ".join(TRAITS[trait][0] for trait in self.traits or ("",))


class Verdict(NamedTuple):
    """What becomes of a recipe, ``accepted``, ``refused``, ``untested`` or ``not in vLLM``, and what shows it."""

    word: str
    proof: str


def read(sources: Sources) -> list[Recipe]:
    """The recipes, in the order of the file.

    Args:
        sources: of the vLLM that is installed.

    Raises:
        KeyError: the file names a trait that is not in ``TRAITS``.
    """
    with open(ROOT / "scripts" / "recipes.tsv", encoding="utf-8", newline="") as file:
        lines = [line for line in file if not line.startswith("#")]
    found = []
    for row in csv.DictReader(lines, delimiter="\t"):
        registered = ModelRegistry.models.get(row["architecture"])
        traits = set((row["traits"] or "").split())
        if registered is not None:
            module, name = _where_defined(registered)
            bases = bases_of(sources, module, name)
            traits |= {TRAITS_OF_BASES[base] for base in bases & TRAITS_OF_BASES.keys()}
        order = sorted(traits, key=lambda trait: [*TRAITS].index(trait))
        found.append(Recipe(row["recipe"], row["architecture"], tuple(order), registered is not None))
    return found


def _where_defined(registered: object) -> tuple[str, str]:
    """The module and the name of a model's class. vLLM's registry has those of its own models as text, and the class
    itself of one that a plugin has registered.
    """
    model_class = getattr(registered, "model_cls", None)
    if model_class is None:
        return registered.module_name, registered.class_name  # type: ignore[attr-defined]
    return model_class.__module__, model_class.__name__


def bases_of(sources: Sources, module: str, name: str) -> set[str]:
    """The names of a class and of all its bases inside vLLM; ``SupportsMRoPE`` and the like have none."""
    found = sources.find(module, name)
    if found is None or not isinstance(found.node, ast.ClassDef):
        return {name}
    bases = [base.id for base in found.node.bases if isinstance(base, ast.Name)]
    return {name}.union(*(bases_of(sources, found.module, base) for base in bases))


def verdict(recipe: Recipe) -> Verdict:
    """Asks the checks in the order in which a start would."""
    if not recipe.is_known:
        return Verdict("not in vLLM", f"vLLM {vllm.__version__} has no {recipe.architecture}")
    try:
        check(set(recipe.traits))
    except ValueError as error:
        return Verdict("refused", str(error))
    tests = [TRAITS[trait][1] for trait in recipe.traits or ("",)]
    if None in tests:
        return Verdict("untested", "nothing refuses it, and no test has it")
    return Verdict("accepted", " ".join(str(test) for test in tests))


def check(traits: set[str]) -> None:
    """Raises ValueError where a model with these traits would be refused."""
    has_window = "window" in traits
    beside = GroupsBeside(WINDOW if has_window else 0, num_windows=has_window, num_states="hybrid" in traits)
    policy = dataclasses.replace(resolve(KVCompressionConfig()), beside=beside)
    model = SimpleNamespace(
        runner_type="generate",
        architecture="",
        is_encoder_decoder=False,
        is_hybrid="hybrid" in traits,
        use_mla="mla" in traits,
        is_attention_free=False,
        uses_alibi=False,
        attention_chunk_size=WINDOW if "chunked" in traits else None,
        rswa_window=WINDOW if "rswa" in traits else None,
        hf_text_config=SimpleNamespace(),
    )
    if "indexer" in traits:
        model.hf_text_config.index_topk = 2048
        model.hf_text_config.sparse_attention_config = None if model.use_mla else {"sparse_index_dim": 128}
    start: Any = SimpleNamespace(model_config=model)
    refuse(Start(policy, start), MODEL_REFUSALS)
    usual: dict[str, Any] = dict(block_size=32, num_kv_heads=2, head_size=64, dtype=torch.float32)
    specs: dict[str, KVCacheSpec] = {"first": FullAttentionSpec(**usual)}
    if "mla" in traits:
        specs["first"] = MLAAttentionSpec(**{**usual, "num_kv_heads": 1})
    if "window" in traits:
        specs["window"] = SlidingWindowSpec(**usual, sliding_window=WINDOW)
    if "kv_shapes" in traits:  # of layers of either kind
        specs["window"] = SlidingWindowSpec(**{**usual, "head_size": 128}, sliding_window=WINDOW)
    if "narrow_values" in traits:
        specs["first"] = FullAttentionSpec(**usual, head_size_v=32)
    if "hybrid" in traits:
        kind = next((kind for trait, kind in STATES.items() if trait in traits), MambaAttentionBackendEnum.LINEAR)
        specs["state"] = MambaSpec(block_size=32, shapes=((2, 64),), dtypes=(torch.float32,), mamba_type=kind)
    check_specs(policy, specs, max_model_len=1 << 20)
    if "own_attention" in traits:
        check_layers({"first": object()})


def lines(recipes: Iterable[Recipe], each: bool) -> list[str]:
    """One line per recipe, or per family and verdict with the number of recipes; the last one is the share accepted."""
    verdicts = [(recipe, verdict(recipe)) for recipe in recipes]
    if each:
        found = [f"{recipe.name}: {recipe.family}: {word}: {proof}" for recipe, (word, proof) in verdicts]
    else:
        counts = collections.Counter((recipe.family, *verdict) for recipe, verdict in verdicts)
        found = [f"{number:3} {family}: {word}: {proof}" for (family, word, proof), number in counts.most_common()]
    accepted = sum(word == "accepted" for _, (word, _) in verdicts)
    return [*found, f"{accepted} of {len(verdicts)} accepted ({accepted / len(verdicts):.0%}), vLLM {vllm.__version__}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="one line per recipe")
    arguments = parser.parse_args()
    print("\n".join(lines(read(Sources(pathlib.Path(vllm.__file__).parent)), arguments.all)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
