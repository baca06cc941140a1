// y (tokens, rows) in float32 = x S^T with S in compressed rows: a warp per row, its values over the lanes, eight tokens at a time.

constexpr int ROWS = 8, TOKENS = 8;

template <class T, class Column>
KERNEL(32 * ROWS, 4)
sparse_rows(const u16* x, const int* pointers, const Column* columns, const u16* values, float* y, int tokens, int rows, s64 stride) {
  const int row = blockIdx.x * ROWS + warp_id(), lane = lane_id(), first = blockIdx.y * TOKENS;
  if (row >= rows) return;
  const int begin = load(pointers + row), end = load(pointers + row + 1);
  const int count = tokens - first < TOKENS ? tokens - first : TOKENS;
  float sum[TOKENS] = {};
  for (int i = begin + lane; i < end; i += 32) {
    const u16* from = x + s64(first) * stride + load(columns + i);
    const float value = BFloat16::low(load(values + i));
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
      if (t < count) sum[t] = multiply_add(value, T::low(load(from + t * stride)), sum[t]);
  }
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) sum[t] += shuffle_xor(sum[t], mask);
    if (lane == t && t < count) store(y + s64(first + t) * rows + row, sum[t]);
  }
}
