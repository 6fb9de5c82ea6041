// Writes a weight's values: rows of W [N, K] in fp32, fp16 or bf16 from codes of any scheme. by_nvrtc.py compiles and
// starts it.
//
// A thread owns RUN columns of a byte row. It reads each byte once and writes one store of 16 bytes for each plane.
//
// Given by the compiler's options: SCHEME, RADIX, PLANES, GROUP, and OUT, SCALE and ZERO as types of the values and of
// the tables. No header is included: a machine without a CUDA toolkit has none.
//
// Binary and ternary weights in 16 bits are made two at a time in the lanes of a register, without a conversion: with s
// the bits of the scale in both lanes, a code 1 of binary flips the sign, and of a ternary code the bit 1 is the sign
// and bit 0 clears the rest of the lane. All else is computed in fp32 as packed_weight.py has it and rounded once; both
// products and sums round (no fused multiply-add), so that values are those of the reference to the bit.

#define FP32 0
#define FP16 1
#define BF16 2

#define BINARY 0
#define TERNARY 1
#define AFFINE 2
#define ZERO_POINT 3

#define SIGNED (SCHEME == BINARY || SCHEME == TERNARY)
#define PAIRS (SIGNED && OUT != FP32)
#define RUN (OUT == FP32 ? 4 : 8)

typedef unsigned short u16;
typedef unsigned int u32;

#ifdef __CUDACC_RTC__
__device__ __forceinline__ u16 half_bits(float x) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

