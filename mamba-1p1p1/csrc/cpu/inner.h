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
    float *u, *projected;  // of one span of some pictures: (b, span, padded), (b, span, r + 2 n)
    Span span;             // what they hold now
    int64_t first_picture, span_tokens;
    float *packed_taps;    // (padded / LANES, w + 1, LANES)
    float *packed;         // of dt_proj, for the channels of a task

    int64_t columns() const { return rank + 2 * states; }
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

    // u and (r, B, C) of some tokens of the span. `tile` has room for (w - 1 + tokens, LANES).
    void project(int64_t b, int64_t start, int64_t tokens, float *tile) const {
        float *rows = u + row(b, start) * padded();
        for (int64_t d = 0; d < channels; d += LANES) {
            const int lanes = lanes_at(d, channels);
            convolve_span(x, b, d, lanes, start, tokens, packed_taps + d * (taps.width + 1), taps.width, true, tile,
                          rows + d, padded());
        }
        apply(x_proj, rows, padded(), tokens, projected + row(b, start) * columns(), columns());
    }

    void begin(const Part &part, float *memory) {
        packed = memory;
        for (int64_t d = part.first; d < part.last; d += LANES) {
            gather(dt_proj + d * rank, rank, 1, lanes_at(d, part.last), rank, memory + (d - part.first) * rank);
        }
    }
    void stage_projections(const Part &part, int64_t start, int64_t tokens, float *B, float *C) const {
        const float *from = projected + row(part.batch, start) * columns() + rank;
        for (int64_t i = 0; i < tokens; ++i, from += columns()) {
            memcpy(B + i * states, from, static_cast<size_t>(states) * sizeof(float));
            memcpy(C + i * states, from + states, static_cast<size_t>(states) * sizeof(float));
        }
    }
    void constants(int64_t, int, float *, float *) const {}

    // COUNT rows of delta before the softplus.
    template <int COUNT>
    void steps(const float *r, const float *weights, Vec shift, float *out) const {
        Vec sums[COUNT];
        for (int i = 0; i < COUNT; ++i) sums[i] = shift;
        for (int64_t j = 0; j < rank; ++j) {
            const Vec weight = load(weights + j * LANES);
            for (int i = 0; i < COUNT; ++i) sums[i] = fma(broadcast(r[i * columns() + j]), weight, sums[i]);
        }
        for (int i = 0; i < COUNT; ++i) store(out + i * LANES, sums[i]);
    }
    void stage(const Part &part, int64_t d, int lanes, int64_t start, int64_t tokens, const Staged &to) const {
        const Vec shift = bias ? load_lanes(bias + d, 1, lanes) : broadcast(0.0f);
        const Vec skip = D ? load_lanes(D + d, 1, lanes) : broadcast(0.0f);
        const float *weights = packed + (d - part.first) * rank;
        const int64_t first = row(part.batch, start), across = columns();
        const float *r = projected + first * across;
        in_groups(tokens, [&](int64_t t, auto count) {
            steps<decltype(count)::value>(r + t * across, weights, shift, to.tiles + t * LANES);
        });
        const Rows raw{to.tiles, LANES}, input{u + first * padded() + d, padded()};
        stage_rows(tokens, D ? &skip : nullptr, true, [&](int64_t i) { return raw[i]; },
                   [&](int64_t i) { return input[i]; }, to);
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

template <class T>
int bidirectional(Computed<T> *directions, const Sizes &sizes, const Output<T> &output, const Threads &threads) {
    if (sizes.batch * sizes.channels * sizes.length == 0) return OK;
    const int64_t width = directions[0].taps.width, padded = directions[0].padded(), columns = directions[0].columns();
    const Spans spans(sizes, padded, threads);
    const Partition partition(sizes, spans.pictures, slices_for(threads, spans.pictures));

    Cursor counter{nullptr};
    const auto take_shared = [&](Cursor &memory) {
        for (int64_t s = 0; s < sizes.directions; ++s) {
            directions[s].u = memory.take(spans.pictures * spans.tokens * padded);
            directions[s].projected = memory.take(spans.pictures * spans.tokens * columns);
            directions[s].x_proj.panels = memory.take(directions[s].x_proj.packed());
            directions[s].packed_taps = memory.take(padded * (width + 1));
            directions[s].span_tokens = spans.tokens;
        }
        return memory.take(spans.count > 1 ? sizes.batch * sizes.directions * padded * sizes.states : 0);
    };
    take_shared(counter);
    const int64_t scanning = ScanMemory<Computed<T>>({nullptr}, sizes, partition.blocks, directions[0]).floats;
    const int64_t projecting = (PROJECTED + width) * LANES, most = scanning > projecting ? scanning : projecting;
    const int64_t floats = (most + 15) / 16 * 16;
    const Memory memory(counter.used + floats * threads.count);
    if (memory.data() == nullptr) return OUT_OF_MEMORY;
    Cursor shared{memory.data()};
    float *carried = take_shared(shared);
    const Kept kept{nullptr, nullptr, spans.count > 1 ? carried : nullptr};
    float *own = memory.data() + counter.used;

    const int64_t panels = directions[0].x_proj.count();
    for_each_task(threads, sizes.directions * (panels + 1), [&](int64_t task, int64_t) {
        const Computed<T> &direction = directions[task % sizes.directions];
        const int64_t panel = task / sizes.directions;
        if (panel < panels) return direction.x_proj.pack(panel);
        direction.pack_all_taps();
    });
    for (int64_t picture = 0; picture < sizes.batch; picture += spans.pictures) {
        const int64_t left = sizes.batch - picture, pictures = left < spans.pictures ? left : spans.pictures;
        for (int64_t index = 0; index < spans.count; ++index) {
            const Span span = spans.span(index, sizes.length);
            for (int64_t s = 0; s < sizes.directions; ++s) {
                directions[s].span = span;
                directions[s].first_picture = picture;
            }
            const int64_t tiles = (span.end - span.begin + PROJECTED - 1) / PROJECTED;
            for_each_task(threads, pictures * sizes.directions * tiles, [&](int64_t task, int64_t worker) {
                const int64_t s = task / tiles % sizes.directions, b = picture + task / tiles / sizes.directions;
                const int64_t start = span.begin + task % tiles * PROJECTED, rest = span.end - start;
                directions[s].project(b, start, rest < PROJECTED ? rest : PROJECTED, own + worker * floats);
            });
            const int64_t tasks = partition.tasks() / spans.pictures * pictures;
            for_each_task(threads, tasks, [&](int64_t task, int64_t worker) {
                const Part part = partition.part(task, picture);
                const ScanMemory<Computed<T>> mine({own + worker * floats}, sizes, partition.blocks, directions[0]);
                for (int64_t s = 0; s < sizes.directions; ++s) {
                    Computed<T> source = directions[s];
                    // Tokens below this number are reached by this direction before the other one.
                    const int64_t firsts = sizes.length - (index + s) * spans.tokens;
                    scan_part(source, sizes, part, s, span, mine.work, kept, mine.spare,
                              [&](const Part &p, int64_t d, int lanes, int64_t start, int64_t tokens, float *y,
                                  float *spare) {
                                  const int64_t ahead = firsts - start;
                                  const int64_t head = ahead < 0 ? 0 : ahead < tokens ? ahead : tokens;
                                  const bool way = source.reverse;
                                  if (head) output.take(p, way, true, false, lanes, d, start, head, y, spare);
                                  if (head == tokens) return;
                                  output.take(p, source.reverse, false, true, lanes, d, start + head, tokens - head,
                                              y + head * LANES, spare);
                              });
                }
            });
        }
    }
    return OK;
}
