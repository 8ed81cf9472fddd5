"""A replay as one page of HTML: measured (measure.py), drawn (figures.py over draw.py) and put together (page.py)."""
