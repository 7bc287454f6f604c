"""Trains: from the start or the newest checkpoint to the last step."""

from adaptive_attention.report import whole
from adaptive_attention.training import run as training
from adaptive_attention.training import settings


def run(config: settings.Checked, workdir, *, corpus, step=None):
  """Trains into `workdir`; called again, it goes on from the newest step.

  At the end it writes a report, if the settings ask for one.

  Args:
    config: all settings.
    workdir, corpus, step: as in `training.run.train`, which lists the errors
      that end a run.
  """
  training.train(settings.training_config(config), workdir, corpus, which=step)
  if config.given.report:
    whole.write_of_ended_run(workdir)
