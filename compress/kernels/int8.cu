// Rows of x as bytes: to[m] = round(x[m] / scale[m]), scale[m] = max |x[m]| / 127. A block per row, columns padded with zeros.

constexpr int THREADS = 256;

template <class T>
KERNEL(THREADS, 4)
quantize_rows(const u16* x, signed char* to, float* scale, int columns, int padded, s64 stride) {
  SHARED(shared);
  float* largest = reinterpret_cast<float*>(shared);
  const u16* row = x + blockIdx.x * stride;
  float most = 0.0f;
  for (int k = threadIdx.x; k < columns; k += THREADS) most = maximum(most, magnitude(T::low(load(row + k))));
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) most = maximum(most, shuffle_xor(most, mask));
  if (lane_id() == 0) largest[warp_id()] = most;
  sync_block();
#pragma unroll
  for (int w = 0; w < THREADS / 32; w++) most = maximum(most, largest[w]);
  // A row of zeros has the scale 0 and bytes of 0; beyond that, the least scale whose inverse is finite.
  const float s = most > 0.0f ? maximum(quotient(most, 127.0f), 1e-30f) : 0.0f;
  if (threadIdx.x == 0) store(scale + blockIdx.x, s);
  for (int k = threadIdx.x; k < padded; k += THREADS) {
    const float value = k < columns && s > 0.0f ? round_even(quotient(T::low(load(row + k)), s)) : 0.0f;
    store(to + blockIdx.x * s64(padded) + k, static_cast<signed char>(int(minimum(maximum(value, -127.0f), 127.0f))));
  }
}
