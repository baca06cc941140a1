// Stands in for compress/kernels/_device.cuh, so that g++ compiles kernels and a CPU runs them, one fiber per thread.
//
// A fiber runs until it waits for others; those of a block take turns in an order drawn from a seed, and where it is odd a warp goes
// on as long as it can before the next one begins. What a GPU leaves open is made as bad as it may be: copies to shared memory
// arrive only when they are waited for, shared memory starts as not-a-number, every load and store is checked against the arrays of
// the launch, threads of a warp that meet in different operations are an error.

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
typedef signed char s8;
typedef long long s64;
struct alignas(8) Words2 { u32 x, y; };
struct alignas(16) Words4 { u32 x, y, z, w; };
struct alignas(16) Floats4 { float x, y, z, w; };

#define DEVICE static inline
#define DEVICE_MEMBER static inline
#define DEVICE_METHOD inline
#define KERNEL(threads, blocks) void
#define __global__
#define SHARED(name) unsigned char* const name = host::shared

namespace host {

struct Index { unsigned x, y, z; };
struct Range { const char* begin; const char* end; };
struct Copy { void* to; const void* from; bool valid; };

static Index thread_index, block_index, block_dim, grid_dim;
static unsigned char* shared;
static size_t shared_bytes;
static std::vector<Range> ranges;
static char message[400];

struct Meeting {  // of the lanes of a warp, or of the threads of a block
  const char* what = nullptr;
  unsigned arrived = 0, generation = 0;
  const void* in[32];
  void* out[32];
};
struct Fiber {
  ucontext_t start;
  jmp_buf at;
  char* stack = nullptr;
  bool started = false, done = false;
  const unsigned* wait = nullptr;
  unsigned seen = 0;
  std::vector<std::vector<Copy>> copies;  // committed groups, oldest first, then the open one
};
static std::vector<Fiber> fibers;
static std::vector<Meeting> warps;
static Meeting block, teams[16];
static jmp_buf scheduler;
static unsigned current, threads;
static void (*body)(void**);
static void** arguments;
constexpr size_t STACK = 128 << 10;

[[noreturn]] static void fail(const char* text, long a = 0, long b = 0) {
  snprintf(message, sizeof message, text, a, b);
  longjmp(scheduler, 2);
}

static void yield() {
  if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}

static void meet(Meeting& m, unsigned count, const char* what) {
  if (m.arrived == 0) m.what = what;
  if (strcmp(m.what, what)) {
    snprintf(message, sizeof message, "thread %u of block (%u, %u, %u) is in %s while others are in %s", current, block_index.x,
             block_index.y, block_index.z, what, m.what);
    _longjmp(scheduler, 2);
  }
  if (++m.arrived < count) {
    fibers[current].wait = &m.generation;
    fibers[current].seen = m.generation;
    yield();
  } else {
    m.arrived = 0;
    m.generation++;
  }
}

// All lanes of a warp hand in `in`; the last one computes what each gets.
template <class In, class Out, class F> static Out together(const char* what, const In& in, F f) {
  Meeting& w = warps[current / 32];
  const unsigned lanes = threads - current / 32 * 32 < 32 ? threads - current / 32 * 32 : 32;
  Out out;
  w.in[current % 32] = &in;
  w.out[current % 32] = &out;
  if (w.arrived + 1 == lanes && w.what && !strcmp(w.what, what)) {
    const In* ins[32];
    Out* outs[32];
    for (unsigned i = 0; i < lanes; i++) ins[i] = static_cast<const In*>(w.in[i]), outs[i] = static_cast<Out*>(w.out[i]);
    f(ins, outs);
  }
  meet(w, lanes, what);
  return out;
}

static void check(const void* p, size_t bytes, const char* what) {
  const char* at = static_cast<const char*>(p);
  if (at >= reinterpret_cast<char*>(shared) && at + bytes <= reinterpret_cast<char*>(shared) + shared_bytes) return;
  for (const Range& r : ranges)
    if (at >= r.begin && at + bytes <= r.end) {
      if (reinterpret_cast<uintptr_t>(p) % bytes) break;
      return;
    }
  snprintf(message, sizeof message, "%s of %zu bytes outside of every array, or not aligned: thread %u of block (%u, %u, %u)", what,
           bytes, current, block_index.x, block_index.y, block_index.z);
  _longjmp(scheduler, 2);
}

static void trampoline() {
  body(arguments);
  fibers[current].done = true;
  _longjmp(scheduler, 1);
}

static u32 random_state;
static bool ahead;  // whether warps run as far ahead of one another as barriers let them
static u32 draw() {
  random_state ^= random_state << 13, random_state ^= random_state >> 17, random_state ^= random_state << 5;
  return random_state;
}
static void shuffle_order(std::vector<unsigned>& order) {
  for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[draw() % i]);
}

