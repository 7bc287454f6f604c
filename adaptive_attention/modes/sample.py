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


def run(
  config,
  workdir,
  *,
  step,
  prompt=None,
  prompt_file=None,
  tokens=500,
  temperature=0.8,
  top_k=0,
  top_p=1.0,
  num=1,
  seed=0,
):
  """Prints texts that a checkpoint writes, the first as it comes; sample.txt.

  Args:
    config: the checkpoint's settings.
    workdir, step: the run's folder and the checkpoint.
    prompt, prompt_file: as of `read_prompt`.
    tokens, num: how many bytes to write, and how many texts side by side.
    temperature, top_k, top_p: as of `generation.generate`.
    seed: text b of the same seed is the same for any number of them.

  Raises:
    SettingsError: flags that are out of bounds, or not one prompt.
    GenerationError: a prompt that cannot be used.
  """
  prompt = read_prompt(prompt, prompt_file)
  drawing = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
  _check_drawing(drawing)
  model_config = ModelConfig(**config.model)
  with checkpoint.Checkpoints(workdir) as checkpoints:
    params, _ = checkpoints.restore_params(step)
  began = time.perf_counter()
  made_BT, rest = _generate(
    params, model_config, np.tile(prompt, (num, 1)), tokens, seed, drawing
  )
  seconds = time.perf_counter() - began
  texts = [console.text_of(np.concatenate([prompt, row])) for row in made_BT]
  layers = mask_params(params, model_config)
  _tell_and_keep(
    texts,
    rest,
    f"{num} x {tokens} bytes in {seconds:.1f} s, compilation included",
    f"cache: {console.cache_text(layers, model_config)}",
    path=pathlib.Path(workdir) / "sample.txt",
    step=step,
  )


def read_prompt(prompt: str | None, prompt_file: str | None) -> np.ndarray:
  """Returns (T,) the bytes to go on from, as uint8.

  Args:
    prompt: a text as it was typed, UTF-8 or not; None if it is in a file.
    prompt_file: the file's path.

  Raises:
    SettingsError: both were given, or neither.
    GenerationError: a file that cannot be read, or an empty prompt.
  """
  if (prompt is None) == (prompt_file is None):
    raise SettingsError(
      "--mode=sample needs one of --prompt=TEXT and --prompt_file=FILE"
    )
  if prompt is not None:
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


def _check_drawing(drawing):
  """Refuses what cannot be drawn with, as a wrong flag.

  Raises:
    SettingsError: naming the flag and its bounds.
  """
  try:
    generation.check_sampling(**drawing)
  except ValueError as error:
    raise SettingsError(str(error)) from error


def _generate(params, config, prompt_BT, tokens, seed, drawing):
  """Writes texts, and the first of them on the console as it comes.

  Returns:
    (B, tokens) bytes, and the end of the first text, which is still to be said.
  """
  if generation.slides(config) and (
    prompt_BT.shape[1] + tokens > config.context_tokens + 1
  ):
    console.say(
      f"positions were learned for {config.context_tokens} tokens: the context "
      "slides, its later half being read anew where it is full"
    )
  first = console.Text()
  console.write_out(console.text_of(prompt_BT[0]))
  made_BT = generation.generate(
    jax.device_put(params),
    config,
    prompt_BT,
    tokens,
    jax.random.key(seed),
    draw_below=generation.BYTES,
    on_tokens=lambda new_BT: console.write_out(first(new_BT[0])),
    **drawing,
  )
  return made_BT, first(made_BT[0, :0], last=True)


def _tell_and_keep(texts, rest, *notes, path, step):
  """Says the rest of the first text and all else; writes sample.txt."""
  count = len(texts)
  others = [
    f"\n--- {i} of {count}\n{text}" for i, text in enumerate(texts, start=1)
  ]
  try:  # told first, and kept even if nobody reads it
    for line in (rest, *others[1:], *notes):
      console.say(line)
  finally:
    kept = [
      f"--- {i} of {count}, step {step}\n{text}\n"
      for i, text in enumerate(texts, start=1)
    ]
    logbook.write_text(path, "".join(kept))
  console.say(f"written to {path}")
