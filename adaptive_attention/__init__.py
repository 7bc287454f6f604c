"""Transformers whose heads learn which tokens to attend to.

The names below are the library. `weights` reads parameters of the published
program and files of parameters, and `accounting` counts what the masks save.
"""

from adaptive_attention.attention import attend, attend_ring
from adaptive_attention.config import ModelConfig
from adaptive_attention.generation import generate
from adaptive_attention.layer import AdaptiveSelfAttention
from adaptive_attention.mask_bounds import WaveBounds
from adaptive_attention.mask_parameters import mask_params, regularizer
from adaptive_attention.masks import Mask, Wave
from adaptive_attention.model import Transformer
from adaptive_attention.state import State, init_cache, init_memory

__version__ = "0.4.0"

__all__ = [
  "AdaptiveSelfAttention",
  "Mask",
  "ModelConfig",
  "State",
  "Transformer",
  "Wave",
  "WaveBounds",
  "attend",
  "attend_ring",
  "generate",
  "init_cache",
  "init_memory",
  "mask_params",
  "regularizer",
]
