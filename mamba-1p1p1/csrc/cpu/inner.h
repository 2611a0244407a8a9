// The "v2" bidirectional mixer between its outer projections, without its intermediate results in memory. Included once
// per instruction set, after scan.h.
//
//     u = silu(conv(x)),  (r, B, C) = x_proj u,  delta = dt_proj r      for each direction, from its end
//     y = (scan forward + scan backward) * silu(z) * scale
//
// e inner channels, l length, n state, r dt rank, w conv width, s directions
//
// First all rows of (r, B, C) are computed, r + 2 n numbers a token: they need every channel. Then each thread scans
// channels of its own and computes u and delta again for these: 16 multiply-adds a token and channel beside the 200
// operations of the scan, against 18 MB of traffic for a picture of 1248 px.

// Dot products of ROWS rows of `a` (at distance step) with COLUMNS rows of `b` (contiguous, of `depth`).
template <int ROWS, int COLUMNS>
inline void dot_tile(const float *a, int64_t step, const float *b, int64_t depth, float *out, int64_t out_step) {
    Vec sums[ROWS][COLUMNS];
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < COLUMNS; ++j) sums[i][j] = broadcast(0.0f);
    }
    int64_t k = 0;
    for (; k + LANES <= depth; k += LANES) {
        Vec columns[COLUMNS];
        for (int j = 0; j < COLUMNS; ++j) columns[j] = load(b + j * depth + k);
        for (int i = 0; i < ROWS; ++i) {
            const Vec row = load(a + i * step + k);
            for (int j = 0; j < COLUMNS; ++j) sums[i][j] = fma(row, columns[j], sums[i][j]);
        }
    }
    if (k < depth) {
        const int lanes = static_cast<int>(depth - k);
        for (int i = 0; i < ROWS; ++i) {
            const Vec row = load_lanes(a + i * step + k, 1, lanes);
            for (int j = 0; j < COLUMNS; ++j) {
                sums[i][j] = fma(row, load_lanes(b + j * depth + k, 1, lanes), sums[i][j]);
            }
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < COLUMNS; ++j) out[i * out_step + j] = sum(sums[i][j]);
    }
}

constexpr int DOT_ROWS = 4, DOT_COLUMNS = Vec::registers == 32 ? 6 : 3;

template <int ROWS>
inline void dot_rows(const float *a, int64_t step, const float *b, int64_t depth, int64_t columns, float *out) {
    int64_t j = 0;
    for (; j + DOT_COLUMNS <= columns; j += DOT_COLUMNS) {
        dot_tile<ROWS, DOT_COLUMNS>(a, step, b + j * depth, depth, out + j, columns);
    }
    for (; j < columns; ++j) dot_tile<ROWS, 1>(a, step, b + j * depth, depth, out + j, columns);
}

// out (rows, columns) = a (rows, depth) times the transpose of b (columns, depth).
inline void multiply(const float *a, int64_t step, int64_t rows, const float *b, int64_t depth, int64_t columns,
                     float *out) {
    int64_t i = 0;
    for (; i + DOT_ROWS <= rows; i += DOT_ROWS) {
        dot_rows<DOT_ROWS>(a + i * step, step, b, depth, columns, out + i * columns);
    }
    for (; i < rows; ++i) dot_rows<1>(a + i * step, step, b, depth, columns, out + i * columns);
}

// A direction that computes its inputs. Its tokens count from the end it starts at.
template <class T>
struct Computed {
    Sequence<const T> x;
    Taps taps;
    const float *x_proj;   // (r + 2 n, e)
    const float *dt_proj;  // (e, r)
    const float *A_log;    // (e, n)
    const float *D, *bias;
    bool reverse;
    int64_t states, rank, length, channels;
    float *projected;  // (b, l, r + 2 n) of this direction
    float *packed, *tile;

    int64_t columns() const { return rank + 2 * states; }
    bool constant_b() const { return false; }
    bool constant_c() const { return false; }
    int64_t spare(int64_t blocks) const { return (blocks * (rank + taps.width) + CHUNK) * LANES; }
    const float *A(int64_t d) const { return A_log + d * states; }
    Vec rates(Vec stored) const { return broadcast(0.0f) - exp(stored); }

