"""Columns of ``CompactionBatch.columns``, as kernels index them."""

import triton.language as tl

from vllm_qfilters.kernels import batch

TABLE_ROW = tl.constexpr(batch.TABLE_ROW)
POSITION = tl.constexpr(batch.POSITION)
RESIDENT = tl.constexpr(batch.RESIDENT)
EVICTED = tl.constexpr(batch.EVICTED)
SINKS = tl.constexpr(batch.SINKS)
WINDOW = tl.constexpr(batch.WINDOW)
NEW_START = tl.constexpr(batch.NEW_START)
TOKEN_START = tl.constexpr(batch.TOKEN_START)
SOURCE_START = tl.constexpr(batch.SOURCE_START)
DISTINCT = tl.constexpr(batch.DISTINCT)
UNOBSERVED = tl.constexpr(batch.UNOBSERVED)
NUM_COLUMNS = tl.constexpr(batch.NUM_COLUMNS)
