"""A small language model with and without an Engram, for `engram_lm.py` and `gate_heatmap.py`."""
