"""report.html in a browser: readable on a phone and a desk, light and dark."""

import json
import re
import shutil
import subprocess

import pytest

from tests.modes.test_an_older_run import OLDER

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
  pytest.mark.browser,
  pytest.mark.skipif(BROWSER is None, reason="chromium is not installed"),
]
# A report has no script. This one tells what the browser has laid out.
PROBE = """<script>addEventListener("load", () => {
  const root = document.documentElement;
  const images = [...document.images];
  parent.postMessage(JSON.stringify({
    width: innerWidth,
    needed: root.scrollWidth,
    drawn: images.map(x => x.complete && x.naturalWidth > 0),
    captions: [...document.querySelectorAll("figcaption")].map(
      x => x.getBoundingClientRect().right),
    page: getComputedStyle(document.body).backgroundColor,
    text: getComputedStyle(document.body).color,
    behind: images.map(x => getComputedStyle(x).backgroundColor),
    widths: images.map(x => x.getBoundingClientRect().width),
    asked: performance.getEntriesByType("resource")
      .map(x => x.name).filter(x => !x.startsWith("data:")),
  }), "*");
});</script>"""
# No window is narrower than 500 pixels, but a frame is.
FRAME = """<!DOCTYPE html><meta name="color-scheme" content="light dark">
<script>onmessage = told => { document.title = told.data; };</script>
<iframe src="probed.html" style="border: 0; width: WIDTHpx"></iframe>"""


@pytest.fixture(scope="module")
def report(main, tmp_path_factory):
  folder = tmp_path_factory.mktemp("browser") / "run"
  shutil.copytree(OLDER / "run", folder)
  code, _, err = main("--mode=inspect", f"--workdir={folder}")
  assert code == 0, err
  return folder / "report.html"


def opened(path, tmp_path, width, dark):
  """Returns what the browser lays out, in a frame of so many pixels."""
  probed = path.read_text().replace("</body>", PROBE + "</body>")
  (tmp_path / "probed.html").write_text(probed)
  frame = tmp_path / "frame.html"
  frame.write_text(FRAME.replace("WIDTH", str(width)))
  flags = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--hide-scrollbars"),
    f"--user-data-dir={tmp_path / 'profile'}",
    f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    *("--window-size=1500,900", "--virtual-time-budget=10000"),
  ]
  run = subprocess.run(
    [BROWSER, *flags, "--dump-dom", frame.as_uri()],
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  return json.loads(re.search(r"<title>(.*?)</title>", run.stdout)[1])


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1400])
def test_it_is_laid_out_within_the_window(report, tmp_path, width, dark):
  found = opened(report, tmp_path, width, dark)
  assert found["width"] == width
  assert found["needed"] <= width  # wide figures scroll in their own place
  assert len(found["drawn"]) == 7 and all(found["drawn"])
  assert max(found["captions"]) <= width
  assert not found["asked"]
  colours = ["rgb(255, 255, 255)", "rgb(26, 26, 26)"]
  if dark:
    colours = ["rgb(22, 22, 22)", "rgb(230, 230, 230)"]
  assert [found["page"], found["text"]] == colours
  assert set(found["behind"]) == {"rgb(255, 255, 255)"}
  widest, narrowest = max(found["widths"]), min(found["widths"])
  assert narrowest < width < 500 or (narrowest < 700 and widest > 900)
