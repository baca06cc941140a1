// Rounding column after column with feedback of the errors, see operators.py: 8 lanes per row of the weight, each with every
// eighth of up to 128 columns, and the feedback among those columns in shared memory.

constexpr int SPAN = 128, STRIDE = SPAN + 1, LANES = 8, OWN = SPAN / LANES, THREADS = 256, ROWS = THREADS / LANES;

KERNEL(THREADS, 1)
round_columns(float* target, float* delta, float* steps, const float* feedback, const float* scale, const float* inverse,
              const float* low, const float* high, const s64* groups, int columns, int rows, s64 stride, s64 feedback_stride) {
  SHARED(shared);
  float* among = reinterpret_cast<float*>(shared);  // [i][k]: of column i on column k; written along i, and lanes meet in no bank
  for (int e = threadIdx.x; e < columns * columns; e += THREADS) {
    const int k = e / columns, i = e % columns;
    if (i < k) among[i * STRIDE + k] = load(feedback + k * feedback_stride + i);
  }
  sync_block();
  const int part = lane_id() % LANES, row = blockIdx.x * ROWS + threadIdx.x / LANES;
  const bool live = row < rows;
  float want[OWN], left[OWN], step[OWN], s[OWN], inv[OWN], lo[OWN], hi[OWN];
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int k = LANES * i + part;
    want[i] = left[i] = step[i] = s[i] = inv[i] = lo[i] = hi[i] = 0.0f;
    if (live && k < columns) {
      const s64 at = load(groups + k) * rows + row;
      want[i] = load(target + k * stride + row);
      left[i] = load(delta + k * stride + row);
      s[i] = load(scale + at);
      inv[i] = load(inverse + at);
      lo[i] = load(low + at);
      hi[i] = load(high + at);
    }
  }
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    for (int owner = 0; owner < LANES && LANES * i + owner < columns; owner++) {
      // All lanes compute, the owner of the column keeps it.
      const float half = lo[i] - floor_of(lo[i]);
      const float scaled = product(want[i], inv[i]);
      const float nearest = minimum(maximum(round_even(scaled - half) + half, lo[i]), hi[i]);
      const float error = left[i] - product(nearest, s[i]);
      if (part == owner) {
        step[i] = nearest;
        left[i] = error;
      }
      const float d = shuffle(error, owner, LANES);
      const float* of = among + (LANES * i + owner) * STRIDE + part;
      if (part > owner && LANES * i + part < columns) want[i] = multiply_add(d, of[LANES * i], want[i]);
#pragma unroll
      for (int later = i + 1; later < OWN; later++)
        if (LANES * later + part < columns) want[later] = multiply_add(d, of[LANES * later], want[later]);
    }
  }
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int k = LANES * i + part;
    if (live && k < columns) {
      store(target + k * stride + row, want[i]);
      store(delta + k * stride + row, left[i]);
      store(steps + k * s64(rows) + row, step[i]);
    }
  }
}
