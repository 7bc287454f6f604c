"""A trained GPT-2 (124 million parameters) whose heads learn spans.

python main.py --config configs/gpt2_span.py \
  --config.init_from=gpt2 --config.data.path=openwebtext
`gpt2` is a folder in the layout of the Hugging Face libraries, `openwebtext`
one with nanoGPT's train.bin and val.bin. It has not been run: it is for a GPU.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.steps = 2_000
  config.batch_size = 32
  config.eval_tokens = 1 << 20
  config.eval_batch_size = 8
  config.model.vocab_size = 50_257
  config.model.n_layer = 12
  config.model.n_head = 12
  config.model.width = 768
  config.model.context_tokens = 1024
  config.model.position = "learned_once"
  config.model.bias = True
  config.model.gelu = "tanh"
  config.model.attention = "span"
  # Spans begin at the end of the context: with a max_span of twice its length
  # at the middle of their sigmoid, where they move most readily.
  config.model.max_span = 2048
  config.model.span_coef = 1e-5
  # The weights are good already; the spans have a way to go.
  config.optimizer.learning_rate = 1e-4
  config.optimizer.min_learning_rate = 1e-5
  config.optimizer.mask_lr_multiplier = 100.0
  return config
