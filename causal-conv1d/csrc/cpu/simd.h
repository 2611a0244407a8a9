// The vector layer: the only place that names instructions. Included once per instruction set, inside its namespace,
// with SIMD_AVX512, SIMD_AVX2 or SIMD_NEON defined, or none of them for plain C++.
//
// `Vec` holds `Vec::width` floats. `Vec::registers` is how many of them the machine keeps. `add_bits` and `larger_bits`
// take the lanes as integers; `by_sign` chooses between two by the sign bit; `add_sums` adds the sum of each of four
// vectors' lanes to a number of its own; bf16 is stored to the nearest, ties to even, and a NaN stays one.

#if defined(SIMD_AVX512) || defined(SIMD_AVX2)
// Like the instruction hadd, which takes twice as long on some machines.
inline __m256 pairwise(__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xDD));
}
#endif

#if defined(SIMD_AVX512)

struct Vec {
    static constexpr int width = 16, registers = 32;
    __m512 v;
};
inline Vec load(const float *p) { return {_mm512_loadu_ps(p)}; }
inline void store(float *p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec broadcast(float a) { return {_mm512_set1_ps(a)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline Vec larger(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec smaller(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec by_sign(Vec sign, Vec positive, Vec negative) {
    return {_mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(sign.v)), positive.v, negative.v)};
}
inline Vec negative_magnitude(Vec a) {
    return {_mm512_castsi512_ps(_mm512_or_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(INT32_MIN)))};
}
inline Vec magnitude(Vec a) {
    return {_mm512_castsi512_ps(_mm512_and_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(INT32_MAX)))};
}
inline Vec into_exponent(Vec a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))}; }
inline Vec nearest(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline bool all_at_most(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ) == 0xFFFF; }
inline Vec add_bits(Vec a, Vec b) {
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
}
inline Vec larger_bits(Vec a, Vec b) {
    return {_mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
}
inline Vec load(const bfloat16 *p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline void store(bfloat16 *p, Vec a) {
    const __m512i bits = _mm512_castps_si512(a.v), one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), one);
    const __m512i near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __m512i nan = _mm512_or_epi32(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i top = _mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, near, nan), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtepi32_epi16(top));
}
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline __m256 folded(Vec a) {
    return _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
}
inline void add_sums(float *p, Vec a, Vec b, Vec c, Vec d) {
    const __m256 s = pairwise(pairwise(folded(a), folded(b)), pairwise(folded(c), folded(d)));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    _mm_storeu_ps(p, _mm_add_ps(_mm_loadu_ps(p), four));
}
inline void transpose(Vec *rows) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
        a[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm512_shuffle_ps(a[i + j], a[i + 2 + j], 0x44);
            b[i + 2 * j + 1] = _mm512_shuffle_ps(a[i + j], a[i + 2 + j], 0xEE);
        }
    }
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88);
        a[4 + i] = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xDD);
        a[8 + i] = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88);
        a[12 + i] = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xDD);
    }
    for (int i = 0; i < 4; ++i) {
        rows[i].v = _mm512_shuffle_f32x4(a[i], a[8 + i], 0x88);
        rows[8 + i].v = _mm512_shuffle_f32x4(a[i], a[8 + i], 0xDD);
        rows[4 + i].v = _mm512_shuffle_f32x4(a[4 + i], a[12 + i], 0x88);
        rows[12 + i].v = _mm512_shuffle_f32x4(a[4 + i], a[12 + i], 0xDD);
    }
}

#elif defined(SIMD_AVX2)

