// Products of integers of any widths from their bits: and, popcount and sums by binary tensor cores. See bit_serial.py.

constexpr int WARPS = 8, THREADS = 32 * WARPS, TOKENS = 8, ROWS = 16;

// Rows of x as bit planes (tokens, bits, words), scales (tokens), and the sum of codes in each group (tokens, groups).
// Codes are round(x / scale) + 2^(bits - 1), or with `bipolar` floor(x / scale) + 2^(bits - 1), values lying in the middle of steps.
template <class T>
KERNEL(THREADS, 4)
pack_planes(const u16* x, u32* planes, float* scale, int* sums, int bits, int columns, int words, int groups, int words_per_group,
            int bipolar, s64 stride) {
  SHARED(shared);
  float* largest = reinterpret_cast<float*>(shared);
  const int lane = lane_id(), warp = warp_id();
  const u16* row = x + blockIdx.x * stride;
  float most = 0.0f;
  for (int k = threadIdx.x; k < columns; k += THREADS) most = maximum(most, magnitude(T::low(load(row + k))));
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) most = maximum(most, shuffle_xor(most, mask));
  if (lane == 0) largest[warp] = most;
  sync_block();
#pragma unroll
  for (int w = 0; w < WARPS; w++) most = maximum(most, largest[w]);
  const int middle = 1 << (bits - 1), top = 2 * middle - 1;
  const float reach = bipolar ? float(middle) : float(middle - 1);
  const float s = most > 0.0f ? maximum(quotient(most, reach), 1e-30f) : 0.0f;
  if (threadIdx.x == 0) store(scale + blockIdx.x, s);
  for (int group = warp; group < groups; group += WARPS) {
    int sum = 0;
    const int end = (group + 1) * words_per_group < words ? (group + 1) * words_per_group : words;
    for (int word = group * words_per_group; word < end; word++) {
      const int k = 32 * word + lane;
      int code = 0;  // beyond the columns, bits that count nowhere
      if (k < columns) {
        const float value = s > 0.0f ? quotient(T::low(load(row + k)), s) : 0.0f;
        const float whole = bipolar ? floor_of(value) : round_even(value);
        code = int(minimum(maximum(whole + float(middle), bipolar ? 0.0f : 1.0f), float(top)));
      }
      for (int i = 0; i < bits; i++) {
        const u32 plane = ballot((code >> i) & 1);
        if (lane == i) store(planes + (s64(blockIdx.x) * bits + i) * words + word, plane);
        sum += popcount(plane) << i;
      }
    }
    if (lane == 0) store(sums + s64(blockIdx.x) * groups + group, sum);
  }
}

// y[m][n] = x_scale[m] sum over groups of w_scale[g][n] ((aw u + bw) . (ax v + bx)), codes u of weights and v of x, the dot product
// from sum_ij 2^(i+j) popcount(u_i and v_j), the sums of codes and the number of columns. Warps share out the columns of a group.
template <class T, int P, int Q>
KERNEL(THREADS, 1)
bit_products(const u32* planes, const float* x_scale, const int* x_sums, const u32* w, const float* w_scale, const int* w_sums,
             u16* y, int tokens, int rows, int words, int blocks, int groups, int blocks_per_group, int columns, int aw, int bw,
             int ax, int bx) {
  SHARED(shared);
  int* partial = reinterpret_cast<int*>(shared);  // [warp][token][row]
  const int lane = lane_id(), warp = warp_id(), g = lane >> 2, c = lane & 3, first = blockIdx.y * TOKENS;
  float total = 0.0f;  // of the token and row of this thread, the first 128 of them
  const int token = threadIdx.x / ROWS, row = threadIdx.x % ROWS, m = first + token, n = blockIdx.x * ROWS + row;
  const bool mine = token < TOKENS && m < tokens && n < rows;
  for (int group = 0; group < groups; group++) {
    int sum[P + Q - 1][4] = {};  // by the weight 2^(i + j)
    const int end = (group + 1) * blocks_per_group < blocks ? (group + 1) * blocks_per_group : blocks;
    for (int block = group * blocks_per_group + warp; block < end; block += WARPS) {
      u32 b[Q][2];
#pragma unroll
      for (int j = 0; j < Q; j++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const int word = 8 * block + c + 4 * r;
          const bool valid = first + g < tokens && word < words;
          b[j][r] = valid ? load(planes + (s64(first + g) * Q + j) * words + word) : 0u;
        }
      }
#pragma unroll
      for (int i = 0; i < P; i++) {
        const Words4 four = load(reinterpret_cast<const Words4*>(w) + ((s64(blockIdx.x) * blocks + block) * P + i) * 32 + lane);
        const u32 a[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < Q; j++) mma_and(sum[i + j], a, b[j][0], b[j][1]);
      }
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
      int whole = 0;
#pragma unroll
      for (int i = 0; i < P + Q - 1; i++) whole += sum[i][e] << i;
      partial[(warp * TOKENS + 2 * c + (e & 1)) * ROWS + g + 8 * (e >> 1)] = whole;
    }
    sync_block();
    if (mine) {
      s64 dot = 0;
#pragma unroll
      for (int k = 0; k < WARPS; k++) dot += partial[(k * TOKENS + token) * ROWS + row];
      const int from = 256 * group * blocks_per_group, to = 256 * end < columns ? 256 * end : columns;
      dot = s64(aw) * ax * dot + s64(aw) * bx * load(w_sums + s64(group) * rows + n) +
            s64(bw) * ax * load(x_sums + s64(m) * groups + group) + s64(to - from) * bw * bx;
      total = multiply_add(load(w_scale + s64(group) * rows + n), float(dot), total);
    }
    sync_block();
  }
  if (mine) store(y + s64(m) * rows + n, u16(T::pack(total * load(x_scale + m), 0.0f) & 0xffffu));
}
