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
