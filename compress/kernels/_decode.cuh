// From the words of a tile to numbers, see _tiles.py for where a field lies.

template <class A, class B> struct Same { static constexpr bool value = false; };
template <class A> struct Same<A, A> { static constexpr bool value = true; };

// The codes that share a register, each in a field of FIELD (16 or 8) bits; `words` are those of one lane, plane after plane.
// `also` has bits that are set besides.
template <int FIELD, int BITS> DEVICE u32 codes_of(const u32 (&words)[BITS], int place, u32 also = 0) {
  u32 code = also;
  int start = 0, above = BITS;
#pragma unroll
  for (int p = 8; p > 0; p >>= 1) {
    if (BITS & p) {
      above -= p;
      const u32 word = words[start + place / (FIELD / p)];
      const int shift = p * (place % (FIELD / p)) - above;
      const u32 mask = (((1u << p) - 1) << above) * (FIELD == 16 ? 0x00010001u : 0x01010101u);
      code = masked_or(shift >= 0 ? word >> (shift & 31) : word << (-shift & 31), mask, code);
      start += p;
    }
  }
  return code;
}

// A pair of one exact number.
template <class T> DEVICE u32 twice(float value) {
  const u32 bits = as_bits(value), sign = bits >> 16 & 0x8000u;
  const u32 half = Same<T, Float16>::value ? sign | ((bits >> 23 & 255u) - 112u) << 10 | (bits >> 13 & 0x3ffu) : bits >> 16;
  return half * 0x00010001u;
}

// Fields of P bits left where they are within the mantissa of 2^7 (bfloat16) or 2^10 (float16), as many as there is room for: a word
// is shifted once for all of them, and a code that lies o bits up counts units of 2^o.
template <class T, int P> struct Mantissa {
  static constexpr int BITS = Same<T, Float16>::value ? 10 : 7, FITS = BITS / P, FIELDS = 16 / P;
  static constexpr u32 POWER = Same<T, Float16>::value ? 0x64006400u : 0x43004300u;
  // What a code's unit stands for, and what 2^7 or 2^10 then does.
  DEVICE_MEMBER float unit(int pair) { return 1.0f / float(1 << (P * (pair % FIELDS % FITS))); }
  DEVICE_MEMBER float power(int pair) { return float(1 << BITS) * unit(pair); }
  // factor * code + add, in a pair
  DEVICE_MEMBER u32 number(const u32* plane, int pair, float factor, u32 add) {
    const int field = pair % FIELDS;
    const u32 mask = (((1u << P) - 1) << (P * (field % FITS))) * 0x00010001u;
    return T::fma2(masked_or(plane[pair / FIELDS] >> (P * FITS * (field / FITS)), mask, POWER), twice<T>(factor * unit(pair)), add);
  }
};

// Codes as integers, less the middle of their range: exact in both types. The code is written into the mantissa of 2^7 (bfloat16)
// or 2^10 (float16), where it counts units, and one sum takes power and middle away.
template <int WIDTH> struct Integer {
  static constexpr int BITS = WIDTH, ENTRIES = 0;
  static constexpr float MIDDLE = float(1 << (WIDTH - 1));
  // What is set beside the codes of a pair for `number`.
  template <class T> static constexpr u32 POWER = Same<T, Float16>::value ? 0x64006400u : WIDTH < 8 ? 0x43004300u : 0u;
  template <class T> DEVICE_MEMBER u32 number(u32 code) {
    if constexpr (Same<T, Float16>::value || WIDTH < 8) {
      return T::fma2(code, twice<T>(1.0f), twice<T>(-Mantissa<T, 1>::power(0) - MIDDLE));
    } else {  // 8 bits do not fit 7: halves of 4, (128 + high) * 16 - 2304 + (128 + low)
      const u32 high = masked_or(code >> 4, 0x000f000fu, 0x43004300u), low = masked_or(code, 0x000f000fu, 0x43004300u);
      return BFloat16::fma2(low, 0x3f803f80u, BFloat16::fma2(high, 0x41804180u, 0xc510c510u));
    }
  }
  template <class T> DEVICE_MEMBER u32 decode(const u32 (&words)[WIDTH], int pair, const u32*, u32) {
    if constexpr (WIDTH == 1 || WIDTH == 2 || WIDTH == 4) {
      using M = Mantissa<T, WIDTH>;
      return M::number(words, pair, 1.0f, twice<T>(-M::power(pair) - MIDDLE));
    } else if constexpr (WIDTH == 3) {  // the upper two bits count 2, and have taken away what the lowest bit brings along
      using Upper = Mantissa<T, 2>;
      using Lowest = Mantissa<T, 1>;
      const float away = 2.0f * Upper::power(pair) + Lowest::power(pair) + MIDDLE;
      return Lowest::number(words + 2, pair, 1.0f, Upper::number(words, pair, 2.0f, twice<T>(-away)));
    } else {
      return number<T>(codes_of<16>(words, pair, POWER<T>));
    }
  }
};

