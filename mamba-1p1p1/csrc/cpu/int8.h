// The kernels of `Int8Products` for one set of instructions. Included after simd.h, with SIMD_VNNI or SIMD_DOT defined
// besides the macro of that where the machine has instructions for products of bytes.
//
// `Sum` holds the sums of LANES columns and `add_products` adds four products to each of them, of a word of each column
// and of a group of a row. Without instructions for bytes the x86 kernels multiply 16-bit numbers in pairs, which
// cannot overflow: the even numbers of a word and the odd ones, and groups are (0, 2, 1, 3) in 16 bits.

inline int32_t word_at(const void *p) {
    int32_t word;
    memcpy(&word, p, 4);
    return word;
}

#if defined(SIMD_AVX512)

using Words = __m512i;
inline Words load_words(const void *p) { return _mm512_loadu_si512(p); }
inline Vec as_floats(Words a) { return {_mm512_castsi512_ps(a)}; }
inline void store_words(void *p, Words a) { _mm512_storeu_si512(p, a); }
inline void store_bytes(int8_t *p, Vec a) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
struct Sum {
    __m512i v;
};
inline Sum no_sum() { return {_mm512_setzero_si512()}; }
inline Vec total(Sum a) { return {_mm512_cvtepi32_ps(a.v)}; }

#if defined(SIMD_VNNI)
using Weights = __m512i;
using Group = __m512i;
inline Weights weights_of(Words a) { return a; }
inline Group group_of(const int8_t *p) { return _mm512_set1_epi32(word_at(p)); }
inline Sum add_products(Sum sum, Weights w, Group g) {
#if defined(KERNELS_EMULATED)
    return {_mm512_dpbusd_epi32(sum.v, g, w)};
#else
    // GCC writes each sum of its own intrinsic to memory in every round, which takes longer than the products.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(g), "v"(w));
    return sum;
#endif
}
#else
struct Weights {
    __m512i even, odd;
};
using Group = Weights;
inline Weights weights_of(Words a) { return {_mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8), _mm512_srai_epi16(a, 8)}; }
inline Group group_of(const int8_t *p) { return {_mm512_set1_epi32(word_at(p)), _mm512_set1_epi32(word_at(p + 4))}; }
inline Sum add_products(Sum sum, Weights w, Group g) {
    const __m512i four = _mm512_add_epi32(_mm512_madd_epi16(w.even, g.even), _mm512_madd_epi16(w.odd, g.odd));
    return {_mm512_add_epi32(sum.v, four)};
}
#endif
constexpr int INT8_ROWS = 12;

#elif defined(SIMD_AVX2)

using Words = __m256i;
inline Words load_words(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
inline Vec as_floats(Words a) { return {_mm256_castsi256_ps(a)}; }
inline void store_words(void *p, Words a) { _mm256_storeu_si256(static_cast<__m256i *>(p), a); }
inline void store_bytes(int8_t *p, Vec a) {
    const __m256i words = _mm256_cvtps_epi32(a.v);
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(p), _mm_packs_epi16(halves, halves));
}
struct Sum {
    __m256i v;
};
inline Sum no_sum() { return {_mm256_setzero_si256()}; }
inline Vec total(Sum a) { return {_mm256_cvtepi32_ps(a.v)}; }

#if defined(SIMD_VNNI)
using Weights = __m256i;
using Group = __m256i;
inline Weights weights_of(Words a) { return a; }
inline Group group_of(const int8_t *p) { return _mm256_set1_epi32(word_at(p)); }
inline Sum add_products(Sum sum, Weights w, Group g) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum.v) : "x"(g), "x"(w));
    return sum;
}
constexpr int INT8_ROWS = 6;
#else
struct Weights {
    __m256i even, odd;
};
using Group = Weights;
inline Weights weights_of(Words a) { return {_mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), _mm256_srai_epi16(a, 8)}; }
inline Group group_of(const int8_t *p) { return {_mm256_set1_epi32(word_at(p)), _mm256_set1_epi32(word_at(p + 4))}; }
inline Sum add_products(Sum sum, Weights w, Group g) {
    const __m256i four = _mm256_add_epi32(_mm256_madd_epi16(w.even, g.even), _mm256_madd_epi16(w.odd, g.odd));
    return {_mm256_add_epi32(sum.v, four)};
}
constexpr int INT8_ROWS = 4;
#endif

#elif defined(SIMD_NEON)

