"""apr_jax: Adaptive Parallel Reasoning in JAX. Ranges live here; `requirements.lock` pins them exactly."""

from setuptools import find_packages, setup

setup(
    name="apr_jax",
    version="0.1.0",
    description="Adaptive Parallel Reasoning in JAX: a Llama that learns when to split its own reasoning",
    packages=find_packages(include=["apr_jax", "apr_jax.*"]),
    package_data={
        "apr_jax": [
            "**/*.html",
            "**/*.css",
            "**/*.js",
            "**/*.txtpb",
            "**/tokenizer.json",
            "policies/*/*",
            "**/*.cc",
            "**/*.h",
            "py.typed",
        ]
    },
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10,<1",
        "flax>=0.12.8,<0.14",
        "optax>=0.2.8,<0.4",  # optax.contrib.muon
        "orbax-checkpoint>=0.12,<0.14",
        "tensorflow-datasets>=4.9.10,<5",
        "importlib_resources>=6",  # tensorflow-datasets imports it without naming it
        "array_record>=0.8,<1",
        "etils>=1.15",
        "fsspec>=2026.2",
        "grain>=0.2.18,<0.4",
        "numpy>=2,<3",
        "ml-collections>=1.1,<2",
        "absl-py>=2.1",
        "chex>=0.1.92,<0.3",
        "tokenizers>=0.22,<1",
        "safetensors>=0.6,<1",
        "tensorboardX>=2.6,<3",
        "tqdm>=4.67,<5",
        "matplotlib>=3.10,<4",
        "jinja2>=3.1,<4",
        "rich>=14,<16",
    ],
    extras_require={
        "gpu": ["jax[cuda12]>=0.10,<1"],
        "tpu": ["jax[tpu]>=0.10,<1"],
        "gcs": ["gcsfs>=2026.7"],  # runs in gs://BUCKET/FOLDER
        "peers": ["torch>=2.9", "transformers>=5"],
        "pretrained": ["gguf>=0.17,<1"],  # reads and writes GGUF files
        "gym": ["reasoning-gym>=0.1.20,<0.2"],  # datasets of config.task.name=gym:NAME
        "browser": ["playwright>=1.60,<2", "pillow>=11"],  # drives a Chromium that is there; brings none
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.130",
            "gguf>=0.17,<1",
            "ruff>=0.14",
            "mypy>=1.18",
            "types-tqdm",
            "setuptools>=77",
        ],
    },
)
