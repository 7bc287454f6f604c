"""A small model that learns from Python's standard library, without a download.

python main.py --config configs/quickstart.py
It takes about two minutes on two CPU cores and reaches 2.47 bits per character
on the validation split, whose order-0 entropy is 4.65 (RESULTS.md). With the
published positions, --config.model.position=learned, it reaches 2.71.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.steps = 500
  config.batch_size = 16
  config.log_every_steps = 50
  config.eval_every_steps = 500
  config.checkpoint_every_steps = 250
  config.sample_every_steps = 500
  config.report = True
  config.data.corpus = "python_source"
  config.model.n_layer = 2
  config.model.n_head = 4
  config.model.width = 192
  config.model.context_tokens = 128
  config.model.position = "rotary"
  config.optimizer.learning_rate = 2e-3
  return config
