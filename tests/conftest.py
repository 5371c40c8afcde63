"""Eight CPU devices and strict promotion; pyproject.toml adds the other checks."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
