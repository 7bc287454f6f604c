"""The published run: spans and triangle waves on enwik8.

python main.py --config configs/enwik8.py
41 million parameters, 8.07 TFLOP per step, 1.2e18 FLOP in all: for a GPU. It
has not been run to its end. RESULTS.md compares it at a small size with spans
alone and with dense attention, under "enwik8-4M".
"""

from configs import base


def get_config():
  config = base.get_config()
  config.steps = 150_000
  config.batch_size = 64
  config.data.corpus = "enwik8"
  config.model.n_layer = 12
  config.model.n_head = 8
  config.model.width = 512
  config.model.context_tokens = 512
  config.model.attention = "span_wave"
  config.model.dropout = 0.2
  return config