static void run_block() {
  memset(shared, 0xff, shared_bytes);
  warps.assign((threads + 31) / 32, Meeting());
  block = Meeting();
  for (Meeting& team : teams) team = Meeting();
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; i++) order[i] = i;
  shuffle_order(order);
  if (ahead) std::stable_sort(order.begin(), order.end(), [](unsigned a, unsigned b) { return a / 32 < b / 32; });
  for (Fiber& fiber : fibers) fiber.started = fiber.done = false, fiber.wait = nullptr, fiber.copies.assign(1, {});
  volatile unsigned left = threads;
  while (left) {
    volatile bool moved = false, again = false;
    for (volatile size_t i = 0; i < order.size(); i++) {
      if (ahead && again && i % 32 == 0) i = i - 32;
      if (i % 32 == 0) again = false;
      Fiber& fiber = fibers[order[i]];
      if (fiber.done || (fiber.wait && *fiber.wait == fiber.seen)) continue;
      fiber.wait = nullptr;
      moved = again = true;
      current = order[i];
      thread_index.x = current;
      const int back = _setjmp(scheduler);
      if (back == 0) {
        if (fiber.started) _longjmp(fiber.at, 1);
        fiber.started = true;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack;
        fiber.start.uc_stack.ss_size = STACK;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, trampoline, 0);
        setcontext(&fiber.start);
      }
      if (back == 2) return;
      if (fibers[current].done) left = left - 1;
    }
    if (!moved) {
      snprintf(message, sizeof message, "block (%u, %u, %u): %u threads wait for others that never come (in %s)", block_index.x,
               block_index.y, block_index.z, unsigned(left), block.arrived ? block.what : "an operation of a warp");
      return;
    }
  }
}

template <auto F, class... A, size_t... I> static void unpack(void (*)(A...), void** values, std::index_sequence<I...>) {
  F(*static_cast<std::decay_t<A>*>(values[I])...);
}
template <auto F, class... A> static void call_as(void (*f)(A...), void** values) {
  unpack<F>(f, values, std::index_sequence_for<A...>());
}
template <auto F> static void call(void** values) { call_as<F>(F, values); }
template <class... A> static constexpr int count(void (*)(A...)) { return sizeof...(A); }
// Bytes of each argument, negative for pointers.
template <class... A> static void sizes(void (*)(A...), int* to) {
  ((*to++ = std::is_pointer_v<A> ? -int(sizeof(A)) : int(sizeof(A))), ...);
}

// Run a grid; returns an empty text, or what went wrong. `spans` are pairs of addresses that may be used.
extern "C" const char* launch(void (*f)(void**), const unsigned* grid, unsigned block_threads, void** values, const char** spans,
                          int span_count, size_t bytes, unsigned seed) {
  message[0] = 0;
  threads = block_threads;
  block_dim = {threads, 1, 1};
  grid_dim = {grid[0], grid[1], grid[2]};
  ranges.clear();
  for (int i = 0; i < span_count; i++) ranges.push_back({spans[2 * i], spans[2 * i + 1]});
  if (fibers.size() < threads) fibers.resize(threads);
  for (Fiber& fiber : fibers)
    if (!fiber.stack) fiber.stack = static_cast<char*>(malloc(STACK));
  shared_bytes = bytes;
  shared = static_cast<unsigned char*>(aligned_alloc(128, (bytes + 255) / 128 * 128));
  body = f;
  arguments = values;
  random_state = seed * 2654435761u + 1;
  ahead = seed % 2 == 1 && threads % 32 == 0;
  std::vector<unsigned> order(size_t(grid[0]) * grid[1] * grid[2]);
  for (size_t i = 0; i < order.size(); i++) order[i] = unsigned(i);
  shuffle_order(order);
  for (size_t i = 0; i < order.size() && !message[0]; i++) {
    block_index = {order[i] % grid[0], order[i] / grid[0] % grid[1], order[i] / grid[0] / grid[1]};
    run_block();
  }
  free(shared);
  return message;
}

