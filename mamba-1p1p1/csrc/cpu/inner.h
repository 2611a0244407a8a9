// The "v2" bidirectional mixer between its outer projections, without its intermediate results in memory. Included once
// per instruction set, after scan.h.
//
//     u = silu(conv(x)),  (r, B, C) = x_proj u,  delta = dt_proj r      for each direction, from its end
//     y = (scan forward + scan backward) * silu(z) * scale
//
// e inner channels, l length, n state, r dt rank, w conv width, s directions
//
// A picture goes in spans of tokens whose u, of both directions, stays in the cache. For each span the (r, B, C) come
// first, since they need every channel of u; then each thread scans channels of its own and computes their delta.

// A direction that computes its inputs. Its tokens count from the end it starts at.
template <class T>
struct Computed {
    Sequence<const T> x;
    Taps taps;
    Linear x_proj;         // to r + 2 n columns
    const float *dt_proj;  // (e, r)
    const float *A_log;    // (e, n)
    const float *D, *bias;
    bool reverse;
    int64_t states, rank, channels;
    float *u, *projected;  // of one span of some pictures: (b, span, padded), (b, span, across)
    Span span;             // what they hold now
    int64_t first_picture, span_tokens;
    float *packed_taps;    // (padded / LANES, w + 1, LANES)
    float *kept;           // (r, B, C) of all pictures, (b, l, r + 2 n), tokens counted from the first; or null
    int64_t length;
    float *packed;         // of dt_proj, for the channels of a task

    // Of `projected`: whole panels of the product.
    int64_t across() const { return x_proj.count() * PANEL; }
    Linear all_columns() const {
        Linear all = x_proj;
        all.columns = across();
        return all;
    }
    int64_t padded() const { return (channels + LANES - 1) / LANES * LANES; }
    bool constant_b() const { return false; }
    bool constant_c() const { return false; }
    int64_t spare(int64_t blocks) const { return blocks * rank * LANES; }
    const float *A(int64_t d) const { return A_log + d * states; }
    Vec rates(Vec stored) const { return broadcast(0.0f) - exp(stored); }

    int64_t row(int64_t b, int64_t t) const { return (b - first_picture) * span_tokens + t - span.begin; }

    void pack_all_taps() const {
        for (int64_t d = 0; d < channels; d += LANES) {
            pack_taps(taps, d, lanes_at(d, channels), packed_taps + d * (taps.width + 1));
        }
    }

    // u and (r, B, C) of some tokens of the span. `tile` has room for (w - 1 + tokens, LANES), then for those tokens as
    // the projection is applied to them.
    void project(int64_t b, int64_t start, int64_t tokens, float *tile) const {
        float *rows = u + row(b, start) * padded();
        for (int64_t d = 0; d < channels; d += LANES) {
            const int lanes = lanes_at(d, channels);
            convolve_span(x, b, d, lanes, start, tokens, packed_taps + d * (taps.width + 1), taps.width, true, tile,
                          rows + d, padded());
        }
        const float *found = projected + row(b, start) * across();
        const float *taken = x_proj.taken(rows, padded(), tokens, tile + (taps.width + tokens) * LANES);
        apply(all_columns(), taken, x_proj.int8 ? x_proj.row_floats() : padded(), tokens,
              projected + row(b, start) * across(), across());
        if (kept == nullptr) return;
        const size_t bytes = static_cast<size_t>(x_proj.columns) * sizeof(float);
        for (int64_t t = start; t < start + tokens; ++t, found += across()) {
            memcpy(kept + (b * length + (reverse ? length - 1 - t : t)) * x_proj.columns, found, bytes);
        }
    }

    void begin(const Part &part, float *memory) {
        packed = memory;
        LowRank{dt_proj, rank}.pack(part, memory);
    }
    void stage_projections(const Part &part, int64_t start, int64_t tokens, float *B, float *C) const {
        const float *from = projected + row(part.batch, start) * across() + rank;
        for (int64_t i = 0; i < tokens; ++i, from += across()) {
            memcpy(B + i * states, from, static_cast<size_t>(states) * sizeof(float));
            memcpy(C + i * states, from + states, static_cast<size_t>(states) * sizeof(float));
        }
    }
    void constants(int64_t, int, float *, float *) const {}

