// What kernels share that multiply some rows of W by some tokens in a thread block: how x lies in shared memory, and the sums at the end.

// Each of the 8 warps of a thread block has 32 rows of W. TEAM warps with different rows work on the same columns and share what they
// need of x; the teams share out the columns.
template <int OF> struct Panel {
  static constexpr int WARPS = 8, THREADS = 32 * WARPS;
  static constexpr int BLOCKS = 2;  // row-blocks of 16 that a warp computes
  static constexpr int TEAM = OF, TEAMS = WARPS / TEAM;
  static constexpr int ROWS = 16 * BLOCKS * TEAM;  // of a thread block
  static constexpr int STRIDE = ROWS + 4;          // of a token's sums in shared memory: lanes of a warp meet in no bank
};

// The team for some tokens of a block, so that reading x costs no more than reading codes: weight_only.py has the same numbers.
template <int TOKENS> constexpr int TEAM_FOR = TOKENS <= 8 ? 1 : TOKENS <= 16 ? 2 : 4;

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

// The words of a lane of a tile's planes, one behind the other. Planes of TILES tiles lie behind one another; of 8 bits, the two
// accesses of a lane are to separate halves of a tile.
template <int TILES, int BITS> DEVICE void take_planes(u32 (&words)[BITS], const u32* planes, int tile, int lane) {
  if constexpr (BITS == 8) {
    take<4>(words, 0, planes + 256 * tile + 4 * lane);
    take<4>(words, 4, planes + 256 * tile + 128 + 4 * lane);
  } else {
    if constexpr (BITS & 4) take<4>(words, 0, planes + 128 * tile + 4 * lane);
    if constexpr (BITS & 2) take<2>(words, BITS & 4, planes + TILES * 32 * (BITS & 4) + 64 * tile + 2 * lane);
    if constexpr (BITS & 1) take<1>(words, BITS & 6, planes + TILES * 32 * (BITS & 6) + 32 * tile + lane);
  }
}

// Compute on pieces of columns while copies of the next ones are under way, into a ring of `stages` pieces of a team's shared memory.
// A call of `fetch` begins the copies of this warp's share of the next piece, or none, and commits them; `count` is the same for all
// warps of a team.
template <int TEAM, class Fetch, class Compute>
DEVICE void through_ring(unsigned char* ring, int stages, int stage_bytes, int count, Fetch& fetch, Compute& compute) {
  const int whole = stages * stage_bytes;
  int here = 0, free = whole - stage_bytes;  // what is computed on, and what is copied to
  for (int i = 0; i < stages - 1; i++) fetch(ring + i * stage_bytes);
  for (int at = 0; at < count; at++) {
    if (stages == 2) {
      copy_wait<0>();
    } else if (stages == 3) {
      copy_wait<1>();
    } else {
      copy_wait<2>();
    }
    // Copies of all lanes are there, and all have read what the next copies overwrite.
    if constexpr (TEAM == 1) {
      sync_warp();
    } else {
      sync_team(1 + warp_id() / TEAM, 32 * TEAM);
    }
    fetch(ring + free);
    compute(ring + here);
    free = here;
    here += stage_bytes;
    if (here == whole) here = 0;
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
  int tokens, rows;
};

// Write the sums of four rows from n on of token m.
template <class T> DEVICE void write_four(const Output& to, int m, int n, const Floats4& sums) {
  const bool vector = n + 4 <= to.rows && (to.rows & 3) == 0;  // then all of them are there, and aligned
  const s64 at = s64(m) * to.rows + n;
  float value[4] = {sums.x, sums.y, sums.z, sums.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (n + i >= to.rows) break;
    if (to.x_scale) value[i] *= load(to.x_scale + m);
    if (to.row_scale) value[i] *= load(to.row_scale + n + i);
    if (to.addend) value[i] += load(to.addend + at + i);
    if (to.bias && !to.whole) value[i] += T::low(load(to.bias + n + i));
    if (vector) continue;
    if (to.whole) {
      store(to.whole + at + i, value[i]);
    } else {
      store(to.y + at + i, u16(T::pack(value[i], 0.0f) & 0xffffu));
    }
  }
  if (!vector) return;
  if (to.whole) {
    store(reinterpret_cast<Floats4*>(to.whole + at), Floats4{value[0], value[1], value[2], value[3]});
  } else {
    store(reinterpret_cast<Words2*>(to.y + at), Words2{T::pack(value[0], value[1]), T::pack(value[2], value[3])});
  }
}

DEVICE Floats4 plus(const Floats4& a, const Floats4& b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

// Add the sums of the teams in their order, and those of blocks that share the columns in theirs, so that results do not depend on
// who comes first. Fragments of `sum` are those of mma.m16n8k16.
template <class T, int TEAM, int TOKENS>
DEVICE void add_up(unsigned char* shared, const float (&sum)[Panel<TEAM>::BLOCKS][TOKENS / 8][4], const Output& to, int first_row,
                   int first_token) {
  using P = Panel<TEAM>;
  constexpr int FOURS = P::ROWS / 4, STEP = P::STRIDE / 4;
  const int lane = lane_id(), team = warp_id() / TEAM, member = warp_id() % TEAM, g = lane >> 2, c = lane & 3;
  float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < P::BLOCKS; i++) {
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int token = 8 * n + 2 * c + (e & 1), row = 16 * (P::BLOCKS * member + i) + g + 8 * (e >> 1);
        sums[(team * TOKENS + token) * P::STRIDE + row] = sum[i][n][e];
      }
    }
  }
  sync_block();
  const int splits = gridDim.y, here = blockIdx.z * gridDim.x + blockIdx.x;
  const int live = to.tokens - first_token < TOKENS ? to.tokens - first_token : TOKENS;
  Floats4* partial = reinterpret_cast<Floats4*>(to.workspace) + s64(here) * splits * FOURS * TOKENS;
  for (int e = threadIdx.x; e < FOURS * live; e += P::THREADS) {
    const int token = e / FOURS, four = e % FOURS;
    const Floats4* from = reinterpret_cast<const Floats4*>(sums) + token * STEP + four;
    Floats4 value = *from;
#pragma unroll
    for (int w = 1; w < P::TEAMS; w++) value = plus(value, from[w * TOKENS * STEP]);
    if (splits == 1) {
      write_four<T>(to, first_token + token, first_row + 4 * four, value);
    } else {
      store(partial + blockIdx.y * FOURS * TOKENS + e, value);
    }
  }
  if (splits == 1) return;

  // The block that comes last adds the parts of all, in their order.
  u32* order = reinterpret_cast<u32*>(sums + P::TEAMS * TOKENS * P::STRIDE);
  fence();
  sync_block();
  if (threadIdx.x == 0) *order = atomic_add(to.counters + here, 1);
  sync_block();
  if (*order != u32(splits - 1)) return;
  fence();
  constexpr int AT_ONCE = FOURS * TOKENS / P::THREADS >= 4 ? 4 : 1;  // sums under way, as each takes long to come
  for (int first = threadIdx.x; first < FOURS * live; first += AT_ONCE * P::THREADS) {
    Floats4 value[AT_ONCE] = {};
    for (int s = 0; s < splits; s++) {
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const int e = first + i * P::THREADS;
        if (e < FOURS * live) value[i] = plus(value[i], load_fresh(partial + s * FOURS * TOKENS + e));
      }
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int e = first + i * P::THREADS;
      if (e < FOURS * live) write_four<T>(to, first_token + e / FOURS, first_row + 4 * (e % FOURS), value[i]);
    }
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
