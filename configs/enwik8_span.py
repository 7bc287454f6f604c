"""The published run without its triangle waves: spans alone.

python main.py --config configs/enwik8_span.py
Costs what configs/enwik8.py costs; not yet run to its end (RESULTS.md,
"enwik8-4M").
"""

from configs import enwik8


def get_config():
  config = enwik8.get_config()
  config.model.attention = "span"
  return config