using Words = int8x16_t;
inline Words load_words(const void *p) { return vreinterpretq_s8_u8(vld1q_u8(static_cast<const uint8_t *>(p))); }
inline Vec as_floats(Words a) { return {vreinterpretq_f32_s8(a)}; }
inline void store_words(void *p, Words a) { vst1q_u8(static_cast<uint8_t *>(p), vreinterpretq_u8_s8(a)); }
inline void store_bytes(int8_t *p, Vec a) {
    const int16x4_t halves = vmovn_s32(vcvtq_s32_f32(a.v));
    const int32_t word = vget_lane_s32(vreinterpret_s32_s8(vmovn_s16(vcombine_s16(halves, halves))), 0);
    memcpy(p, &word, 4);
}
using Weights = int8x16_t;
inline Weights weights_of(Words a) { return a; }

#if defined(SIMD_DOT)
struct Sum {
    int32x4_t v;
};
using Group = int8x16_t;
inline Sum no_sum() { return {vdupq_n_s32(0)}; }
inline Vec total(Sum a) { return {vcvtq_f32_s32(a.v)}; }
inline Group group_of(const int8_t *p) { return vreinterpretq_s8_s32(vdupq_n_s32(word_at(p))); }
inline Sum add_products(Sum sum, Weights w, Group g) { return {vdotq_s32(sum.v, w, g)}; }
constexpr int INT8_ROWS = 12;
#else
struct Sum {
    int32x4_t first, last;  // of two columns each, in two parts
};
using Group = int8x8_t;
inline Sum no_sum() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
inline Vec total(Sum a) { return {vcvtq_f32_s32(vpaddq_s32(a.first, a.last))}; }
inline Group group_of(const int8_t *p) { return vreinterpret_s8_s32(vdup_n_s32(word_at(p))); }
inline Sum add_products(Sum sum, Weights w, Group g) {
    return {vpadalq_s16(sum.first, vmull_s8(vget_low_s8(w), g)), vpadalq_s16(sum.last, vmull_s8(vget_high_s8(w), g))};
}
constexpr int INT8_ROWS = 6;
#endif

#else

