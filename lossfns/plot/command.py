"""``lossfns plot NAME ...``: pictures of losses, from the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lossfns.describe import presets
from lossfns.errors import LossInputError
from lossfns.plot import family, figures
from lossfns.spellings import unknown_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOPICS: dict[str, Callable[[], Figure]] = {
    "kl": figures.plot_kl,
    "weighings": figures.plot_weighings,
    "advantages": figures.plot_advantages,
}
"""The pictures that do not belong to a single loss."""


def figure_of(names: Sequence[str], parts: str | None = None) -> Figure:
    """Return the picture of losses by their names, of a topic, or of the parts of a family.

    Raises:
        LossInputError: for a name of no loss and no topic, and for losses that do not go together.
    """
    if parts is not None:
        if names:
            raise LossInputError(
                "--parts", "no NAME with it", " ".join(names), "It draws a whole family: leave it out."
            )
        return family.plot_family(parts)
    if len(names) == 1 and names[0] in TOPICS:
        return TOPICS[names[0]]()
    if any(name in TOPICS for name in names):
        fix = "Draw them one by one; several losses of one kind share a picture."
        raise LossInputError("NAME", f"one of {', '.join(TOPICS)} alone", " and ".join(names), fix)
    for name in names:
        if name not in presets():
            expected = f"a run, a loss, or one of {', '.join(TOPICS)}"
            raise LossInputError("NAME", expected, repr(name), unknown_loss(name, [*presets(), *TOPICS]))
    return figures.plot_losses([presets()[name]() for name in names])


def draw(names: Sequence[str], out: str | None = None, parts: str | None = None) -> Path:
    """Draw a picture into a file, and return its path. ``out`` is ``NAME.svg`` unless given; PNG and PDF work too.

    Raises:
        LossInputError: as ``figure_of``, and for a file that cannot be written or has an unknown ending.
    """
    path = Path(out or f"{'-'.join([*names, *filter(None, [parts])])}.svg")
    if path.suffix.lower() not in (".svg", ".png", ".pdf"):  # matplotlib would write another file, with an ending
        raise LossInputError("--out", "a file ending in .svg, .png or .pdf", f"{path}", "Choose another.")
    try:
        figures.save(figure_of(names, parts), path)
    except LossInputError:
        raise
    except ImportError as error:
        fix = "pip install 'lossfns[viz]'"
        raise LossInputError("plot", "matplotlib", f"{error}", fix) from None
    except (OSError, ValueError) as error:
        raise LossInputError(
            "--out", "a file ending in .svg, .png or .pdf", f"{path} ({error})", "Choose another."
        ) from None
    return path
