"""A small model in four variants: what masks keep, and what they save.

VARIANT is dense, span, span_wave (real periods) or span_integer (periods that
are integers, whose hidden keys are skipped). A run is meant to take at most 20
minutes on two quiet CPU cores; RESULTS.md has what they came to:

python main.py --config configs/enwik8_small.py:VARIANT --config.seed=1 \
  --config.model.position=rotary --workdir runs/VARIANT_1
python main.py --mode=eval --workdir runs/VARIANT_1 --split=test

Masks learn ten times as fast as the weights, so that they come to rest in so
few steps.
"""

from configs import enwik8

VARIANTS = {
  "dense": {"attention": "dense"},
  "span": {"attention": "span"},
  "span_wave": {"attention": "span_wave"},
  "span_integer": {"attention": "span_wave", "period": "integer"},
}


def get_config(variant: str):
  if variant not in VARIANTS:
    raise ValueError(f"VARIANT={variant} is not one of {', '.join(VARIANTS)}")
  config = enwik8.get_config()
  config.steps = 1_500
  config.batch_size = 16
  config.log_every_steps = 50
  config.eval_every_steps = 750
  config.checkpoint_every_steps = 250
  config.sample_every_steps = 0
  config.keep_checkpoints = 1
  config.model.n_layer = 4
  config.model.width = 256
  config.model.context_tokens = 256
  config.model.dropout = 0.0
  config.optimizer.learning_rate = 2e-3
  config.optimizer.mask_lr_multiplier = 10.0
  config.model.update(VARIANTS[variant])
  return config
