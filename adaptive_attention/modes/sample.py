"""Writes texts on from a prompt."""

import os
import pathlib
import time

import jax
import numpy as np

from adaptive_attention import generation
from adaptive_attention.config import ModelConfig
from adaptive_attention.errors import Error, SettingsError
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.training import checkpoint, console, logbook


class GenerationError(Error):
  """A prompt that cannot be used."""


def read_prompt(prompt, prompt_file) -> np.ndarray:
  """(T,) the bytes to go on from.

  Raises:
    SettingsError: both were given, or neither.
    GenerationError: a file that cannot be read, or an empty prompt.
  """
  if (prompt is None) == (prompt_file is None):
    raise SettingsError(
      "--mode=sample needs one of --prompt=TEXT and --prompt_file=FILE"
    )
  if prompt is not None:
    # The bytes that were typed, whether or not they are UTF-8.
    data, source = os.fsencode(prompt), "--prompt"
  else:
    source = f"--prompt_file={prompt_file}"
    try:
      data = pathlib.Path(prompt_file).read_bytes()
    except OSError as error:
      raise GenerationError(
        f"{source} cannot be read ({error.strerror}); give a file"
      ) from error
  if not data:
    raise GenerationError(f"{source} is empty; give at least one byte")
  return np.frombuffer(data, np.uint8)


def run(
  config,
  workdir,
  *,
  step,
  prompt,
  tokens,
  temperature,
  top_k,
  top_p,
  num,
  seed,
):
  """Prints texts that a checkpoint writes, the first as it comes; sample.txt.

  Args:
    config: the checkpoint's settings.
    workdir, step: the run's folder and the checkpoint.
    prompt: (T,) bytes.
    tokens, num: how many bytes to write, and how many texts side by side.
    temperature, top_k, top_p: see `sample`.
    seed: text b of the same seed is the same for any number of them.
  """
  model_config = ModelConfig(**config.model)
  try:
    generation.check_sampling(temperature, top_k, top_p)
  except ValueError as error:
    raise SettingsError(str(error)) from error
  with checkpoint.Checkpoints(workdir) as checkpoints:
    params, _ = checkpoints.restore_params(step)
  params = jax.device_put(params)
  if generation.slides(model_config) and len(prompt) + tokens > (
    model_config.context_tokens + 1
  ):
    console.say(
      f"positions were learned for {model_config.context_tokens} tokens: the "
      "context slides, its later half being read anew where it is full"
    )
  first = console.Text()

  def show(new_BT):
    console.write_out(first(new_BT[0]))

  console.write_out(console.text_of(prompt))
  began = time.perf_counter()
  made_BT = generation.generate(
    params,
    model_config,
    np.tile(prompt, (num, 1)),
    tokens,
    jax.random.key(seed),
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    draw_below=generation.BYTES,
    on_tokens=show,
  )
  seconds = time.perf_counter() - began
  texts = [console.text_of(np.concatenate([prompt, row])) for row in made_BT]
  path = pathlib.Path(workdir) / "sample.txt"
  try:  # told first, and kept even if nobody reads it
    console.write_out(first(made_BT[0, :0], last=True) + "\n")
    for i, text in enumerate(texts[1:], start=1):
      console.say(f"\n--- {i + 1} of {num}\n{text}")
    layers = mask_params(params, model_config)
    console.say(
      f"{num} x {tokens} bytes in {seconds:.1f} s, compilation included"
    )
    console.say(f"cache: {console.cache_text(layers, model_config)}")
  finally:
    logbook.write_text(
      path,
      "\n".join(
        f"--- {i + 1} of {num}, step {step}\n{text}"
        for i, text in enumerate(texts)
      )
      + "\n",
    )
  console.say(f"written to {path}")
