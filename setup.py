"""Installs Cohort: `pip install .`, with DALI `pip install .[dali-cuda13]` or `.[dali-cuda12]`."""

from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ("data_pipelines", "engine", "launch", "losses", "models")

setup(
    name="cohort",
    version="0.1.0",
    description="Train networks that teach each other: online knowledge distillation, distributed, at ImageNet scale",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=[f"{room}{below}" for room in ROOMS for below in ("", ".*")]),
    package_data={"data_pipelines": ["fashion_mnist_subset/*"], "engine": ["reporting/report/published.yaml"]},
    install_requires=[
        # Each with the oldest version that it has been run with: `make test-oldest`.
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pillow>=10.0",
        "pydantic>=2.7",
        "pyyaml>=6.0",
        "safetensors>=0.4.5",
        "timm>=1.0.27",
        "torch>=2.11",
        "torchvision>=0.26",
        "tqdm>=4.66",
        "wandb>=0.19",
    ],
    extras_require={
        "dali-cuda12": ["nvidia-dali-cuda120>=2.0"],
        "dali-cuda13": ["nvidia-dali-cuda130>=2.0"],
        "hub": ["datasets>=3"],
        "tensorboard": ["tensorboard>=2.16"],
        "dev": [
            "datasets>=3",
            "hypothesis",
            "import-linter",
            "mypy",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "tensorboard>=2.16",
            "types-PyYAML",
        ],
    },
)
