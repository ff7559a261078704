"""Columns of ``CompactionBatch.rows``, as kernels index them; ``.value`` of each is the number."""

import triton.language as tl

OLD_ROW = tl.constexpr(0)
POSITION = tl.constexpr(1)
RESIDENT = tl.constexpr(2)
EVICTED = tl.constexpr(3)
SINKS = tl.constexpr(4)
WINDOW = tl.constexpr(5)
NEW_START = tl.constexpr(6)
TOKEN_START = tl.constexpr(7)
MOVE_START = tl.constexpr(8)
DISTINCT = tl.constexpr(9)
NUM_COLUMNS = tl.constexpr(10)
