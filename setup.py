"""Package head-pruning: the core, the plugins for fairseq and transformers, and the data preparation."""

from pathlib import Path

from setuptools import find_packages, setup

FAIRSEQ = ["fairseq-fixed>=0.12.3.1", "sacrebleu>=2.0", "sacremoses>=0.1", "subword-nmt>=0.3.8", "tqdm", "babel"]
HF = ["transformers>=5.0", "datasets>=3.0", "accelerate", "scikit-learn", "scipy", "sentencex>=1.0", "tqdm"]
INT8 = ["torchao>=0.18"]
OPENVINO = ["openvino>=2026.0"]
ONNX = ["onnx>=1.17", "onnxscript>=0.3", "onnxruntime>=1.20"]
SWEEPS = {"ray": ["ray>=2.40"], "slurm": ["submitit>=1.5"], "optuna": ["optuna>=4.0"]}
DEV = ["pytest", "pytest-timeout", "hypothesis", "ruff", "mypy", "peft"]

setup(
    name="head-pruning",
    version="0.1.0",
    description="Prune the attention heads and weights of transformers while they train, and make the models smaller",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["head_pruning*", "fairseq_plugin*", "hf_plugin*", "prepare*"]),
    package_data={
        "prepare": ["*.sh"],
        "head_pruning.report": ["templates/*"],
        **{name: ["py.typed"] for name in ("head_pruning", "fairseq_plugin", "hf_plugin")},
    },
    install_requires=["torch>=2.6", "numpy", "safetensors", "matplotlib", "jinja2", "pyyaml", "tqdm"],
    extras_require={
        "fairseq": FAIRSEQ,
        "hf": HF,
        "onnx": ONNX,
        "openvino": ONNX + OPENVINO,
        "int8": INT8,
        "dev": DEV,
        **SWEEPS,
        "all": FAIRSEQ + HF + ONNX + INT8 + DEV,
    },
    entry_points={
        "console_scripts": [
            "head-pruning = head_pruning.cli:main",
            *(
                f"head-pruning-{name} = hf_plugin.run_{name}:main"
                for name in ("dsp", "voita", "michel", "glue", "squad", "ner", "swag", "pretraining")
            ),
        ],
        "head_pruning.hosts": ["transformers = hf_plugin.host", "fairseq = fairseq_plugin.host"],
    },
)
