// Which centroid is nearest to each point, see assign in operators.py and nearest.py.

constexpr int THREADS = 256;

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
