"""What of vLLM's recipes is accepted, as the documentation has it."""

import ast
import pathlib
import re

import pytest
import vllm
from vllm import ModelRegistry
from vllm.model_executor.models.registry import _RegisteredModel

from scripts import count_recipes
from scripts.check_vllm import Sources

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def recipes():
    return count_recipes.read(Sources(pathlib.Path(vllm.__file__).parent))


def test_as_many_recipes_are_accepted_as_the_documentation_says(recipes):
    *_, last = count_recipes.lines(recipes, each=False)
    documented = re.search(r"\*\*(\d+) of (\d+)\*\*", (ROOT / "docs" / "compatibility.md").read_text())
    assert last.startswith(f"{documented[1]} of {documented[2]} accepted")


@pytest.mark.parametrize(
    "name, family, word",
    [
        ("Qwen3-8B", "keys and values of one shape", "accepted"),
        ("gpt-oss-20b", "sliding windows, attention sinks", "accepted"),
        ("Qwen3-Next", "states beside attention, gated delta nets", "accepted"),  # by its class
        ("Qwen3.5 4B", "M-RoPE, states beside attention, gated delta nets", "accepted"),  # by classes below its own
        ("Qwen3-VL-235B", "M-RoPE", "accepted"),
        ("gemma-4-31B", "sliding windows, KV heads that differ", "accepted"),
        ("gemma-4-E2B", "sliding windows, KV heads that differ, layers that share a cache", "accepted"),
        (
            "MiMo-V2-Flash",
            "sliding windows, attention sinks, KV heads that differ, values narrower than keys",
            "accepted",
        ),
        ("Inkling", "sliding windows, KV heads that differ, attention layers of its own", "refused"),
        ("DeepSeek-R1", "MLA", "accepted"),
        ("V3.2", "MLA, sparse indexer", "refused"),
        ("MiniMax-M3", "sparse indexer", "refused"),
        ("Kimi-Linear", "MLA, states beside attention", "refused"),
        ("plamo-2-translate", "keys and values of one shape", "not in vLLM"),
    ],
)
def test_families_come_from_the_registry_and_the_file(name, family, word, recipes):
    (recipe,) = [recipe for recipe in recipes if recipe.name == name]
    assert (recipe.family, count_recipes.verdict(recipe).word) == (family, word)


def test_every_recipe_is_accepted_by_a_test_or_refused_by_words(recipes):
    assert {count_recipes.verdict(recipe).word for recipe in recipes} == {"accepted", "refused", "not in vLLM"}


def test_a_class_that_a_plugin_registered_is_known_by_itself(recipes, monkeypatch):
    name = "Qwen3ForCausalLM"
    registered = _RegisteredModel.from_model_cls(ModelRegistry.models[name].load_model_cls())
    monkeypatch.setitem(ModelRegistry.models, name, registered)
    assert count_recipes.read(Sources(pathlib.Path(vllm.__file__).parent)) == recipes


def test_every_proof_is_a_test_that_exists():
    for _, proof in count_recipes.TRAITS.values():
        if proof is not None:
            file, _, test = proof.partition("::")
            functions = [node.name for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")]
            assert test in functions
