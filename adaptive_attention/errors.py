"""The errors that a user is told in one sentence, and their exit codes."""


class Error(Exception):
  """What cannot be done, told in one sentence; the program ends with 1."""

  exit_code = 1


class SettingsError(Error, ValueError):
  """A flag or setting that is wrong, or two that do not fit."""

  exit_code = 2
