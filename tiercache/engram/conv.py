"""ShortConv: the convolution behind an Engram's gate, which looks a few n-grams back.

Each channel of each branch is filtered by itself: position t sees t, t - dilation, .. t - (kernel - 1) * dilation. What it saw
of a chunk's past is kept in a state, so that a text in chunks gives what the whole gives.

Cheng et al., arXiv 2601.07372, section 2.3; names and shapes of the parameters are those of the paper's demo.
"""

import torch
from torch import nn

from tiercache.engram.hasher import check_least


class ShortConv(nn.Module):
    """SiLU of a causal depthwise convolution over RMS-normalised branches, without bias; its weights begin at zero."""

    def __init__(self, hidden: int, branches: int, *, kernel: int = 4, dilation: int = 3, eps: float = 1e-5) -> None:
        """hidden: channels of a branch."""
        super().__init__()
        check_least(1, kernel=kernel, dilation=dilation)
        channels = hidden * branches
        self.span = (kernel - 1) * dilation  # positions before the current one that it sees
        self.conv = nn.Conv1d(channels, channels, kernel, groups=channels, bias=False, dilation=dilation)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, eps=eps) for _ in range(branches))
        nn.init.zeros_(self.conv.weight)

    def new_state(self, batch: int) -> torch.Tensor:
        """What lies before the start of `batch` sequences: zeros[batch, channels, span]."""
        weight = self.conv.weight
        return weight.new_zeros(batch, weight.shape[0], self.span)

    def forward(self, values: torch.Tensor, state: torch.Tensor | None = None) -> torch.Tensor:
        """values: [B, T, branches, hidden]; returns the same shape.

        state: of the positions before these, `new_state`'s at the start of a text, moved on in place once all is
        computed; None: a whole text.
        """
        batch, length, branches, hidden = values.shape
        if not length:
            return values
        normed = torch.cat([norm(values[:, :, branch]) for branch, norm in enumerate(self.norms)], -1).transpose(1, 2)
        past = self.new_state(batch) if state is None else state
        seen = torch.cat([past, normed], 2)
        mixed = nn.functional.silu(self.conv(seen))
        if state is not None:
            state.copy_(seen[:, :, length:].detach())
        return mixed.transpose(1, 2).reshape(batch, length, branches, hidden)
