"""What the documentation names exists, and its numbers come from the code and the files of results."""

import ast
import functools
import json
import pathlib
import re
import subprocess
import tomllib

import pytest
import torch
import yaml

from scripts import make_docs
from scripts.pages import readme, results
from scripts.pages.markdown import NOT_MEASURED, fill_in, without_folders, without_parts
from vllm_qfilters import __version__
from vllm_qfilters.commands import COMMANDS
from vllm_qfilters.config import KVCompressionConfig
from vllm_qfilters.frontend.metrics import GAUGES, HISTOGRAMS
from vllm_qfilters.frontend.support import REFUSALS
from vllm_qfilters.frontend.versions import VLLM_VERSIONS
from vllm_qfilters.methods import catalog
from vllm_qfilters.methods.base import PerSequence
from vllm_qfilters.methods.catalog import METHODS
from vllm_qfilters.policy import resolve
from vllm_qfilters.stats import COUNTERS

ROOT = pathlib.Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
README = (ROOT / "README.md").read_text()


def table(name: str) -> list[list[str]]:
    """Rows of the first table of a page, without its head."""
    lines = [line for line in (ROOT / "docs" / name).read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@functools.cache
def literals() -> str:
    """All that the package can say, f-strings as they are written."""
    files = [*(ROOT / "vllm_qfilters").rglob("*.py")]
    return "\n".join("".join(re.findall(r'f?"((?:[^"\\]|\\.)*)"', path.read_text())) for path in files)


def anchors(page: pathlib.Path) -> set[str]:
    """What the headings of a page can be linked as."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "feature, state, proof", table("compatibility.md"), ids=lambda text: text.replace(" ", "-")[:40]
)
def test_every_cell_of_the_compatibility_table_has_its_proof(feature, state, proof):
    paths, refusals = re.findall(r"`([^`]+)`", proof), re.findall(r'"([^"]+)"', proof)
    kind = re.match(r"tested|refused|open|not tested", state)
    assert kind, state
    assert bool(refusals) == (kind[0] == "refused") and bool(paths) == (kind[0] in ("tested", "open"))
    for path in paths:
        file, _, test = path.partition("::")
        assert (ROOT / file).is_file(), path
        if test:
            functions = {
                node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)
            }
            assert test in functions, path
    said = literals()
    for refusal in refusals:
        assert refusal in said, refusal


def test_the_compatibility_table_has_every_refusal_of_support():
    quoted = {quote for *_, proof in table("compatibility.md") for quote in re.findall(r'"([^"]+)"', proof)}
    for refusal in REFUSALS:
        assert any(quote in refusal.message for quote in quoted), refusal.message


def test_messages_that_troubleshooting_explains_are_ours():
    _, _, section = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## It does not start")
    rows = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    assert len(rows) >= 8
    for row in rows:
        message = re.match(r"\| `([^`]+)`", row)[1]
        assert max(message.split("..."), key=len).strip() in literals(), message


def test_every_metric_and_no_other_is_documented():
    documented = {name for name, *_ in table("observability.md")}
    metrics = {f"`{name}_total`" for name in COUNTERS} | {f"`{name}`" for name in (*GAUGES, *HISTOGRAMS)}
    assert documented == metrics


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    text = page.read_text()
    for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", text):
        if not link.startswith("http"):
            target = page.parent / link if link else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), f"{link}#{anchor}"
    for path in re.findall(r"`((?:tests|scripts|benchmarks|docs|kernels|requirements)/[\w./-]*)(?:::\w+)?`", text):
        assert (ROOT / path).exists() or "*" in path, path
    options = set(KVCompressionConfig().to_dict())
    for option in re.findall(r"--kv-compression-config\.(\w+)", text):
        assert option in options or option == "NAME", option
    for method in re.findall(r"--kv-compression (\w+)", text):
        assert method in METHODS or method == "METHOD", method


def test_every_command_is_documented():
    text = (ROOT / "docs" / "commands.md").read_text()
    assert all(f"vllm-qfilters {command} " in text for command in COMMANDS)


def test_the_index_has_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    assert all(f"({page.name})" in index for page in DOCS if page.name != "README.md")


def test_generated_pages_and_parts_are_as_the_code_and_the_results_have_them():
    differences = make_docs.differences(make_docs.make())
    assert not differences, f"run scripts/make_docs.py:\n{differences}"


def test_a_number_typed_into_a_generated_part_is_found():
    changed = README.replace("|plain vLLM|", "|a plain vLLM|")
    assert changed != README
    differences = make_docs.differences({"README.md": changed})
    assert "|a plain vLLM|" in differences and differences.startswith("--- README.md")


def test_readme_can_be_read_in_two_minutes():
    assert len(README.splitlines()) <= 120 and len(README.split()) <= 900
    assert max(map(len, README.splitlines())) <= 180


def test_numbers_in_readme_are_made_or_no_measurements():
    """Outside of generated parts and code stand defaults, versions, papers, and what follows from shapes."""
    text = re.sub(r"^    .*$", "", re.sub(r"```.*?```", "", without_parts(README), flags=re.DOTALL), flags=re.MULTILINE)
    text = re.sub(r"^\d+\. ", "", text, flags=re.MULTILINE)  # numbered lists
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = {*re.findall(r"[\d.]*\d", project["requires-python"]), *(f"{a}.{b}" for a, b in VLLM_VERSIONS)}
    policy = resolve(KVCompressionConfig())
    defaults = {value for name in policy.to_dict() if isinstance(value := getattr(policy, name), int | float)}
    # Keys and values of a sequence of 131,072 tokens: 32 layers, 8 KV heads, head size 128, bfloat16, in GiB.
    context = 131_072
    shapes = {context, 2 * 32 * 8 * 128 * 2 * context >> 30}
    allowed = {f"{value:,}" for value in defaults | shapes} | {str(value) for value in defaults} | versions
    numbers = {number.rstrip(".,") for number in re.findall(r"(?<![\w.-])\d[\d,.]*", text)}
    papers = {number for number in numbers if re.fullmatch(r"\d{4}\.\d{5}", number)}
    assert numbers - papers <= allowed


def test_defaults_in_readme_are_those_of_the_configuration():
    policy = resolve(KVCompressionConfig())
    rows = re.findall(r"^\|`(\w+)`\|`([\w.]+)`\|", README, re.MULTILINE)
    assert len(rows) == 5
    for name, default in rows:
        assert str(getattr(policy, name)) == default, name


def test_the_worked_diff_of_contributing_is_a_method():
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    file, entry = diff.split("--- vllm_qfilters/methods/catalog.py\n+")
    namespace = {}
    exec("\n".join(line[1:] for line in file.splitlines()[1:]), namespace)
    assert eval("{" + entry + "}", vars(catalog))["value_norm"].implementation == "value_norm:ValueNorm"
    assert issubclass(namespace["ValueNorm"], PerSequence)
    values = torch.ones(2, 5, 16)  # [num_kv_heads, num_tokens, head_size]
    scores = namespace["ValueNorm"].scores_of_layer(None, keys=values, values=values, sinks=0, seed=0)
    assert torch.equal(scores, torch.full((2, 5), 4.0))


def test_every_section_of_the_lab_notebook_says_where_its_numbers_come_from():
    sections = (ROOT / "docs" / "lab-notebook.md").read_text().split("\n## ")[1:]
    for section in sections:
        sources = re.findall(r"^Source: (.*(?:\n.+)*)", section, re.MULTILINE)
        assert sources, section.partition("\n")[0]
        for source in sources:
            assert "no file" in source or re.search(r"`benchmarks/results/[\w.-]+\.json`", source), source


def test_the_glossary_explains_each_word_once():
    words = [row[0] for row in table("glossary.md")]
    assert len(words) == len(set(words)) == 17


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and citation["preferred-citation"]["type"] == "article"


def test_the_changelog_begins_with_what_is_not_released():
    headings = re.findall(r"^##+ (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", "Changed outputs"]
    known = {"Added", "Changed", "Changed outputs", "Deprecated", "Removed", "Fixed", "Security", "Unreleased"}
    assert all(heading in known or re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", heading) for heading in headings)


RUN = {
    "date": "2026-01-01T00:00:00+00:00", "cpu": "A CPU, 2 cores", "isa": "AVX2", "vllm": "0.32.0", "commit": "abc1234",
    "command": "python -m benchmarks decode /home/somebody/models/M --budget 2048",
}  # fmt: skip


def case_file(name: str, options: dict, rounds: list[dict], **changes) -> dict:
    values = {"case": name, "dry_run": False, "run": {**RUN, **changes}, "options": {"model": "models/M", **options}}
    return {**values, "rounds": rounds, "ratios": [{} for _ in rounds]}


@pytest.fixture
def measured(tmp_path):
    """A folder with made-up files of results for README, of one commit."""

    def step(ms: float) -> dict:
        longest = {"mean_step_ms": ms, "ttft_s": ms / 20}
        return {"contexts": {"2048": {"mean_step_ms": 9.0}, "7000": longest}, **longest}

    variants = ("plain", "qfilters 2048", "streaming 2048")
    decode = [
        dict(zip(variants, map(step, times), strict=True)) for times in ((90, 50, 45), (70, 40, 35), (80, 45, 40))
    ]
    files = {
        "readme-decode": case_file("decode", {"sequences": 8, "contexts": [2048, 7000]}, decode),
        "readme-throughput": case_file(
            "throughput",
            {"cache": 0.125, "requests": 16, "prompt": 6000, "output_tokens": 144},
            3 * [{"plain": {"requests_per_s": 0.5}, "qfilters": {"requests_per_s": 1.25}}],
        ),
        "readme-quality": {
            "version": 1, "model": "models/M", "runs": [RUN], "engines": [{"method": "qfilters", "run": 0}],
            "tasks": {
                "streaming": {"sequences": 1, "tokens": 7168, "chunk": 128, "loss_from": 3072, "texts": {}},
                "passkey-8000": {"length": 8000, "depths": [0, 1], "trials_per_depth": 1, "seed": 0},
                "ruler-8000": {"length": 8000, "kinds": ["single"], "repeats": 2, "seed": 0},
            },
            "cells": [
                {"task": task, "engine": 0, "method": method, "budget": budget, **numbers}
                for task, cells in {
                    "streaming": {
                        ("full", 0): {"loss": 2.0, "texts": ["a"], "block_losses": [[2.0, 2.0]]},
                        ("qfilters", 2048): {"loss": 2.1, "texts": ["a"], "block_losses": [[2.1, 2.1]]},
                        ("qfilters", 512): {"loss": 2.9, "texts": ["a"], "block_losses": [[2.9, 2.9]]},
                    },
                    "passkey-8000": {
                        ("full", 0): {"found": 2, "trials": 2},
                        ("qfilters", 0.256): {"found": 2, "trials": 2},
                        ("streaming", 0.256): {"found": 1, "trials": 2},
                    },
                    "ruler-8000": {
                        ("full", 0): {"mean": 0.75, "error": 0.25, "trials": 2, "scores": [0.5, 1.0]},
                        ("qfilters", 0.256): {"mean": 0.5, "error": 0.5, "trials": 2, "scores": [0.0, 1.0]},
                    },
                }.items()
                for (method, budget), numbers in cells.items()
            ],
        },
    }  # fmt: skip
    for name, values in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    return tmp_path


def test_the_table_of_readme_is_made_from_the_files_of_results(measured):
    made = readme.results(results.read(measured))
    assert "|M, budget 2,048|plain vLLM|qfilters|StreamingLLM|" in made
    assert "|ms per step, 8 sequences of 7,000 tokens|80|45|**40**|" in made, "medians, the best is bold"
    assert "|s to the first token, prompt of 7,000|4.00|2.25|**2.00**|" in made
    assert f"|0.500|**1.25**|{NOT_MEASURED}|" in made
    assert f"|**0**|0.100|{NOT_MEASURED}|" in made
    assert "of 2, prompts of 8,000|**2**|**2**|1|" in made, "0.256 of 8,000 tokens is the budget"
    assert f"RULER's, prompts of 8,000|**0.75**|0.50|{NOT_MEASURED}|" in made
    assert "A CPU, 2 cores (AVX2), vLLM 0.32.0, commit abc1234.\nSpeed: medians of 3 rounds, quality: one run. " in made
    assert not re.search(r"\*\*[a-z]", made), "nothing to warn of"


def test_readme_warns_of_numbers_from_changed_trees_and_single_rounds(measured):
    path = measured / "readme-decode.json"
    values = json.loads(path.read_text())
    values["run"]["commit"] += "+changes"
    path.write_text(json.dumps({**values, "rounds": values["rounds"][:1]}))
    made = readme.results(results.read(measured))
    assert "commit abc1234+changes / abc1234" in made and "**uncommitted changes, a single round" in made
    assert "several commits" in made


def test_what_is_not_measured_is_said(tmp_path):
    made = readme.results([])
    assert made.count(NOT_MEASURED) == 3 * 8 and "ms per step" in made
    assert readme.plots(tmp_path, "results") == f"Plots: {NOT_MEASURED}."


def test_the_results_page_has_every_file_and_no_folder_of_the_machine(measured):
    page = results.page(results.read(measured), "plots")
    assert "## readme-decode.json" in page and "|plain|80 (70 to 90)|" in page
    assert "`python -m benchmarks decode M --budget 2048`" in page and "/home" not in page


def test_the_commands_in_files_of_results_name_no_folder_of_the_machine():
    for file in results.read(ROOT / "benchmarks" / "results"):
        for run in file.runs:
            assert without_folders(run["command"]) == run["command"], file.path.name


def test_a_page_cannot_mark_a_part_that_nobody_makes():
    with pytest.raises(ValueError, match="'plots'"):
        fill_in(README, {"results": ""})


@pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "python").exists(), reason="make has not installed the package")
def test_a_machine_that_passes_for_another_is_served_in_what_that_is_fast_in():
    told = subprocess.run(["make", "-n", "serve", "ISA=avx2"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "serving in float32" in told.stdout
