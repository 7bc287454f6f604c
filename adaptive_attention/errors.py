"""The errors that a user is told in one sentence, and their exit codes."""


class Error(Exception):
  """An error that is told in one sentence; the program exits with code 1."""

  exit_code = 1


class SettingsError(Error, ValueError):
  """A flag or setting that is wrong, or two that do not fit; exit code 2."""

  exit_code = 2


def first_line(error: BaseException) -> str:
  """Returns the first line of a library's error, or the name of its class."""
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0][:200].rstrip(".")