    Rows stage(const Part &part, int64_t d, int lanes, int64_t start, int64_t tokens, const Staged &to) const {
        const Vec shift = bias ? load_lanes(bias + d, 1, lanes) : broadcast(0.0f);
        const int64_t first = row(part.batch, start), step = across();
        float *const raw = to.tiles;
        const Rows input{u + first * padded() + d, padded()};
        LowRank::multiply(projected + first * step, step, 1, rank, packed + (d - part.first) * rank, tokens, raw);
        stage_rows(tokens, {raw, LANES}, shift, true, input, to);
        return input;
    }
};

constexpr int64_t SPAN_FLOATS = 1 << 18;      // of u of both directions
constexpr int64_t PROJECTED = 4 * GEMM_ROWS;  // tokens that a task projects

// Sizes of the spans: pictures at a time, and tokens, a multiple of CHUNK.
struct Spans {
    int64_t pictures, tokens, count;

    Spans(const Sizes &sizes, int64_t padded, const Threads &threads) {
        pictures = threads.count / sizes.directions;
        if (pictures < 1) pictures = 1;
        if (pictures > sizes.batch) pictures = sizes.batch;
        tokens = SPAN_FLOATS / (sizes.directions * padded) / CHUNK * CHUNK;
        if (tokens < CHUNK) tokens = CHUNK;
        const int64_t all = sizes.chunks() * CHUNK;
        if (tokens > all) tokens = all;
        count = (sizes.length + tokens - 1) / tokens;
        tokens = (sizes.chunks() + count - 1) / count * CHUNK;  // of about the same size
        count = (sizes.length + tokens - 1) / tokens;
    }
    Span span(int64_t index, int64_t length) const {
        const int64_t begin = index * tokens, end = begin + tokens;
        return {begin, end < length ? end : length};
    }
};

// A call: its memory, how it is cut, and its two stages.
template <class T>
class Inner {
public:
    // `directions` are the caller's, two of them, and are completed here. `borders`: as in `Kept`.
    Inner(Computed<T> *directions, const Sizes &sizes, const Threads &threads, float *borders = nullptr)
        : borders_(borders), directions_(directions), sizes_(sizes), threads_(threads), padded_(directions[0].padded()),
          spans_(sizes, padded_, threads), partition_(sizes, spans_.pictures, slices_for(threads, spans_.pictures)),
          worker_floats_(floats_of_worker()), shared_floats_(take_shared({nullptr})),
          memory_(shared_floats_ + worker_floats_ * threads.count) {
        if (memory_.data()) take_shared({memory_.data()});
    }
    bool has_memory() const { return memory_.data() != nullptr; }

    // Independent tasks to do first: `pack` each of them.
    int64_t packing_tasks() const { return sizes_.directions * (directions_[0].x_proj.count() + 1); }
    void pack(int64_t task) const {
        const Computed<T> &direction = directions_[task % sizes_.directions];
        const int64_t panel = task / sizes_.directions;
        if (panel < direction.x_proj.count()) return direction.x_proj.pack(panel);
        direction.pack_all_taps();
    }

    void run(const Output<T> &output) {
        for (int64_t picture = 0; picture < sizes_.batch; picture += spans_.pictures) {
            const int64_t left = sizes_.batch - picture, pictures = left < spans_.pictures ? left : spans_.pictures;
            for (int64_t index = 0; index < spans_.count; ++index) {
                for (int64_t s = 0; s < sizes_.directions; ++s) {
                    directions_[s].span = spans_.span(index, sizes_.length);
                    directions_[s].first_picture = picture;
                }
                project(picture, pictures);
                scan(picture, pictures, index, output);
            }
        }
    }

private:
    int64_t floats_of_worker() const {
        const int64_t scanning = ScanMemory<Computed<T>>({nullptr}, sizes_, partition_.blocks, directions_[0]).floats;
        const Linear &x_proj = directions_[0].x_proj;
        const int64_t quantized = x_proj.int8 ? PROJECTED * x_proj.row_floats() : 0;
        const int64_t projecting = (PROJECTED + directions_[0].taps.width) * LANES + quantized;
        return ((scanning > projecting ? scanning : projecting) + 15) / 16 * 16;
    }

