// y = x W^T with W of which only some weights are kept, for few rows of x, and W itself for many. See masked.py.

constexpr int WARPS = Panel<1>::WARPS, THREADS = Panel<1>::THREADS, BLOCKS = Panel<1>::BLOCKS;

// A kept weight as it is, a 16-bit number of x's type.
struct Value {
  static constexpr int BITS = 16;
};
template <class D> constexpr bool SCALED = !Same<D, Value>::value;

DEVICE int aligned(int bytes) { return (bytes + 7) & ~7; }

// Fields of kept weights in planes of 8, 4, 2 and 1 bits one behind the other, each a dense stream; or values.
template <class D> struct Fields {
  const unsigned char* start;
  int bytes[3];  // of the planes that have others behind them

  DEVICE_MEMBER Fields at(const unsigned char* from, int count) {
    Fields f = {from, {0, 0, 0}};
    int plane = 0;
#pragma unroll
    for (int p = 8; p > 1; p >>= 1)
      if (D::BITS & p) f.bytes[plane++] = aligned((count * p + 7) >> 3);
    return f;
  }
  DEVICE_MEMBER const unsigned char* behind(const unsigned char* from, int count) {
#pragma unroll
    for (int p = 8; p > 0; p >>= 1)
      if (D::BITS & p) from += aligned((count * p + 7) >> 3);
    return from;
  }
  // One field.
  DEVICE_METHOD u32 one(int i) const {
    if constexpr (!SCALED<D>) {
      return load(reinterpret_cast<const u16*>(start) + i);
    } else {
      const unsigned char* from = start;
      int plane = 0, above = D::BITS;
      u32 code = 0;
#pragma unroll
      for (int p = 8; p > 0; p >>= 1) {
        if (D::BITS & p) {
          above -= p;
          const u32 byte = load(from + (p == 8 ? i : i * p >> 3));
          code |= ((byte >> (p == 8 ? 0 : i * p & 7)) & ((1u << p) - 1)) << above;
          if (p > 1) from += bytes[plane++];
        }
      }
      return code;
    }
  }
  // Fields 4 i to 4 i + 3, in two pairs.
  DEVICE_METHOD void four(int i, u32 (&pair)[2]) const {
    pair[0] = pair[1] = 0;
    if constexpr (!SCALED<D>) {
      const Words2 both = load(reinterpret_cast<const Words2*>(start) + i);
      pair[0] = both.x, pair[1] = both.y;
    } else {
      const unsigned char* from = start;
      int plane = 0, above = D::BITS;
#pragma unroll
      for (int p = 8; p > 0; p >>= 1) {
        if (D::BITS & p) {
          above -= p;
          u32 word;
          if (p == 8) {
            word = load(reinterpret_cast<const u32*>(from) + i);
          } else if (p == 4) {
            word = load(reinterpret_cast<const u16*>(from) + i);
          } else {
            word = u32(load(from + (i * p >> 1))) >> (p == 2 ? 0 : 4 * (i & 1));
          }
          const u32 mask = (1u << p) - 1;
          pair[0] |= ((word & mask) | ((word >> p) & mask) << 16) << above;
          pair[1] |= ((word >> (2 * p) & mask) | ((word >> (3 * p)) & mask) << 16) << above;
          if (p > 1) from += bytes[plane++];
        }
      }
    }
  }
};

template <class T, class D> DEVICE u32 number_of(u32 pair) {
  if constexpr (SCALED<D>) {
    return D::template number<T>(pair | D::template POWER<T>);
  } else {
    return pair;
  }
}
template <class T> constexpr u32 ONES = Same<T, Float16>::value ? 0x3c003c00u : 0x3f803f80u;
DEVICE u32 halves(u32 bits) { return (bits & 1) * 0xffffu | (bits >> 1) * 0xffff0000u; }

// How a tile lies in its packet. `open` is called by all lanes of a warp. `fragment` gives the left operand of a step, and what a
// product has in its place for the sums of x, 1 where a weight is kept.

