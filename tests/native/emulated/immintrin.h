// In place of the compiler's header, for scripts/avx512: SIMDe's instructions in plain C++, and those that it lacks.
#pragma once

#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>

#include <cstring>

#ifndef _MM_FROUND_NO_EXC
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC
#endif

using __mmask16 = simde__mmask16;

template <class To, class From>
inline To same_bits(const From &value) {
    static_assert(sizeof(To) <= sizeof(From), "the first bits are taken");
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

struct Floats512 {
    float lane[16];
};

inline float emulated_reduce_add(simde__m512 a) {
    const Floats512 all = same_bits<Floats512>(a);
    float sum = 0.0f;
    for (float each : all.lane) sum += each;
    return sum;
}
#define _mm512_reduce_add_ps emulated_reduce_add

inline simde__m256i emulated_low_halves(simde__m512i a) {
    struct Words {
        short lane[32];
    } all = same_bits<Words>(a), halves{};
    for (int i = 0; i < 16; ++i) halves.lane[i] = all.lane[2 * i];
    return same_bits<simde__m256i>(halves);
}
#define _mm512_cvtepi32_epi16 emulated_low_halves

inline simde__m512i emulated_widened(simde__m256i a) {
    struct Words {
        unsigned short lane[16];
    } halves = same_bits<Words>(a);
    struct {
        unsigned lane[16];
    } all;
    for (int i = 0; i < 16; ++i) all.lane[i] = halves.lane[i];
    return same_bits<simde__m512i>(all);
}
#define _mm512_cvtepu16_epi32 emulated_widened

inline simde__m256 emulated_extract(simde__m512 a, int half) {
    Floats512 all = same_bits<Floats512>(a);
    if (half) std::memcpy(all.lane, all.lane + 8, 8 * sizeof(float));
    return same_bits<simde__m256>(all);
}
#define _mm512_extractf32x8_ps emulated_extract

// Quarters of 128 bits: two of a, then two of b, two bits of `which` for each.
inline simde__m512 emulated_shuffle(simde__m512 a, simde__m512 b, int which) {
    const Floats512 first = same_bits<Floats512>(a), second = same_bits<Floats512>(b);
    Floats512 chosen;
    for (int quarter = 0; quarter < 4; ++quarter) {
        const float *from = (quarter < 2 ? first : second).lane + 4 * (which >> 2 * quarter & 3);
        std::memcpy(chosen.lane + 4 * quarter, from, 4 * sizeof(float));
    }
    return same_bits<simde__m512>(chosen);
}
#define _mm512_shuffle_f32x4 emulated_shuffle

struct Integers512 {
    int lane[16];
};

// To the nearest whole numbers; without the sign bit's special value, which no caller rounds to.
inline simde__m512i emulated_rounded(simde__m512 a) {
    const Floats512 all = same_bits<Floats512>(a);
    Integers512 whole;
    for (int i = 0; i < 16; ++i) whole.lane[i] = static_cast<int>(__builtin_rintf(all.lane[i]));
    return same_bits<simde__m512i>(whole);
}
#define _mm512_cvtps_epi32 emulated_rounded

inline simde__m512 emulated_floats(simde__m512i a) {
    const Integers512 whole = same_bits<Integers512>(a);
    Floats512 all;
    for (int i = 0; i < 16; ++i) all.lane[i] = static_cast<float>(whole.lane[i]);
    return same_bits<simde__m512>(all);
}
#define _mm512_cvtepi32_ps emulated_floats

inline simde__m128i emulated_low_bytes(simde__m512i a) {
    const Integers512 whole = same_bits<Integers512>(a);
    struct {
        signed char lane[16];
    } bytes;
    for (int i = 0; i < 16; ++i) bytes.lane[i] = static_cast<signed char>(whole.lane[i]);
    return same_bits<simde__m128i>(bytes);
}
#define _mm512_cvtepi32_epi8 emulated_low_bytes

// SIMDe gives this name to another instruction.
#undef _mm512_madd_epi16
#define _mm512_madd_epi16 simde_mm512_madd_epi16
