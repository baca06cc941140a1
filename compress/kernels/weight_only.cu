// y = x W^T with W in tiles of codes, for few rows of x, and W itself for many. See weight_only.py, and int8.py for x in bytes.

constexpr int WARPS = Panel::WARPS, THREADS = Panel::THREADS, BLOCKS = Panel::BLOCKS;

template <class A, class D, int META, int TOKENS> struct Stage {
  static constexpr int X = TOKENS * 16 * Activation<A>::CHUNKS, CODES = 128 * D::BITS, RECORD = Record<META>::BYTES;
  DEVICE_MEMBER int bytes(int records) { return X + BLOCKS * (CODES + records * RECORD); }
};

// The table in shared memory as numbers of type T in the lower half of words.
template <class T, class D> DEVICE void fill_table(u32* to, const float* table, int entries) {
  if constexpr (D::ENTRIES > 0)
    for (int i = threadIdx.x; i < entries; i += THREADS) to[i] = T::pack(load(table + i), 0.0f);
}

// Each warp takes every eighth tile of 64 columns of the block's rows and keeps its own ring of copies in shared memory, so that
// warps wait for one another at the end alone. The sums of a group are multiplied by its scales in float32.
template <class A, class D, int META, int TOKENS>
KERNEL(THREADS, TOKENS <= 16 ? 2 : 1)
wqmm(const unsigned char* x, const float* x_scale, const u32* codes, const unsigned char* meta, const float* table,
     const float* row_scale, const u16* bias, const float* addend, u16* y, float* whole, float* workspace, u32* counters,
     const u64* experts, const int* starts, int batches, int tokens, int rows, int columns, s64 stride, int tiles, int row_blocks,
     int tiles_per_split, int record_bits, int steps_per_group, u32 reciprocal, int stages, int entries) {
  SHARED(shared);
  using T = typename Activation<A>::Out;
  using S = Stage<A, D, META, TOKENS>;
  constexpr bool WHOLE = Activation<A>::BYTES == 1;  // sums are integers
  constexpr bool SHIFTS = Record<META>::SHIFTS;
  constexpr int NT = TOKENS / 8;
  const int lane = lane_id(), warp = warp_id(), g = lane >> 2, c = lane & 3;
  const int first_block = blockIdx.x * BLOCKS;
  int first_token = blockIdx.z % batches * TOKENS;
  if (experts) {  // four numbers for each: addresses of codes, records and scales of rows, and which rows of x are its
    const u64* mine = experts + 4 * (blockIdx.z / batches);
    codes = reinterpret_cast<const u32*>(load(mine));
    meta = reinterpret_cast<const unsigned char*>(load(mine + 1));
    row_scale = reinterpret_cast<const float*>(load(mine + 2));
    const u64 expert = load(mine + 3);
    first_token += load(starts + expert);
    tokens = load(starts + expert + 1);
    if (first_token >= tokens) return;
  }
  const int begin = blockIdx.y * tiles_per_split;
  const int end = begin + tiles_per_split < tiles ? begin + tiles_per_split : tiles;
  const int records = 1 << record_bits, stage_bytes = S::bytes(records);

  const u32* lookup = reinterpret_cast<const u32*>(shared);
  fill_table<T, D>(reinterpret_cast<u32*>(shared), table, entries);
  if constexpr (D::ENTRIES > 0) sync_block();
  unsigned char* ring = shared + 4 * D::ENTRIES + warp * stages * stage_bytes;

  // Where this lane copies from, for the tile that comes next; each call goes on to the warp's tile after that.
  constexpr int CHUNKS = Activation<A>::CHUNKS, EACH = 32 / CHUNKS, PIECES = S::RECORD / 16;
  const int token = lane / CHUNKS, chunk = lane % CHUNKS;
  int next = begin + warp, column = 64 * next + 64 / CHUNKS * chunk;
  const int live = (tokens - first_token - token + EACH - 1) / EACH;  // rounds in which there is a token for it
  const s64 row_step = EACH * stride * Activation<A>::BYTES;
  const unsigned char* x_from = x + ((first_token + token) * stride + column) * Activation<A>::BYTES;
  s64 code_place = (s64(first_block) * tiles + next) * 32;  // in words, times the bits of a plane
  const s64 block_step = s64(tiles) * 32, plane_step = block_step * row_blocks;
  const unsigned char* meta_from = meta + s64(first_block) * S::RECORD + 16 * lane;
  const bool second = first_block + 1 < row_blocks, has_record = lane < PIECES || (lane < 2 * PIECES && second);
  auto fetch = [&](unsigned char* stage) {
    if (next < end) {
      const unsigned char* from = x_from;
#pragma unroll
      for (int i = 0; i < TOKENS / EACH; i++) {
        copy16(stage + Activation<A>::place(EACH * i + token, chunk), from, i < live && column < columns);
        from += row_step;
      }
      unsigned char* to_codes = stage + S::X;
      const u32* plane = codes;
#pragma unroll
      for (int p = 8; p > 0; p >>= 1) {
        if (D::BITS & p) {
          const u32* of = plane + code_place * p;
#pragma unroll
          for (int i = 0; i < 8 * p; i += 32) {
            const int piece = i + lane;  // at 8 bits a lane has two, which go to separate halves
            const int at = p == 8 ? (piece & 1) * 32 + (piece >> 1) : piece;
            if (p >= 4 || piece < 8 * p) {
              copy16(to_codes + 16 * at, of + 4 * piece, true);
              copy16(to_codes + S::CODES + 16 * at, of + block_step * p + 4 * piece, second);
            }
          }
          to_codes += 128 * p;
          plane += plane_step * p;
        }
      }
      unsigned char* to = stage + S::X + BLOCKS * S::CODES + 16 * lane;
#pragma unroll 1
      for (int at = 0; at < records; at++) {
        const int group = group_of(4 * next + (at << (2 - record_bits)), steps_per_group, reciprocal);
        if (lane < BLOCKS * PIECES) copy16(to, meta_from + group * (s64(row_blocks) * S::RECORD), has_record);
        to += BLOCKS * S::RECORD;
      }
    }
    copy_commit();
    next += WARPS;
    column += 64 * WARPS;
    code_place += 32 * WARPS;
    x_from += 64 * WARPS * Activation<A>::BYTES;
  };

  float sum[BLOCKS][NT][4] = {};
  auto compute = [&](const unsigned char* stage) {
    u32 words[BLOCKS][D::BITS];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      const u32* from = reinterpret_cast<const u32*>(stage + S::X + b * S::CODES);
      if constexpr (D::BITS == 8) {
        take<4>(words[b], 0, from + 4 * lane);
        take<4>(words[b], 4, from + 128 + 4 * lane);
      } else {
        take_planes<D::BITS>(words[b], from);
      }
    }
    const unsigned char* record = stage + S::X + BLOCKS * S::CODES;
    if constexpr (WHOLE) {
      int part[BLOCKS][NT][4] = {}, ones[NT][4] = {};
      u32 b[NT][4];
#pragma unroll
      for (int n = 0; n < NT; n++) load_matrices(b[n], stage + Activation<A>::place(8 * n + (lane & 7), lane >> 3));
#pragma unroll
      for (int step = 0; step < 2; step++) {  // of 32 columns
        const u32 one[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
#pragma unroll
        for (int n = 0; n < NT; n++) mma_u8s8(ones[n], one, b[n][2 * step], b[n][2 * step + 1]);
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
          u32 a[4];
#pragma unroll
          for (int r = 0; r < 4; r++) a[r] = codes_of<8>(words[i], 4 * step + r);
#pragma unroll
          for (int n = 0; n < NT; n++) mma_u8s8(part[i][n], a, b[n][2 * step], b[n][2 * step + 1]);
        }
        if (step == 1 || record_bits == 1) {
#pragma unroll
          for (int i = 0; i < BLOCKS; i++) {
            float scale[2], shift[2];
            scales<META, D::BITS>(record + ((record_bits == 1 ? step : 0) * BLOCKS + i) * S::RECORD, g, scale, shift);
#pragma unroll
            for (int n = 0; n < NT; n++) {
#pragma unroll
              for (int e = 0; e < 4; e++) {
                const int whole = part[i][n][e] - (1 << (D::BITS - 1)) * ones[n][e];
                sum[i][n][e] = multiply_add(scale[e >> 1], float(whole), sum[i][n][e]);
                if constexpr (SHIFTS) sum[i][n][e] = multiply_add(shift[e >> 1], float(ones[n][e]), sum[i][n][e]);
                part[i][n][e] = 0;
              }
            }
          }
#pragma unroll
          for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) ones[n][e] = 0;
          }
        }
      }
    } else {
      float part[BLOCKS][NT][4] = {}, ones[NT][4] = {};  // sums of a group; of x alone, for shifts
#pragma unroll
      for (int half = 0; half < 2; half++) {
        u32 b[NT][4];
#pragma unroll
        for (int n = 0; n < NT; n++) {
          const int token = 8 * n + (lane & 7), chunk = 4 * half + (lane >> 3);
          load_matrices(b[n], stage + Activation<A>::place(token, chunk));
        }
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
          const int step = 2 * half + odd, at = step >> (2 - record_bits);
          if constexpr (SHIFTS) {
            constexpr u32 one = Same<T, Float16>::value ? 0x3c003c00u : 0x3f803f80u;
            const u32 a[4] = {one, one, one, one};
#pragma unroll
            for (int n = 0; n < NT; n++) T::mma(ones[n], a, b[n][2 * odd], b[n][2 * odd + 1]);
          }
#pragma unroll
          for (int i = 0; i < BLOCKS; i++) {
            u32 select[2], a[4];
            selects<META>(record + (at * BLOCKS + i) * S::RECORD, g, select);
#pragma unroll
            for (int r = 0; r < 4; r++) a[r] = D::template decode<T>(words[i], 4 * step + r, lookup, select[r & 1]);
#pragma unroll
            for (int n = 0; n < NT; n++) T::mma(part[i][n], a, b[n][2 * odd], b[n][2 * odd + 1]);
          }
          if (((step + 1) & ((4 >> record_bits) - 1)) == 0) {  // the last step of a record
#pragma unroll
            for (int i = 0; i < BLOCKS; i++) {
              float scale[2], shift[2];
              scales<META, D::BITS>(record + (at * BLOCKS + i) * S::RECORD, g, scale, shift);
#pragma unroll
              for (int n = 0; n < NT; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                  sum[i][n][e] = multiply_add(scale[e >> 1], part[i][n][e], sum[i][n][e]);
                  if constexpr (SHIFTS) sum[i][n][e] = multiply_add(shift[e >> 1], ones[n][e], sum[i][n][e]);
                  part[i][n][e] = 0.0f;
                }
              }
            }
#pragma unroll
            for (int n = 0; n < NT; n++) {
#pragma unroll
              for (int e = 0; e < 4; e++) ones[n][e] = 0.0f;
            }
          }
        }
      }
    }
  };

  through_ring(ring, stages, stage_bytes, (end - begin - warp + WARPS - 1) / WARPS, fetch, compute);
  add_up<T, TOKENS>(shared, sum, {x_scale, row_scale, bias, addend, y, whole, workspace, counters}, first_block, first_token, tokens,
                    rows);
}