// Single weights anywhere in 16 x 64: records, a bit for each weight in the order of fragments (pair, lane, half), fields.
template <class D, int META> struct Single {
  using Decoder = D;
  static constexpr int STEPS = 4, COLUMNS = 64;
  static constexpr bool UNITS = false, SHIFTS = SCALED<D> && Record<META>::SHIFTS;
  const unsigned char* packet;
  const u32* mask;
  int first;  // field of the pairs of word `lane` of the mask
  Fields<D> fields;

  DEVICE_METHOD void open(const unsigned char* at, int records) {
    packet = at;
    mask = reinterpret_cast<const u32*>(at + (SCALED<D> ? records * Record<META>::BYTES : 0));
    const int lane = lane_id(), own = popcount(load(mask + lane));
    int sum = own;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      const int other = shuffle(sum, (lane - d) & 31, 32);
      if (lane >= d) sum += other;
    }
    first = sum - own;
    fields = Fields<D>::at(reinterpret_cast<const unsigned char*>(mask + 32), shuffle(sum, 31, 32));
  }
  template <class T> DEVICE_METHOD void fragment(int step, u32 (&a)[4], u32 (&ones)[4]) const {
    const int lane = lane_id(), bit = 2 * (lane & 15);
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const int at = 2 * (4 * step + r) + (lane >> 4);
      const u32 word = load(mask + at), bits = (word >> bit) & 3;
      const int field = shuffle(first, at, 32) + popcount(word & ((1u << bit) - 1));
      u32 pair = bits & 1 ? fields.one(field) : 0;
      if (bits & 2) pair |= fields.one(field + (bits & 1)) << 16;
      a[r] = number_of<T, D>(pair) & halves(bits);
      ones[r] = ONES<T> & halves(bits);
    }
  }
  DEVICE_METHOD void scale(int step, int record, float (&scale)[2], float (&shift)[2]) const {
    scales<META, D::BITS>(packet + record * Record<META>::BYTES, lane_id() >> 2, scale, shift);
  }
  template <class T> DEVICE_METHOD void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], int step) const {
    T::mma(d, a, b[2 * (step & 1)], b[2 * (step & 1) + 1]);
  }
};

// Runs of 16 columns of a row: a bit for each run (step, row), 16 fields per run in the order of lanes, then per run its scale, and
// zero code or shift.
template <class D, int META> struct Runs {
  using Decoder = D;
  static constexpr int STEPS = 4, COLUMNS = 64;
  static constexpr bool UNITS = true, SHIFTS = SCALED<D> && Record<META>::SHIFTS;
  u32 low, high;  // bits of steps 0 and 1, 2 and 3
  Fields<D> fields;
  const unsigned char* beside;
  int count;

  DEVICE_METHOD void open(const unsigned char* at, int) {
    const Words4 words = load(reinterpret_cast<const Words4*>(at));
    low = words.x, high = words.y;
    count = popcount(low) + popcount(high);
    fields = Fields<D>::at(at + 16, 16 * count);
    beside = Fields<D>::behind(at + 16, 16 * count);
  }
  // Whether the run of a row is there, and its number.
  DEVICE_METHOD bool run(int step, int row, int& number) const {
    const u32 word = step < 2 ? low : high;
    const int bit = 16 * (step & 1) + row;
    number = popcount(word & ((1u << bit) - 1)) + (step < 2 ? 0 : popcount(low));
    return word >> bit & 1;
  }
  template <class T> DEVICE_METHOD void fragment(int step, u32 (&a)[4], u32 (&ones)[4]) const {
    const int g = lane_id() >> 2, c = lane_id() & 3;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int number;
      u32 pair[2] = {0, 0};
      const bool there = run(step, g + 8 * i, number);
      if (there) fields.four(4 * number + c, pair);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        a[i + 2 * j] = there ? number_of<T, D>(pair[j]) : 0;
        ones[i + 2 * j] = there ? ONES<T> : 0;
      }
    }
  }
  DEVICE_METHOD void scale(int step, int, float (&scale)[2], float (&shift)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int number;
      scale[i] = shift[i] = 0.0f;
      if (!run(step, (lane_id() >> 2) + 8 * i, number)) continue;
      scale[i] = BFloat16::low(load(reinterpret_cast<const u16*>(beside) + number));
      const unsigned char* more = beside + aligned(2 * count);
      if constexpr (META == HALF) shift[i] = 0.5f * scale[i];
      if constexpr (META == ZERO) shift[i] = scale[i] * (float(1 << (D::BITS - 1)) - float(load(more + number)));
      if constexpr (META == SHIFT) shift[i] = load(reinterpret_cast<const float*>(more) + number);
    }
  }
  template <class T> DEVICE_METHOD void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], int step) const {
    T::mma(d, a, b[2 * (step & 1)], b[2 * (step & 1) + 1]);
  }
};

