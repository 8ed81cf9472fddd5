"""Rows that are asked for twice: when their numbers are known, and when they are needed."""

import threading
from typing import Any

import torch
from torch import nn

from tiercache.flight import Ticket
from tiercache.request import is_traced
from tiercache.store import Store


class Ahead:
    """Rows of one table of a store, prefetched by `begin` and had by `take`. Each thread has one request ahead, or none."""

    def __init__(self, store: Store, table: str) -> None:
        self.store, self.table = store, table
        self._here = _Here()

    def begin(self, rows: torch.Tensor) -> None:
        """Begin to read rows: integers of any shape, on any device, which is waited for. What was ahead is given up.

        rows may be changed afterwards.
        """
        self.drop()
        self._here.ticket = self.store.prefetch(rows.cpu(), table=self.table)

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """dtype[*rows.shape, dim], on the store's device: what `begin` brought, if it was these rows; read now, if not."""
        rows = rows.cpu()
        ticket, self._here.ticket = self._here.ticket, None
        if ticket is not None and not is_traced(rows) and ticket.asks_for(rows):
            return ticket.take()
        if ticket is not None:
            ticket.cancel()
        return self.store.fetch(rows, table=self.table)

    def drop(self) -> None:
        """Give up what is ahead."""
        ticket, self._here.ticket = self._here.ticket, None
        if ticket is not None:
            ticket.cancel()


class _Here(threading.local):
    ticket: Ticket | None = None


def without_rows(width: int, dtype: torch.dtype, device: torch.device | None = None) -> nn.Parameter:
    """A parameter of no rows in an engine's module, into which its loader copies nothing of the checkpoint's table."""
    parameter: Any = nn.Parameter(torch.empty(0, width, dtype=dtype, device=device), requires_grad=False)
    parameter.weight_loader = _skip
    return parameter


def _skip(parameter: nn.Parameter, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """A weight loader of the engines."""
