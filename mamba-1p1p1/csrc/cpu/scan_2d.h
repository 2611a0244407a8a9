// The scan of pictures in several directions, whose outputs are added up. Included once per instruction set, after
// scan.h.
//
// b batch, d channels, l pixels, n state, r dt rank
//
// The pixels of a chunk lie anywhere in the picture, each with its channels side by side. They are read whole, and
// added to whole, through tiles: the rows of one vector of channels are a power of two apart often enough to push each
// other out of the first cache.

constexpr int64_t TILE_FLOATS = (CHUNK + 1) * LANES;  // from tile to tile: an odd number of rows
constexpr int64_t CACHED_FLOATS = 1 << 17;             // of an input, in the second cache of a core, beside its output
constexpr int64_t LINE = 16;                           // floats of a cache line

// A direction over pixels; `tiles` are those of the chunk, one for each vector of a task's channels: first the inputs,
// then the outputs.
struct Pixels : Given<float> {
    float *tiles, *weights;  // the latter of `low_rank`, for the channels of a task
    Sequence<float> out;
    bool adds;  // to what is in `out`
    bool far;   // whether a picture is too large for the second cache

    Pixels(const Given<float> &given, const Sequence<float> &to, bool adding)
        : Given<float>(given), tiles(nullptr), weights(nullptr), out(to), adds(adding), far(false) {}

    int64_t spare(int64_t blocks) const { return blocks * (TILE_FLOATS + LANES * low_rank.rank); }
    float *tile(const Part &part, int64_t d) const { return tiles + (d - part.first) / LANES * TILE_FLOATS; }

    void begin(const Part &part, float *memory) {
        tiles = memory;
        far = route.length * (part.last - part.first) > CACHED_FLOATS;
        weights = tile(part, part.last + LANES - 1);
        low_rank.pack(part, weights);
    }
    void stage_projections(const Part &part, int64_t start, int64_t tokens, float *B, float *C) const {
        Given<float>::stage_projections(part, start, tokens, B, C);
        each_pixel(start, tokens, [&](int64_t i, int64_t token) ALWAYS_INLINE {
            const float *from = u.at(part.batch, part.first, token);
            each_vector(part, i, [&](int64_t c, int lanes, float *row) ALWAYS_INLINE {
                store(row, load_lanes(from + c, 1, lanes));
            });
        });
        if (far) {
            const int64_t next = start + tokens, left = route.length - next;
            each_pixel(next, left < CHUNK ? left : CHUNK, [&](int64_t, int64_t token) ALWAYS_INLINE {
                const float *from = u.at(part.batch, part.first, token), *to = out.at(part.batch, part.first, token);
                for (int64_t c = 0; c < part.last - part.first; c += LINE) {
                    prefetch_far(from + c);
                    prefetch_far(to + c);
                }
            });
        }
    }
    Rows stage(const Part &part, int64_t d, int lanes, int64_t start, int64_t tokens, const Staged &to) const {
        const Vec shift = bias ? load_lanes(bias + d, 1, lanes) : broadcast(0.0f);
        const Rows x{tile(part, d), LANES};
        low_rank.expand(delta, route, part.batch, weights + (d - part.first) * low_rank.rank, start, tokens, to.tiles);
        stage_rows(tokens, {to.tiles, LANES}, shift, true, x, to);
        return x;
    }
    // Take the outputs of a vector of channels; with the last one write or add those of the chunk.
    void finish(const Part &part, int64_t d, int64_t start, int64_t tokens, const Scanned &y) const {
        float *const rows = tile(part, d);
        for (int64_t i = 0; i < tokens; ++i) store(rows + i * LANES, y[i]);
        if (d + LANES < part.last) return;
        each_pixel(start, tokens, [&](int64_t i, int64_t token) ALWAYS_INLINE {
            float *to = out.at(part.batch, part.first, token);
            each_vector(part, i, [&](int64_t c, int lanes, const float *row) ALWAYS_INLINE {
                store_lanes(to + c, 1, lanes, adds ? load_lanes(to + c, 1, lanes) + load(row) : load(row));
            });
        });
    }

private:
    // Call body(c, lanes, row) for each vector of the task's channels, the first of which is c, and its i-th row.
    template <class Body>
    void each_vector(const Part &part, int64_t i, const Body &body) const {
        const int64_t channels = part.last - part.first;
        float *row = tiles + i * LANES;
        int64_t c = 0;
        for (; c + LANES <= channels; c += LANES, row += TILE_FLOATS) body(c, LANES, row);
        if (c < channels) body(c, static_cast<int>(channels - c), row);
    }
    template <class Body>
    void each_pixel(int64_t start, int64_t tokens, const Body &body) const {
        route.pieces(start, tokens, [&](int64_t first, int64_t token, int64_t step, int64_t count) {
            for (int64_t i = 0; i < count; ++i) body(first + i, token + i * step);
        });
    }
};

// out (b, l, d) = the sum of all directions. `borders`: as in `Kept`.
inline int scan_pictures(const Given<float> *directions, const Sizes &sizes, const Sequence<float> &out, float *borders,
                         const Threads &threads) {
    const Partition partition(sizes, sizes.batch, slices_for(threads, sizes.batch));
    const Pixels first(directions[0], out, false);
    const int64_t floats = ScanMemory<Pixels>({nullptr}, sizes, partition.blocks, first).floats;
    const Memory memory(floats * threads.count);
    if (memory.data() == nullptr) return OUT_OF_MEMORY;
    for_each_task(threads, partition.tasks(), [&](int64_t task, int64_t worker) {
        const Part part = partition.part(task, 0);
        const ScanMemory<Pixels> own({memory.data() + worker * floats}, sizes, partition.blocks, first);
        for (int64_t s = 0; s < sizes.directions; ++s) {
            Pixels pixels(directions[s], out, s > 0);
            const Kept kept{nullptr, borders, nullptr};
            scan_part(pixels, sizes, part, s, Span{0, sizes.length}, own.work, kept, own.spare,
                      [&](const Part &p, int64_t d, int, int64_t start, int64_t tokens, const Scanned &y, float *) {
                          pixels.finish(p, d, start, tokens, y);
                      });
        }
    });
    return OK;
}
