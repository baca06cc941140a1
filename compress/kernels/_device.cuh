// What kernels need of the device, one function per instruction or intrinsic. tests/kernels/host.h has the same functions in
// plain C++, so that whole kernels run on a CPU; nothing outside this file may use inline PTX, intrinsics or shared memory directly.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char s8;
typedef long long s64;
struct __align__(8) Words2 { u32 x, y; };
struct __align__(16) Words4 { u32 x, y, z, w; };
struct __align__(16) Floats4 { float x, y, z, w; };

#define DEVICE __device__ __forceinline__
#define DEVICE_MEMBER static __device__ __forceinline__
#define DEVICE_METHOD __device__ __forceinline__
#define KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define SHARED(name) extern __shared__ __align__(16) unsigned char name[]

DEVICE u32 lane_id() { return threadIdx.x & 31; }
DEVICE u32 warp_id() { return threadIdx.x >> 5; }
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
// Of the `count` threads of whole warps that name the same number, 1 to 15; other threads of the block go on.
DEVICE void sync_team(int number, int count) { asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(count) : "memory"); }

// Global memory. `load` and `store` of at most 16 bytes; `load_fresh` reads past L1 what another block wrote.
template <class T> DEVICE T load(const T* p) { return *p; }
template <class T> DEVICE void store(T* p, T value) { *p = value; }
DEVICE Floats4 load_fresh(const Floats4* p) {
  Floats4 four;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(four.x), "=f"(four.y), "=f"(four.z), "=f"(four.w) : "l"(p) : "memory");
  return four;
}
DEVICE u32 atomic_add(u32* p, u32 value) { return atomicAdd(p, value); }
DEVICE void fence() { __threadfence(); }

// Sixteen bytes from global to shared memory without registers; zeros where `valid` is false.
DEVICE void copy16(void* shared, const void* global, bool valid) {
  const u32 address = static_cast<u32>(__cvta_generic_to_shared(shared));
  const u32 bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}
// The same for threads with `mine` alone, without a branch.
DEVICE void copy16_if(bool mine, void* shared, const void* global, bool valid) {
  const u32 address = static_cast<u32>(__cvta_generic_to_shared(shared));
  const u32 bytes = valid ? 16 : 0, there = mine;
  asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p cp.async.cg.shared.global [%0], [%1], 16, %2;}" ::"r"(address), "l"(global),
               "r"(bytes), "r"(there)
               : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// Within a warp.
template <class T> DEVICE T shuffle(T value, int from, int width) { return __shfl_sync(0xffffffffu, value, from, width); }
template <class T> DEVICE T shuffle_xor(T value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
// The same value. If YES it comes from a shuffle: what a loop needs then stays in a register, where the compiler would rather compute
// it anew each time.
template <bool YES> DEVICE u32 held(u32 value) { return YES ? __shfl_sync(0xffffffffu, value, threadIdx.x & 31) : value; }
template <bool YES, class T> DEVICE const T* held(const T* p) {
  const u64 bits = reinterpret_cast<u64>(p);
  return reinterpret_cast<const T*>(u64(held<YES>(u32(bits >> 32))) << 32 | held<YES>(u32(bits)));
}
DEVICE u32 ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

// Bits.
DEVICE int popcount(u32 word) { return __popc(word); }
DEVICE u32 multiply_high(u32 a, u32 b) { return __umulhi(a, b); }
DEVICE u32 permute(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}
// (a & mask) | c in one instruction, which the compiler makes two of where mask and c are constants
DEVICE u32 masked_or(u32 a, u32 mask, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(c));
  return d;
}
DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 as_bits(float value) { return __float_as_uint(value); }
DEVICE float round_even(float value) { return rintf(value); }
DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float floor_of(float value) { return floorf(value); }
DEVICE float magnitude(float value) { return fabsf(value); }
DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
DEVICE float minimum(float a, float b) { return fminf(a, b); }
// Products and quotients as they stand, which the compiler may not join with a sum or replace by an estimate.
DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
DEVICE float quotient(float a, float b) { return __fdiv_rn(a, b); }

// Before PTX 8.5 there is one name for metadata in any order.
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 5)
#define MMA_SPARSE "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32."
#else
#define MMA_SPARSE "mma.sp.sync.aligned.m16n8k32.row.col.f32."
#endif

// Pairs of 16-bit numbers in one register, the lower half first.
struct BFloat16 {
  // d = a * b + c in pairs
  DEVICE_MEMBER u32 fma2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
  DEVICE_MEMBER u32 pack(float low, float high) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
  }
  DEVICE_MEMBER float low(u32 pair) { return __uint_as_float(pair << 16); }
  DEVICE_MEMBER float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
  // d (16 x 8) += a (16 x 16) b (16 x 8), see PTX, mma.m16n8k16
  DEVICE_MEMBER void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  // d (16 x 8) += a (16 x 32) b (32 x 8), of a two numbers of every four; which, `places` says of 16 columns of the rows g and g + 8
  // in lanes 0 and 1 of four (selector 0) or 2 and 3 (selector 1): two bits each, from the lowest.
  template <int SELECTOR> DEVICE_MEMBER void mma_sparse(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 places) {
    asm volatile(MMA_SPARSE "bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(places), "n"(SELECTOR));
  }
};
struct Float16 {
  DEVICE_MEMBER u32 fma2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
  DEVICE_MEMBER u32 pack(float low, float high) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
  }
  DEVICE_MEMBER float low(u32 pair) {
    float d;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(d) : "r"(pair));
    return d;
  }
  DEVICE_MEMBER float high(u32 pair) {
    float d;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(d) : "r"(pair));
    return d;
  }
  DEVICE_MEMBER void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  template <int SELECTOR> DEVICE_MEMBER void mma_sparse(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 places) {
    asm volatile(MMA_SPARSE "f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(places), "n"(SELECTOR));
  }
};

// Four 8 x 8 matrices of 16-bit numbers from shared memory; lane l names the row l % 8 of matrix l / 8.
DEVICE void load_matrices(u32 (&d)[4], const void* shared) {
  const u32 address = static_cast<u32>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// d (16 x 8) += a (16 x 32) b (32 x 8), a unsigned and b signed bytes.
DEVICE void mma_u8s8(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d (16 x 8) += popcount(a (16 x 256) and b (256 x 8)), single bits.
DEVICE void mma_and(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
