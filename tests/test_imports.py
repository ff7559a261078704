"""Imports point one way: which room of the package may import which, also for types alone and within functions.

A room is a module or a folder, by its name below ``vllm_qfilters``; "" is ``vllm_qfilters/__init__.py``. A file belongs
to the longest name that fits it, and may import its own room. What is named as a string, as vLLM wants worker classes
and the catalogue implementations, is no import.
"""

import ast
import importlib.util
import pathlib
import sys

import pytest

from vllm_qfilters.methods.catalog import METHODS

PACKAGE = pathlib.Path(__file__).parents[1] / "vllm_qfilters"

ALLOWED: dict[str, set[str]] = {
    # The vocabulary, which all processes share.
    "methods.catalog": set(),
    "budget": set(),
    "groups": {"budget"},
    "cpu": set(),
    "plan": set(),
    "stats": set(),
    "config": {"methods.catalog"},
    "messages": {"plan"},
    "policy": {"budget", "config", "groups", "methods.catalog"},
    # The workers.
    "kernels": {"plan"},
    "filters": {"groups", "kernels.ops"},
    "methods": {"filters.bank", "kernels", "methods.catalog"},
    "attention": {"filters.statistics", "kernels.ops", "methods.base"},
    "worker": {"attention", "core.spec", "filters", "groups", "kernels", "messages", "methods.base", "plan", "policy"},
    # The engine.
    "core": {"budget", "config", "messages", "plan", "policy", "stats"},
    # The front end, and what is run by hand.
    "frontend": {"budget", "config", "cpu", "filters.format", "filters.load", "methods.catalog", "policy", "stats"},
    "commands": {
        "",
        "attention.queries",
        "budget",
        "config",
        "cpu",
        "filters.calibrate",
        "filters.format",
        "frontend",
        "groups",
        "kernels",
        "methods.catalog",
        "policy",
        "worker.compactor",
    },
    "": {"config", "frontend.engine_args"},
}

FOREIGN: dict[str, set[str]] = {
    # What rooms import of other packages, beside the standard library; of others anything.
    "methods.catalog": set(),
    "budget": set(),
    "groups": set(),
    "plan": set(),
    "config": set(),
    "policy": set(),
    "": set(),
    "cpu": {"torch"},
    "stats": {"vllm"},
    "messages": {"vllm"},
    "kernels": {"torch", "triton"},
    "core": {"numpy", "vllm"},
}


def modules() -> dict[str, pathlib.Path]:
    """All modules of the package, by their names below it. ``kernels`` is a link to a folder beside the package."""
    paths = {path for folder in (PACKAGE, PACKAGE / "kernels") for path in folder.rglob("*.py")}
    found = {}
    for path in paths:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def is_below(name: str, room: str) -> bool:
    return name == room or (room != "" and name.startswith(room + "."))


def room_of(name: str) -> str:
    return max((room for room in ALLOWED if is_below(name, room)), key=len)


def imports(name: str) -> set[str]:
    """What a module imports, by full names."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level and node.module, f"{name} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(name: str) -> set[str]:
    """The modules of this package that a module imports, by their names below it."""
    found = set()
    for imported in imports(name):
        package, _, below = imported.partition(".")
        if package == PACKAGE.name:
            found.add(max((module for module in MODULES if is_below(below, module)), key=len, default=""))
    return found


def test_every_module_has_a_room():
    assert len(MODULES) > 60 and {"kernels.triton.selection", "config", "core.scheduler"} <= set(MODULES)
    for name in MODULES:
        assert any(is_below(name, room) for room in ALLOWED), name


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_what_it_may(room):
    for name in MODULES:
        if room_of(name) == room:
            for imported in own_imports(name):
                allowed = room_of(imported) == room or any(is_below(imported, other) for other in ALLOWED[room])
                assert allowed, f"{name} imports {imported}"


@pytest.mark.parametrize("room", ALLOWED)
def test_no_arrow_is_left_over(room):
    imported = {module for name in MODULES if room_of(name) == room for module in own_imports(name)}
    for other in ALLOWED[room]:
        assert any(is_below(module, other) for module in imported), f"{room} imports nothing of {other}"


def test_no_two_rooms_need_each_other():
    def reachable(room: str) -> set[str]:
        seen, left = set(), [room]
        while left:
            for other in {room_of(name) for name in ALLOWED[left.pop()]} - seen:
                seen.add(other)
                left.append(other)
        return seen

    assert {room for room in ALLOWED if room in reachable(room)} == set()


@pytest.mark.parametrize("room", FOREIGN)
def test_a_room_imports_no_other_package(room):
    for name in MODULES:
        if room_of(name) == room:
            packages = {imported.split(".")[0] for imported in imports(name)}
            assert packages - set(sys.stdlib_module_names) - {PACKAGE.name} <= FOREIGN[room], name


def test_what_names_a_class_by_a_string_names_one_that_is_there():
    from vllm_qfilters.frontend import engine_args
    from vllm_qfilters.methods.catalog import METHODS, QFILTERS

    named = [value for key, value in vars(engine_args).items() if key.endswith("_CLS")]
    named += [
        f"vllm_qfilters.methods.{entry.implementation.replace(':', '.')}"
        for entry in (*METHODS.values(), *QFILTERS.values())
    ]
    for path in named:
        module, _, cls = path.rpartition(".")
        origin = importlib.util.find_spec(module).origin
        classes = {
            node.name for node in ast.parse(pathlib.Path(origin).read_text()).body if isinstance(node, ast.ClassDef)
        }
        assert cls in classes, path


def test_nothing_but_the_methods_and_the_catalogue_asks_for_a_method_by_name():
    for module, path in MODULES.items():
        if any(is_below(module, room) for room in ("core", "worker", "kernels", "attention")):
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            named = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
            assert not named & METHODS.keys(), path