// Two of every four columns, for sparse tensor cores in steps of 32 columns: records, a word of places per lane and two steps, 16 x 64
// kept codes of 16 x 128 as `wqmm` has them, or values of half as many, as the registers of steps. The places of step s are in word s / 2
// of lanes 2 (s mod 2) and on.
template <class D, int META> struct TwoOfFour {
  using Decoder = D;
  static constexpr int STEPS = SCALED<D> ? 4 : 2, COLUMNS = 32 * STEPS;
  static constexpr bool UNITS = false, SHIFTS = SCALED<D> && Record<META>::SHIFTS;
  const unsigned char* packet;
  u32 places[STEPS / 2], words[SCALED<D> ? D::BITS : 8];

  DEVICE_METHOD void open(const unsigned char* at, int records) {
    packet = at;
    const unsigned char* from = at + (SCALED<D> ? records * Record<META>::BYTES : 0);
    const int lane = lane_id();
    take<STEPS / 2>(places, 0, reinterpret_cast<const u32*>(from) + STEPS / 2 * lane);
    const u32* plane = reinterpret_cast<const u32*>(from + 64 * STEPS);
    if constexpr (!SCALED<D>) {
#pragma unroll
      for (int i = 0; i < STEPS; i++) take<4>(words, 4 * i, plane + 128 * i + 4 * lane);
    } else if constexpr (D::BITS == 8) {
      take<4>(words, 0, plane + 8 * lane);
      take<4>(words, 4, plane + 8 * lane + 4);
    } else {
      take_planes<1>(words, plane, 0, lane);
    }
  }
  template <class T> DEVICE_METHOD void fragment(int step, u32 (&a)[4], u32 (&ones)[4]) const {
#pragma unroll
    for (int r = 0; r < 4; r++) {
      if constexpr (SCALED<D>) {
        a[r] = D::template decode<T>(words, 4 * step + r, nullptr, 0);
      } else {
        a[r] = words[4 * step + r];
      }
      ones[r] = ONES<T>;
    }
  }
  DEVICE_METHOD void scale(int step, int record, float (&scale)[2], float (&shift)[2]) const {
    scales<META, D::BITS>(packet + record * Record<META>::BYTES, lane_id() >> 2, scale, shift);
  }
  template <class T> DEVICE_METHOD void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], int step) const {
    if (step & 1) {
      T::template mma_sparse<1>(d, a, b, places[step >> 1]);
    } else {
      T::template mma_sparse<0>(d, a, b, places[step >> 1]);
    }
  }
};

