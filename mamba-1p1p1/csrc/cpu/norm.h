// Residual addition and layer or RMS normalisation of rows. Included once per instruction set, after tile.h.
//
//     s = x + residual,    y = (s - mean) / sqrt(var + eps) * weight + bias    or    s / sqrt(mean(s^2) + eps) * weight
//
// A row is read once from memory: its sum waits in fp32 in the first cache.

struct NormSizes {
    int64_t rows, features;
    float eps;
    bool rms;
};

// T: of x and y. R: of the residual and of the stored sum; either may be null.
template <class T, class R>
void add_norm_rows(const T *x, const R *residual, T *y, R *stored, const float *weight, const float *bias,
                   const NormSizes &sizes, int64_t begin, int64_t end, float *row) {
    const int64_t n = sizes.features, whole = n / LANES * LANES;
    const int rest = static_cast<int>(n - whole);
    float ones[LANES];  // what keeps the unused lanes of the last vector out of the variance
    store(ones, broadcast(1.0f));
    const auto each = [&](const auto &body) {
        for (int64_t i = 0; i < whole; i += LANES) body(i, LANES);
        if (rest) body(whole, rest);
    };
    for (int64_t r = begin; r < end; ++r, x += n, y += n) {
        Vec total = broadcast(0.0f);
        each([&](int64_t i, int lanes) {
            Vec s = load_lanes(x + i, 1, lanes);
            if (residual) s = s + load_lanes(residual + i, 1, lanes);
            if (stored) store_lanes(stored + i, 1, lanes, s);
            store(row + i, s);
            total = sizes.rms ? fma(s, s, total) : total + s;
        });
        if (residual) residual += n;
        if (stored) stored += n;
        float mean = 0.0f, square = sum(total);
        if (!sizes.rms) {
            mean = square / static_cast<float>(n);
            total = broadcast(0.0f);
            each([&](int64_t i, int lanes) {
                const Vec s = (load(row + i) - broadcast(mean)) * load_lanes(ones, 1, lanes);
                total = fma(s, s, total);
            });
            square = sum(total);
        }
        const float scale = 1.0f / sqrtf(square / static_cast<float>(n) + sizes.eps);
        each([&](int64_t i, int lanes) {
            Vec value = (load(row + i) - broadcast(mean)) * broadcast(scale) * load_lanes(weight + i, 1, lanes);
            if (bias) value = value + load_lanes(bias + i, 1, lanes);
            store_lanes(y + i, 1, lanes, value);
        });
    }
}

constexpr int64_t NORM_ROWS = 64;  // of a task

template <class T, class R>
int add_norm_of(const T *x, const R *residual, T *y, R *stored, const float *weight, const float *bias,
                const NormSizes &sizes, const Threads &threads) {
    const int64_t n = sizes.features, floats = (n + LANES + 15) / 16 * 16;
    const Memory memory(floats * threads.count);
    if (memory.data() == nullptr) return OUT_OF_MEMORY;
    for_each_task(threads, (sizes.rows + NORM_ROWS - 1) / NORM_ROWS, [&](int64_t task, int64_t worker) {
        const int64_t begin = task * NORM_ROWS, left = sizes.rows - begin;
        const int64_t end = begin + (left < NORM_ROWS ? left : NORM_ROWS);
        add_norm_rows(x + begin * n, residual ? residual + begin * n : nullptr, y + begin * n,
                      stored ? stored + begin * n : nullptr, weight, bias, sizes, begin, end,
                      memory.data() + worker * floats);
    });
    return OK;
}

// The gradients, of fp32 rows: with n = (s - mean) * scale and g = dy * weight,
//
//     ds += scale * (g - mean(g) - n * mean(g * n)),    dweight = sum of dy * n over rows,    dbias = sum of dy
//
// without mean(g) for the RMS norm. Rows are summed in parts that do not depend on the number of threads.
struct NormGradients {
    const float *dy, *s, *ds, *weight;  // ds, of the stored sum: may be null
    float *out, *parameters;            // (rows, n), (2, n): of weight and bias

    void rows(const NormSizes &sizes, int64_t begin, int64_t end, float *sums) const {
        const int64_t n = sizes.features, whole = n / LANES * LANES;
        const int rest = static_cast<int>(n - whole);
        const float inverse = 1.0f / static_cast<float>(n);
        memset(sums, 0, static_cast<size_t>(2 * n) * sizeof(float));
        const auto each = [&](const auto &body) {
            for (int64_t i = 0; i < whole; i += LANES) body(i, LANES);
            if (rest) body(whole, rest);
        };
        for (int64_t r = begin; r < end; ++r) {
            const float *value = s + r * n, *slope = dy + r * n;
            Vec first = broadcast(0.0f), second = first, third = first;
            float mean = 0.0f;
            if (!sizes.rms) {
                each([&](int64_t i, int lanes) { first = first + load_lanes(value + i, 1, lanes); });
                mean = sum(first) * inverse;
                first = broadcast(0.0f);
            }
            // Lanes beyond the row are zero in g; in the centred row they would be -mean.
            each([&](int64_t i, int lanes) {
                const Vec g = load_lanes(slope + i, 1, lanes) * load_lanes(weight + i, 1, lanes);
                const Vec x = lanes == LANES ? load(value + i) - broadcast(mean) : centred(value + i, mean, lanes);
                first = fma(x, x, first);
                second = fma(x, g, second);
                third = third + g;
            });
            const float scale = 1.0f / sqrtf(sum(first) * inverse + sizes.eps);
            const float along = sum(second) * inverse * scale * scale;  // mean(g * n) * scale
            const float shift = sizes.rms ? 0.0f : sum(third) * inverse;
            each([&](int64_t i, int lanes) {
                const Vec d = load_lanes(slope + i, 1, lanes);
                const Vec x = load_lanes(value + i, 1, lanes) - broadcast(mean);
                const Vec g = fma(d, load_lanes(weight + i, 1, lanes), broadcast(-shift));
                Vec result = fnma(x, broadcast(along), g) * broadcast(scale);
                if (ds) result = result + load_lanes(ds + r * n + i, 1, lanes);
                store_lanes(out + r * n + i, 1, lanes, result);
                const Vec part = fma(d, x * broadcast(scale), load_lanes(sums + i, 1, lanes));
                store_lanes(sums + i, 1, lanes, part);
                store_lanes(sums + n + i, 1, lanes, load_lanes(sums + n + i, 1, lanes) + d);
            });
        }
    }

    int run(const NormSizes &sizes, const Threads &threads) const {
        const int64_t both = 2 * sizes.features, parts = (sizes.rows + NORM_ROWS - 1) / NORM_ROWS;
        const Memory memory(parts * both);
        if (memory.data() == nullptr) return OUT_OF_MEMORY;
        for_each_task(threads, parts, [&](int64_t task, int64_t) {
            const int64_t begin = task * NORM_ROWS, end = begin + NORM_ROWS;
            rows(sizes, begin, end < sizes.rows ? end : sizes.rows, memory.data() + task * both);
        });
        sum_parts(memory.data(), both, parts, 1, both, parameters, both);
        return OK;
    }

private:
    static Vec centred(const float *value, float mean, int lanes) {
        float each[LANES] = {};
        for (int i = 0; i < lanes; ++i) each[i] = value[i] - mean;
        return load(each);
    }
};
