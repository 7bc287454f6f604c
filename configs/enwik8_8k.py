"""Spans up to 8,192 tokens over a memory of as many (Sukhbaatar et al. 2019).

python main.py --config configs/enwik8_8k.py
With triangle waves: --config.model.attention=span_wave
38 million parameters. With all pairs a step of 128 x 256 tokens is 28 TFLOP, of
which attention over context and memory is three quarters; while spans are short
only 2% of that is computed. The memory takes 1.1 GiB in bfloat16 over all
devices at first (2.2 in float32), and grows with the spans, to 25 GiB if each
head came to reach all of it: for several GPUs. It has not been run to its end.
RESULTS.md has a small model with a memory, and a step of 4 x 512 over 8,192.

A stream reads one article for many steps, whose gradients resemble each other.
In a small model that costs 0.07 bits, more than a memory gains, and four times
as many streams of short segments win 0.03 back at as many tokens a step
(RESULTS.md). So there are 128 streams of 256 tokens where configs/enwik8.py has
64 sequences of 512. What that gains at this size was not measured.

The optimizer is AdamW at 1e-3, as in configs/enwik8.py for a model of the same
width. Its warmup is longer, for the same reason. Spans start at 32
tokens, as most of them stay short and long ones cost time from the first step
on. From there z = 8192 sigmoid(logit) grows by a factor e as the logit grows by
one, so that 2,000 tokens are four units away. At the rate of the other
parameters that takes 4,000 steps even if all gradients agree, hence a
multiplier of ten. The paper's own choice is Adagrad at 0.07 with each tensor's
gradient clipped to 0.03 and a warmup of 32,000 steps:
  --config.optimizer.name=adagrad --config.optimizer.learning_rate=0.07
  --config.optimizer.min_learning_rate=0.07 --config.optimizer.clip=tensor
  --config.optimizer.clip_norm=0.03 --config.optimizer.warmup_steps=32000
  --config.optimizer.weight_decay=0 --config.optimizer.mask_lr_multiplier=1
"""

from configs import enwik8


def get_config():
  config = enwik8.get_config()
  config.model.attention = "span"
  config.batch_size = 128
  config.model.context_tokens = 256
  config.model.memory_tokens = 8192
  config.model.max_span = 8192
  config.model.position = "rotary"
  config.model.span_init = 1 / 256
  config.model.span_coef = 5e-7
  config.model.dropout = 0.3
  config.optimizer.warmup_steps = 1_000
  config.optimizer.mask_lr_multiplier = 10.0
  return config
