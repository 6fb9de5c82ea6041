// A CUDA source compiled for the processor, and a driver that runs it: for tests of the text and of its launches.
// cuda_on_host.py puts this in front of the source, once for each set of options.

#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __forceinline__ inline

struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct Dimensions {
    unsigned x, y, z;
};
static Dimensions blockIdx, threadIdx, blockDim, gridDim;

static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class To, class From> static To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "of one size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
static unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
static float __uint_as_float(unsigned x) { return same_bits<float>(x); }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }

static unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    unsigned found = 0;
    for (int i = 0; i < 4; i++) found |= (unsigned)(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return found;
}

// What the source has as instructions. Halves by their definition: 2^-24 is the smallest, 2^-10 the step of 1 .. 2.
static float of_half_bits(unsigned short bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float x = exponent ? fraction + 1024 : fraction;
    for (int i = 1; i < exponent; i++) x *= 2;
    x *= 1.0f / (1 << 24);
    if (exponent == 31) x = fraction ? __builtin_nanf("") : __builtin_inff();
    return bits >> 15 ? -x : x;
}
static unsigned short half_bits(float x) {
    const unsigned sign = __float_as_uint(x) >> 16 & 0x8000;
    const float size = __uint_as_float(__float_as_uint(x) & 0x7fffffff);
    if (size != size) return 0x7fff;
    if (size >= 65520) return sign | 0x7c00;
    unsigned low = 0, high = 0x7c00;  // the largest that is not above, and the next
    while (high - low > 1) {
        const unsigned middle = (low + high) / 2;
        (of_half_bits(middle) <= size ? low : high) = middle;
    }
    const float next = high == 0x7c00 ? 65536.0f : of_half_bits(high);
    const float below = size - of_half_bits(low), above = next - size;
    return sign | (below < above || (below == above && low % 2 == 0) ? low : high);
}

typedef void Start(void **);
struct Variant {
    Start *start;
};
extern Variant variants[];

extern "C" {
int load_status, launch_status, launches, loads, bound, unbound, spoiled;

int cuModuleLoadData(void **module, const char *image) {
    if (unbound && !bound) return 201;
    int number = 0;
    for (; *image; image++) number = 10 * number + *image - '0';
    *module = &variants[number];
    loads++;
    return load_status;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = module;
    return strcmp(name, "unpack") ? 500 : 0;
}

int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **arguments, void **extra) {
    if (unbound && !bound) return 201;
    if (launch_status) return launch_status;
    if (gy > 65535 || gz != 1 || bx * by * bz > 1024 || shared || extra) return 1;
    launches++;
    gridDim = {gx, gy, gz};
    blockDim = {bx, by, bz};
    for (blockIdx.y = 0; blockIdx.y < gy; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < gx; blockIdx.x++)
            for (threadIdx.y = 0; threadIdx.y < by; threadIdx.y++)
                for (threadIdx.x = 0; threadIdx.x < bx; threadIdx.x++) ((Variant *)function)->start(arguments);
    if (spoiled) **(unsigned char **)arguments[3] ^= 1;
    return 0;
}

int cuGetErrorString(int status, const char **words) {
    *words = status == 2     ? "out of memory"
             : status == 700 ? "an illegal memory access was encountered"
             : status == 222 ? "the provided PTX was compiled with an unsupported toolchain."
                             : "invalid argument";
    return 0;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = &bound;
    return device;
}

int cuCtxSetCurrent(void *context) {
    bound = context == &bound;
    return 0;
}
}