struct Words {
    int8_t v[16];
};
inline Words load_words(const void *p) {
    Words a;
    memcpy(a.v, p, 16);
    return a;
}
inline Vec as_floats(Words a) {
    Vec b;
    memcpy(b.v, a.v, 16);
    return b;
}
inline void store_words(void *p, Words a) { memcpy(p, a.v, 16); }
inline void store_bytes(int8_t *p, Vec a) {
    for (int i = 0; i < LANES; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
struct Sum {
    int32_t v[4];
};
using Weights = Words;
using Group = const int8_t *;
inline Sum no_sum() { return {{0, 0, 0, 0}}; }
inline Vec total(Sum a) {
    Vec b;
    for (int i = 0; i < LANES; ++i) b.v[i] = static_cast<float>(a.v[i]);
    return b;
}
inline Weights weights_of(Words a) { return a; }
inline Group group_of(const int8_t *p) { return p; }
inline Sum add_products(Sum sum, Weights w, Group g) {
    for (int i = 0; i < LANES; ++i) {
        for (int j = 0; j < 4; ++j) sum.v[i] += w.v[4 * i + j] * g[j];
    }
    return sum;
}
constexpr int INT8_ROWS = 4;

#endif

// --- the rest is written in terms of the above -----------------------------------------------------------------------

#if defined(SIMD_VNNI)
// Its instruction takes the numbers of a row as unsigned: 128 is added to each, and 128 times the sum of a column is
// taken off what its sums start with.
constexpr int64_t GROUP_BYTES = 4;
constexpr int8_t ROW_BIAS = -128;  // which is 128 in eight bits
inline Sum first_sum(const float *start) { return {load_words(start)}; }
#else
inline Sum first_sum(const float *) { return no_sum(); }
#if (defined(SIMD_AVX512) || defined(SIMD_AVX2))
constexpr int64_t GROUP_BYTES = 8;
constexpr int8_t ROW_BIAS = 0;
#else
constexpr int64_t GROUP_BYTES = 4;
constexpr int8_t ROW_BIAS = 0;
#endif
#endif

constexpr int INT8_PANEL = 2 * LANES;
constexpr int64_t PANEL_HEAD = 2;  // rows of a packed panel before its words: what sums start with, and scales

inline void pack_int8(const Int8Weight &weight, int64_t index, float *panel) {
    const int64_t depth = weight.depth, groups = (depth + 3) / 4, whole = depth / 4;
    float *words = panel + PANEL_HEAD * INT8_PANEL;
    for (int half = 0; half < 2; ++half) {
        const int64_t first = index * INT8_PANEL + half * LANES, left = weight.columns - first;
        const int lanes = static_cast<int>(left < 0 ? 0 : left < LANES ? left : LANES);
        const int8_t *rows = weight.data + (lanes ? first * depth : 0);
        for (int64_t i = 0; i < lanes * depth; i += 64) prefetch(rows + i);  // these weights are seldom in a cache
        float *to = words + half * LANES;
        int64_t g = 0;
        for (; g + LANES <= whole; g += LANES) {
            Vec block[LANES];
            for (int i = 0; i < LANES; ++i) {
                block[i] = i < lanes ? as_floats(load_words(rows + i * depth + 4 * g)) : broadcast(0.0f);
            }
            transpose(block);
            for (int i = 0; i < LANES; ++i) store(to + (g + i) * INT8_PANEL, block[i]);
        }
        for (; g < groups; ++g) {
            int8_t bytes[4 * LANES] = {};
            const size_t count = static_cast<size_t>(depth - 4 * g < 4 ? depth - 4 * g : 4);
            for (int i = 0; i < lanes; ++i) memcpy(bytes + 4 * i, rows + i * depth + 4 * g, count);
            store_words(to + g * INT8_PANEL, load_words(bytes));
        }
        int32_t starts[LANES] = {};
#if defined(SIMD_VNNI)
        int8_t bias[4];
        memset(bias, ROW_BIAS, sizeof bias);
        Sum sum = no_sum();
        for (g = 0; g < groups; ++g) {
            sum = add_products(sum, weights_of(load_words(to + g * INT8_PANEL)), group_of(bias));
        }
        memcpy(starts, &sum.v, sizeof starts);
        for (int i = 0; i < LANES; ++i) starts[i] = -starts[i];
#endif
        memcpy(panel + half * LANES, starts, sizeof starts);
        store(panel + INT8_PANEL + half * LANES,
              lanes ? load_lanes(weight.scales + first, 1, lanes) : broadcast(0.0f));
    }
}

// LANES numbers, each a whole one within int8, as groups.
inline void store_groups(int8_t *to, Vec values, int64_t groups) {
    int8_t bytes[LANES], spread[2 * LANES];
    store_bytes(bytes, values);
    const int8_t *from = bytes;
    if (GROUP_BYTES == 8) {
        constexpr int order[4] = {0, 2, 1, 3};
        for (int i = 0; i < LANES; ++i) {
            const int16_t wide = bytes[i / 4 * 4 + order[i % 4]];
            memcpy(spread + 2 * i, &wide, 2);
        }
        from = spread;
    } else {
        for (int i = 0; i < LANES; ++i) bytes[i] = static_cast<int8_t>(bytes[i] ^ ROW_BIAS);
    }
    if (groups >= LANES / 4) {
        memcpy(to, from, LANES / 4 * GROUP_BYTES);
    } else {
        memcpy(to, from, static_cast<size_t>(groups * GROUP_BYTES));
    }
}

constexpr float LEAST_LARGEST = 1e-30f;  // of a row whose scale it says itself: the inverse of less overflows

inline void quantize_int8(const float *row, int64_t depth, const float *step, float *to) {
    const int64_t whole = depth / LANES * LANES, groups = (depth + 3) / 4;
    const int rest = static_cast<int>(depth - whole);
    Vec most = broadcast(0.0f);  // as integers: the bits of a NaN are more than those of an infinity
    for (int64_t i = 0; i < whole; i += LANES) most = larger_bits(most, magnitude(load(row + i)));
    if (rest) most = larger_bits(most, magnitude(load_lanes(row + whole, 1, rest)));
    int32_t bits[LANES], largest_bits = 0;
    store(reinterpret_cast<float *>(bits), most);
    for (int i = 0; i < LANES; ++i) largest_bits = bits[i] > largest_bits ? bits[i] : largest_bits;
    float largest;
    memcpy(&largest, &largest_bits, 4);
    int8_t *bytes = reinterpret_cast<int8_t *>(to + 1);
    if (largest_bits >= 0x7F800000) {
        to[0] = NAN;
        memset(bytes, 0, static_cast<size_t>(groups * GROUP_BYTES));
        return;
    }
    largest = largest > LEAST_LARGEST ? largest : LEAST_LARGEST;
    to[0] = step ? *step : largest / 127.0f;
    const Vec inverse = broadcast(step ? 1.0f / *step : 127.0f / largest);
    const auto rounded = [&](Vec x) {
        return nearest(smaller(broadcast(127.0f), larger(broadcast(-127.0f), x * inverse)));
    };
    for (int64_t i = 0; i < whole; i += LANES) {
        store_groups(bytes + i / 4 * GROUP_BYTES, rounded(load(row + i)), LANES / 4);
    }
    if (rest) {
        store_groups(bytes + whole / 4 * GROUP_BYTES, rounded(load_lanes(row + whole, 1, rest)), groups - whole / 4);
    }
}

template <int ROWS, int WIDTH>
inline void multiply_tile(const float *panel, int64_t groups, const float *rows, int64_t step, const Vec *bias,
                          float *out, int64_t out_step, int lanes) {
    Sum sums[ROWS][WIDTH];
    Vec scales[WIDTH];
    for (int j = 0; j < WIDTH; ++j) {
        for (int i = 0; i < ROWS; ++i) sums[i][j] = first_sum(panel + j * LANES);
        scales[j] = load(panel + INT8_PANEL + j * LANES);
    }
    const float *words = panel + PANEL_HEAD * INT8_PANEL;
    const int8_t *bytes = reinterpret_cast<const int8_t *>(rows + 1);
    for (int64_t g = 0; g < groups; ++g, words += INT8_PANEL, bytes += GROUP_BYTES) {
        Weights columns[WIDTH];
        for (int j = 0; j < WIDTH; ++j) columns[j] = weights_of(load_words(words + j * LANES));
        for (int i = 0; i < ROWS; ++i) {
            const Group group = group_of(bytes + i * step * 4);
            for (int j = 0; j < WIDTH; ++j) sums[i][j] = add_products(sums[i][j], columns[j], group);
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        const Vec scale = broadcast(rows[i * step]);
        for (int j = 0; j < WIDTH; ++j) {
            Vec value = total(sums[i][j]) * (scale * scales[j]);
            if (bias) value = value + bias[j];
            store_lanes(out + i * out_step + j * LANES, 1, j == WIDTH - 1 ? lanes : LANES, value);
        }
    }
}

// `count` rows: as many tiles of ROWS as there are, then one of just what is left.
template <int ROWS, int WIDTH>
inline void multiply_rows(const float *panel, int64_t groups, const float *rows, int64_t step, int64_t count,
                          const Vec *bias, float *out, int64_t out_step, int lanes) {
    int64_t i = 0;
    for (; i + ROWS <= count; i += ROWS) {
        multiply_tile<ROWS, WIDTH>(panel, groups, rows + i * step, step, bias, out + i * out_step, out_step, lanes);
    }
    if constexpr (ROWS > 1) {
        if (i < count) {
            multiply_rows<ROWS - 1, WIDTH>(panel, groups, rows + i * step, step, count - i, bias, out + i * out_step,
                                           out_step, lanes);
        }
    }
}

inline void multiply_int8(const float *panel, int64_t depth, const float *rows, int64_t step, int64_t count,
                          const float *bias, float *out, int64_t out_step, int64_t columns) {
    const int width = columns > LANES ? 2 : 1;
    const int64_t in_last = columns - (width - 1) * LANES, groups = (depth + 3) / 4;
    const int lanes = static_cast<int>(in_last < LANES ? in_last : LANES);
    Vec added[2];
    if (bias) {
        for (int j = 0; j < width; ++j) added[j] = load_lanes(bias + j * LANES, 1, j == width - 1 ? lanes : LANES);
    }
    const Vec *shift = bias ? added : nullptr;
    if (width == 2) {
        multiply_rows<INT8_ROWS, 2>(panel, groups, rows, step, count, shift, out, out_step, lanes);
    } else {
        multiply_rows<INT8_ROWS, 1>(panel, groups, rows, step, count, shift, out, out_step, lanes);
    }
}

constexpr Int8Products int8_products_called(const char *name) {
    return {name, GROUP_BYTES, pack_int8, quantize_int8, multiply_int8};
}

#if !defined(SIMD_VNNI) && !defined(SIMD_DOT)
// Those of this machine, of the vectors of this set.
inline const Int8Products &int8_products() {
#if defined(SIMD_AVX512)
    if (has_avx512_vnni()) return avx512_vnni_products;
#elif defined(SIMD_AVX2) && defined(HAS_AVX2_VNNI)
    if (has_avx2_vnni()) return avx2_vnni_products;
#elif defined(SIMD_NEON)
    if (has_neon_dot()) return neon_dot_products;
#endif
    static constexpr Int8Products own = int8_products_called("int8");
    return own;
}
#endif
