"""Every setting there is, with its default.

The other files of this folder start from here and change what their experiment
is about; flags change the rest: `--config.model.n_layer=4`. Names end in
`_steps` for durations, `_tokens` for lengths, `_coef` for weights of losses.
"""

import dataclasses

from ml_collections import ConfigDict

from adaptive_attention.config import OptimizerConfig


def get_config() -> ConfigDict:
  config = ConfigDict()

  # One number, under 2^32, from which the parameters, batches and dropout all
  # follow.
  config.seed = 0
  # Optimizer updates. The learning rate reaches its minimum with the last one.
  config.steps = 150_000
  # Sequences per update, over all devices and accumulation steps together.
  config.batch_size = 64
  # Parts into which each device's sequences are cut to save memory; the
  # update is that of the whole batch.
  config.accumulation_steps = 1
  # Lines on the console and in metrics.jsonl; each one waits for the device.
  config.log_every_steps = 100
  # How often the validation split is predicted.
  config.eval_every_steps = 1_000
  # First bytes of the validation split to predict then; 0 for all of it.
  config.eval_tokens = 0
  # Windows at a time in evaluation, over all devices; no figure depends on it.
  config.eval_batch_size = 64
  # How often a text is written on the console, on from the first bytes of the
  # validation split; 0 for never.
  config.sample_every_steps = 1_000
  # What is lost at most when the machine goes down.
  config.checkpoint_every_steps = 1_000
  # Newest checkpoints to keep, besides the one with the best validation.
  config.keep_checkpoints = 2
  # Parameters of the published program to start from: an .npz or .pt file.
  config.init_from = ""
  # CPU devices to make where there is no accelerator; 0 for one per core, or
  # as many as the batch can be dealt to.
  config.cpu_devices = 0
  # Several processes (hosts) that train one model together.
  config.distributed = False
  # Who they are; found out by jax on clusters that it knows.
  config.coordinator_address = ""
  config.process_count = 0
  config.process_index = -1
  # Copies of metrics.jsonl for those who look at curves.
  config.tensorboard = False
  config.wandb = False

  config.data = ConfigDict()
  # "enwik8", or "python_source", the text that every Python carries.
  config.data.corpus = "enwik8"
  # Any local file instead (raw, .gz, .bz2, .xz, .zip with one member), split
  # 90/5/5.
  config.data.path = ""
  # Where a downloaded corpus is kept.
  config.data.cache_dir = "data/cache"

  config.model = ConfigDict()
  # Bytes are the vocabulary.
  config.model.vocab_size = 256
  config.model.n_layer = 12
  config.model.n_head = 8
  config.model.width = 512
  # Tokens of a training sequence; positions are learned for as many.
  config.model.context_tokens = 512
  # Earlier tokens whose keys and values are kept: training then reads streams,
  # batch_size of them, rather than random windows.
  config.model.memory_tokens = 0
  # "learned" (added before every block, as published), "rotary" (queries and
  # keys are turned; without a longest context) or "relative" (a learned vector
  # for each distance, as in Sukhbaatar et al. 2019). With a memory the
  # first will not do.
  config.model.position = "learned"
  # "dense", "span" (a learned window), "span_wave" (and a learned comb).
  config.model.attention = "span_wave"
  # The longest span that a head can learn, in tokens; the context unless set.
  config.model.max_span = config.model.get_oneway_ref("context_tokens")
  # The spans' initial share of max_span. One far from where it should end takes
  # long: the logit moves by about a learning rate a step.
  config.model.span_init = 0.5
  # R, the soft end of the window in tokens: where a span has its gradient.
  config.model.ramp = 32.0
  # Nats per token of mean span, per layer: what looking far costs.
  config.model.span_coef = 4e-6
  # "integer" rounds periods, so that a comb is a stride that can be skipped.
  config.model.period = "real"
  # Bounds of the learned periods, in tokens.
  config.model.period_min = 2.0
  config.model.period_max = 8.0
  # Bounds of the lift of the teeth; at ratio_max = 0.5 a comb can open fully.
  config.model.ratio_min = -0.25
  config.model.ratio_max = 0.25
  # Highest harmonic of the wave's series (published: 5); 0 for the exact wave.
  config.model.harmonics = 5
  # Share dropped of embeddings, attention weights and residual branches.
  config.model.dropout = 0.0
  # Biases in linear layers and norms.
  config.model.bias = False
  # Of activations: "float32", "bfloat16"; "auto" is bfloat16 on GPU and TPU.
  config.model.dtype = "auto"
  # What the backward pass computes again rather than keeps: "none", "mlp" (most
  # of the activations) or "block" (all but each block's input; no memory then).
  config.model.remat = "none"
  # Of attention: a name to insist on, or "auto" for the best that serves.
  config.model.implementation = "auto"

  # Each is explained where its default stands, at OptimizerConfig.
  config.optimizer = ConfigDict(dataclasses.asdict(OptimizerConfig()))

  config.bench = ConfigDict()
  # "torch" times PyTorch's attention beside ours, where it is installed.
  config.bench.compare = ""
  # A trained run whose spans to time, in place of the named shapes.
  config.bench.checkpoint = ""
  # Some of the shapes, parted by ";"; all if empty.
  config.bench.shapes = ""
  # Timed turns of each; the median is told.
  config.bench.repeats = 7

  return config.lock()
