"""How programs of tests are compiled: quickly, and once for all workers of a run."""

import os
import pathlib

import jax
from jax._src.lru_cache import LRUCache

# What XLA calls YNNPACK for, where it is not told otherwise.
YNN = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
# Compiles in far less time; LLVM's optimisation and YNNPACK, which XLA's products of
# matrices otherwise call, change nothing tested with it.
QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_cpu_experimental_ynn_fusion_type": "",
}
OPTIMIZED = {
    "xla_backend_optimization_level": 3,
    "xla_cpu_parallel_codegen_split_count": 32,
}
if jax.__version_info__ < (0, 11):  # later ones may not know it, or have no YNNPACK
    QUICKLY["xla_cpu_use_fusion_emitters"] = False
    OPTIMIZED["xla_cpu_use_fusion_emitters"] = True
    OPTIMIZED["xla_cpu_experimental_ynn_fusion_type"] = YNN
XLA_FLAGS = " ".join(f"--{name}={value}".lower() for name, value in QUICKLY.items())
CACHE = "JAX_COMPILATION_CACHE_DIR"


def compile_quickly():
    """In this process and its children; `OPTIMIZED` as options of a jit undoes it."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}"


def compile_once(directory):
    """Keep every compiled program in a directory; children only read from it."""
    os.environ[CACHE] = str(directory)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    LRUCache.put = _put_whole


def _put_whole(self, key, value):
    """Other processes see a program's file whole or not at all."""
    part = pathlib.Path(self.path, f"{key}.{os.getpid()}")
    part.write_bytes(value)
    part.replace(pathlib.Path(self.path, f"{key}-cache"))
