"""The published run without its masks: plain causal attention.

python main.py --config configs/enwik8_dense.py
"""

from configs import enwik8


def get_config():
  config = enwik8.get_config()
  config.model.attention = "dense"
  return config
