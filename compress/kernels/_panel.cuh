// What kernels share that multiply 32 rows of W by some tokens in a thread block: how x lies in shared memory, and the sums at the end.

struct Panel {
  static constexpr int WARPS = 8, THREADS = 32 * WARPS;
  static constexpr int BLOCKS = 2;          // row-blocks of 16 that a thread block computes
  static constexpr int ROWS = 16 * BLOCKS;  // rows of W that a thread block computes
  static constexpr int STRIDE = ROWS + 1;   // of a token's sums in shared memory
};

// What x consists of: 16-bit numbers of the result's type, or bytes with a scale for each token.
template <class T> struct Bytes {};
template <class X> struct Activation {
  using Out = X;
  static constexpr int BYTES = 2, CHUNKS = 8;  // of a number; of 16 bytes in a tile's columns
  // Where a chunk of a token lies in its stage: so that eight tokens of a column, or eight chunks of a token, meet no bank twice.
  DEVICE_MEMBER int place(int token, int chunk) { return 128 * token + 16 * (chunk ^ (token & 7)); }
};
template <class T> struct Activation<Bytes<T>> {
  using Out = T;
  static constexpr int BYTES = 1, CHUNKS = 4;
  DEVICE_MEMBER int place(int token, int chunk) { return 64 * token + 16 * (chunk ^ ((token >> 1) & 3)); }
};

// COUNT words at `from`, which is aligned to as many, in one access.
template <int COUNT, int N> DEVICE void take(u32 (&words)[N], int start, const u32* from) {
  if constexpr (COUNT == 4) {
    const Words4 four = *reinterpret_cast<const Words4*>(from);
    words[start] = four.x, words[start + 1] = four.y, words[start + 2] = four.z, words[start + 3] = four.w;
  } else if constexpr (COUNT == 2) {
    const Words2 two = *reinterpret_cast<const Words2*>(from);
    words[start] = two.x, words[start + 1] = two.y;
  } else {
    words[start] = *from;
  }
}

// The words of this lane of a tile's planes of 4, 2 and 1 bits, one behind the other.
template <int BITS> DEVICE void take_planes(u32 (&words)[BITS], const u32* planes) {
  const int lane = lane_id();
  if constexpr (BITS & 4) take<4>(words, 0, planes + 4 * lane);
  if constexpr (BITS & 2) take<2>(words, BITS & 4, planes + 32 * (BITS & 4) + 2 * lane);
  if constexpr (BITS & 1) take<1>(words, BITS & 6, planes + 32 * (BITS & 6) + lane);
}

// Compute on a warp's tiles while copies of the next ones are under way, into a ring of `stages` pieces of shared memory. A call of
// `fetch` begins the copies of the next tile, or none, and commits them.
template <class Fetch, class Compute>
DEVICE void through_ring(unsigned char* ring, int stages, int stage_bytes, int count, Fetch& fetch, Compute& compute) {
  int slot = 0;
  for (int i = 0; i < stages - 1; i++) fetch(ring + i * stage_bytes);
  for (int tile = 0; tile < count; tile++) {
    if (stages == 2) {
      copy_wait<0>();
    } else if (stages == 3) {
      copy_wait<1>();
    } else {
      copy_wait<2>();
    }
    sync_warp();  // copies of all lanes are there, and all have read what the next copies overwrite
    const int free = slot == 0 ? stages - 1 : slot - 1;
    fetch(ring + free * stage_bytes);
    compute(ring + slot * stage_bytes);
    slot = slot + 1 == stages ? 0 : slot + 1;
  }
  copy_wait<0>();
  sync_block();
}

// Where sums go: y = (sum * scale of the token * scale of the row + addend) + bias, or without the bias to `whole` in float32.
struct Output {
  const float* x_scale;
  const float* row_scale;
  const u16* bias;
  const float* addend;
  u16* y;
  float* whole;
  float* workspace;
  u32* counters;
};