__device__ __forceinline__ float of_half_bits(u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
#endif

// fp32 -> bf16, to nearest even, in the upper half; GPUs before sm_80 have no instruction for it.
__device__ __forceinline__ u32 bf16_bits(float x) {
    const u32 bits = __float_as_uint(x);
    return x == x ? bits + 0x7fff + (bits >> 16 & 1) : 0x7fffffff;
}

// Two values in OUT's 16 bits each, `low` in the lower half.
__device__ __forceinline__ u32 pair(float low, float high) {
#if OUT == FP16 && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    u32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
#elif OUT == FP16
    return half_bits(low) | (u32)half_bits(high) << 16;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
#else
    return bf16_bits(low) >> 16 | (bf16_bits(high) & 0xffff0000);
#endif
}

// A table's entry as fp32.
template <int TYPE> struct Entry {
    typedef u16 stored;
    static __device__ __forceinline__ float read(u16 bits) {
        return TYPE == FP16 ? of_half_bits(bits) : __uint_as_float((u32)bits << 16);
    }
};
template <> struct Entry<FP32> {
    typedef float stored;
    static __device__ __forceinline__ float read(float x) { return x; }
};

// Plane p of the bytes in the 16-bit lanes of y (radix 3: already multiplied by 3), times s: a pair of weights.
__device__ __forceinline__ u32 signed_lanes(u32 y, u32 s, int p) {
#if RADIX == 2
    return s ^ (y << (8 + p) & 0x80008000);
#elif RADIX == 4
    return (s & ~((y >> (6 - 2 * p) & 0x00010001) * 0x7fff)) ^ (y << (8 + 2 * p) & 0x80008000);
#else
    return (s & ~((y >> 8 & 0x00010001) * 0x7fff)) ^ (y << 6 & 0x80008000);
#endif
}

// Plane p of byte y (radix 3: already multiplied by 3).
__device__ __forceinline__ u32 code_of(u32 y, int p) {
#if RADIX == 256
    return y;
#elif RADIX == 3
    return y >> 8;
#else
    const int bits = RADIX == 2 ? 1 : RADIX == 4 ? 2 : 4;
    return y >> (8 - bits - bits * p) & (RADIX - 1);
#endif
}

__device__ __forceinline__ float value_of(u32 code, float s, float z) {
    // 2^23 + code, without the conversion that is four times slower
    const float c = __fsub_rn(__uint_as_float(0x4b000000 | code), 8388608.0f);
#if SCHEME == BINARY
    return __fmul_rn(__fsub_rn(1.0f, __fadd_rn(c, c)), s);
#elif SCHEME == TERNARY
    return __fmul_rn(__fsub_rn(1.0f, c), s);
#elif SCHEME == AFFINE
    return __fadd_rn(__fmul_rn(c, s), z);
#else
    return __fmul_rn(__fsub_rn(c, z), s);
#endif
}

// w [last - first, K] = rows first .. last-1 of W, made of the byte rows start .. end-1.
//
// codes: uint8 [n, K]. scale, zero: [N, K / GROUP]; zero is not read where the scheme has none. All at addresses that 16
// divides, codes and w. Blocks of 32 by any number: 32 RUN columns by as many byte rows; x covers K, y takes turns.
extern "C" __global__ void unpack(const unsigned char *__restrict__ codes,
                                  const typename Entry<SCALE>::stored *__restrict__ scale,
                                  const typename Entry<ZERO>::stored *__restrict__ zero, uint4 *__restrict__ w,
                                  int columns, int n, int first, int last, int start, int end) {
    const int column = (blockIdx.x * 32 + threadIdx.x) * RUN;
    if (column >= columns) return;
    const int groups = columns / GROUP, group = column / GROUP;
    const int step = gridDim.y * blockDim.y;
#pragma unroll 1
    for (int row = start + blockIdx.y * blockDim.y + threadIdx.y; row < end; row += step) {
        const unsigned char *bytes = codes + (size_t)row * columns + column;  // [n, K]
#if OUT == FP32
        const u32 words[1] = {*(const u32 *)bytes};
#else
        const uint2 both = *(const uint2 *)bytes;
        const u32 words[2] = {both.x, both.y};
#endif
        size_t entry = (size_t)row * groups + group;  // [N, K / GROUP]
        float s[PLANES], z[PLANES];
#pragma unroll
        for (int p = 0; p < PLANES; p++) {
            const bool wanted = (u32)(row + p * n - first) < (u32)(last - first);
            s[p] = wanted ? Entry<SCALE>::read(scale[entry]) : 0.0f;
            z[p] = wanted && !SIGNED ? Entry<ZERO>::read(zero[entry]) : 0.0f;
            entry += (size_t)n * groups;
        }
#if PAIRS
        u32 y[4] = {__byte_perm(words[0], 0, 0x4140), __byte_perm(words[0], 0, 0x4342),
                    __byte_perm(words[1], 0, 0x4140), __byte_perm(words[1], 0, 0x4342)};
#else
        u32 y[RUN];
#pragma unroll
        for (int i = 0; i < RUN; i++) y[i] = words[i / 4] >> (i % 4 * 8) & 255;
#endif
        long long place = (long long)(row - first) * (columns / RUN) + column / RUN;  // [last - first, K / RUN]
#pragma unroll
        for (int p = 0; p < PLANES; p++) {
            u32 made[4];
#if PAIRS
            const u32 lanes = pair(s[p], s[p]);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (RADIX == 3) y[i] *= 3;
                made[i] = signed_lanes(y[i], lanes, p);
                if (RADIX == 3) y[i] &= 0x00ff00ff;
            }
#else
            float values[RUN];
#pragma unroll
            for (int i = 0; i < RUN; i++) {
                if (RADIX == 3) y[i] *= 3;
                values[i] = value_of(code_of(y[i], p), s[p], z[p]);
                if (RADIX == 3) y[i] &= 255;
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
#if OUT == FP32
                made[i] = __float_as_uint(values[i]);
#else
                made[i] = pair(values[2 * i], values[2 * i + 1]);
#endif
            }
#endif
            if ((u32)(row + p * n - first) < (u32)(last - first))
                w[place] = make_uint4(made[0], made[1], made[2], made[3]);
            place += (long long)n * (columns / RUN);
        }
    }
}
