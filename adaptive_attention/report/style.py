"""How figures look, and what a figure is; matplotlib is imported here."""

import base64
import contextlib
import io
from typing import Any, NamedTuple

from adaptive_attention.errors import Error

# Colours that colour-blind readers tell apart (M. Okabe and K. Ito, 2008).
COLOURS = (
  "#0072B2",
  "#D55E00",
  "#009E73",
  "#CC79A7",
  "#E69F00",
  "#56B4E9",
  "#000000",
)
MARKERS = "osD^vPX"
LINES = ("-", "--", "-.", ":")
OPEN, SOFT, HIDDEN = "#0072B2", "#56B4E9", "#E8E8E8"
SEQUENTIAL = "cividis"  # its lightness grows evenly
_SHEET = {
  "font.size": 9,
  "axes.titlesize": 9,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "grid.alpha": 0.25,
  "legend.frameon": False,
  "figure.constrained_layout.use": True,
  "pdf.fonttype": 42,  # fonts are embedded as they are
  "svg.hashsalt": "adaptive_attention",  # the same figure is the same file
}


class MissingError(Error):
  """matplotlib is not installed."""


class Figure(NamedTuple):
  """A figure with its words.

  Attributes:
    name: of its files.
    title: a few words.
    caption: what is shown, with formulas and units.
    alt: what a reader who cannot see it should know.
    drawn: the figure of matplotlib.
  """

  name: str
  title: str
  caption: str
  alt: str
  drawn: Any


def check():
  """Checks that figures can be drawn.

  Raises:
    MissingError: matplotlib is not installed.
  """
  try:
    import matplotlib  # noqa: F401
  except ImportError as error:
    raise MissingError(
      "report.html and figures need the package matplotlib; pip install "
      "'adaptive_attention[report]', or matplotlib itself"
    ) from error


@contextlib.contextmanager
def sheet():
  """Draws by the style of the project while the context lasts."""
  import matplotlib

  with matplotlib.rc_context(_SHEET):
    yield


def axes(rows=1, columns=1, *, width=7.0, height=2.6, **options):
  """Returns (a figure of so many inches, its axes), without a window."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure as Drawn

  drawn = Drawn(figsize=(width, height))
  FigureCanvasAgg(drawn)
  return drawn, drawn.subplots(rows, columns, squeeze=False, **options)


def small_multiples(L: int, H: int):
  """Returns (a figure, its axes) with a small panel for each head, labelled."""
  width, height = min(14, 1.2 + 1.15 * H), 0.8 + 0.75 * L
  drawn, grid = axes(L, H, width=width, height=height, sharex=True, sharey=True)
  for i in range(L):
    grid[i, 0].set_ylabel(f"layer {i}")
  for h in range(H):
    grid[-1, h].set_xlabel(f"head {h}")
  for ax in grid.ravel():
    ax.grid(False)
  return drawn, grid


def plain_log(axis):
  """Writes the numbers of a logarithmic axis as they are: 64, not 6.4e1."""
  from matplotlib.ticker import LogFormatter

  class Plain(LogFormatter):
    def __call__(self, x, pos=None):
      return f"{x:,.10g}" if super().__call__(x, pos) else ""

  axis.set_major_formatter(Plain())
  axis.set_minor_formatter(Plain(minor_thresholds=(2, 0.4)))


def of_run(i: int) -> dict:
  """Returns the colour and the line of the i-th run."""
  return {
    "color": COLOURS[i % len(COLOURS)],
    "linestyle": LINES[i // len(COLOURS) % len(LINES)],
  }


def marker(i: int) -> str:
  """Returns the marker of the i-th run, another one where colours return."""
  return MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]


def files(figure: Figure) -> dict[str, bytes]:
  """Returns the content of a figure's files, by their names."""
  found = {}
  # Parts find their places once, not again for each file.
  figure.drawn.draw_without_rendering()
  figure.drawn.set_layout_engine("none")
  for kind in ("png", "pdf", "svg"):
    content = io.BytesIO()
    # Without a date the same figure is the same file.
    metadata = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
    figure.drawn.savefig(content, format=kind, dpi=150, metadata=metadata[kind])
    found[f"{figure.name}.{kind}"] = content.getvalue()
  return found


def as_address(svg: bytes) -> str:
  """Returns a picture as a data: address, which contains the picture."""
  return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
