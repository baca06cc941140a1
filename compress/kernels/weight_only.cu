// y = x W^T with W in tiles of codes, for few rows of x, and W itself for many. See weight_only.py, and int8.py for x in bytes.

constexpr int WARPS = Panel<1>::WARPS, THREADS = Panel<1>::THREADS, BLOCKS = Panel<1>::BLOCKS;

template <bool V> struct Flag { static constexpr bool value = V; };

// A piece of columns in shared memory, TILES tiles wide: x for a team, then for each of its warps codes of its row-blocks, in planes
// of TILES tiles, and records, of the piece's groups in their order.
template <class A, class D, int META, int TOKENS, int TILES> struct Stage {
  static constexpr int TEAM = TEAM_FOR<TOKENS>;
  static constexpr int X = TOKENS * 16 * Activation<A>::CHUNKS, EIGHT = X / TOKENS * 8;  // of a tile, and of eight tokens in it
  static constexpr int CODES = TILES * 128 * D::BITS, RECORD = Record<META>::BYTES;
  static constexpr int STEPS = 4 * TILES;  // of 16 columns
  DEVICE_MEMBER int warp_bytes(int records) { return BLOCKS * (CODES + records * RECORD); }
  DEVICE_MEMBER int bytes(int records) { return TILES * X + TEAM * warp_bytes(records); }
};

// The table in shared memory as numbers of type T in the lower half of words.
template <class T, class D> DEVICE void fill_table(u32* to, const float* table, int entries) {
  if constexpr (D::ENTRIES > 0)
    for (int i = threadIdx.x; i < entries; i += THREADS) to[i] = T::pack(load(table + i), 0.0f);
}

// sum += scale * part + shift * ones, for the rows g and g + 8; what was added is 0 afterwards.
template <bool SHIFTS, class Part, int NT>
DEVICE void scale_up(float (&sum)[NT][4], Part (&part)[NT][4], const Part (&ones)[NT][4], const float (&scale)[2],
                     const float (&shift)[2]) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      sum[n][e] = multiply_add(scale[e >> 1], float(part[n][e]), sum[n][e]);
      if constexpr (SHIFTS) sum[n][e] = multiply_add(shift[e >> 1], float(ones[n][e]), sum[n][e]);
      part[n][e] = 0;
    }
  }
}
template <class Part, int NT> DEVICE void clear(Part (&part)[NT][4]) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
#pragma unroll
    for (int e = 0; e < 4; e++) part[n][e] = 0;
  }
}

// Where a lane reads: its number, and the chunks of x of its rows of ldmatrix, in the first half of a tile's columns and the second.
struct Reads {
  u32 lane, x[2];
};

// Add the products of a piece with x in 16-bit numbers. `codes` and `record` are those of a warp; a record is that of 1 / records of
// the piece, or of all of it where ALL.
template <bool ALL, class S, class T, class D, int META, int TILES, int NT>
DEVICE void multiply_numbers(float (&sum)[BLOCKS][NT][4], const unsigned char* x, const unsigned char* codes, const Reads& of,
                             const u32* lookup, int record_bits) {
  constexpr bool SHIFTS = Record<META>::SHIFTS;
  constexpr u32 ONE = Same<T, Float16>::value ? 0x3c003c00u : 0x3f803f80u;
  const unsigned char* record = codes + BLOCKS * S::CODES;
  const int g = of.lane >> 2, record_steps = S::STEPS >> record_bits;
  float part[BLOCKS][NT][4] = {}, ones[NT][4] = {};  // sums of a group; of x alone, for shifts
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    u32 words[BLOCKS][D::BITS];
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) take_planes<TILES>(words[i], reinterpret_cast<const u32*>(codes + i * S::CODES), tile, of.lane);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 b[NT][4];
#pragma unroll
      for (int n = 0; n < NT; n++)
        load_matrices(b[n], x + tile * S::X + n * S::EIGHT + of.x[half]);
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        const int step = 4 * tile + 2 * half + odd, at = ALL ? 0 : (step << record_bits) / S::STEPS;
        if constexpr (SHIFTS) {
          const u32 a[4] = {ONE, ONE, ONE, ONE};
#pragma unroll
          for (int n = 0; n < NT; n++) T::mma(ones[n], a, b[n][2 * odd], b[n][2 * odd + 1]);
        }
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
          u32 select[2], a[4];
          selects<META>(record + (at * BLOCKS + i) * S::RECORD, g, select);
#pragma unroll
          for (int r = 0; r < 4; r++) a[r] = D::template decode<T>(words[i], 4 * (step & 3) + r, lookup, select[r & 1]);
