"""The errors that a user is told in one sentence, and their exit codes."""


class Error(Exception):
  """What cannot be done, told in one sentence; the program ends with 1."""

  exit_code = 1


class SettingsError(Error, ValueError):
  """A flag or setting that is wrong, or two that do not fit."""

  exit_code = 2


def first_line(error: BaseException) -> str:
  """The first line of what a library's error says, or else its class."""
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0][:200].rstrip(".")