    // Deal out what the threads share; returns how much that is.
    int64_t take_shared(Cursor memory) {
        const int64_t pictures = spans_.pictures, states = padded_ * sizes_.states;
        for (int64_t s = 0; s < sizes_.directions; ++s) {
            Computed<T> &direction = directions_[s];
            direction.u = memory.take(pictures * spans_.tokens * padded_);
            direction.projected = memory.take(pictures * spans_.tokens * direction.across());
            direction.x_proj.panels = memory.take(direction.x_proj.packed());
            direction.packed_taps = memory.take(padded_ * (direction.taps.width + 1));
            direction.span_tokens = spans_.tokens;
        }
        const bool carries = spans_.count > 1;
        float *carried = memory.take(carries ? sizes_.batch * sizes_.directions * states : 0);
        kept_ = {nullptr, borders_, carries ? carried : nullptr};
        return memory.used;
    }

    float *own(int64_t worker) const { return memory_.data() + shared_floats_ + worker * worker_floats_; }

    // u and (r, B, C) of a span.
    void project(int64_t picture, int64_t pictures) const {
        const Span span = directions_[0].span;
        const int64_t tiles = (span.end - span.begin + PROJECTED - 1) / PROJECTED;
        for_each_task(threads_, pictures * sizes_.directions * tiles, [&](int64_t task, int64_t worker) {
            const int64_t s = task / tiles % sizes_.directions, b = picture + task / tiles / sizes_.directions;
            const int64_t start = span.begin + task % tiles * PROJECTED, rest = span.end - start;
            directions_[s].project(b, start, rest < PROJECTED ? rest : PROJECTED, own(worker));
        });
    }

    void scan(int64_t picture, int64_t pictures, int64_t index, const Output<T> &output) const {
        const int64_t tasks = partition_.tasks() / spans_.pictures * pictures;
        for_each_task(threads_, tasks, [&](int64_t task, int64_t worker) {
            const Part part = partition_.part(task, picture);
            const ScanMemory<Computed<T>> mine({own(worker)}, sizes_, partition_.blocks, directions_[0]);
            for (int64_t s = 0; s < sizes_.directions; ++s) {
                Computed<T> source = directions_[s];
                const bool way = source.reverse;
                // Tokens below this number are reached by this direction before the other one.
                const int64_t firsts = sizes_.length - (index + s) * spans_.tokens;
                scan_part(source, sizes_, part, s, source.span, mine.work, kept_, mine.spare,
                          [&](const Part &p, int64_t d, int lanes, int64_t start, int64_t tokens, const Scanned &y,
                              float *tiles) {
                              const int64_t ahead = firsts - start;
                              const int64_t head = ahead < 0 ? 0 : ahead < tokens ? ahead : tokens;
                              if (head) output.take(p, way, true, false, lanes, d, start, head, y, tiles);
                              if (head == tokens) return;
                              output.take(p, way, false, true, lanes, d, start + head, tokens - head, y.from(head),
                                          tiles);
                          });
            }
        });
    }

    float *const borders_;
    Computed<T> *directions_;
    const Sizes sizes_;
    const Threads threads_;
    const int64_t padded_;
    const Spans spans_;
    const Partition partition_;
    Kept kept_;
    const int64_t worker_floats_, shared_floats_;
    const Memory memory_;
};

template <class T>
int bidirectional(Computed<T> *directions, const Sizes &sizes, const Output<T> &output, float *borders,
                  const Threads &threads) {
    if (sizes.batch * sizes.channels * sizes.length == 0) return OK;
    Inner<T> inner(directions, sizes, threads, borders);
    if (!inner.has_memory()) return OUT_OF_MEMORY;
    for_each_task(threads, inner.packing_tasks(), [&](int64_t task, int64_t) { inner.pack(task); });
    inner.run(output);
    return OK;
}
