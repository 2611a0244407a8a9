// The vector layer: the only place that names instructions. Included once per instruction set, inside its namespace,
// with SIMD_AVX512, SIMD_AVX2 or SIMD_NEON defined, or none of them for plain C++.
//
// `Vec` holds `Vec::width` floats. `Vec::registers` is how many of them the machine keeps.

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
inline Vec negative_magnitude(Vec a) {
    return {_mm512_castsi512_ps(_mm512_or_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(INT32_MIN)))};
}
inline Vec into_exponent(Vec a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))}; }
inline Vec load(const bfloat16 *p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }

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
inline Vec negative_magnitude(Vec a) { return {_mm256_or_ps(a.v, _mm256_set1_ps(-0.0f))}; }
inline Vec into_exponent(Vec a) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))}; }
inline Vec load(const bfloat16 *p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
inline float sum(Vec a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
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
inline Vec negative_magnitude(Vec a) { return {vnegq_f32(vabsq_f32(a.v))}; }
inline Vec into_exponent(Vec a) { return {vreinterpretq_f32_s32(vshlq_n_s32(vreinterpretq_s32_f32(a.v), 23))}; }
inline Vec load(const bfloat16 *p) {
    const uint16x4_t half = vld1_u16(reinterpret_cast<const uint16_t *>(p));
    return {vreinterpretq_f32_u32(vshll_n_u16(half, 16))};
}
inline float sum(Vec a) { return vaddvq_f32(a.v); }

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
inline Vec negative_magnitude(Vec a) { EACH_LANE(float_of(bits_of(a.v[i]) | 0x80000000u)); }
inline Vec into_exponent(Vec a) { EACH_LANE(float_of(bits_of(a.v[i]) << 23)); }
inline Vec load(const bfloat16 *p) { EACH_LANE(float_of(static_cast<uint32_t>(p[i].bits) << 16)); }
inline float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
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
inline void put(float *p, float a) { *p = a; }
inline void put(bfloat16 *p, float a) {  // to the nearest, ties to even; a NaN stays one
    uint32_t bits;
    memcpy(&bits, &a, 4);
    p->bits = static_cast<uint16_t>(a != a ? (bits >> 16) | 0x40 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// `count` floats at distance `stride`; the lanes above are zero.
template <class T>
inline Vec load_lanes(const T *p, int64_t stride, int count) {
    if (stride == 1 && count == LANES) return load(p);
    float lanes[LANES] = {};
    for (int i = 0; i < count; ++i) lanes[i] = to_float(p[i * stride]);
    return load(lanes);
}

// As `load_lanes`; DENSE promises a stride of 1 and all lanes.
template <bool DENSE, class T>
inline Vec load_row(const T *p, int64_t stride, int count) {
    return DENSE ? load(p) : load_lanes(p, stride, count);
}

inline void store_lanes(float *p, int64_t stride, int count, Vec a) {
    if (stride == 1 && count == LANES) return store(p, a);
    float lanes[LANES];
    store(lanes, a);
    for (int i = 0; i < count; ++i) p[i * stride] = lanes[i];
}
inline void store_lanes(bfloat16 *p, int64_t stride, int count, Vec a) {
    float lanes[LANES];
    store(lanes, a);
    for (int i = 0; i < count; ++i) put(p + i * stride, lanes[i]);
}

template <bool DENSE>
inline void store_row(float *p, int64_t stride, int count, Vec a) {
    if (DENSE) return store(p, a);
    store_lanes(p, stride, count, a);
}
template <bool DENSE>
inline void store_row(bfloat16 *p, int64_t stride, int count, Vec a) {
    store_lanes(p, stride, count, a);
}

// 2^x within 1.5e-7 of its value; 0 where that is below 2^-126.5, infinity above 2^127.5, NaN for NaN.
//
// Adding 1.5 * 2^23 rounds x to an integer n in the low bits of the sum (compiled without any flag that would let the
// compiler simplify that away); 127 more makes those bits the exponent field of 2^n. The rest, in [-1/2, 1/2], goes
// through a polynomial whose constant term is exactly 1: slow channels multiply many factors near 1.
// `BOUNDED`: all of |x| <= 126, so nothing needs to be cut off.
template <bool BOUNDED = false>
inline Vec exp2(Vec x) {
    const Vec magic = broadcast(12582912.0f + 127.0f);
    if (!BOUNDED) x = smaller(broadcast(128.0f), larger(broadcast(-127.0f), x));
    const Vec rounded = x + magic;
    const Vec f = x - (rounded - magic);
    Vec p = broadcast(1.32647369e-3f);
    p = fma(p, f, broadcast(9.67151657e-3f));
    p = fma(p, f, broadcast(5.55073376e-2f));
    p = fma(p, f, broadcast(2.4022242e-1f));
    p = fma(p, f, broadcast(6.93146978e-1f));
    p = fma(p, f, broadcast(1.0f));
    return p * into_exponent(rounded);
}

// e^x, with ln 2 in two parts so that large arguments keep their digits.
inline Vec exp(Vec x) {
    const Vec magic = broadcast(12582912.0f + 127.0f);
    x = smaller(broadcast(88.9f), larger(broadcast(-88.0f), x));
    const Vec rounded = fma(x, broadcast(1.44269504f), magic);
    const Vec n = rounded - magic;
    Vec f = fnma(n, broadcast(0.693359375f), x);
    f = fma(n, broadcast(2.12194440e-4f), f);
    Vec p = broadcast(1.38146093e-3f);
    p = fma(p, f, broadcast(8.3687173e-3f));
    p = fma(p, f, broadcast(4.16683879e-2f));
    p = fma(p, f, broadcast(1.66665206e-1f));
    p = fma(p, f, broadcast(4.99999934e-1f));
    p = fma(p, f * f, f + broadcast(1.0f));
    return p * into_exponent(rounded);
}

// log(1 + e^x) = max(x, 0) + 2 artanh(s), s = e^-|x| / (2 + e^-|x|): no cancellation, no overflow.
inline Vec softplus(Vec x) {
    const Vec small = exp(negative_magnitude(x));
    const Vec s = small / (small + broadcast(2.0f));
    const Vec q = s * s;
    Vec p = broadcast(1.40060714e-1f);
    p = fma(p, q, broadcast(1.40008881e-1f));
    p = fma(p, q, broadcast(2.00107644e-1f));
    p = fma(p, q, broadcast(3.33332081e-1f));
    const Vec artanh = fma(p * q, s, s);
    return larger(broadcast(0.0f), x) + (artanh + artanh);
}

inline Vec sigmoid(Vec x) { return broadcast(1.0f) / (broadcast(1.0f) + exp(broadcast(0.0f) - x)); }
inline Vec silu(Vec x) { return x / (broadcast(1.0f) + exp(broadcast(0.0f) - x)); }
