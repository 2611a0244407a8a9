// Products with a transposed weight, as linear layers need them: out = a * weight^T + bias. Included once per
// instruction set, after tile.h and int8.h.
//
// The weight is packed into panels of PANEL columns, summed axis outermost: a tile of GEMM_ROWS x PANEL sums stays in
// registers while a row element is broadcast against two vectors of the panel. Panels of one call are read from the
// first cache; packing costs as much as one or two rows. A weight in int8 is packed and applied by `Int8Products`: the
// rows of `a` are then quantised ones.

constexpr int PANEL = 2 * LANES, GEMM_ROWS = Vec::registers == 32 ? 12 : 6;
constexpr int64_t GEMM_DEPTH = 256;  // of the summed axis at a time

struct Linear {
    const float *weight, *bias;  // (columns, depth), (columns,) or null
    int64_t columns, depth;
    float *panels;  // the packed weight
    const Int8Products *int8 = nullptr;           // of a weight that is int8
    const float *scales = nullptr, *step = nullptr;  // its (columns,), and of all rows, or null

    int64_t count() const { return (columns + PANEL - 1) / PANEL; }
    int64_t panel_floats() const { return PANEL * (int8 ? PANEL_HEAD + (depth + 3) / 4 : depth); }
    int64_t packed() const { return count() * panel_floats(); }
    int64_t row_floats() const { return int8 ? int8->row_floats(depth) : depth; }  // of a row as it is applied to

    // Rows as the weight is applied to them, at a distance of `row_floats`: `rows` themselves, or quantised in `to`.
    const float *taken(const float *rows, int64_t step_of_rows, int64_t count, float *to) const {
        if (int8 == nullptr) return rows;
        for (int64_t i = 0; i < count; ++i) int8->quantize(rows + i * step_of_rows, depth, step, to + i * row_floats());
        return to;
    }

    // Pack one panel; columns beyond the last one are zero.
    void pack(int64_t index) const { pack(index, panels + index * panel_floats()); }
    void pack(int64_t index, float *panel) const {
        if (int8) return int8->pack({reinterpret_cast<const int8_t *>(weight), scales, columns, depth}, index, panel);
        for (int half = 0; half < 2; ++half) {
            const int64_t first = index * PANEL + half * LANES, left = columns - first;
            const int lanes = static_cast<int>(left < 0 ? 0 : left < LANES ? left : LANES);
            const float *rows = weight + (lanes ? first * depth : 0);
            for (int64_t i = 0; i < lanes * depth; i += 16) prefetch(rows + i);  // these weights are seldom in a cache
            int64_t k = 0;
            for (; k + LANES <= depth; k += LANES) {
                Vec block[LANES];
                for (int i = 0; i < LANES; ++i) block[i] = i < lanes ? load(rows + i * depth + k) : broadcast(0.0f);
                transpose(block);
                for (int i = 0; i < LANES; ++i) store(panel + (k + i) * PANEL + half * LANES, block[i]);
            }
            for (; k < depth; ++k) store(panel + k * PANEL + half * LANES, load_lanes(rows + k, depth, lanes));
        }
    }
};

// ROWS rows of `a` with WIDTH vectors of a panel, added to `out` or, for the `first` part of the sum, to the bias.
template <int ROWS, int WIDTH>
inline void gemm_tile(const float *a, int64_t a_step, const float *panel, int64_t depth, bool first, const Vec *bias,
                      float *out, int64_t out_step, int lanes) {
    Vec sums[ROWS][WIDTH];
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < WIDTH; ++j) {
            const int count = j == WIDTH - 1 ? lanes : LANES;
            sums[i][j] = first ? bias[j] : load_lanes(out + i * out_step + j * LANES, 1, count);
        }
    }
    for (int64_t k = 0; k < depth; ++k) {
        Vec columns[WIDTH];
        for (int j = 0; j < WIDTH; ++j) columns[j] = load(panel + k * PANEL + j * LANES);
        for (int i = 0; i < ROWS; ++i) {
            const Vec value = broadcast(a[i * a_step + k]);
            for (int j = 0; j < WIDTH; ++j) sums[i][j] = fma(value, columns[j], sums[i][j]);
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < WIDTH; ++j) {
            store_lanes(out + i * out_step + j * LANES, 1, j == WIDTH - 1 ? lanes : LANES, sums[i][j]);
        }
    }
}

