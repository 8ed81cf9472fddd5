"""The pictures: held-out loss over training, tokens a second of each way to serve, and gates over text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

COLORS = {"baseline": "#0072B2", "engram": "#D55E00"}
_LABELS = {"baseline": "mixture of experts", "engram": "Engram"}
_KINDS = ("#999999", "#D55E00", "#E69F00")
_LINE = 104  # characters
_SHADES = LinearSegmentedColormap.from_list("gates", ["#ffffff", "#ffe9b0", "#fdb863", "#f4845f"])  # letters stay legible


def plot_losses(path: Path, seen: dict[str, list[list[tuple[int, float]]]], tokens_a_step: int, title: str) -> None:
    """seen: of each form, of each seed, (step, held-out loss)."""
    figure = Figure(figsize=(7.5, 4.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    for form, runs in seen.items():
        tokens = [step * tokens_a_step / 1000 for step, _ in runs[0]]
        losses = np.array([[loss for _, loss in run] for run in runs])
        last = f"{losses[:, -1].mean():.3f}"
        axes.plot(tokens, losses.mean(0), color=COLORS[form], marker="o", ms=4, lw=1.8, label=f"{_LABELS[form]}: {last}")
        axes.fill_between(tokens, losses.min(0), losses.max(0), color=COLORS[form], alpha=0.2, lw=0)
    axes.set_xlabel("tokens of training, thousands")
    axes.set_ylabel("held-out loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, title="mean and range of the seeds" if len(runs) > 1 else None)
    axes.set_title(title, fontsize=11, loc="left")
    figure.savefig(path)


def plot_serving(path: Path, rates: dict[str, dict[str, float]], title: str) -> None:
    """rates: of each phase, of each way to serve, tokens a second; the first way is the whole."""
    figure = Figure(figsize=(7.5, 0.8 + 1.6 * len(rates)), dpi=110, layout="constrained")
    for axes, (phase, ways) in zip(np.atleast_1d(figure.subplots(len(rates), 1)), rates.items(), strict=True):
        whole = next(iter(ways.values()))
        for place, rate in enumerate(ways.values()):
            axes.barh(place, rate, color=_KINDS[place], height=0.7)
            label = f"{rate:,.0f} tokens/s, {100 * rate / whole:.1f} %"
            style: dict[str, Any] = {
                "va": "center",
                "fontsize": 9,
                "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1},
            }
            axes.text(1.02 * max(ways.values()), place, label, **style)
        axes.axvline(0.97 * whole, color="black", lw=1, ls=":")
        axes.set_yticks(range(len(ways)), list(ways), fontsize=9)
        axes.set_title(f"{phase}; dotted: 97 % of resident", fontsize=10, loc="left")
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.4 * max(ways.values()))
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(path)


def plot_gates(path: Path, texts: Sequence[str], known: Sequence[bool], panels: dict[str, npt.NDArray[np.float64]]) -> None:
    """Tokens as flowing text, coloured by a value each. texts: of each token; known: False where the model reads an unknown.

    panels: values [T] by title, drawn below one another, each in its own scale from its 2nd to its 98th percentile.
    """
    places = _flow(texts)
    figure = Figure(figsize=(11, len(panels) * (1.0 + 0.27 * (places[-1][0] + 1))), dpi=100, layout="constrained")
    for axes, (title, values) in zip(np.atleast_1d(figure.subplots(len(panels), 1)), panels.items(), strict=True):
        low, high = np.percentile(values, (2, 98))
        scale = ScalarMappable(Normalize(low, high), _SHADES)
        _draw_text(axes, texts, known, places, scale.to_rgba(values))
        axes.set_title(title, fontsize=10, loc="left")
        figure.colorbar(scale, ax=axes, location="bottom", fraction=0.05, aspect=80, pad=0.01)
    figure.savefig(path)


def _flow(texts: Sequence[str]) -> list[tuple[int, int]]:
    """(line, column) of each token."""
    places, line, column = [], 0, 0
    for text in texts:
        if column and column + len(text) > _LINE:
            line, column = line + 1, 0
        places.append((line, column))
        column += len(text)
    return places


def _draw_text(
    axes: Axes, texts: Sequence[str], known: Sequence[bool], places: Sequence[tuple[int, int]], colors: npt.NDArray[np.float64]
) -> None:
    for text, plain, (line, column), color in zip(texts, known, places, colors, strict=True):
        axes.add_patch(Rectangle((column, line + 0.06), len(text), 0.88, facecolor=tuple(color), edgecolor="white", lw=0.8))
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8.5, "family": "monospace"}
        for number, letter in enumerate(text):
            axes.text(column + number + 0.5, line + 0.52, letter, color="black" if plain else "#707070", **style)
    axes.set_xlim(0, _LINE)
    axes.set_ylim(places[-1][0] + 1, 0)
    axes.axis("off")
