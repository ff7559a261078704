"""The compactions of one step as the Triton kernels read them: many sequences of different lengths in one launch.

All sizes are known on the host, so nothing waits for the device. Results of kernels are flat, row by row: of sequence
``r``, ``[num_layers, heads, resident_tokens]`` begins at ``num_layers * heads * token_start``.
"""

import dataclasses
from collections.abc import Sequence

import torch

from vllm_qfilters.kernels.triton.columns import DISTINCT, EVICTED, NUM_COLUMNS, POSITION, RESIDENT


@dataclasses.dataclass(frozen=True)
class Compaction:
    """What one sequence loses.

    Attributes:
        old_row: its row of the block table.
        position: of its next token.
        resident_tokens: tokens it holds.
        evicted_tokens: tokens it loses, a multiple of the block size.
        sinks: first tokens that stay.
        window: last tokens that stay.
        new_pages: its pages afterwards.
        copied_pages: private copies to make before anything moves, as (place in the block table, new page).
        shared_pages_out: pages taken out that other sequences hold too, where scoring writes beside the tokens of all
            pages.
        distinct_tokens: of those that stay, how many do because their keys are unlike the others, and not for their
            score.
    """

    old_row: int
    position: int
    resident_tokens: int
    evicted_tokens: int
    sinks: int
    window: int
    new_pages: Sequence[int]
    copied_pages: Sequence[tuple[int, int]] = ()
    shared_pages_out: Sequence[int] = ()
    distinct_tokens: int = 0

    @property
    def max_moves(self) -> int:
        """Most tokens of one layer and head that change places: survivors in pages taken out, into holes before the
        window.
        """
        return min(self.evicted_tokens, self.resident_tokens - self.evicted_tokens - self.window)


@dataclasses.dataclass(frozen=True)
class CompactionBatch:
    """The compactions of one step, on the device.

    Attributes:
        block_table: the pages of all sequences before, shape ``[max_num_sequences, max_num_pages]``, int32.
        rows: shape ``[num_rows, NUM_COLUMNS]``, int64, see :mod:`vllm_qfilters.kernels.triton.columns`.
        new_pages: the pages of the rows afterwards, one row behind the other, int64.
        copied_pages: shape ``[num_copies, 3]``, int64: row and place in the block table, new page.
        compactions: as given.
        num_tokens: resident tokens of all rows.
        num_moves: sum of the rows' most moves.
        max_resident: most resident tokens of a row.
        max_moves: most moves of a row.
    """

    block_table: torch.Tensor
    rows: torch.Tensor
    new_pages: torch.Tensor
    copied_pages: torch.Tensor
    compactions: tuple[Compaction, ...]
    num_tokens: int
    num_moves: int
    max_resident: int
    max_moves: int

    @classmethod
    def make(cls, compactions: Sequence[Compaction], block_table: torch.Tensor) -> "CompactionBatch":
        """Copies the numbers to the device of ``block_table``, in one piece and without waiting for it."""
        rows, new_pages, copied_pages = [], [], []
        num_tokens = num_moves = 0
        for compaction in compactions:
            rows += [
                compaction.old_row,
                compaction.position,
                compaction.resident_tokens,
                compaction.evicted_tokens,
                compaction.sinks,
                compaction.window,
                len(new_pages),
                num_tokens,
                num_moves,
                compaction.distinct_tokens,
            ]
            new_pages += compaction.new_pages
            for place, page in compaction.copied_pages:
                copied_pages += [compaction.old_row, place, page]
            num_tokens += compaction.resident_tokens
            num_moves += compaction.max_moves
        on_host = torch.tensor(rows + new_pages + copied_pages, dtype=torch.int64, pin_memory=block_table.is_cuda)
        numbers = on_host.to(block_table.device, non_blocking=True)
        rows, new_pages, copied_pages = numbers.split([len(rows), len(new_pages), len(copied_pages)])
        return cls(
            block_table=block_table,
            rows=rows.view(-1, NUM_COLUMNS.value),
            new_pages=new_pages,
            copied_pages=copied_pages.view(-1, 3),
            compactions=tuple(compactions),
            num_tokens=num_tokens,
            num_moves=num_moves,
            max_resident=max(compaction.resident_tokens for compaction in compactions),
            max_moves=max(compaction.max_moves for compaction in compactions),
        )

    def evicting_distinct_tokens(self) -> "CompactionBatch":
        """The same sequences, each to lose what it would keep as distinct, too: what is left stays for its score."""
        rows = self.rows.clone()
        rows[:, EVICTED.value] += rows[:, DISTINCT.value]
        return dataclasses.replace(self, rows=rows)

    def keeps_distinct(self, num_heads: int) -> torch.Tensor:
        """Of a flat result whether it is of a row with distinct tokens, bool; ``num_heads``: of all layers."""
        return torch.repeat_interleave(
            self.rows[:, DISTINCT.value] > 0,
            num_heads * self.rows[:, RESIDENT.value],
            output_size=num_heads * self.num_tokens,
        )

    @property
    def has_distinct_tokens(self) -> bool:
        """Whether any row has."""
        return any(compaction.distinct_tokens for compaction in self.compactions)

    @property
    def num_rows(self) -> int:
        return self.rows.shape[0]

    @property
    def positions(self) -> torch.Tensor:
        """Of the rows' next tokens, shape ``[num_rows]``, int64."""
        return self.rows[:, POSITION.value]

    def split(self, flat: torch.Tensor, num_layers: int, num_heads: int) -> list[torch.Tensor]:
        """A flat result as one tensor ``[num_layers, num_heads, resident_tokens]`` per row."""
        lengths = [compaction.resident_tokens for compaction in self.compactions]
        parts = flat.split([num_layers * num_heads * length for length in lengths])
        return [part.view(num_layers, num_heads, length) for part, length in zip(parts, lengths, strict=True)]
