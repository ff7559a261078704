"""The compactions of one step as operators read them: sequences of different lengths in one go.

All sizes are known on the host, so nothing waits for the device. Results of operators are flat, sequence by sequence:
those of sequence ``i``, ``[num_layers, heads, resident_tokens]``, begin at ``num_layers * heads * token_start``.
"""

import dataclasses
from collections.abc import Sequence

import torch

from vllm_qfilters.plan import RequestCompaction

NOT_OBSERVED = -1.0  # stands for the attention to a token that no query was seen to look at, or not yet

# Columns of CompactionBatch.columns; triton/columns.py has the same for kernels.
TABLE_ROW, POSITION, RESIDENT, EVICTED, SINKS, WINDOW = range(6)
NEW_START, TOKEN_START, SOURCE_START, DISTINCT, UNOBSERVED = range(6, 11)
NUM_COLUMNS = 11


@dataclasses.dataclass(frozen=True)
class CompactionBatch:
    """The compactions of one step, on the device.

    Attributes:
        compactions: of the sequences, as the scheduler planned them.
        table_rows: where in ``block_table`` each sequence stands.
        block_table: the pages of sequences before, shape ``[max_num_sequences, max_num_pages]``, int32.
        columns: the numbers of each sequence, shape ``[num_sequences, NUM_COLUMNS]``, int64.
        new_pages: the pages of the sequences afterwards, one sequence behind the other, int64.
        copied_pages: shape ``[num_copies, 3]``, int64: row and place in the block table, new page.
        num_tokens: resident tokens of all sequences.
        kept_before_windows: tokens that stay before the windows, of all sequences.
        max_resident: most resident tokens of a sequence.
    """

    compactions: tuple[RequestCompaction, ...]
    table_rows: tuple[int, ...]
    block_table: torch.Tensor
    columns: torch.Tensor
    new_pages: torch.Tensor
    copied_pages: torch.Tensor
    num_tokens: int
    kept_before_windows: int
    max_resident: int

    @classmethod
    def make(
        cls, compactions: Sequence[RequestCompaction], table_rows: Sequence[int], block_table: torch.Tensor
    ) -> "CompactionBatch":
        """Copies the numbers to the device of ``block_table``, in one piece and without waiting for it."""
        columns: list[int] = []
        new_pages: list[int] = []
        copied_pages: list[int] = []
        num_tokens = kept_before_windows = 0
        for compaction, table_row in zip(compactions, table_rows, strict=True):
            columns += [
                table_row,
                compaction.position,
                compaction.resident_tokens,
                compaction.evicted_tokens,
                compaction.sinks,
                compaction.window,
                len(new_pages),
                num_tokens,
                kept_before_windows,
                compaction.distinct_tokens,
                compaction.unobserved_tokens,
            ]
            new_pages += compaction.block_ids
            for place, page in compaction.copied_pages:
                copied_pages += [table_row, place, page]
            num_tokens += compaction.resident_tokens
            kept_before_windows += compaction.kept_before_window
        sizes = [len(columns), len(new_pages), len(copied_pages)]
        on_host = torch.tensor(columns + new_pages + copied_pages, dtype=torch.int64, pin_memory=block_table.is_cuda)
        on_device = on_host.to(block_table.device, non_blocking=True).split(sizes)
        return cls(
            compactions=tuple(compactions),
            table_rows=tuple(table_rows),
            block_table=block_table,
            columns=on_device[0].view(-1, NUM_COLUMNS),
            new_pages=on_device[1],
            copied_pages=on_device[2].view(-1, 3),
            num_tokens=num_tokens,
            kept_before_windows=kept_before_windows,
            max_resident=max(compaction.resident_tokens for compaction in compactions),
        )

    def evicting_distinct_tokens(self) -> "CompactionBatch":
        """The same sequences, each to lose what it would keep as distinct, too: what is left stays for its score."""
        columns = self.columns.clone()
        columns[:, EVICTED] += columns[:, DISTINCT]
        compactions = tuple(
            dataclasses.replace(
                compaction,
                evicted_tokens=compaction.evicted_tokens + compaction.distinct_tokens,
                distinct_tokens=0,
            )
            for compaction in self.compactions
        )
        return dataclasses.replace(self, columns=columns, compactions=compactions)

    @property
    def has_distinct_tokens(self) -> bool:
        """Whether any sequence keeps distinct tokens."""
        return any(compaction.distinct_tokens for compaction in self.compactions)

    @property
    def has_observed_tokens(self) -> bool:
        """Whether a prompt's queries have looked at any token."""
        return any(compaction.unobserved_tokens < compaction.resident_tokens for compaction in self.compactions)

    @property
    def num_sequences(self) -> int:
        return len(self.compactions)

    @property
    def positions(self) -> torch.Tensor:
        """The position of each sequence's next token, shape ``[num_sequences]``, int64."""
        return self.columns[:, POSITION]

    def pages_before(self, index: int, block_size: int) -> torch.Tensor:
        """The pages of a sequence before its compaction, private copies entered, shape ``[num_pages]``, int64."""
        compaction = self.compactions[index]
        num_pages = len(compaction.block_ids) + compaction.evicted_tokens // block_size
        return self.block_table[self.table_rows[index], :num_pages].to(torch.int64)

    def pages_after(self, index: int) -> torch.Tensor:
        """The pages of a sequence after its compaction, shape ``[num_pages]``, int64."""
        return torch.tensor(self.compactions[index].block_ids, dtype=torch.int64, device=self.block_table.device)

    def split(self, flat: torch.Tensor, num_layers: int, num_heads: int) -> list[torch.Tensor]:
        """A flat result as one tensor ``[num_layers, num_heads, resident_tokens]`` per sequence."""
        lengths = [compaction.resident_tokens for compaction in self.compactions]
        parts = flat.split([num_layers * num_heads * length for length in lengths])
        return [part.view(num_layers, num_heads, length) for part, length in zip(parts, lengths, strict=True)]
