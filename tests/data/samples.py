"""Random content, and functions that make files of it."""

import hashlib
import io
import zipfile

import numpy as np

CONTENT = np.random.default_rng(0).integers(0, 256, 50_000, np.uint8).tobytes()


def sha256(content):
  return hashlib.sha256(content).hexdigest()


def zipped(**members):
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, content in members.items():
      archive.writestr(name, content)
  return file.getvalue()


ZIP = zipped(tiny=CONTENT)
