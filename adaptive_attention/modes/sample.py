"""Continues a prompt with texts that a model writes."""

import os
import pathlib
import time

import jax
import numpy as np

from adaptive_attention import accounting, generation
from adaptive_attention.errors import Error, SettingsError
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.training import (
  console,
  exported,
  files,
  room,
  settings,
  units,
)


class GenerationError(Error):
  """A prompt cannot be used."""


def run(
  config: settings.Checked,
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
  """Prints texts as a checkpoint writes them, and saves them in sample.txt.

  Args:
    config, workdir, step: the settings, the run's folder and the checkpoint.
    prompt, prompt_file: as in `read_prompt`.
    tokens, num: how many tokens to write, and how many texts side by side.
    temperature, top_k, top_p: as in `generation.generate`.
    seed: text b of a seed is the same for any number of texts.

  Raises:
    SettingsError: a flag is out of bounds, or there is not one prompt.
    GenerationError, RoomError: the prompt or so many tokens cannot be used.
  """
  typed, source = read_prompt(prompt, prompt_file)
  drawing = _checked(temperature=temperature, top_k=top_k, top_p=top_p)
  model_config = config.model
  with exported.opened(workdir) as checkpoints:
    params, meta = checkpoints.restore_params(step)
  layers = mask_params(params, model_config)
  read = units.of_record(meta["data"])
  prompt_T = _tokens(typed, source, read, model_config)
  _check_room(num, len(prompt_T) + tokens, layers, model_config)
  prompt_BT = prompt_T[None].repeat(num, 0)
  began = time.perf_counter()
  made_BT, rest = _generate(
    params, model_config, read, prompt_BT, tokens, seed, drawing
  )
  took = f"{time.perf_counter() - began:.1f} s, compilation included"
  _print_and_write(
    [read.text_of(row) for row in np.hstack([prompt_BT, made_BT])],
    rest,
    f"{num} x {tokens} {read.unit}s in {took}",
    f"cache: {console.cache_text(layers, model_config)}",
    path=pathlib.Path(workdir) / "sample.txt",
    step=step,
  )


def read_prompt(
  prompt: str | None, prompt_file: str | None
) -> tuple[bytes, str]:
  """Returns the bytes of the prompt, and what they come from.

  Args:
    prompt: a text as it was typed, UTF-8 or not; None if it is in a file.
    prompt_file: the file's path.

  Raises:
    SettingsError: both were given, or neither.
    GenerationError: the file cannot be read, or the prompt is empty.
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
  return data, source


def _tokens(text: bytes, source: str, read: units.Units, config) -> np.ndarray:
  """Returns the tokens of a prompt, (T,).

  Raises:
    GenerationError: it holds what is not a token of the model, or none.
  """
  try:
    tokens = read.tokens_of(text)
    generation.check_tokens(tokens, config)
  except (units.TokensError, ValueError) as error:
    raise GenerationError(f"{source}: {error}") from error
  if not len(tokens):
    raise GenerationError(f"{source} holds no token; give at least one number")
  return tokens


def _checked(**drawing) -> dict:
  """Returns the flags that drawing takes, by name.

  Raises:
    SettingsError: naming the flag that is wrong and its bounds.
  """
  try:
    generation.check_sampling(**drawing)
  except ValueError as error:
    raise SettingsError(str(error)) from error
  return drawing


def _check_room(num, tokens, layers, config):
  """Checks that the texts and their KV caches fit the one device used."""
  each = accounting.cache_bytes(layers, config)["head"] + 8 * tokens
  what = f"a sample of {num:,} x {tokens:,} tokens"
  room.check(num * each, what, "give --num or --tokens less", count=1)


def _generate(params, config, read, prompt_BT, tokens, seed, drawing):
  """Writes texts, and prints the first of them as it comes.

  Returns:
    (B, tokens) tokens, and the end of the first text, which is not yet printed.
  """
  if generation.slides(config) and (
    prompt_BT.shape[1] + tokens > config.context_tokens + 1
  ):
    console.say(
      f"positions were learned for {config.context_tokens} tokens: each time "
      "the context is full, its later half is read again"
    )
  first = read.writer()
  console.write_out(first(prompt_BT[0]))
  made_BT = generation.generate(
    jax.device_put(params),
    config,
    prompt_BT,
    tokens,
    jax.random.key(seed),
    draw_below=read.draw_below,
    on_tokens=lambda new_BT: console.write_out(first(new_BT[0])),
    **drawing,
  )
  return made_BT, first(made_BT[0, :0], last=True)


def _print_and_write(texts, rest, *notes, path, step):
  """Prints the rest of the first text and all others; writes sample.txt."""
  count = len(texts)
  others = [
    f"\n--- {i} of {count}\n{text}" for i, text in enumerate(texts, start=1)
  ]
  try:  # the file is written even if nothing can be printed
    for line in (rest, *others[1:], *notes):
      console.say(line)
  finally:
    kept = [
      f"--- {i} of {count}, step {step}\n{text}\n"
      for i, text in enumerate(texts, start=1)
    ]
    files.write_text(path, "".join(kept))
  console.say(f"written to {path}")
