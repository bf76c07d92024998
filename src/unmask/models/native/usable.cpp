// Whether this processor runs a variant of the kernels: linked into each variant's library, for whoever has to choose.
//
// Compiled for any processor of its kind, with -DUNMASK_VARIANT_AMX or the like to say which variant it speaks for. Features are read and then
// tried, with SIGILL caught: some virtual machines advertise instructions that they do not have.
#include <csetjmp>
#include <csignal>
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif
#if defined(UNMASK_VARIANT_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
enum Register { kEax, kEbx, kEcx, kEdx };

static bool has(unsigned leaf, unsigned part, Register which, uint32_t bits) {
    unsigned found[4];
    return __get_cpuid_count(leaf, part, &found[kEax], &found[kEbx], &found[kEcx], &found[kEdx]) && (found[which] & bits) == bits;
}

// Whether the system keeps these registers for each thread: bit 1 SSE, 2 AVX, 5-7 AVX-512, 17-18 tiles.
static bool kept(uint32_t bits) {
    if (!has(1, 0, kEcx, bit_OSXSAVE)) return false;
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & bits) == bits;
}

static thread_local sigjmp_buf before_probe;
static void leave_probe(int) { siglongjmp(before_probe, 1); }

// Whether the probe's instructions are there and give what they should.
static bool passes(bool (*probe)()) {
    struct sigaction catching = {}, before;
    catching.sa_handler = leave_probe;
    sigemptyset(&catching.sa_mask);
    if (sigaction(SIGILL, &catching, &before) != 0) return false;
    const bool right = sigsetjmp(before_probe, 1) == 0 && probe();
    sigaction(SIGILL, &before, nullptr);
    return right;
}

// Operands that the compiler cannot know: weights 200 and inputs -3, four to a sum.
static volatile int weight = int(0xc8c8c8c8), input = int(0xfdfdfdfd);
constexpr int kSum = 4 * 200 * -3;
#endif

#if defined(UNMASK_VARIANT_PORTABLE) || defined(UNMASK_VARIANT_NEON)
extern "C" int unmask_usable() { return 1; }

#elif defined(UNMASK_VARIANT_NEON_DOTPROD) || defined(UNMASK_VARIANT_NEON_I8MM)
#if defined(__APPLE__)
static bool has(const char* feature) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value;
}
static bool has_dotprod() { return has("hw.optional.arm.FEAT_DotProd"); }
static bool has_i8mm() { return has("hw.optional.arm.FEAT_I8MM"); }
#else
static bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }  // HWCAP_ASIMDDP
static bool has_i8mm() { return getauxval(AT_HWCAP2) >> 13 & 1; }    // HWCAP2_I8MM
#endif
#if defined(UNMASK_VARIANT_NEON_I8MM)
extern "C" int unmask_usable() { return has_dotprod() && has_i8mm(); }
#else
extern "C" int unmask_usable() { return has_dotprod(); }
#endif

#elif defined(UNMASK_VARIANT_AVX2) || defined(UNMASK_VARIANT_AVXVNNI)
#if defined(UNMASK_VARIANT_AVX2)
__attribute__((target("avx2,fma"))) static bool probe() {
    const __m256 two = _mm256_set1_ps(float(weight & 2 | 2)), five = _mm256_fmadd_ps(two, two, _mm256_set1_ps(1.0f));
    const __m256i product = _mm256_madd_epi16(_mm256_set1_epi16(short(weight & 255)), _mm256_cvtps_epi32(five));
    return _mm256_extract_epi32(product, 7) == 200 * 5;
}
#else
__attribute__((target("avx2,avxvnni"))) static bool probe() {
    const __m256i sum = _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), _mm256_set1_epi32(weight), _mm256_set1_epi32(input));
    return _mm256_extract_epi32(sum, 7) == kSum;
}
#endif
extern "C" int unmask_usable() {
    return kept(6) && has(1, 0, kEcx, bit_FMA | bit_AVX) && has(7, 0, kEbx, bit_AVX2 | bit_BMI | bit_BMI2) &&
#if defined(UNMASK_VARIANT_AVXVNNI)
           has(7, 1, kEax, 1u << 4) &&
#endif
           passes(probe);
}

#elif defined(UNMASK_VARIANT_AVX512VNNI) || defined(UNMASK_VARIANT_AMX)
__attribute__((target("avx512f,avx512vnni"))) static bool probe_dot() {
    const __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi32(weight), _mm512_set1_epi32(input));
    return _mm512_reduce_add_epi32(sum) == 16 * kSum;
}
static bool has_avx512vnni() {
    return kept(0xe6) && has(1, 0, kEcx, bit_FMA | bit_AVX) && has(7, 0, kEbx, bit_AVX2 | bit_BMI | bit_BMI2) &&
           has(7, 0, kEbx, bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ) && has(7, 0, kEcx, 1u << 11) &&
           passes(probe_dot);
}
#if defined(UNMASK_VARIANT_AVX512VNNI)
extern "C" int unmask_usable() { return has_avx512vnni(); }
#else
// One tile product of 16 rows, 64 inputs and 16 channels.
__attribute__((target("amx-tile,amx-int8"))) static bool probe_tiles() {
    struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64};
        uint8_t rows[16] = {16, 16, 16};
    } shapes;
    alignas(64) int inputs[16 * 16], weights[16 * 16], sums[16 * 16];
    for (int i = 0; i < 16 * 16; i++) inputs[i] = input, weights[i] = weight;
    __asm__ volatile("" : : "r"(&shapes), "r"(inputs), "r"(weights) : "memory");  // see amx.h, `stored`
    _tile_loadconfig(&shapes);
    _tile_loadd(1, inputs, 64);
    _tile_loadd(2, weights, 64);
    _tile_dpbsud(0, 1, 2);
    _tile_stored(0, sums, 64);
    _tile_release();
    for (int sum : sums)
        if (sum != 16 * kSum) return false;
    return true;
}
extern "C" int unmask_usable() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of the process, for every thread it has or will have
    return has_avx512vnni() && kept(3u << 17) && has(7, 0, kEdx, 3u << 24) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 && passes(probe_tiles);
}
#endif
#endif
