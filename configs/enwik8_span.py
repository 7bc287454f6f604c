"""The published run without its triangle waves: spans alone.

python main.py --config configs/enwik8_span.py
It costs what configs/enwik8.py costs. It has not been run to its end;
RESULTS.md has it at a small size, under "enwik8-4M".
"""

from configs import enwik8


def get_config():
  config = enwik8.get_config()
  config.model.attention = "span"
  return config