// `rows` rows: as many tiles of ROWS as there are, then one of just what is left.
template <int ROWS, int WIDTH>
inline void gemm_rows(const float *a, int64_t a_step, int64_t rows, const float *panel, int64_t depth, bool first,
                      const Vec *bias, float *out, int64_t out_step, int lanes) {
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS) {
        gemm_tile<ROWS, WIDTH>(a + i * a_step, a_step, panel, depth, first, bias, out + i * out_step, out_step, lanes);
    }
    if constexpr (ROWS > 1) {
        if (i < rows) {
            gemm_rows<ROWS - 1, WIDTH>(a + i * a_step, a_step, rows - i, panel, depth, first, bias, out + i * out_step,
                                       out_step, lanes);
        }
    }
}

// The columns of one panel of out (rows, columns) = a (rows, depth) through `linear`.
inline void apply_panel(const Linear &linear, int64_t index, const float *packed, const float *a, int64_t a_step,
                        int64_t rows, float *out, int64_t out_step) {
    const int64_t column = index * PANEL, left = linear.columns - column;
    if (linear.int8) {
        const float *bias = linear.bias ? linear.bias + column : nullptr;
        return linear.int8->multiply(packed, linear.depth, a, a_step, rows, bias, out + column, out_step,
                                     left < PANEL ? left : PANEL);
    }
    const int width = left > LANES ? 2 : 1;
    const int64_t in_last = left - (width - 1) * LANES;
    const int lanes = static_cast<int>(in_last < LANES ? in_last : LANES);
    Vec bias[2] = {broadcast(0.0f), broadcast(0.0f)};
    if (linear.bias) {
        for (int j = 0; j < width; ++j) {
            bias[j] = load_lanes(linear.bias + column + j * LANES, 1, j == width - 1 ? lanes : LANES);
        }
    }
    for (int64_t k = 0; k < linear.depth || k == 0; k += GEMM_DEPTH) {
        const int64_t depth = linear.depth - k < GEMM_DEPTH ? linear.depth - k : GEMM_DEPTH;
        const float *panel = packed + k * PANEL;
        if (width == 2) {
            gemm_rows<GEMM_ROWS, 2>(a + k, a_step, rows, panel, depth, k == 0, bias, out + column, out_step, lanes);
        } else {
            gemm_rows<GEMM_ROWS, 1>(a + k, a_step, rows, panel, depth, k == 0, bias, out + column, out_step, lanes);
        }
    }
}

// out = a through the packed `linear`.
inline void apply(const Linear &linear, const float *a, int64_t a_step, int64_t rows, float *out, int64_t out_step) {
    for (int64_t index = 0; index < linear.count(); ++index) {
        const float *panel = linear.panels + index * linear.panel_floats();
        apply_panel(linear, index, panel, a, a_step, rows, out, out_step);
    }
}

// The same for few rows, through a `linear` that is not packed: a thread takes some panels, packs them and uses them at
// once, so that weights that are seldom in a cache are read once and never written. `packed` holds GEMM_GROUP panels.
constexpr int64_t GEMM_GROUP = 8;
constexpr int64_t GEMM_CHUNK = 8 * GEMM_ROWS;  // rows that stay in the cache for all panels of a group

inline int64_t group_panels(const Linear &linear, const Threads &threads) {
    const int64_t panels = (linear.count() + 2 * threads.count - 1) / (2 * threads.count);
    return panels < GEMM_GROUP ? panels : GEMM_GROUP;
}
inline int64_t group_count(const Linear &linear, const Threads &threads) {
    const int64_t size = group_panels(linear, threads);
    return (linear.count() + size - 1) / size;
}

inline void apply_group(const Linear &linear, int64_t group, int64_t size, float *packed, const float *a,
                        int64_t a_step, int64_t rows, float *out, int64_t out_step) {
    const int64_t first = group * size, last = first + size < linear.count() ? first + size : linear.count();
    const int64_t panel = linear.panel_floats();
    for (int64_t index = first; index < last; ++index) linear.pack(index, packed + (index - first) * panel);
    for (int64_t row = 0; row < rows; row += GEMM_CHUNK) {
        const int64_t count = rows - row < GEMM_CHUNK ? rows - row : GEMM_CHUNK;
        for (int64_t index = first; index < last; ++index) {
            apply_panel(linear, index, packed + (index - first) * panel, a + row * a_step, a_step, count,
                        out + row * out_step, out_step);
        }
    }
}