// W (rows, columns) in type T, rows first..first + rows of which `first` is a multiple of 16; a warp per tile.
template <class T, class D, int META>
KERNEL(THREADS, 2)
dequantize(const u32* codes, const unsigned char* meta, const float* table, const float* row_scale, u16* w, int first, int rows,
           int columns, int tiles, int row_blocks, int record_bits, int steps_per_group, u32 reciprocal, int entries) {
  SHARED(shared);
  const int lane = lane_id(), warp = warp_id(), g = lane >> 2, c = lane & 3;
  const u32* lookup = reinterpret_cast<const u32*>(shared);
  fill_table<T, D>(reinterpret_cast<u32*>(shared), table, entries);
  if constexpr (D::ENTRIES > 0) sync_block();
  unsigned char* stage = shared + 4 * D::ENTRIES + warp * 2048;  // 16 rows of 64 numbers
  const s64 count = s64((rows + 15) / 16) * tiles;
  for (s64 at = s64(blockIdx.x) * WARPS + warp; at < count; at += s64(gridDim.x) * WARPS) {
    const int block = int(at / tiles), tile = int(at % tiles);
    const s64 place = at + s64(first / 16) * tiles;
    u32 words[D::BITS];
    const u32* from = codes;
    int start = 0;
#pragma unroll
    for (int p = 8; p > 0; p >>= 1) {
      if (D::BITS & p) {
#pragma unroll
        for (int i = 0; i < 8; i++)
          if (i < p) words[start + i] = load(from + (place * 32 + lane) * p + i);
        start += p;
        from += s64(row_blocks) * tiles * 32 * p;
      }
    }
    float factor[2] = {1.0f, 1.0f};
    const int n = first + 16 * block + g;
    if (row_scale) {
      if (16 * block + g < rows) factor[0] = load(row_scale + n);
      if (16 * block + g + 8 < rows) factor[1] = load(row_scale + n + 8);
    }
#pragma unroll
    for (int step = 0; step < 4; step++) {
      const s64 group = group_of(4 * tile + step, steps_per_group, reciprocal);
      const unsigned char* record = meta + (group * row_blocks + first / 16 + block) * Record<META>::BYTES;
      float scale[2], shift[2];
      u32 select[2];
      scales<META, D::BITS>(record, g, scale, shift);
      selects<META>(record, g, select);
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const u32 pair = D::template decode<T>(words, 4 * step + r, lookup, select[r & 1]);
        const float s = scale[r & 1], t = shift[r & 1], f = factor[r & 1];
        const u32 value = T::pack(multiply_add(T::low(pair), s, t) * f, multiply_add(T::high(pair), s, t) * f);
        const int row = g + 8 * (r & 1), column = 16 * step + 2 * c + 8 * (r >> 1);
        *reinterpret_cast<u32*>(stage + staged(row, column)) = value;
      }
    }
    store_tile(stage, w, 16 * block, 64 * tile, rows, columns);
  }
}
