"""FlowJAX: training flow and diffusion transformers."""

import pathlib

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = (
  (HERE / "flowjax/__init__.py")
  .read_text()
  .split('__version__ = "')[1]
  .split('"')[0]
)

# jax 0.10 is the last for Python 3.11; 0.12 needs 3.12. Both are tested.
JAX = "jax>=0.10,<0.13"

ARRAY_RECORD = "array_record>=0.8"
TFDS = [
  "tensorflow-datasets>=4.9.10,<5",
  ARRAY_RECORD,
  # tensorflow-datasets imports it without declaring it.
  "importlib_resources",
]
# Below 2.14: the ends that are tested.
TORCH = ["torch>=2.6,<2.14"]
ADAPTIVE = ["diffrax>=0.7,<0.8"]
COUPLINGS = ["scipy>=1.13", "ott-jax>=0.6,<0.7"]
CLU = "clu>=0.0.12,<0.1"
HF = ["pyarrow>=18"]
DIGITS = ["scikit-learn>=1.5,<2"]
TEXT = ["tokenizers>=0.21,<0.24"]

LINUX = "sys_platform == 'linux' and platform_machine == 'x86_64'"
TPU_AOT = ["jax[tpu]>=0.10,<0.13; " + LINUX]

EXTRAS = {
  "demo": DIGITS,
  "tfds": TFDS,
  # Data sets in local parquet and arrow files.
  "hf": HF,
  # `flowjax encode`, and training on what it wrote.
  "encode": [ARRAY_RECORD],
  "torch": TORCH,
  # Solvers that choose their own steps, and couplings by optimal transport.
  "adaptive": ADAPTIVE,
  "couplings": COUPLINGS,
  # The tokenizers of CLIP and T5, of pipelines that are brought in.
  "text": TEXT,
  # TensorBoard through clu.metric_writers (config.log.backend = "clu").
  "clu": [CLU, "tensorflow>=2.18", "tensorboard>=2.18"],
  "gpu": ["jax[cuda13]>=0.10,<0.13"],
  "tpu": ["jax[tpu]>=0.10,<0.13"],
  # With it jax finds the other pods of a job in Kubernetes.
  "k8s": ["jax[k8s]>=0.10,<0.13"],
  # To compile for what is not here (`flowjax plan`): libtpu, as jax pins it,
  # and the CUDA plugin without NVIDIA's own packages.
  "tpu-aot": TPU_AOT,
  "gpu-aot": ["jax[cuda13-local]>=0.10,<0.13; " + LINUX],
  "test": [
    *DIGITS,
    *TFDS,
    *HF,
    *ADAPTIVE,
    *COUPLINGS,
    *TEXT,
    CLU,
    *TPU_AOT,
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.8",
    "ruff==0.17.*",
    "mypy>=1.15,<3",
  ],
  # Independent implementations that tests compare with.
  "oracles": [
    *TORCH,
    "diffusers>=0.36,<0.43",
    # With it diffusers has adapters; it brings transformers.
    "peft>=0.18,<0.22",
    "torchcfm>=1.0.7,<2",
    "torchdiffeq>=0.2.5,<0.3",
  ],
}

setuptools.setup(
  name="flowjax",
  version=VERSION,
  description="Training flow and diffusion transformers in JAX",
  long_description=(HERE / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["flowjax", "flowjax.*"]),
  package_data={
    "flowjax": ["py.typed", "interop/torch/*.py", "parallel/h100.txtpb"]
  },
  install_requires=[
    JAX,
    "flax>=0.12,<0.13",
    "optax>=0.2.5,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "grain>=0.2.18,<0.3",
    "einops>=0.8,<1",
    "ml_collections>=1.1,<2",
    "absl-py>=2",
    "numpy>=2",
    "pillow>=11",
    "safetensors>=0.5,<1",
    "tensorboardX>=2.6,<3",
    "rich>=13",
    "matplotlib>=3.9",
  ],
  extras_require=EXTRAS,
  entry_points={"console_scripts": ["flowjax = flowjax.__main__:entry"]},
)
