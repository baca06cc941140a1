// Rounding column after column with feedback of the errors, see compress/operators.py: 8 lanes per row of the weight, each with every
// eighth of up to 128 columns, and the feedback among those columns in shared memory.

constexpr int SPAN = 128, LANES = 8, OWN = SPAN / LANES, THREADS = 256, ROWS = THREADS / LANES;

KERNEL(THREADS, 1)
round_columns(float* target, float* delta, float* steps, const float* feedback, const float* scale, const float* inverse,
              const float* low, const float* high, const s64* groups, int columns, int rows, s64 stride, s64 feedback_stride) {
  SHARED(shared);
  float* among = reinterpret_cast<float*>(shared);  // [i][k]: of column i on column k
  for (int e = threadIdx.x; e < columns * columns; e += THREADS) {
    const int k = e / columns, i = e % columns;
    if (i < k) among[i * SPAN + k] = load(feedback + k * feedback_stride + i);
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
      const float* of = among + (LANES * i + owner) * SPAN + part;
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

// The nearest centroid of each point by sum_d w_d (x_d - c_d)^2, less what is the same for all centroids: sum_d c_d (w_d c_d - 2 w_d x_d).
// Centroids go through shared memory, each with the sum of its squares behind it; a thread keeps some points in registers.
template <int DIM, bool WEIGHTED>
KERNEL(THREADS, 2)
nearest_centroids(const float* points, const float* weights, const float* centroids, s64* found, s64 count, int centroid_count) {
  SHARED(shared);
  constexpr int POINTS = DIM > 8 ? 2 : 4, STEP = 128, STRIDE = DIM + 1;
  float* tile = reinterpret_cast<float*>(shared);
  const s64 first = s64(blockIdx.x) * THREADS * POINTS + threadIdx.x;
  float slope[POINTS][DIM], curve[POINTS][WEIGHTED ? DIM : 1], best[POINTS];
  int index[POINTS];
#pragma unroll
  for (int p = 0; p < POINTS; p++) {
    const s64 at = first + p * THREADS;
    best[p] = as_float(0x7f800000u);
    index[p] = 0;
#pragma unroll
    for (int d = 0; d < DIM; d++) {
      const float x = at < count ? load(points + at * DIM + d) : 0.0f;
      if constexpr (WEIGHTED) {
        curve[p][d] = at < count ? load(weights + at * DIM + d) : 0.0f;
        slope[p][d] = -2.0f * curve[p][d] * x;
      } else {
        slope[p][d] = -2.0f * x;
      }
    }
  }
  for (int start = 0; start < centroid_count; start += STEP) {
    const int here = centroid_count - start < STEP ? centroid_count - start : STEP;
    sync_block();  // all are done with the ones before
    if (int(threadIdx.x) < here) {
      float square = 0.0f;
#pragma unroll
      for (int d = 0; d < DIM; d++) {
        const float c = load(centroids + s64(start + threadIdx.x) * DIM + d);
        tile[threadIdx.x * STRIDE + d] = c;
        square = multiply_add(c, c, square);
      }
      tile[threadIdx.x * STRIDE + DIM] = square;
    }
    sync_block();
#pragma unroll 2
    for (int i = 0; i < here; i++) {
      float c[STRIDE];
#pragma unroll
      for (int d = 0; d < STRIDE; d++) c[d] = tile[i * STRIDE + d];
#pragma unroll
      for (int p = 0; p < POINTS; p++) {
        float score = WEIGHTED ? 0.0f : c[DIM];
#pragma unroll
        for (int d = 0; d < DIM; d++) {
          if constexpr (WEIGHTED) {
            score = multiply_add(multiply_add(curve[p][d], c[d], slope[p][d]), c[d], score);
          } else {
            score = multiply_add(slope[p][d], c[d], score);
          }
        }
        if (score < best[p]) best[p] = score, index[p] = start + i;
      }
    }
  }
#pragma unroll
  for (int p = 0; p < POINTS; p++)
    if (first + p * THREADS < count) store(found + first + p * THREADS, s64(index[p]));
}