// Add the sums of the warps in their order, and those of blocks that share the columns in theirs, so that results do not depend on
// who comes first. Fragments of `sum` are those of mma.m16n8k16.
template <class T, int TOKENS>
DEVICE void add_up(unsigned char* shared, const float (&sum)[Panel::BLOCKS][TOKENS / 8][4], const Output& to, int first_block,
                   int first_token, int tokens, int rows) {
  constexpr int ROWS = Panel::ROWS, STRIDE = Panel::STRIDE, WARPS = Panel::WARPS, THREADS = Panel::THREADS;
  const int lane = lane_id(), warp = warp_id(), g = lane >> 2, c = lane & 3;
  float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < Panel::BLOCKS; i++) {
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int token = 8 * n + 2 * c + (e & 1), row = 16 * i + g + 8 * (e >> 1);
        sums[(warp * TOKENS + token) * STRIDE + row] = sum[i][n][e];
      }
    }
  }
  sync_block();
  auto finish = [&](int token, int row, float value) {
    const int m = first_token + token, n = 16 * first_block + row;
    if (m >= tokens || n >= rows) return;
    const s64 at = s64(m) * rows + n;
    if (to.x_scale) value *= load(to.x_scale + m);
    if (to.row_scale) value *= load(to.row_scale + n);
    if (to.addend) value += load(to.addend + at);
    if (to.whole) return store(to.whole + at, value);  // float32 for whoever adds more
    if (to.bias) value += T::low(load(to.bias + n));
    store(to.y + at, u16(T::pack(value, 0.0f) & 0xffffu));
  };
  const int splits = gridDim.y, here = blockIdx.z * gridDim.x + blockIdx.x;
  float* partial = to.workspace + s64(here) * splits * ROWS * TOKENS;
  for (int e = threadIdx.x; e < ROWS * TOKENS; e += THREADS) {
    const int token = e / ROWS, row = e % ROWS;
    float value = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) value += sums[(w * TOKENS + token) * STRIDE + row];
    if (splits == 1) {
      finish(token, row, value);
    } else {
      store(partial + blockIdx.y * ROWS * TOKENS + e, value);
    }
  }
  if (splits == 1) return;

  // The block that comes last adds the parts of all, in their order.
  u32* order = reinterpret_cast<u32*>(sums + WARPS * TOKENS * STRIDE);
  fence();
  sync_block();
  if (threadIdx.x == 0) *order = atomic_add(to.counters + here, 1);
  sync_block();
  if (*order != u32(splits - 1)) return;
  fence();
  for (int e = threadIdx.x; e < ROWS * TOKENS; e += THREADS) {
    float value = 0.0f;
    for (int s = 0; s < splits; s++) value += load_fresh(partial + s * ROWS * TOKENS + e);
    finish(e / ROWS, e % ROWS, value);
  }
  if (threadIdx.x == 0) store(to.counters + here, 0u);  // as it was found
}

// A tile of 16 rows and 64 columns of 16-bit numbers, which the lanes of a warp put into shared memory at `staged`, to W from there.
DEVICE int staged(int row, int column) { return 128 * row + 2 * (column ^ (8 * (row & 7))); }
DEVICE void store_tile(const unsigned char* stage, u16* w, int first_row, int first_column, int rows, int columns) {
  const int lane = lane_id();
  sync_warp();
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = 4 * i + (lane >> 3), chunk = lane & 7, column = first_column + 8 * chunk;
    const u32* value = reinterpret_cast<const u32*>(stage + 128 * row + 16 * (chunk ^ (row & 7)));
    if (first_row + row < rows) {
      u16* to = w + s64(first_row + row) * columns + column;
      if (column + 8 <= columns && (columns & 7) == 0) {
        store(reinterpret_cast<Words4*>(to), *reinterpret_cast<const Words4*>(value));
      } else {
        for (int e = 0; e < 8 && column + e < columns; e++) store(to + e, u16(value[e >> 1] >> (16 * (e & 1))));
      }
    }
  }
  sync_warp();
}
