"""All settings, with their defaults.

The other files of this folder start from these and change what their experiment
is about. Flags change the rest: `--config.model.n_layer=4`. Names end in
`_steps` for durations, `_tokens` for lengths, `_coef` for weights of losses.
"""

from ml_collections import ConfigDict

from adaptive_attention.config import ModelConfig, OptimizerConfig, defaults


def get_config() -> ConfigDict:
  """Returns all settings, locked."""
  config = _of_a_run()
  config.update(_of_the_machine())
  config.data = _of_the_data()
  # Each field of these two is explained where its default stands.
  config.model = ConfigDict(defaults(ModelConfig))
  config.optimizer = ConfigDict(defaults(OptimizerConfig))
  config.bench = _of_benchmarks()
  return config.lock()


def _of_a_run() -> ConfigDict:
  config = ConfigDict()
  # The number, under 2^32, that parameters, batches and dropout follow from.
  config.seed = 0
  # Optimizer updates. The learning rate reaches its minimum with the last one.
  config.steps = 150_000
  # Sequences per update, over all devices and accumulation steps.
  config.batch_size = 64
  # Parts into which each device's sequences are cut to save memory; the
  # update is that of the whole batch.
  config.accumulation_steps = 1
  # How often a line is printed and recorded; each waits for the device.
  config.log_every_steps = 100
  # How often the validation split is predicted.
  config.eval_every_steps = 1_000
  # How many bytes of the validation split are predicted then; 0 for all.
  config.eval_tokens = 0
  # Windows at a time in evaluation, over all devices; no result depends on it.
  config.eval_batch_size = 64
  # How often a text is printed that continues the first bytes of the validation
  # split; 0 for never.
  config.sample_every_steps = 1_000
  # How often a checkpoint is saved; at most so many steps are lost in a crash.
  config.checkpoint_every_steps = 1_000
  # How many of the newest checkpoints are kept, besides the best by validation.
  config.keep_checkpoints = 2
  # Parameters to start from: the folder of a run, a .safetensors that
  # --mode=export wrote, or an .npz or .pt of the published program. Masks that
  # they lack start fully open, so that nothing changes at first.
  config.init_from = ""
  # "masks" to learn spans and waves alone, and hold the weights still; or a
  # regular expression that finds the paths of the parameters that are trained,
  # as "(span|ratio)_logit", or "^(?!.*period)" for all but periods.
  config.train_only = ""
  # Whether metrics.jsonl is copied to TensorBoard and to Weights & Biases.
  config.tensorboard = False
  config.wandb = False
  # Whether what --mode=inspect shows is made at the end of training: heads.csv
  # and, with matplotlib, report.html.
  config.report = False
  return config


def _of_the_machine() -> ConfigDict:
  config = ConfigDict()
  # CPU devices to make without an accelerator; 0 for one per core, but only as
  # many as the batch can be dealt to.
  config.cpu_devices = 0
  # Whether several processes (hosts) train one model together.
  config.distributed = False
  # HOST:PORT of the first process, how many there are, and which one this is.
  # On clusters that jax knows it finds these out.
  config.coordinator_address = ""
  config.process_count = 0
  config.process_index = -1
  # A process that the others have not heard of for so long is dead, and they
  # end.
  config.heartbeat_seconds = 100
  # How long one of several processes goes on after SIGTERM, as it cannot save
  # before all of them have made the step.
  config.stop_seconds = 300
  # A device that --mode=plan compiles for, though it is not here: "v5e", "v5p",
  # "v6e", "h100", "a100" or "rtx4090"; the devices of this machine if empty.
  config.target = ""
  return config


def _of_the_data() -> ConfigDict:
  config = ConfigDict()
  # "enwik8", or "python_source", the sources of Python's standard library.
  config.corpus = "enwik8"
  # Any local file instead (raw, .gz, .bz2, .xz, .zip with one member), split
  # 90/5/5. Or tokens, with model.vocab_size that of their tokenizer: a folder
  # with train.bin and val.bin as nanoGPT writes them (16 or 32 bits a token),
  # and perhaps a test.bin; or an .npy of integers, split 90/5/5.
  config.path = ""
  # How many bytes of text a token stands for, on average, so that losses are
  # told per byte too; 0 if it is not known.
  config.bytes_per_token = 0.0
  # Where a downloaded corpus is kept, and the digests of files of tokens.
  config.cache_dir = "data/cache"
  return config


def _of_benchmarks() -> ConfigDict:
  config = ConfigDict()
  # "torch" times PyTorch's attention too, if it is installed.
  config.compare = ""
  # The folder of a run whose masks are timed, in place of the named shapes.
  config.checkpoint = ""
  # The tokens of a context that those masks are stretched to; 0 for their own.
  config.context = 0
  # Some of the shapes, separated by ";"; all if empty.
  config.shapes = ""
  # How often each is timed; the median is printed.
  config.repeats = 7
  # Whether a trace of one round of each is written to WORKDIR/profile.
  config.profile = False
  return config
