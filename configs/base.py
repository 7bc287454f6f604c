"""Every setting there is, with its default.

The other files of this folder start from here and change what their experiment
is about; flags change the rest: `--config.model.n_layer=4`. Names end in
`_steps` for durations, `_tokens` for lengths, `_coef` for weights of losses.
"""

from ml_collections import ConfigDict

from adaptive_attention.config import ModelConfig, OptimizerConfig, defaults


def get_config() -> ConfigDict:
  """Returns all settings, locked."""
  config = _of_a_run()
  config.data = _of_the_data()
  # Each field of these two is explained where its default stands.
  config.model = ConfigDict(defaults(ModelConfig))
  config.optimizer = ConfigDict(defaults(OptimizerConfig))
  config.bench = _of_benchmarks()
  return config.lock()


def _of_a_run() -> ConfigDict:
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
  return config


def _of_the_data() -> ConfigDict:
  config = ConfigDict()
  # "enwik8", or "python_source", the text that every Python carries.
  config.corpus = "enwik8"
  # Any local file instead (raw, .gz, .bz2, .xz, .zip with one member), split
  # 90/5/5.
  config.path = ""
  # Where a downloaded corpus is kept.
  config.cache_dir = "data/cache"
  return config


def _of_benchmarks() -> ConfigDict:
  config = ConfigDict()
  # "torch" times PyTorch's attention beside ours, where it is installed.
  config.compare = ""
  # A trained run whose spans to time, in place of the named shapes.
  config.checkpoint = ""
  # Some of the shapes, parted by ";"; all if empty.
  config.shapes = ""
  # Timed turns of each; the median is told.
  config.repeats = 7
  return config