// As wqmm: teams of warps share x and the columns out, with a ring of copies for each team. Packets of tiles differ in length; `offsets`
// says where they begin, in units of 16 bytes, and `room` is that of the longest.
template <class T, class L, int TOKENS>
KERNEL(THREADS, TOKENS <= 16 ? 2 : 1)
masked_products(const unsigned char* x, const unsigned char* packets, const int* offsets, const u16* bias, const float* addend,
                u16* y, float* workspace, u32* counters, int tokens, int rows, int columns, s64 stride, int tiles, int row_blocks,
                int tiles_per_split, int record_bits, int stages, int room) {
  SHARED(shared);
  constexpr int NT = TOKENS / 8, PARTS = L::COLUMNS / 64, X = TOKENS * 128;  // bytes of x for 64 columns
  constexpr bool SCALES = SCALED<typename L::Decoder>, SHIFTS = L::SHIFTS;
  constexpr int TEAM = TEAM_FOR<TOKENS>, TEAMS = Panel<TEAM>::TEAMS, EACH = 4 * TEAM;
  const int lane = lane_id(), team = warp_id() / TEAM, member = warp_id() % TEAM;
  const int first_row = blockIdx.x * Panel<TEAM>::ROWS, first_block = first_row / 16 + BLOCKS * member;
  const int first_token = blockIdx.z * TOKENS;
  const int begin = blockIdx.y * tiles_per_split;
  const int end = begin + tiles_per_split < tiles ? begin + tiles_per_split : tiles;
  const int stage_bytes = PARTS * X + TEAM * BLOCKS * room, mine = PARTS * X + member * BLOCKS * room;
  const int there = row_blocks - first_block;  // row-blocks from the warp's first one on
  unsigned char* ring = shared + team * stages * stage_bytes;

  const int rank = 32 * member + lane, token = rank >> 3, chunk = rank & 7;
  const int live = (tokens - first_token - token + EACH - 1) / EACH;  // rounds in which there is a token for this lane
  int next = begin + team;
  int start[BLOCKS] = {}, stop[BLOCKS] = {};  // of the packets of tile `next`
  auto look = [&]() {
    if (next < end) {
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) {
        if (b < there) {
          const int* at = offsets + s64(first_block + b) * tiles + next;
          start[b] = load(at), stop[b] = load(at + 1);
        }
      }
    }
  };
  look();
  auto fetch = [&](unsigned char* stage) {
    if (next < end) {
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        const int column = L::COLUMNS * next + 64 * part + 8 * chunk;
        const unsigned char* from = x + 2 * (s64(first_token + token) * stride + column);
#pragma unroll
        for (int i = 0; i < TOKENS / EACH; i++) {
          copy16(stage + part * X + Activation<T>::place(EACH * i + token, chunk), from, i < live && column < columns);
          from += 2 * EACH * stride;
        }
      }
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) {
        unsigned char* to = stage + mine + b * room;
        const unsigned char* from = packets + 16 * s64(start[b]);
#pragma unroll 2
        for (int piece = lane; piece < stop[b] - start[b]; piece += 32) copy16(to + 16 * piece, from + 16 * piece, true);
      }
    }
    copy_commit();
    next += TEAMS;
    look();
  };

  float sum[BLOCKS][NT][4] = {};
  auto compute = [&](const unsigned char* stage) {
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
      if (i >= there) break;
      L of;
      of.open(stage + mine + i * room, 1 << record_bits);
      float part[NT][4] = {}, ones[NT][4] = {};  // sums of a group; of x where weights are kept, for shifts
      u32 b[NT][4];
      constexpr bool SPARSE = L::COLUMNS == 32 * L::STEPS;
      constexpr int AT_ONCE = L::UNITS && TOKENS > 16 ? 1 : L::STEPS / 2;  // what is unrolled takes registers
#pragma unroll AT_ONCE
      for (int half = 0; half < L::STEPS / 2; half++) {
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
          const int step = 2 * half + odd;
          if (SPARSE || odd == 0) {  // 32 columns of x
            const int at = SPARSE ? step : half;
#pragma unroll
            for (int n = 0; n < NT; n++)
              load_matrices(b[n], stage + at / 2 * X + Activation<T>::place(8 * n + (lane & 7), 4 * (at & 1) + (lane >> 3)));
          }
          u32 a[4], kept[4];
          of.template fragment<T>(step, a, kept);
#pragma unroll
          for (int n = 0; n < NT; n++) {
            if constexpr (SCALES) {
              of.template mma<T>(part[n], a, b[n], step);
              if constexpr (SHIFTS) of.template mma<T>(ones[n], kept, b[n], step);
            } else {
              of.template mma<T>(sum[i][n], a, b[n], step);
            }
          }
          if constexpr (SCALES) {
            if (L::UNITS || ((step + 1) & ((4 >> record_bits) - 1)) == 0) {  // the last step of a group
              float scale[2], shift[2];
              of.scale(step, step >> (2 - record_bits), scale, shift);
#pragma unroll
              for (int n = 0; n < NT; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                  sum[i][n][e] = multiply_add(scale[e >> 1], part[n][e], sum[i][n][e]);
                  if constexpr (SHIFTS) sum[i][n][e] = multiply_add(shift[e >> 1], ones[n][e], sum[i][n][e]);
                  part[n][e] = ones[n][e] = 0.0f;
                }
              }
            }
          }
        }
      }
    }
  };

  through_ring<TEAM>(ring, stages, stage_bytes, (end - begin - team + TEAMS - 1) / TEAMS, fetch, compute);
  const Output to = {nullptr, nullptr, bias, addend, y, nullptr, workspace, counters, tokens, rows};
  add_up<T, TEAM, TOKENS>(shared, sum, to, first_row, first_token);
}

