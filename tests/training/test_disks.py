"""A disk's reasons are told from damage, in the system's words."""

import errno
import os

import pytest

from adaptive_attention.training import disks

DISK_FULL = "No space left on device"
TENSORSTORE = "UNKNOWN: Error writing x [os_error_code='{}'] [source: y]"


@pytest.mark.parametrize(
  ("error", "reason"),
  [
    (OSError(errno.ENOSPC, DISK_FULL, "x"), DISK_FULL),
    (OSError("closed"), "closed"),
    (OSError(), "OSError"),
    (ValueError(TENSORSTORE.format(errno.ENOSPC)), DISK_FULL),
    (ValueError(TENSORSTORE.format(errno.EDQUOT)), os.strerror(errno.EDQUOT)),
    (ValueError("NOT_FOUND: x"), "a file that was just written is gone"),
    (ValueError("DATA_LOSS: x"), "a file that was just written is gone"),
    (ValueError("an array of strings"), None),
  ],
)
def test_why_a_disk_does_not_take_bytes(error, reason):
  assert disks.reason_of(error) == reason


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_why_a_disk_does_not_give_bytes(number):
  for error in (
    OSError(number, "x"),
    ValueError(TENSORSTORE.format(number)),
  ):
    assert disks.refusal(error) == os.strerror(number)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR, errno.EISDIR])
def test_what_is_not_there_was_not_refused(number):
  for error in (
    OSError(number, "x"),
    ValueError(TENSORSTORE.format(number)),
    ValueError("not JSON"),
  ):
    assert disks.refusal(error) is None


def test_a_folder_stays_where_it_is(tmp_path):
  folder = tmp_path / "w"
  place = disks.Place(folder)  # which need not exist
  place.check()
  folder.mkdir()
  place.check()
  place = disks.Place(folder)
  place.check()
  folder.rename(tmp_path / "moved")
  with pytest.raises(OSError, match="not the folder any more"):
    place.check()
  folder.mkdir()
  with pytest.raises(OSError, match="not the folder any more"):
    place.check()
  folder.rmdir()
  (tmp_path / "moved").rename(folder)
  place.check()
