"""Two CPU devices for all tests, so that what is parallel runs so."""

import jax

jax.config.update("jax_num_cpu_devices", 2)
