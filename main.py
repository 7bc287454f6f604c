"""The command line: flags and data, then one call of a mode's `run`."""

import contextlib
import importlib
import logging
import pathlib
import sys

from adaptive_attention.command_line import flags
from adaptive_attention.errors import Error
from adaptive_attention.training import console, last_words, signals
from adaptive_attention.training.bounds import holds_tokens
from configs import base
from data import CorpusError

_HERE = pathlib.Path(__file__).resolve().parent


def main(argv) -> int:
  """Runs the mode, prints an error in one sentence, returns the exit code."""
  try:
    given = flags.parse(argv, _HERE / "configs", base.get_config())
    if given is None:
      _print_help()
    else:
      _run(given)
  except (CorpusError, Error) as error:
    return _fail(error, error.exit_code)
  except BrokenPipeError:
    return _fail("stopped by a closed pipe", 128 + 13)  # SIGPIPE
  except OSError as error:  # of a file, or of a console that fails
    return _fail(
      f"{error.filename or 'a file'} cannot be read or written "
      f"({error.strerror or error}); check that it exists, that it may be used "
      "and that the disk has room",
      1,
    )
  return 0


def _fail(error, code) -> int:
  told = console.one_line(str(error))
  with contextlib.suppress(OSError):  # the exit code still says that it failed
    console.write(f"main.py: {told}\n", sys.stderr)
  # Without this module there are no other processes that wait for this one.
  if others := sys.modules.get("adaptive_attention.training.processes"):
    others.leave(told, code)
  return code


def _print_help():
  from adaptive_attention.command_line import help_page

  page = help_page.text(base.get_config())
  with contextlib.suppress(OSError):  # the reader may have left
    console.write(f"{page}\n", sys.stdout)


def _run(given: flags.Given):
  # Imported after the flags were read, so that a wrong one is refused at once.
  from adaptive_attention.command_line import prepare
  from adaptive_attention.training import processes, room

  project = prepare.Project(_HERE, base.get_config, load_corpus)
  mode = importlib.import_module(f"adaptive_attention.modes.{given.use.mode}")
  with processes.failures(), room.failures():
    positional, named = prepare.arguments(given, project)
    mode.run(*positional, **named)


def load_corpus(config):
  """Returns the bytes or tokens that the settings name, split.

  Raises:
    CorpusError: they cannot be read or fetched.
  """
  from data import enwik8, python_source, text_file, tokens

  last_words.of_lost_file(f"data.path={config.data.path}")
  if holds_tokens(config.data.path):
    return tokens.load(
      config.data.path,
      config.model.vocab_size,
      config.data.cache_dir,
      bytes_per_token=config.data.bytes_per_token or None,
      log=console.say,
    )
  if config.data.path:
    return text_file.load(config.data.path)
  match config.data.corpus:
    case "enwik8":
      return enwik8.load(config.data.cache_dir, log=console.say)
    case "python_source":
      return python_source.load()


if __name__ == "__main__":
  logging.basicConfig(level=logging.WARNING)
  signals.Signals(saving=False).__enter__()  # until the program's very end
  sys.exit(main(sys.argv))