    // Rows start to start + tokens of (r, B, C); `u` has room for (tokens, channels + LANES).
    void project(int64_t b, int64_t start, int64_t tokens, float *u, float *pack) const {
        const int64_t step = channels + LANES;
        for (int64_t d = 0; d < channels; d += LANES) {
            const int lanes = static_cast<int>(channels - d < LANES ? channels - d : LANES);
            const Vec shift = pack_taps(taps, d, lanes, pack);
            convolve_block(x.at(b, d, 0), x.channel, x.token, lanes, pack, shift, taps.width, true, start,
                           start + tokens, u + d, step);
        }
        multiply(u, step, tokens, x_proj, channels, columns(), projected + (b * length + start) * columns());
    }

    void begin(const Part &part, float *memory) {
        tile = memory;
        packed = memory + CHUNK * LANES;
        float *next = packed;
        for (int64_t d = part.first; d < part.last; d += LANES, next += (rank + taps.width) * LANES) {
            const int lanes = static_cast<int>(part.last - d < LANES ? part.last - d : LANES);
            pack_taps(taps, d, lanes, next);
            float *weights = next + taps.width * LANES;
            for (int64_t i = 0; i < rank; ++i) {
                store(weights + i * LANES, load_lanes(dt_proj + d * rank + i, rank, lanes));
            }
        }
    }
    void stage_projections(const Part &part, int64_t start, int64_t tokens, float *B, float *C) const {
        const float *row = projected + (part.batch * length + start) * columns() + rank;
        for (int64_t i = 0; i < tokens; ++i, row += columns()) {
            memcpy(B + i * states, row, states * sizeof(float));
            memcpy(C + i * states, row + states, states * sizeof(float));
        }
    }
    void constants(int64_t, int, float *, float *) const {}
    void stage(const Part &part, int64_t d, int lanes, int64_t start, int64_t tokens, const Staged &staged) const {
        const float *own = packed + (d - part.first) / LANES * (rank + taps.width) * LANES;
        const float *weights = own + taps.width * LANES;
        const Vec conv_bias = taps.bias ? load_lanes(taps.bias + d, 1, lanes) : broadcast(0.0f);
        const Vec shift = bias ? load_lanes(bias + d, 1, lanes) : broadcast(0.0f);
        const Vec skip = D ? load_lanes(D + d, 1, lanes) : broadcast(0.0f);
        convolve_block(x.at(part.batch, d, 0), x.channel, x.token, lanes, own, conv_bias, taps.width, true, start,
                       start + tokens, tile, LANES);
        const float *row = projected + (part.batch * length + start) * columns(), *from = tile;
        const int64_t row_step = columns(), terms = rank;
        const bool skips = D != nullptr;
        const Staged to = staged;
        Vec reach = broadcast(0.0f);
        for (int64_t i = 0; i < tokens; ++i, row += row_step) {
            Vec dt = shift, other = broadcast(0.0f);
            int64_t j = 0;
            for (; j + 2 <= terms; j += 2) {
                dt = fma(broadcast(row[j]), load(weights + j * LANES), dt);
                other = fma(broadcast(row[j + 1]), load(weights + (j + 1) * LANES), other);
            }
            if (j < terms) dt = fma(broadcast(row[j]), load(weights + j * LANES), dt);
            dt = softplus(dt + other);
            reach = larger(reach, dt);
            const Vec u = load(from + i * LANES);
            store(to.dt + i * LANES, dt);
            store(to.weighted + i * LANES, dt * u);
            store(to.y + i * LANES, skips ? skip * u : broadcast(0.0f));
        }
        store(to.reach, reach);
    }
};

template <class T>
int bidirectional(Computed<T> *directions, const Sizes &sizes, const Output<T> &output, const Threads &threads) {
    const int64_t tiles = (sizes.length + CHUNK - 1) / CHUNK, width = directions[0].taps.width;
    {
        const int64_t floats = CHUNK * (sizes.channels + LANES) + width * LANES;
        const Memory memory(floats * threads.count);
        if (memory.data() == nullptr) return OUT_OF_MEMORY;
        for_each_task(threads, sizes.batch * sizes.directions * tiles, [&](int64_t task, int64_t worker) {
            const int64_t tile = task % tiles, s = task / tiles % sizes.directions, b = task / tiles / sizes.directions;
            const int64_t start = tile * CHUNK;
            const int64_t tokens = sizes.length - start < CHUNK ? sizes.length - start : CHUNK;
            float *u = memory.data() + worker * floats;
            directions[s].project(b, start, tokens, u, u + CHUNK * (sizes.channels + LANES));
        });
    }
    return scan(directions, sizes, output, Kept{nullptr, nullptr}, threads);
}
