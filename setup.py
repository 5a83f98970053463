"""Package metadata. paddle comes through extras: `paddlepaddle` and `paddlepaddle-gpu` exclude each
other, a hard dependency would overwrite one.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "([^"]+)"', (HERE / "ernie_tune" / "__init__.py").read_text(encoding="utf-8")
).group(1)

DEMO = Path("examples") / "digits"  # what `ernie-tune demo` trains on
SHARE = Path("share") / "ernie_tune"
# The floors are the first versions without known holes: pillow (writing outside of memory when PSD
# files are read), sentencepiece (hostile model files), tqdm, starlette (denial of service), h11
# (smuggled requests), fastapi (requests without a content type, which any web page can send to this
# machine).
SERVER = ["fastapi>=0.132", "starlette>=0.49.1", "h11>=0.16", "uvicorn>=0.30"]

setup(
    name="ernie-tune",
    version=VERSION,
    description="Fine-tune ERNIE-4.5-VL with PaddlePaddle: one numerics on a laptop's CPU, one card, or a cluster",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["ernie_tune", "ernie_tune.*"]),
    package_data={"ernie_tune": ["py.typed", "data/assets/*", "data/assets/*/*", "serve/*.html"]},
    data_files=[
        (
            str(SHARE / DEMO),
            [
                str(DEMO / name)
                for name in ("README.md", "sft.yaml", "fresh.yaml", "rlvr.yaml", "train.jsonl", "eval.jsonl")
            ],
        ),
        (
            str(SHARE / DEMO / "images"),
            [str(DEMO / "images" / f.name) for f in sorted((HERE / DEMO / "images").glob("*.png"))],
        ),
    ],
    install_requires=[
        "numpy>=1.24",
        "safetensors>=0.4",
        "sentencepiece>=0.2.1",
        "pillow>=12.1.1",
        "pyyaml>=6",
        "tqdm>=4.66.3",
        "jinja2>=3.1.6",
    ],
    extras_require={
        "cpu": ["paddlepaddle>=3.3"],
        "gpu": [
            "paddlepaddle-gpu>=3.3"
        ],  # from Paddle's own index: https://www.paddlepaddle.org.cn/packages/stable/cu126/
        "video": ["av>=14.2"],
        "tensorboard": ["tensorboardX>=2.6"],
        "visualdl": ["visualdl>=2.5"],
        "hub": ["huggingface_hub>=0.23", "modelscope>=1.15", "aistudio-sdk>=0.2.6"],
        "rag": ["bm25s>=0.2", "jieba>=0.42", "qdrant-client>=1.10", "scikit-learn>=1.4"],
        # The neighbours, whose objects are taken as they are. Each belongs in an environment of its
        # own: these pins are the ones that install and import cleanly on Python 3.10 to 3.12.
        "paddlenlp": [
            "paddlepaddle==3.3.1",
            "paddlenlp==3.0.0b4",
            "aistudio-sdk==0.2.6",
            "datasets<4.5",
            "pyarrow<23",
        ],
        "paddleformers": ["paddlepaddle==3.3.1", "paddleformers==1.2.0", "pyarrow<26"],
        # Not on PyPI; the README says from where.
        "paddlemix": ["paddlemix"],
        "fastdeploy": ["fastdeploy-gpu"],
        "rl": ["math-verify>=0.8", "jsonschema>=4.20"],
        "ui": ["gradio>=6.10", *SERVER],
        "serve": [*SERVER, "pydantic>=2.9", "llguidance>=1.9"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "ruff>=0.8",
            "mypy>=1.11",
            "types-PyYAML",
            "types-tqdm",
            "av>=14.2",
            "tensorboardX>=2.6",
            *SERVER,
            "pydantic>=2.9",
            "llguidance>=1.9",
            "httpx>=0.27",
            "huggingface_hub>=1",
            "modelscope>=1.15",
            "aistudio-sdk>=0.3",
            "bm25s>=0.2",
            "jieba>=0.42",
            "qdrant-client>=1.10",
            "scikit-learn>=1.4",
            "openai>=1.60",
            "schemathesis>=4",
            "math-verify>=0.8",
            "jsonschema>=4.20",
            "pyarrow>=16",
            "gradio>=6.10",
            "playwright>=1.48",  # drives a Chromium that the machine has
            "axe-playwright-python>=0.1.4",  # brings axe-core along
        ],
    },
    entry_points={"console_scripts": ["ernie-tune = ernie_tune.cli.main:main"]},
)