// Codes as places in a table of `tables` times 2^WIDTH values in shared memory, one of them per word: no two lanes meet in a bank.
template <int WIDTH> struct Lookup {
  static constexpr int BITS = WIDTH, ENTRIES = 4 << WIDTH;
  template <class T> DEVICE_MEMBER u32 decode(const u32 (&words)[WIDTH], int pair, const u32* table, u32 select) {
    const u32 code = codes_of<16>(words, pair);
    table += select << WIDTH;
    return permute(table[code & 0xffffu], table[code >> 16], 0x5410);
  }
};

// What a group has beside its codes, in records of a row-block; value = scale * number + shift.
enum Meta {
  SYMMETRIC,  // 16 bfloat16 scales, and shift 0
  HALF,       // likewise, and shift scale / 2: zero points half a step below the middle
  ZERO,       // 16 scales, 16 zero codes of a byte, padded to 16 bytes: shift = scale * (middle - zero)
  SHIFT,      // 16 scales, 16 float32 shifts
  WIDE,       // 16 float32 scales, 16 float32 shifts
  TWO_LEVEL,  // 16 bytes, scale code in the lower 4 bits and zero code in the upper; float32 top, step, zero, zero step
  SELECT,     // 16 scales, 16 bytes that choose a table
};
template <int META> struct Record {
  static constexpr int BYTES = META == WIDE ? 128 : META == SHIFT ? 96 : META == ZERO || META == SELECT ? 48 : 32;
  static constexpr bool SHIFTS = META == HALF || META == ZERO || META == SHIFT || META == WIDE || META == TWO_LEVEL;
};

// Scales and shifts of the rows g and g + 8 from a record, whose values are ordered 0, 8, 1, 9, ...
template <int META, int WIDTH> DEVICE void scales(const unsigned char* record, int g, float (&scale)[2], float (&shift)[2]) {
  if constexpr (META == TWO_LEVEL) {
    const u32 codes = load(reinterpret_cast<const u16*>(record + 2 * g));
    const float* grid = reinterpret_cast<const float*>(record + 16);
    const float top = load(grid), step = load(grid + 1), zero = load(grid + 2), zero_step = load(grid + 3);
    scale[0] = top - float(codes & 15) * step;
    scale[1] = top - float((codes >> 8) & 15) * step;
    shift[0] = -scale[0] * (zero + float((codes >> 4) & 15) * zero_step);
    shift[1] = -scale[1] * (zero + float(codes >> 12) * zero_step);
    return;
  }
  if constexpr (META == WIDE) {
    const float* both = reinterpret_cast<const float*>(record) + 2 * g;
    scale[0] = load(both);
    scale[1] = load(both + 1);
    shift[0] = load(both + 16);
    shift[1] = load(both + 17);
    return;
  }
  const u32 pair = load(reinterpret_cast<const u32*>(record + 4 * g));
  scale[0] = BFloat16::low(pair);
  scale[1] = BFloat16::high(pair);
  shift[0] = shift[1] = 0.0f;
  if constexpr (META == HALF) {
    shift[0] = 0.5f * scale[0];
    shift[1] = 0.5f * scale[1];
  } else if constexpr (META == ZERO) {
    const u32 zeros = load(reinterpret_cast<const u16*>(record + 32 + 2 * g));
    shift[0] = scale[0] * (float(1 << (WIDTH - 1)) - float(zeros & 255));
    shift[1] = scale[1] * (float(1 << (WIDTH - 1)) - float(zeros >> 8));
  } else if constexpr (META == SHIFT) {
    const float* shifts = reinterpret_cast<const float*>(record + 32 + 8 * g);
    shift[0] = load(shifts);
    shift[1] = load(shifts + 1);
  }
}

// The tables that the rows g and g + 8 look into.
template <int META> DEVICE void selects(const unsigned char* record, int g, u32 (&select)[2]) {
  select[0] = select[1] = 0;
  if constexpr (META == SELECT) {
    const u32 both = load(reinterpret_cast<const u16*>(record + 32 + 2 * g));
    select[0] = both & 255;
    select[1] = both >> 8;
  }
}

// The group of a step of 16 columns, by the reciprocal of its steps as weight_only.py gives it.
DEVICE u32 group_of(int step, u32 reciprocal) { return multiply_high(2 * u32(step) + 1, reciprocal); }