#pragma unroll
          for (int n = 0; n < NT; n++) T::mma(part[i][n], a, b[n][2 * odd], b[n][2 * odd + 1]);
        }
        if (ALL ? step == S::STEPS - 1 : ((step + 1) & (record_steps - 1)) == 0) {  // the last step of a record
#pragma unroll
          for (int i = 0; i < BLOCKS; i++) {
            float scale[2], shift[2];
            scales<META, D::BITS>(record + (at * BLOCKS + i) * S::RECORD, g, scale, shift);
            scale_up<SHIFTS>(sum[i], part[i], ones, scale, shift);
          }
          clear(ones);
        }
      }
    }
  }
}

// The same with x in bytes, in steps of 32 columns: sums are integers, and codes count from 0 until they are added up.
template <bool ALL, class S, class A, class D, int META, int TILES, int NT>
DEVICE void multiply_bytes(float (&sum)[BLOCKS][NT][4], const unsigned char* x, const unsigned char* codes, const Reads& of,
                           int record_bits) {
  constexpr bool SHIFTS = Record<META>::SHIFTS;
  const unsigned char* record = codes + BLOCKS * S::CODES;
  const int g = of.lane >> 2, record_steps = S::STEPS >> record_bits;
  int part[BLOCKS][NT][4] = {}, ones[NT][4] = {};
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    u32 words[BLOCKS][D::BITS], b[NT][4];
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) take_planes<TILES>(words[i], reinterpret_cast<const u32*>(codes + i * S::CODES), tile, of.lane);
#pragma unroll
    for (int n = 0; n < NT; n++) load_matrices(b[n], x + tile * S::X + n * S::EIGHT + of.x[0]);
#pragma unroll
    for (int odd = 0; odd < 2; odd++) {
      const int step = 4 * tile + 2 * odd + 1, at = ALL ? 0 : (step << record_bits) / S::STEPS;
      const u32 one[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
#pragma unroll
      for (int n = 0; n < NT; n++) mma_u8s8(ones[n], one, b[n][2 * odd], b[n][2 * odd + 1]);
#pragma unroll
      for (int i = 0; i < BLOCKS; i++) {
        u32 a[4];
#pragma unroll
        for (int r = 0; r < 4; r++) a[r] = codes_of<8>(words[i], 4 * odd + r);
#pragma unroll
        for (int n = 0; n < NT; n++) mma_u8s8(part[i][n], a, b[n][2 * odd], b[n][2 * odd + 1]);
      }
      if (ALL ? step == S::STEPS - 1 : ((step + 1) & (record_steps - 1)) == 0) {
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
          float scale[2], shift[2];
          scales<META, D::BITS>(record + (at * BLOCKS + i) * S::RECORD, g, scale, shift);
#pragma unroll
          for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) part[i][n][e] -= (1 << (D::BITS - 1)) * ones[n][e];
          }
          scale_up<SHIFTS>(sum[i], part[i], ones, scale, shift);
        }
        clear(ones);
      }
    }
  }
}

// A warp's share of the copies of one plane of codes, P bits wide: 16 bytes at a time, both row-blocks in one go where they are few.
template <int P, int TILES, bool ROOM> struct Plane {
  static constexpr int CHUNKS = 8 * P * TILES;  // of a row-block in a piece
  static constexpr bool JOINT = CHUNKS < 32;
  const u32* from[BLOCKS];  // of the first piece
  u32 to;                   // in bytes, from where the warp's codes begin
  int end;                  // pieces that have the tile of this lane's first access
  // `step` words times P lie between row-blocks; those beyond the last one are the last one again, and nobody reads their sums.
  DEVICE_METHOD void open(const u32* plane, int first_block, int row_blocks, int tiles, s64 step, int plane_bytes, int block_bytes) {
    const int lane = lane_id(), mine = JOINT ? lane / CHUNKS & 1 : 0, piece = JOINT ? lane % CHUNKS : lane;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      const int block = first_block + (JOINT ? mine : b);
      from[b] = held<ROOM>(plane + (block < row_blocks ? block : row_blocks - 1) * step * P + 4 * piece);
    }
    to = held<ROOM>(mine * block_bytes + plane_bytes + 16 * piece);
    end = held<ROOM>(piece < 8 * P ? tiles : tiles / TILES);
  }
  // Of the piece `at`; `full` is the number of pieces with all their tiles.
  DEVICE_METHOD void fetch(unsigned char* codes, int at, int full, int block_bytes) const {
    const int lane = lane_id();
    if constexpr (JOINT) {
      copy16_if(2 * CHUNKS == 32 || lane < 2 * CHUNKS, codes + to, from[0] + s64(at) * (32 * P * TILES), at < end);
    } else {
#pragma unroll
      for (int i = 0; i < CHUNKS; i += 32) {
        const bool live = TILES == 1 || (8 * P >= 32 && i < 8 * P) || at < (i < 8 * P ? end : full);
        // Of 8 bits a lane has two pieces in a tile, which go to separate halves.
        const int place = P == 8 ? 16 * (i / 64 * 64 + i % 64 / 2 + (lane & 1) * 32 + (lane >> 1) - lane) : 16 * i;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
          copy16(codes + to + b * block_bytes + place, from[b] + s64(at) * (32 * P * TILES) + 4 * i, live);
      }
    }
  }
};