// W (rows, columns) in type T, rows first..first + rows of which `first` is a multiple of 16; a warp per tile.
template <class T, class L>
KERNEL(THREADS, 2)
masked_weight(const unsigned char* packets, const int* offsets, u16* w, int first, int rows, int columns, int tiles, int record_bits) {
  SHARED(shared);
  constexpr int PARTS = L::COLUMNS / 64;
  const int lane = lane_id(), g = lane >> 2, c = lane & 3;
  unsigned char* stage = shared + warp_id() * PARTS * 2048;  // 16 rows of 64 numbers, once or twice
  const s64 count = s64((rows + 15) / 16) * tiles;
  for (s64 at = s64(blockIdx.x) * WARPS + warp_id(); at < count; at += s64(gridDim.x) * WARPS) {
    const int block = int(at / tiles), tile = int(at % tiles);
    L of;
    of.open(packets + 16 * s64(load(offsets + s64(first / 16) * tiles + at)), 1 << record_bits);
    constexpr bool SPARSE = L::COLUMNS == 32 * L::STEPS;
    constexpr int AT_ONCE = SPARSE ? L::STEPS : 2;  // what is unrolled takes registers; words in registers need it
    if constexpr (SPARSE) {
      for (int i = lane; i < PARTS * 512; i += 32) reinterpret_cast<u32*>(stage)[i] = 0;
      sync_warp();
    }
#pragma unroll AT_ONCE
    for (int step = 0; step < L::STEPS; step++) {
      u32 a[4], kept[4];
      of.template fragment<T>(step, a, kept);
      float scale[2] = {1.0f, 1.0f}, shift[2] = {};
      if constexpr (SCALED<typename L::Decoder>) of.scale(step, step >> (2 - record_bits), scale, shift);
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const int row = g + 8 * (r & 1);
        u32 value = a[r];
        if constexpr (SCALED<typename L::Decoder>) {
          const float s = scale[r & 1], t = shift[r & 1];
          const u32 live = kept[r] & 0xffffu ? 0xffffu : 0, above = kept[r] >> 16 ? 0xffff0000u : 0;
          value = T::pack(multiply_add(T::low(value), s, t), multiply_add(T::high(value), s, t)) & (live | above);
        }
        if constexpr (!SPARSE) {
          *reinterpret_cast<u32*>(stage + staged(row, 16 * step + 2 * c + 8 * (r >> 1))) = value;
        } else {  // kept weights 2 c and 2 c + 1 of eight are those of group c of four columns, in half r / 2 of the step's 32
          const u32 places = shuffle(of.places[step >> 1], (lane & 28) + 2 * (step & 1) + (r >> 1), 32) >> (16 * (r & 1) + 4 * c) & 15;
          const int column = 32 * (step & 1) + 16 * (r >> 1) + 4 * c;
          unsigned char* to = stage + 2048 * (step >> 1);
          *reinterpret_cast<u16*>(to + staged(row, column + (places & 3))) = u16(value);
          *reinterpret_cast<u16*>(to + staged(row, column + (places >> 2))) = u16(value >> 16);
        }
      }
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++)
      store_tile(stage + 2048 * part, w, 16 * block, L::COLUMNS * tile + 64 * part, rows, columns);
  }
}
