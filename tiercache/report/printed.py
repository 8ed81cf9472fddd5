"""Tables on a terminal and in pipes."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def print_whole(console: Console, table: Table) -> None:
    """Print a table with all that its cells say, in one line each: where it is wider than the console, lines are that long."""
    width = Measurement.get(console, console.options.update(width=100_000), table).maximum
    if width > console.width:
        table.width = width
    console.print(table, soft_wrap=True)