static float from_half(u16 h) {
  const u32 sign = u32(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  float value = exponent == 31 ? (mantissa ? NAN : INFINITY)
                               : exponent ? ldexpf(float(mantissa | 0x400), int(exponent) - 25) : ldexpf(float(mantissa), -24);
  return sign ? -value : value;
}
static u16 to_half(double value) {
  if (value != value) return 0x7fff;
  const u16 sign = signbit(value) ? 0x8000 : 0;
  value = fabs(value);
  if (value >= 65520.0) return sign | 0x7c00;
  if (value < 6.103515625e-05) return sign | u16(nearbyint(value * 16777216.0));  // 2^24: in subnormal units
  int exponent;
  const double mantissa = frexp(value, &exponent);  // [0.5, 1)
  // The mantissa has its leading 1, which adds one to the exponent's field, as does a carry out of rounding.
  return u16(sign + ((exponent + 13) << 10) + int(nearbyint(mantissa * 2048.0)));
}
static float from_bfloat(u16 b) {
  const u32 bits = u32(b) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static u16 to_bfloat(double value) {
  float f = float(value);
  u32 bits;
  memcpy(&bits, &f, 4);
  if (f != f) return 0x7fff;
  return u16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace host

#define threadIdx (host::thread_index)
#define blockIdx (host::block_index)
#define blockDim (host::block_dim)
#define gridDim (host::grid_dim)

DEVICE u32 lane_id() { return host::current & 31; }
DEVICE u32 warp_id() { return host::current >> 5; }
DEVICE void sync_block() { host::meet(host::block, host::threads, "sync_block"); }
DEVICE void sync_team(int number, int count) {
  if (number < 1 || number > 15 || count % 32) host::fail("sync_team: number %ld of %ld threads", number, count);
  host::meet(host::teams[number], count, "sync_team");
}
DEVICE void sync_warp() { host::together<int, int>("sync_warp", 0, [](auto, auto) {}); }

template <class T> DEVICE T load(const T* p) {
  host::check(p, sizeof(T), "load");
  return *p;
}
template <class T> DEVICE void store(T* p, T value) {
  host::check(p, sizeof(T), "store");
  *p = value;
}
DEVICE Floats4 load_fresh(const Floats4* p) { return load(p); }
DEVICE u32 atomic_add(u32* p, u32 value) {
  host::check(p, 4, "atomic_add");
  return (*p += value) - value;
}
DEVICE void fence() {}

DEVICE void copy16(void* shared, const void* global, bool valid) {
  if (valid) host::check(global, 16, "copy16");
  const unsigned char* to = static_cast<unsigned char*>(shared);
  if (to < host::shared || to + 16 > host::shared + host::shared_bytes || reinterpret_cast<uintptr_t>(shared) % 16)
    host::fail("copy16 to outside of shared memory, or not aligned: byte %ld of %ld", long(to - host::shared), long(host::shared_bytes));
  memset(shared, 0xff, 16);
  host::fibers[host::current].copies.back().push_back({shared, global, valid});
}
DEVICE void copy16_if(bool mine, void* shared, const void* global, bool valid) {
  if (mine) copy16(shared, global, valid);
}
DEVICE void copy_commit() { host::fibers[host::current].copies.emplace_back(); }
template <int PENDING> DEVICE void copy_wait() {
  auto& groups = host::fibers[host::current].copies;
  while (groups.size() > PENDING + 1) {
    for (const host::Copy& c : groups.front()) c.valid ? (void)memcpy(c.to, c.from, 16) : (void)memset(c.to, 0, 16);
    groups.erase(groups.begin());
  }
}

template <class T> DEVICE T shuffle(T value, int from, int width) {
  return host::together<std::pair<T, std::pair<int, int>>, T>("shuffle", {value, {from, width}}, [](auto ins, auto outs) {
    for (int i = 0; i < 32; i++) {
      const int width = ins[i]->second.second;
      *outs[i] = ins[i / width * width + ins[i]->second.first % width]->first;
    }
  });
}
template <class T> DEVICE T shuffle_xor(T value, int mask) {
  return host::together<std::pair<T, int>, T>("shuffle_xor", {value, mask}, [](auto ins, auto outs) {
    for (int i = 0; i < 32; i++) *outs[i] = ins[i ^ ins[i]->second]->first;
  });
}
template <bool YES> DEVICE u32 held(u32 value) { return YES ? shuffle(value, int(lane_id()), 32) : value; }
template <bool YES, class T> DEVICE const T* held(const T* p) { return YES ? shuffle(p, int(lane_id()), 32) : p; }
DEVICE u32 ballot(bool predicate) {
  return host::together<bool, u32>("ballot", predicate, [](auto ins, auto outs) {
    u32 all = 0;
    for (int i = 0; i < 32; i++) all |= u32(*ins[i]) << i;
    for (int i = 0; i < 32; i++) *outs[i] = all;
  });
}

DEVICE int popcount(u32 word) { return __builtin_popcount(word); }
DEVICE u32 multiply_high(u32 a, u32 b) { return u32(u64(a) * b >> 32); }
DEVICE u32 permute(u32 a, u32 b, u32 selector) {
  const u64 both = u64(b) << 32 | a;
  u32 d = 0;
  for (int i = 0; i < 4; i++) {
    const u32 s = selector >> (4 * i) & 15;
    u32 byte = u32(both >> (8 * (s & 7))) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    d |= byte << (8 * i);
  }
  return d;
}
DEVICE u32 masked_or(u32 a, u32 mask, u32 c) { return (a & mask) | c; }
DEVICE float as_float(u32 bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
DEVICE u32 as_bits(float value) {
  u32 bits;
  memcpy(&bits, &value, 4);
  return bits;
}
DEVICE float round_even(float value) { return nearbyintf(value); }
DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float floor_of(float value) { return floorf(value); }
DEVICE float magnitude(float value) { return fabsf(value); }
DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
DEVICE float minimum(float a, float b) { return fminf(a, b); }
DEVICE float product(float a, float b) { return a * b; }
DEVICE float quotient(float a, float b) { return a / b; }

namespace host {
// Row and column of what a lane holds of the operands of mma.m16n8k16: registers of a and b with two numbers each, d with one.
struct Tile { u32 a[4], b[2]; };

// d (16 x 8) += a (16 x K) b (K x 8) with `each` numbers per register, K = 8 each; `at` takes one out of a register, and which.
template <class D, class Total, class F> static void multiply(const char* what, D (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, int each, F at) {
  struct In { Tile t; D d[4]; };
  struct Out { D d[4]; };
  In in = {{{a[0], a[1], a[2], a[3]}, {b0, b1}}, {d[0], d[1], d[2], d[3]}};
  const Out out = together<In, Out>(what, in, [&](const In** ins, Out** outs) {
    static Total left[16][256], right[256][8];
    for (int lane = 0; lane < 32; lane++) {
      const int g = lane / 4, c = lane % 4;
      for (int r = 0; r < 4; r++)
        for (int e = 0; e < each; e++) {
          const int k = each * c + e + 4 * each * (r / 2);
          left[g + 8 * (r % 2)][k] = at(ins[lane]->t.a[r], e, true);
          if (r < 2) right[each * c + e + 4 * each * r][g] = at(ins[lane]->t.b[r], e, false);
        }
    }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        Total total = ins[lane]->d[i];
        for (int k = 0; k < 8 * each; k++) total += left[row][k] * right[k][column];
        outs[lane]->d[i] = D(total);
      }
  });
  for (int i = 0; i < 4; i++) d[i] = out.d[i];
}

// d (16 x 8) += a (16 x 32) b (32 x 8) with two of every four numbers of a, whose places the lanes that `selector` names have.
template <class F> static void multiply_sparse(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 places, int selector, F at) {
  struct In { u32 a[4], b[4], places; float d[4]; };
  struct Out { float d[4]; };
  const In in = {{a[0], a[1], a[2], a[3]}, {b[0], b[1], b[2], b[3]}, places, {d[0], d[1], d[2], d[3]}};
  const Out out = together<In, Out>("mma_sparse", in, [&](const In** ins, Out** outs) {
    static double left[16][32], right[32][8];
    memset(left, 0, sizeof left);
    for (int lane = 0; lane < 32; lane++) {
      const int g = lane / 4, c = lane % 4;
      for (int r = 0; r < 4; r++)
        for (int e = 0; e < 2; e++) {
          const int row = g + 8 * (r % 2), kept = 2 * c + e + 8 * (r / 2);  // of 16 in this row
          const u32 words = ins[4 * g + 2 * selector + kept / 8]->places >> (16 * (r % 2));
          const u32 four = words >> (4 * (kept % 8 / 2)) & 15;
          if ((four & 3) >= four >> 2) fail("mma_sparse: places %ld, expected two of four in their order", four);
          left[row][4 * (kept / 2) + (e ? four >> 2 : four & 3)] = at(ins[lane]->a[r], e);
          right[2 * c + e + 8 * r][g] = at(ins[lane]->b[r], e);
        }
    }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        double total = ins[lane]->d[i];
        for (int k = 0; k < 32; k++) total += left[lane / 4 + 8 * (i / 2)][k] * right[k][2 * (lane % 4) + i % 2];
        outs[lane]->d[i] = float(total);
      }
  });
  for (int i = 0; i < 4; i++) d[i] = out.d[i];
}
}  // namespace host

template <class Own> struct Halves {
  static u32 fma2(u32 a, u32 b, u32 c) {
    return pack_double(double(low(a)) * low(b) + low(c), double(high(a)) * high(b) + high(c));
  }
  static u32 pack(float low, float high) { return pack_double(low, high); }
  static float low(u32 pair) { return Own::from(u16(pair)); }
  static float high(u32 pair) { return Own::from(u16(pair >> 16)); }
  static void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    host::multiply<float, double>("mma", d, a, b0, b1, 2, [](u32 word, int e, bool) { return double(e ? high(word) : low(word)); });
  }
  template <int SELECTOR> static void mma_sparse(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 places) {
    host::multiply_sparse(d, a, b, places, SELECTOR, [](u32 word, int e) { return double(e ? high(word) : low(word)); });
  }

 private:
  static u32 pack_double(double low, double high) { return u32(Own::to(low)) | u32(Own::to(high)) << 16; }
};
struct BFloat16 : Halves<BFloat16> {
  static float from(u16 bits) { return host::from_bfloat(bits); }
  static u16 to(double value) { return host::to_bfloat(value); }
};
struct Float16 : Halves<Float16> {
  static float from(u16 bits) { return host::from_half(bits); }
  static u16 to(double value) { return host::to_half(value); }
};

DEVICE void load_matrices(u32 (&d)[4], const void* shared) {
  struct Out { u32 d[4]; };
  const Out out = host::together<const void*, Out>("load_matrices", shared, [](auto ins, auto outs) {
    for (int lane = 0; lane < 32; lane++)
      for (int m = 0; m < 4; m++) {
        const char* row = static_cast<const char*>(*ins[8 * m + lane / 4]);
        host::check(row, 4, "load_matrices");
        memcpy(&outs[lane]->d[m], row + 4 * (lane % 4), 4);
      }
  });
  for (int i = 0; i < 4; i++) d[i] = out.d[i];
}

DEVICE void mma_u8s8(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  host::multiply<int, s64>("mma_u8s8", d, a, b0, b1, 4, [](u32 word, int e, bool left) {
    const u32 byte = word >> (8 * e) & 255;
    return left ? s64(byte) : s64(s8(byte));
  });
}
DEVICE void mma_and(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  host::multiply<int, s64>("mma_and", d, a, b0, b1, 32, [](u32 word, int e, bool) { return s64(word >> e & 1); });
}