struct Vec {
    static constexpr int width = 8, registers = 16;
    __m256 v;
};
inline Vec load(const float *p) { return {_mm256_loadu_ps(p)}; }
inline void store(float *p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline Vec broadcast(float a) { return {_mm256_set1_ps(a)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
inline Vec larger(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec smaller(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec by_sign(Vec sign, Vec positive, Vec negative) {
    return {_mm256_blendv_ps(positive.v, negative.v, sign.v)};
}
inline Vec negative_magnitude(Vec a) { return {_mm256_or_ps(a.v, _mm256_set1_ps(-0.0f))}; }
inline Vec magnitude(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec into_exponent(Vec a) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))}; }
inline Vec nearest(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline bool all_at_most(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)) == 0xFF; }
inline Vec add_bits(Vec a, Vec b) {
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v)))};
}
inline Vec larger_bits(Vec a, Vec b) {
    return {_mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v)))};
}
inline Vec load(const bfloat16 *p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
inline void store(bfloat16 *p, Vec a) {
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i near = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    const __m256i top = _mm256_srli_epi32(_mm256_blendv_epi8(near, nan, is_nan), 16);
    const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), half);
}
inline void transpose(Vec *rows) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
        a[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0xEE);
        }
    }
    for (int i = 0; i < 4; ++i) {
        rows[i].v = _mm256_permute2f128_ps(b[i], b[4 + i], 0x20);
        rows[4 + i].v = _mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
    }
}
inline float sum(Vec a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline void add_sums(float *p, Vec a, Vec b, Vec c, Vec d) {
    const __m256 s = pairwise(pairwise(a.v, b.v), pairwise(c.v, d.v));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    _mm_storeu_ps(p, _mm_add_ps(_mm_loadu_ps(p), four));
}

#elif defined(SIMD_NEON)

struct Vec {
    static constexpr int width = 4, registers = 32;
    float32x4_t v;
};
inline Vec load(const float *p) { return {vld1q_f32(p)}; }
inline void store(float *p, Vec a) { vst1q_f32(p, a.v); }
inline Vec broadcast(float a) { return {vdupq_n_f32(a)}; }
inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {vfmsq_f32(c.v, a.v, b.v)}; }
// Like x86: b where either is NaN or they are equal.
inline Vec larger(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline Vec smaller(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
inline Vec by_sign(Vec sign, Vec positive, Vec negative) {
    return {vbslq_f32(vcltzq_s32(vreinterpretq_s32_f32(sign.v)), negative.v, positive.v)};
}
inline Vec negative_magnitude(Vec a) { return {vnegq_f32(vabsq_f32(a.v))}; }
inline Vec magnitude(Vec a) { return {vabsq_f32(a.v)}; }
inline Vec into_exponent(Vec a) { return {vreinterpretq_f32_s32(vshlq_n_s32(vreinterpretq_s32_f32(a.v), 23))}; }
inline Vec nearest(Vec a) { return {vrndnq_f32(a.v)}; }
inline bool all_at_most(Vec a, Vec b) { return vminvq_u32(vcleq_f32(a.v, b.v)) != 0; }
inline Vec add_bits(Vec a, Vec b) {
    return {vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a.v), vreinterpretq_s32_f32(b.v)))};
}
inline Vec larger_bits(Vec a, Vec b) {
    return {vreinterpretq_f32_s32(vmaxq_s32(vreinterpretq_s32_f32(a.v), vreinterpretq_s32_f32(b.v)))};
}
inline Vec load(const bfloat16 *p) {
    const uint16x4_t half = vld1_u16(reinterpret_cast<const uint16_t *>(p));
    return {vreinterpretq_f32_u32(vshll_n_u16(half, 16))};
}
inline void store(bfloat16 *p, Vec a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a.v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t near = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
    const uint32x4_t nan = vorrq_u32(bits, vdupq_n_u32(0x400000));
    vst1_u16(reinterpret_cast<uint16_t *>(p), vshrn_n_u32(vbslq_u32(vceqq_f32(a.v, a.v), near, nan), 16));
}
inline void transpose(Vec *rows) {
    const float32x4x2_t a = vtrnq_f32(rows[0].v, rows[1].v), b = vtrnq_f32(rows[2].v, rows[3].v);
    for (int i = 0; i < 2; ++i) {
        rows[i].v = vcombine_f32(vget_low_f32(a.val[i]), vget_low_f32(b.val[i]));
        rows[2 + i].v = vcombine_f32(vget_high_f32(a.val[i]), vget_high_f32(b.val[i]));
    }
}
inline float sum(Vec a) { return vaddvq_f32(a.v); }
inline void add_sums(float *p, Vec a, Vec b, Vec c, Vec d) {
    vst1q_f32(p, vaddq_f32(vld1q_f32(p), vpaddq_f32(vpaddq_f32(a.v, b.v), vpaddq_f32(c.v, d.v))));
}

