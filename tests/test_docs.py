"""What the documentation names exists: tests, refusals, options, metrics, files."""

import ast
import json
import pathlib
import re

import pytest

from vllm_qfilters.config import KVCompressionConfig
from vllm_qfilters.frontend.metrics import GAUGES, HISTOGRAMS
from vllm_qfilters.methods.catalog import METHODS
from vllm_qfilters.stats import COUNTERS

ROOT = pathlib.Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))


def table(name: str) -> list[list[str]]:
    """Rows of the first table of a page, without its head."""
    lines = [line for line in (ROOT / "docs" / name).read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def literals() -> str:
    """All that the package can say, f-strings as they are written."""
    files = [*(ROOT / "vllm_qfilters").rglob("*.py")]
    return "\n".join("".join(re.findall(r'f?"((?:[^"\\]|\\.)*)"', path.read_text())) for path in files)


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
    source = (ROOT / "vllm_qfilters" / "support.py").read_text()
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    assigned = [node.value for node in ast.walk(functions["check_supported"]) if isinstance(node, ast.Assign)]
    (refused,) = (value for value in assigned if isinstance(value, ast.Dict))
    quoted = {quote for *_, proof in table("compatibility.md") for quote in re.findall(r'"([^"]+)"', proof)}
    for key in refused.keys:
        assert any(quote in ast.get_source_segment(source, key) for quote in quoted), ast.get_source_segment(
            source, key
        )


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


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_what_a_page_names_exists(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:tests|scripts|benchmarks|docs|kernels|requirements)/[\w./-]*)(?:::\w+)?`", text):
        assert (ROOT / path).exists(), path
    options = set(KVCompressionConfig().to_dict())
    for option in re.findall(r"--kv-compression-config\.(\w+)", text):
        assert option in options, option
    for method in re.findall(r"--kv-compression (\w+)", text):
        assert method in METHODS or method == "METHOD", method


@pytest.mark.parametrize("model", ["SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct"])
def test_numbers_in_the_budget_page_are_those_of_the_results(model):
    values = json.loads((ROOT / f"benchmarks/results/quality-{model}.json").read_text())
    cells = {(cell["task"], cell["method"], cell["budget"]): cell for cell in values["cells"]}
    text = (ROOT / "docs" / "budget.md").read_text()
    for method in ("qfilters", "streaming"):
        columns = [*((method, budget) for budget in (256, 512, 1024)), ("full", 0)]
        assert " | ".join(f"{cells['streaming', *column]['loss']:.3f}" for column in columns) in text
    for task, method, label in (
        ("passkey-1024", "qfilters", "qfilters"),
        ("passkey-1024", "streaming", "streaming"),
        ("passkey-4096", "qfilters", "qfilters"),
        ("passkey-4096", "streaming", "streaming"),
        ("kv-4096", "qfilters", "qfilters, one of eight named numbers"),
    ):
        columns = [*((method, fraction) for fraction in (0.125, 0.25, 0.5)), ("full", 0)]
        assert f"| {label} | " + " | ".join(str(cells[task, *column]["found"]) for column in columns) + " |" in text
