"""Builds the C++ operators of csrc/; everything else about the package is in pyproject.toml.

Where torch, CMake and a C++ compiler are found they are built; that needs ``--no-build-isolation``.
"""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent
IS_REQUIRED = os.environ.get("VLLM_QFILTERS_REQUIRE_EXTENSION") == "1"


class BuildOperators(build_ext):
    """Builds csrc/ with CMake. Without it the package works all the same, with kernels in plain PyTorch."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # knows nothing of Python, so that its name does not either

    def build_extension(self, ext: Extension) -> None:
        library = pathlib.Path(self.get_ext_fullpath(ext.name)).absolute()
        library.unlink(missing_ok=True)  # of an earlier build: not to be packed if this one fails
        try:
            build_operators(library.parent)
        except BuildError as error:
            if IS_REQUIRED:
                raise
            print(f"warning: the PyTorch kernels will be used, the C++ ones are not built: {error}", file=sys.stderr)


class BuildError(Exception):
    pass


def build_operators(folder: pathlib.Path) -> None:
    """Builds ``_C.so`` into ``folder``."""
    if importlib.util.find_spec("torch") is None:
        raise BuildError(
            "torch is not in the build environment (install it first, and use pip install --no-build-isolation)"
        )
    if shutil.which("cmake") is None:
        raise BuildError("cmake is not installed")
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}"]
    # A fresh folder each time: CMake remembers where it found torch, which may since be another one.
    with tempfile.TemporaryDirectory() as build:
        run("cmake", "-S", str(ROOT), "-B", build, *options)
        run("cmake", "--build", build, "--parallel")


def run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    if done.returncode:
        first_error = " ".join(done.stdout[done.stdout.lower().find("error") :].split())
        raise BuildError(f"{' '.join(command[:2])} failed: {first_error[:300]}")


setup(
    ext_modules=[
        Extension(
            "vllm_qfilters._C",
            sources=[str(path) for path in sorted(pathlib.Path("csrc").glob("*.cpp"))],
            depends=["CMakeLists.txt", "csrc/checks.h", "csrc/lanes.h", "csrc/operators.h"],
            optional=not IS_REQUIRED,
        )
    ],
    cmdclass={"build_ext": BuildOperators},
)