#else

struct Vec {
    static constexpr int width = 4, registers = 16;
    float v[4];
};
#define EACH_LANE(expression)                          \
    Vec r;                                             \
    for (int i = 0; i < 4; ++i) r.v[i] = (expression); \
    return r
inline uint32_t bits_of(float a) {
    uint32_t bits;
    memcpy(&bits, &a, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float a;
    memcpy(&a, &bits, 4);
    return a;
}
inline Vec load(const float *p) { EACH_LANE(p[i]); }
inline void store(float *p, Vec a) { memcpy(p, a.v, sizeof a.v); }
inline Vec broadcast(float a) { EACH_LANE(a); }
inline Vec operator+(Vec a, Vec b) { EACH_LANE(a.v[i] + b.v[i]); }
inline Vec operator-(Vec a, Vec b) { EACH_LANE(a.v[i] - b.v[i]); }
inline Vec operator*(Vec a, Vec b) { EACH_LANE(a.v[i] * b.v[i]); }
inline Vec operator/(Vec a, Vec b) { EACH_LANE(a.v[i] / b.v[i]); }
inline Vec fma(Vec a, Vec b, Vec c) { EACH_LANE(a.v[i] * b.v[i] + c.v[i]); }
inline Vec fnma(Vec a, Vec b, Vec c) { EACH_LANE(c.v[i] - a.v[i] * b.v[i]); }
inline Vec larger(Vec a, Vec b) { EACH_LANE(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline Vec smaller(Vec a, Vec b) { EACH_LANE(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline Vec by_sign(Vec sign, Vec positive, Vec negative) {
    EACH_LANE(bits_of(sign.v[i]) >> 31 ? negative.v[i] : positive.v[i]);
}
inline Vec negative_magnitude(Vec a) { EACH_LANE(float_of(bits_of(a.v[i]) | 0x80000000u)); }
inline Vec magnitude(Vec a) { EACH_LANE(float_of(bits_of(a.v[i]) & 0x7FFFFFFFu)); }
inline Vec into_exponent(Vec a) { EACH_LANE(float_of(bits_of(a.v[i]) << 23)); }
inline Vec nearest(Vec a) { EACH_LANE(rintf(a.v[i])); }
inline bool all_at_most(Vec a, Vec b) {
    return a.v[0] <= b.v[0] && a.v[1] <= b.v[1] && a.v[2] <= b.v[2] && a.v[3] <= b.v[3];
}
inline Vec add_bits(Vec a, Vec b) { EACH_LANE(float_of(bits_of(a.v[i]) + bits_of(b.v[i]))); }
inline Vec larger_bits(Vec a, Vec b) {
    EACH_LANE(static_cast<int32_t>(bits_of(a.v[i])) > static_cast<int32_t>(bits_of(b.v[i])) ? a.v[i] : b.v[i]);
}
inline Vec load(const bfloat16 *p) { EACH_LANE(float_of(static_cast<uint32_t>(p[i].bits) << 16)); }
inline float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline void add_sums(float *p, Vec a, Vec b, Vec c, Vec d) {
    const Vec all[] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) p[i] += sum(all[i]);
}
inline void store(bfloat16 *p, Vec a) {
    for (int i = 0; i < 4; ++i) {
        const uint32_t bits = bits_of(a.v[i]);
        const uint32_t near = bits + 0x7FFF + (bits >> 16 & 1), nan = bits | 0x400000;
        p[i].bits = static_cast<uint16_t>((a.v[i] != a.v[i] ? nan : near) >> 16);
    }
}
inline void transpose(Vec *rows) {
    for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < i; ++j) {
            const float above = rows[j].v[i];
            rows[j].v[i] = rows[i].v[j];
            rows[i].v[j] = above;
        }
    }
}
#undef EACH_LANE

#endif

// --- the rest is written in terms of the above -----------------------------------------------------------------------

constexpr int LANES = Vec::width;

inline float to_float(float a) { return a; }
inline float to_float(bfloat16 a) {
    const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// `count` of the numbers at distance `stride`; the lanes above are zero.
template <class T>
inline Vec load_lanes(const T *p, int64_t stride, int count) {
    if (stride == 1 && count == LANES) return load(p);
    float lanes[LANES] = {};
    for (int i = 0; i < count; ++i) lanes[i] = to_float(p[i * stride]);
    return load(lanes);
}

template <class T>
inline void store_lanes(T *p, int64_t stride, int count, Vec a) {
    if (stride == 1 && count == LANES) return store(p, a);
    T lanes[LANES];
    store(lanes, a);
    for (int i = 0; i < count; ++i) p[i * stride] = lanes[i];
}

// 2^x within 8e-8 of its value, COUNT of them side by side; 0 below 2^-126.5, infinity above 2^127.5, NaN for NaN.
//
// Adding 1.5 * 2^23 rounds x to an integer n in the low bits of the sum (compiled without any flag that would let the
// compiler simplify that away). The rest, in [-1/2, 1/2], goes through a polynomial whose constant term is exactly 1:
// slow channels multiply many factors near 1. What is known of all |x| of a call saves work, without changing a bit of
// the results: BOUNDED promises at most EXP2_BOUND, where n is simply added to the exponent.
constexpr float EXP2_BOUND = 125.0f;

template <bool BOUNDED, int COUNT>
inline void exp2_each(Vec *x) {
    const Vec magic = broadcast(BOUNDED ? 12582912.0f : 12582912.0f + 127.0f);
    Vec rounded[COUNT], p[COUNT];
    for (int i = 0; i < COUNT; ++i) {
        if (!BOUNDED) x[i] = smaller(broadcast(128.0f), larger(broadcast(-127.0f), x[i]));
        rounded[i] = x[i] + magic;
    }
    for (int i = 0; i < COUNT; ++i) x[i] = x[i] - (BOUNDED ? nearest(x[i]) : rounded[i] - magic);
    for (int i = 0; i < COUNT; ++i) p[i] = fma(x[i], broadcast(1.5353359e-4f), broadcast(1.33988762e-3f));
    for (int i = 0; i < COUNT; ++i) p[i] = fma(p[i], x[i], broadcast(9.61843692e-3f));
    for (int i = 0; i < COUNT; ++i) p[i] = fma(p[i], x[i], broadcast(5.55033237e-2f));
    for (int i = 0; i < COUNT; ++i) p[i] = fma(p[i], x[i], broadcast(2.40226477e-1f));
    for (int i = 0; i < COUNT; ++i) p[i] = fma(p[i], x[i], broadcast(6.93147182e-1f));
    for (int i = 0; i < COUNT; ++i) p[i] = fma(p[i], x[i], broadcast(1.0f));
    for (int i = 0; i < COUNT; ++i) {
        const Vec power = into_exponent(rounded[i]);
        x[i] = BOUNDED ? add_bits(p[i], power) : p[i] * power;
    }
}

// e^x, COUNT of them side by side, with ln 2 in two parts so that large arguments keep their digits.
template <int COUNT>
inline void exp_each(Vec *x) {
    const Vec magic = broadcast(12582912.0f + 127.0f);
    Vec rounded[COUNT], p[COUNT];
    for (int i = 0; i < COUNT; ++i) x[i] = smaller(broadcast(88.9f), larger(broadcast(-88.0f), x[i]));
    for (int i = 0; i < COUNT; ++i) rounded[i] = fma(x[i], broadcast(1.44269504f), magic);
    for (int i = 0; i < COUNT; ++i) {
        const Vec n = rounded[i] - magic;
        x[i] = fma(n, broadcast(2.12194440e-4f), fnma(n, broadcast(0.693359375f), x[i]));
    }
    for (int i = 0; i < COUNT; ++i) p[i] = fma(broadcast(1.38146093e-3f), x[i], broadcast(8.3687173e-3f));
    for (int i = 0; i < COUNT; ++i) p[i] = fma(p[i], x[i], broadcast(4.16683879e-2f));
    for (int i = 0; i < COUNT; ++i) p[i] = fma(p[i], x[i], broadcast(1.66665206e-1f));
    for (int i = 0; i < COUNT; ++i) p[i] = fma(p[i], x[i], broadcast(4.99999934e-1f));
    for (int i = 0; i < COUNT; ++i) p[i] = fma(p[i], x[i] * x[i], x[i] + broadcast(1.0f));
    for (int i = 0; i < COUNT; ++i) x[i] = p[i] * into_exponent(rounded[i]);
}

// log(1 + e^x) = max(x, 0) + log(1 + w), w = e^-|x|: no cancellation, no overflow. log(1 + w) / w on [0, 1] is a
// polynomial with the constant term 1, within 1.6e-7: no division.
template <int COUNT>
inline void softplus_of_exp(const Vec *w, Vec *x) {
    static const float terms[] = {1.0f, -0.499999017f, 0.333299637f, -0.249541342f, 0.196759403f, -0.153055936f,
                                  0.106036566f, -0.0569595434f, 0.0198514648f};
    Vec p[COUNT];
    for (int i = 0; i < COUNT; ++i) p[i] = broadcast(-0.0032440254f);
    for (int k = 8; k >= 0; --k) {
        for (int i = 0; i < COUNT; ++i) p[i] = fma(p[i], w[i], broadcast(terms[k]));
    }
    for (int i = 0; i < COUNT; ++i) x[i] = fma(p[i], w[i], larger(broadcast(0.0f), x[i]));
}

template <int COUNT>
inline void softplus_each(Vec *x) {
    Vec w[COUNT];
    for (int i = 0; i < COUNT; ++i) w[i] = negative_magnitude(x[i]);
    exp_each<COUNT>(w);
    softplus_of_exp<COUNT>(w, x);
}

// The softplus and its derivative, 1 / (1 + e^-x) = (1 or, below zero, w) / (1 + w).
template <int COUNT>
inline void softplus_and_slope_each(Vec *x, Vec *slope) {
    Vec w[COUNT];
    const Vec one = broadcast(1.0f);
    for (int i = 0; i < COUNT; ++i) w[i] = negative_magnitude(x[i]);
    exp_each<COUNT>(w);
    for (int i = 0; i < COUNT; ++i) slope[i] = by_sign(x[i], one, w[i]) / (one + w[i]);
    softplus_of_exp<COUNT>(w, x);
}

// 1 + e^-x: what a sigmoid divides by.
template <int COUNT>
inline void one_plus_exp_each(const Vec *x, Vec *out) {
    for (int i = 0; i < COUNT; ++i) out[i] = broadcast(0.0f) - x[i];
    exp_each<COUNT>(out);
    for (int i = 0; i < COUNT; ++i) out[i] = broadcast(1.0f) + out[i];
}

template <int COUNT>
inline void silu_each(Vec *x) {
    Vec divisors[COUNT];
    one_plus_exp_each<COUNT>(x, divisors);
    for (int i = 0; i < COUNT; ++i) x[i] = x[i] / divisors[i];
}

inline Vec exp(Vec x) {
    exp_each<1>(&x);
    return x;
}
inline Vec silu(Vec x) {
    silu_each<1>(&x);
    return x;
}

inline void prefetch(const void *p) {
#if defined(__GNUC__)
    __builtin_prefetch(p);
#else
    (void)p;
#endif
}

// Into the second cache.
inline void prefetch_far(const void *p) {
#if defined(__GNUC__)
    __builtin_prefetch(p, 0, 2);
#else
    (void)p;
#endif
}

constexpr int GROUP = 4;  // functions computed side by side, to keep the pipelines full

// Call body(first, count) for `total` items in groups, count being a constant: GROUP, then 1.
template <int N>
struct Count {
    static constexpr int value = N;
};
template <class Body>
inline void in_groups(int64_t total, const Body &body) {
    int64_t i = 0;
    for (; i + GROUP <= total; i += GROUP) body(i, Count<GROUP>());
    for (; i < total; ++i) body(i, Count<1>());
}