// A team takes every TEAMS-th piece of the block's columns and keeps its own ring of copies in shared memory, so that teams wait for
// one another at the end alone. The sums of a group are multiplied by its scales in float32.
template <class A, class D, int META, int TOKENS, int TILES>
KERNEL(THREADS, TOKENS <= 16 ? 2 : 1)
wqmm(const unsigned char* x, const float* x_scale, const u32* codes, const unsigned char* meta, const float* table,
     const float* row_scale, const u16* bias, const float* addend, u16* y, float* whole, float* workspace, u32* counters,
     const u64* experts, const int* starts, int batches, int tokens, int rows, int columns, s64 stride, int tiles, int row_blocks,
     int pieces_per_split, int record_bits, u32 reciprocal, int stages, int entries) {
  SHARED(shared);
  using T = typename Activation<A>::Out;
  using S = Stage<A, D, META, TOKENS, TILES>;
  constexpr int TEAM = S::TEAM, TEAMS = Panel<TEAM>::TEAMS, NT = TOKENS / 8, OCTETS = Activation<A>::BYTES;
  // Whether there are registers beside the sums, for what a loop needs and for a loop made for one group in a piece.
  constexpr bool ROOM = TOKENS == 8 || TOKENS == 32 || (TOKENS == 16 && !Record<META>::SHIFTS);
  const int lane = lane_id(), team = warp_id() / TEAM, member = warp_id() % TEAM;
  const int first_row = blockIdx.x * Panel<TEAM>::ROWS;
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
  const int pieces = (tiles + TILES - 1) / TILES, begin = blockIdx.y * pieces_per_split;
  const int end = begin + pieces_per_split < pieces ? begin + pieces_per_split : pieces;
  const int records = 1 << record_bits, warp_bytes = S::warp_bytes(records), stage_bytes = held<ROOM>(S::bytes(records));

  const u32* lookup = reinterpret_cast<const u32*>(shared);
  fill_table<T, D>(reinterpret_cast<u32*>(shared), table, entries);
  if constexpr (D::ENTRIES > 0) sync_block();
  unsigned char* ring = shared + held<ROOM>(4 * D::ENTRIES + team * stages * stage_bytes);
  const int mine = held<ROOM>(TILES * S::X + member * warp_bytes);  // where a warp's codes begin in a stage

  // Where this lane copies x from, for the piece that comes next; each call goes on to the team's piece after that. What stands
  // for tokens that are not there comes to sums that nobody reads.
  using X = Activation<A>;
  constexpr int CHUNKS = X::CHUNKS, EACH = 32 * TEAM / (CHUNKS * TILES);
  const int rank = 32 * member + lane, token = rank / (CHUNKS * TILES), chunk = rank % (CHUNKS * TILES);
  const int there = tokens - first_token, rounds = there < TOKENS ? (there + EACH - 1) / EACH : TOKENS / EACH;
  const u32 x_to = held<ROOM>(chunk / CHUNKS * S::X + X::place(token, chunk % CHUNKS));
  const unsigned char* x_from = held<ROOM>(x + ((first_token + token) * stride + 16 / OCTETS * chunk) * OCTETS);
  const s64 row_step = EACH * stride * OCTETS;
  const int x_pieces = (columns - 16 / OCTETS * chunk + 64 * TILES - 1) / (64 * TILES);  // that have this lane's columns
  const int x_end = held<ROOM>(token < there ? x_pieces : 0);

  // Likewise of codes, plane by plane, and of records, of which a lane mostly has one.
  const int first_block = first_row / 16 + BLOCKS * member, full = tiles / TILES;
  const s64 block_step = s64(tiles) * 32, plane_step = block_step * row_blocks;  // in words, times the bits of a plane
  Plane<8, TILES, ROOM> eights;
  Plane<4, TILES, ROOM> fours;
  Plane<2, TILES, ROOM> twos;
  Plane<1, TILES, ROOM> ones;
  constexpr int ABOVE_TWOS = D::BITS & 4, ABOVE_ONES = D::BITS & 6, PIECES = BLOCKS * S::RECORD / 16;
  if constexpr (D::BITS & 8) eights.open(codes, first_block, row_blocks, tiles, block_step, 0, S::CODES);
  if constexpr (D::BITS & 4) fours.open(codes, first_block, row_blocks, tiles, block_step, 0, S::CODES);
  if constexpr (D::BITS & 2)
    twos.open(codes + plane_step * ABOVE_TWOS, first_block, row_blocks, tiles, block_step, TILES * 128 * ABOVE_TWOS, S::CODES);
  if constexpr (D::BITS & 1)
    ones.open(codes + plane_step * ABOVE_ONES, first_block, row_blocks, tiles, block_step, TILES * 128 * ABOVE_ONES, S::CODES);
  int next = begin + team;
  const u32 meta_step = u32(row_blocks) * S::RECORD;
  const int record_pieces = records * PIECES, mine_of = lane % record_pieces;  // lanes beyond the last copy what others do
  auto record_step = [&](int at) { return at / PIECES * S::STEPS >> record_bits; };  // within a piece
  auto record_from = [&](int at) {
    const int rest = at % PIECES, block = first_block + rest / (PIECES / BLOCKS);
    return meta + s64(block < row_blocks ? block : row_blocks - 1) * S::RECORD + 16 * (rest % (PIECES / BLOCKS));
  };
  auto record_end = [&](int at) { return (4 * tiles - record_step(at) + S::STEPS - 1) / S::STEPS; };
  const unsigned char* meta_from = held<ROOM>(record_from(mine_of));
  const u32 meta_to = held<ROOM>(mine + BLOCKS * S::CODES + 16 * mine_of);
  const int meta_step_of = held<ROOM>(record_step(mine_of)), meta_end = held<ROOM>(record_end(mine_of));
  auto fetch_record = [&](unsigned char* to, const unsigned char* from, int step, int record_end) {
    const u32 group = group_of(S::STEPS * next + step, reciprocal);
    copy16(to, from + u64(group) * meta_step, next < record_end);
  };
  const bool more = held<ROOM>(rounds > 1 || record_pieces > 32);
  auto fetch = [&](unsigned char* stage) {
    if (next < end) {
      const unsigned char* from = x_from + s64(next) * (64 * TILES * OCTETS);
      copy16(stage + x_to, from, next < x_end);
      unsigned char* to = stage + mine;
      if constexpr (D::BITS & 8) eights.fetch(to, next, full, S::CODES);
      if constexpr (D::BITS & 4) fours.fetch(to, next, full, S::CODES);
      if constexpr (D::BITS & 2) twos.fetch(to, next, full, S::CODES);
      if constexpr (D::BITS & 1) ones.fetch(to, next, full, S::CODES);
      fetch_record(stage + meta_to, meta_from, meta_step_of, meta_end);
      if (more) {
#pragma unroll
        for (int i = 1; i < TOKENS / EACH; i++) {
          if (i >= rounds) break;
          from += row_step;
          unsigned char* x_there = stage + chunk / CHUNKS * S::X + X::place(EACH * i + token, chunk % CHUNKS);
          copy16(x_there, from, EACH * i + token < there && next < x_pieces);
        }
#pragma unroll 1
        for (int at = lane + 32; at < record_pieces; at += 32)
          fetch_record(to + BLOCKS * S::CODES + 16 * at, record_from(at), record_step(at), record_end(at));
      }
    }
    copy_commit();
    next += TEAMS;
  };

  const u32 half[2] = {u32(X::place(lane & 7, lane >> 3)), u32(X::place(lane & 7, CHUNKS / 2 + (lane >> 3)))};
  const Reads reads = {held<ROOM>(lane), {held<ROOM>(half[0]), held<ROOM>(half[1])}};
  float sum[BLOCKS][NT][4] = {};
  auto multiply = [&](auto all, const unsigned char* stage) {
    if constexpr (OCTETS == 1) {
      multiply_bytes<decltype(all)::value, S, A, D, META, TILES>(sum, stage, stage + mine, reads, record_bits);
    } else {
      multiply_numbers<decltype(all)::value, S, T, D, META, TILES>(sum, stage, stage + mine, reads, lookup, record_bits);
    }
  };
  auto compute = [&](const unsigned char* stage) {
    if (ROOM && record_bits == 0) {
      multiply(Flag<true>(), stage);
    } else {
      multiply(Flag<false>(), stage);
    }
  };
  through_ring<TEAM>(ring, stages, stage_bytes, (end - begin - team + TEAMS - 1) / TEAMS, fetch, compute);
  const Output to = {x_scale, row_scale, bias, addend, y, whole, workspace, counters, tokens, rows};
  add_up<T, TEAM, TOKENS>(shared, sum, to, first_row, first_token);
}

// W (rows, columns) in type T, rows first..first + rows of which `first` is a multiple of 16; a warp per tile.
template <class T, class D, int META>
KERNEL(THREADS, 2)
dequantize(const u32* codes, const unsigned char* meta, const float* table, const float* row_scale, u16* w, int first, int rows,
           int columns, int tiles, int row_blocks, u32 reciprocal, int entries) {
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
      const s64 group = group_of(4 * tile + step, reciprocal);
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
