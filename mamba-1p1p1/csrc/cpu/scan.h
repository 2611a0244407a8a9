// The selective scan, one direction or the two of a bidirectional block. Included once per instruction set, after
// conv1d.h.
//
//     h[t] = 2^(dt[t] * A') * h[t-1] + dt[t] * B[t] * u[t],   A' = A * log2 e
//     y[t] = <C[t], h[t]> + D * u[t]
//
// b batch, d channels, l length, n state, g groups, k = d / g channels of a group, s directions
//
// Channels are the lanes of a vector, so B and C are broadcast and nothing is summed across lanes. Tokens go in chunks:
// for each chunk and each vector of channels a `Source` stages dt, dt * u and D * u in the first cache, then the states
// are swept a few at a time, in registers, through the whole chunk. Channels of a task stay within one core's cache.
// A reversed direction is a forward one over rows that run the other way.

constexpr int64_t CHUNK = 32;  // tokens between kept states: the same number as in selective_scan_torch.py
constexpr int TILE = 4;        // states swept together
constexpr float LOG2_E = 1.44269504088896341f;

inline void add_to(float *sum, Vec a) { store(sum, load(sum) + a); }

// What one direction stages for a vector of channels and a chunk: (CHUNK, LANES) each.
struct Staged {
    float *dt, *weighted, *y;  // `weighted` is dt * u; y is written by the sweep
    float *reach;              // (LANES,): the largest |dt| of the chunk, or a NaN
    float *tiles;              // room for three tiles
};

// Factors 2^(dt * a) of a chunk for one state, COUNT vectors apart.
template <int COUNT, bool BOUNDED>
inline void decays(const float *dt, int64_t tokens, Vec a, float *out) {
    in_groups(tokens, [=](int64_t t, auto count) {
        constexpr int n = decltype(count)::value;
        Vec x[n];
        for (int i = 0; i < n; ++i) x[i] = load(dt + (t + i) * LANES) * a;
        exp2_each<BOUNDED, n>(x);
        for (int i = 0; i < n; ++i) store(out + (t + i) * COUNT * LANES, x[i]);
    });
}

// Of B and C, varying ones are staged per chunk as (CHUNK, n), constant ones per vector of channels as (n, LANES).
// The factors come first, independent of each other; the recurrence then runs over them.
template <int COUNT, bool CONSTANT_B, bool CONSTANT_C, bool BOUNDED>
void sweep_tile(const Staged staged, int64_t tokens, int64_t states, bool first, const float *B, const float *C,
                const float *A, float *h) {
    alignas(64) float factors[CHUNK * COUNT * LANES];
    Vec s[COUNT];
    for (int j = 0; j < COUNT; ++j) {
        decays<COUNT, BOUNDED>(staged.dt, tokens, load(A + j * LANES), factors + j * LANES);
        s[j] = load(h + j * LANES);
    }
    for (int64_t t = 0; t < tokens; ++t) {
        const Vec x = load(staged.weighted + t * LANES);
        for (int j = 0; j < COUNT; ++j) {
            const Vec b = CONSTANT_B ? load(B + j * LANES) : broadcast(B[t * states + j]);
            s[j] = fma(load(factors + (t * COUNT + j) * LANES), s[j], x * b);
        }
        Vec y = first ? broadcast(0.0f) : load(staged.y + t * LANES);
        for (int j = 0; j < COUNT; ++j) {
            const Vec c = CONSTANT_C ? load(C + j * LANES) : broadcast(C[t * states + j]);
            y = fma(s[j], c, y);
        }
        store(staged.y + t * LANES, y);
    }
    for (int j = 0; j < COUNT; ++j) store(h + j * LANES, s[j]);
}

// Whether exp2_each may be promised BOUNDED arguments for COUNT states.
template <int COUNT>
inline bool bounded(const float *A, const float *reach) {
    Vec rate = magnitude(load(A));
    for (int j = 1; j < COUNT; ++j) rate = larger_bits(rate, magnitude(load(A + j * LANES)));
    return all_at_most(rate * load(reach), broadcast(EXP2_BOUND));
}

template <bool CONSTANT_B, bool CONSTANT_C>
void sweep(const Staged &staged, int64_t tokens, int64_t states, const float *B, const float *C, const float *A,
           float *h) {
    if (states == 0) memset(staged.y, 0, static_cast<size_t>(tokens * LANES) * sizeof(float));
    int64_t n = 0;
    const auto some = [&](auto count) {
        constexpr int COUNT = decltype(count)::value;
        const int64_t first = n * LANES;
        const auto tile = bounded<COUNT>(A + first, staged.reach) ? sweep_tile<COUNT, CONSTANT_B, CONSTANT_C, true>
                                                                  : sweep_tile<COUNT, CONSTANT_B, CONSTANT_C, false>;
        tile(staged, tokens, states, n == 0, B + (CONSTANT_B ? first : n), C + (CONSTANT_C ? first : n), A + first,
             h + first);
        n += COUNT;
    };
    while (n + TILE <= states) some(Count<TILE>());
    while (n < states) some(Count<1>());
}

using Sweep = void (*)(const Staged &, int64_t, int64_t, const float *, const float *, const float *, float *);

inline Sweep sweep_for(bool constant_b, bool constant_c) {
    if (constant_b) return constant_c ? sweep<true, true> : sweep<true, false>;
    return constant_c ? sweep<false, true> : sweep<false, false>;
}

// Stage the tokens of a chunk: `raw` is delta before the bias and the softplus, u the input.
inline void stage_rows(int64_t tokens, Rows raw, Vec bias, bool positive, Rows u, const Staged &to) {
    float *const steps = to.dt, *const weighted = to.weighted;
    Vec reach = broadcast(0.0f);
    in_groups(tokens, [&reach, raw, bias, positive, u, steps, weighted](int64_t t, auto count) ALWAYS_INLINE {
        constexpr int n = decltype(count)::value;
        Vec dt[n];
        for (int i = 0; i < n; ++i) dt[i] = raw[t + i] + bias;
        if (positive) softplus_each<n>(dt);
        for (int i = 0; i < n; ++i) {
            reach = larger_bits(reach, magnitude(dt[i]));
            store(steps + (t + i) * LANES, dt[i]);
            store(weighted + (t + i) * LANES, dt[i] * u[t + i]);
        }
    });
    store(to.reach, reach);
}

// The rows that a scan of a vector of channels and a chunk puts out: y, with the skip. D * u comes last because it may
// be much larger than each term.
struct Scanned {
    float *y;  // (tokens, LANES)
    Rows u;
    Vec D;
    bool skips;
    Vec operator[](int64_t i) const { return skips ? fma(u[i], D, load(y + i * LANES)) : load(y + i * LANES); }
    Scanned from(int64_t token) const { return {y + token * LANES, {u.data + token * u.step, u.step}, D, skips}; }
};

// Where one task works: a picture, a group, and channels of it counted from the first of all channels.
struct Part {
    int64_t batch, group, first, last;
};

// The sizes that every part of a scan shares.
struct Sizes {
    int64_t batch, channels, length, states, groups, directions;
    int64_t group_channels() const { return channels / groups; }
    int64_t chunks() const { return (length + CHUNK - 1) / CHUNK; }
};

// Tokens of a run, counted in the order of the direction.
struct Span {
    int64_t begin, end;
};

// How pictures, groups and slices of their channels are dealt out as tasks.
struct Partition {
    const Sizes &sizes;
    int64_t pictures, slices, blocks;  // slices of a group; vectors of channels of the largest slice

    Partition(const Sizes &all, int64_t batch, int64_t slices_of_group)
        : sizes(all), pictures(batch), slices(slices_of_group) {
        const int64_t vectors = (all.group_channels() + LANES - 1) / LANES;
        if (slices > vectors) slices = vectors;
        blocks = (vectors + slices - 1) / slices;
    }
    int64_t tasks() const { return pictures * sizes.groups * slices; }
    // `first_picture`: what the pictures are counted from.
    Part part(int64_t task, int64_t first_picture) const {
        const int64_t slice = task % slices, group = task / slices % sizes.groups, k = sizes.group_channels();
        const int64_t first = slice * blocks * LANES, last = first + blocks * LANES;
        return {first_picture + task / slices / sizes.groups, group, group * k + (first < k ? first : k),
                group * k + (last < k ? last : k)};
    }
};

// The states of one direction's task: A' and h as (block, n, LANES), B and C of a chunk, staging space.
struct Workspace {
    float *A, *h, *B, *C;
    Staged staged;

    Workspace(Cursor &memory, const Sizes &sizes, int64_t blocks) {
        const int64_t projected = sizes.states * (CHUNK > LANES ? CHUNK : LANES);
        A = memory.take(blocks * sizes.states * LANES);
        h = memory.take(blocks * sizes.states * LANES);
        B = memory.take(projected);
        C = memory.take(projected);
        staged.dt = memory.take(CHUNK * LANES);
        staged.weighted = memory.take(CHUNK * LANES);
        staged.y = memory.take(CHUNK * LANES);
        staged.reach = memory.take(LANES);
        staged.tiles = memory.take(3 * CHUNK * LANES);
    }
};

// What a scan writes, beside y: the last state (b, d, n), the states before each chunk (b, chunks, s, g, n, k), and the
// states that the next run over the same channels starts from. Each may be null.
struct Kept {
    float *last, *borders, *carried;
};

inline int lanes_at(int64_t d, int64_t last) { return static_cast<int>(last - d < LANES ? last - d : LANES); }

// Run one direction of one task over a span that starts at a multiple of CHUNK.
//
// `source` offers: constant_b(), constant_c(); begin(part, spare) with memory of its own; A(d) the n rates of a
//     channel, contiguous, and rates(v) of what is stored there; stage_projections(part, start, tokens, B, C) for
//     varying ones, or constants(d, lanes, B, C) for constant ones; stage(part, d, lanes, start, tokens, staged), which
//     returns the rows of u, the first of the staged tiles at most being theirs; D, (d,) or null.
// `finish(part, d, lanes, start, tokens, scanned, tiles)` takes the outputs, in the order of the direction, and finds
// room for two tiles.
template <class Source, class Finish>
void scan_part(Source &source, const Sizes &sizes, const Part &part, int64_t direction, Span span,
               const Workspace &work, const Kept &kept, float *spare, const Finish &finish) {
    const int64_t n = sizes.states, k = sizes.group_channels(), state_floats = n * LANES;
    const bool constant_b = source.constant_b(), constant_c = source.constant_c();
    const Sweep run = sweep_for(constant_b, constant_c);
    source.begin(part, spare);
    for (int64_t d = part.first, block = 0; d < part.last; d += LANES, ++block) {
        float *A = work.A + block * state_floats, *h = work.h + block * state_floats;
        gather(source.A(d), n, 1, lanes_at(d, part.last), n, A);
        for (int64_t j = 0; j < n; ++j) {
            store(A + j * LANES, source.rates(load(A + j * LANES)) * broadcast(LOG2_E));
            store(h + j * LANES, broadcast(0.0f));
        }
    }
    float *carried = nullptr;
    if (kept.carried) {
        const int64_t vectors = (sizes.channels + LANES - 1) / LANES;
        const int64_t first = (part.batch * sizes.directions + direction) * vectors + part.first / LANES;
        carried = kept.carried + first * state_floats;
    }
    const int64_t floats = (part.last - part.first + LANES - 1) / LANES * state_floats;
    const size_t held = static_cast<size_t>(floats) * sizeof(float);
    if (carried && span.begin) memcpy(work.h, carried, held);

    for (int64_t start = span.begin; start < span.end; start += CHUNK) {
        const int64_t tokens = span.end - start < CHUNK ? span.end - start : CHUNK;
        source.stage_projections(part, start, tokens, constant_b ? nullptr : work.B, constant_c ? nullptr : work.C);
        for (int64_t d = part.first, block = 0; d < part.last; d += LANES, ++block) {
            const int lanes = lanes_at(d, part.last);
            float *h = work.h + block * state_floats;
            if (kept.borders) {
                const int64_t chunk = part.batch * sizes.chunks() + start / CHUNK;
                const int64_t border = (chunk * sizes.directions + direction) * sizes.groups + part.group;
                float *before = kept.borders + border * n * k + d - part.group * k;
                for (int64_t j = 0; j < n; ++j) store_lanes(before + j * k, 1, lanes, load(h + j * LANES));
            }
            source.constants(d, lanes, constant_b ? work.B : nullptr, constant_c ? work.C : nullptr);
            const Rows u = source.stage(part, d, lanes, start, tokens, work.staged);
            run(work.staged, tokens, n, work.B, work.C, work.A + block * state_floats, h);
            const Vec skip = source.D ? load_lanes(source.D + d, 1, lanes) : broadcast(0.0f);
            finish(part, d, lanes, start, tokens, Scanned{work.staged.y, u, skip, source.D != nullptr},
                   work.staged.tiles + CHUNK * LANES);
        }
    }
    if (carried) memcpy(carried, work.h, held);
    if (kept.last == nullptr || direction != 0) return;
    for (int64_t d = part.first, block = 0; d < part.last; d += LANES, ++block) {
        float *state = kept.last + (part.batch * sizes.channels + d) * n;
        scatter(work.h + block * state_floats, lanes_at(d, part.last), n, state, n, 1);
    }
}

// The gate, the output, and the sum over directions: the first visit of a token writes, the last one adds, scales and
// gates.
template <class T>
struct Output {
    Sequence<T> out;
    Sequence<const T> z;  // data may be null: no gate
    Sequence<float> sum;  // where directions meet; the same memory as `out` where that is in fp32
    int64_t length;
    float scale;

    // `reverse`: the tokens of `from` run from the end. Its y is overwritten; `tiles` has room for two.
    void take(const Part &part, bool reverse, bool first, bool last, int d_lanes, int64_t d, int64_t start,
              int64_t tokens, const Scanned &from, float *tiles) const {
        const int64_t t = reverse ? length - 1 - start : start, way = reverse ? -1 : 1;
        float *partial = sum.at(part.batch, d, t);
        Rows before{};
        if (!first) before = rows_of(partial, sum.channel, way * sum.token, d_lanes, tokens, tiles);
        const auto total = [&](int64_t i) ALWAYS_INLINE { return first ? from[i] : from[i] + before[i]; };
        if (!last) {
            const Target<float> target{partial, sum.channel, way * sum.token, d_lanes, from.y};
            for (int64_t i = 0; i < tokens; ++i) store(target.rows() + i * target.step(), total(i));
            return target.written(tokens);
        }
        const Target<T> target{out.at(part.batch, d, t), out.channel, way * out.token, d_lanes, from.y};
        float *to = target.rows();
        const int64_t step = target.step();
        const Vec factor = broadcast(scale);
        if (z.data) {
            const Rows gate = rows_of(z.at(part.batch, d, t), z.channel, way * z.token, d_lanes, tokens,
                                      tiles + CHUNK * LANES);
            in_groups(tokens, [&](int64_t i, auto count) ALWAYS_INLINE {
                constexpr int n = decltype(count)::value;
                Vec x[n];
                for (int j = 0; j < n; ++j) x[j] = gate[i + j];
                silu_each<n>(x);
                for (int j = 0; j < n; ++j) store(to + (i + j) * step, total(i + j) * factor * x[j]);
            });
        } else {
            for (int64_t i = 0; i < tokens; ++i) store(to + i * step, total(i) * factor);
        }
        target.written(tokens);
    }
};

// Where delta is of low rank: `weight` (d, rank) times what the sequence delta then holds, (b, rank, l). Else null.
struct LowRank {
    const float *weight;
    int64_t rank;

    // The weights of the channels of a task, as (block, rank, LANES).
    void pack(const Part &part, float *packed) const {
        for (int64_t d = part.first; d < part.last; d += LANES) {
            gather(weight + d * rank, rank, 1, lanes_at(d, part.last), rank, packed + (d - part.first) * rank);
        }
    }
    // out (tokens, LANES) = the products of a vector of channels; token t of `from` is `step` after t - 1, its numbers
    // are `apart`.
    template <class T>
    static void multiply(const T *from, int64_t step, int64_t apart, int64_t rank, const float *packed, int64_t tokens,
                         float *out) {
        in_groups(tokens, [=](int64_t t, auto count) ALWAYS_INLINE {
            constexpr int n = decltype(count)::value;
            Vec sums[n];
            for (int i = 0; i < n; ++i) sums[i] = broadcast(0.0f);
            for (int64_t j = 0; j < rank; ++j) {
                const Vec value = load(packed + j * LANES);
                for (int i = 0; i < n; ++i) {
                    sums[i] = fma(broadcast(to_float(from[(t + i) * step + j * apart])), value, sums[i]);
                }
            }
            for (int i = 0; i < n; ++i) store(out + (t + i) * LANES, sums[i]);
        });
    }
    // out (tokens, LANES) = the delta of what a route visits from `start` on, of channels whose weights are `packed`.
    template <class T>
    void expand(const Sequence<const T> &from, const Route &route, int64_t b, const float *packed, int64_t start,
                int64_t tokens, float *out) const {
        route.pieces(start, tokens, [&](int64_t first, int64_t token, int64_t step, int64_t count) {
            multiply(from.at(b, 0, token), step * from.token, from.channel, rank, packed, count, out + first * LANES);
        });
    }
};

// A direction whose u, delta, B and C are given.
template <class T>
struct Given {
    Sequence<const T> u, delta;
    const float *rates_of;  // A, (d, n)
    const T *B_data, *C_data;
    int64_t B_strides[4], C_strides[4];  // of b, g, n, l; for a constant one those of d (in place of b) and n
    bool fixed_b, fixed_c;
    const float *D, *bias;
    bool softplus_steps;
    Route route;
    int64_t states;
    LowRank low_rank;

    bool constant_b() const { return fixed_b; }
    bool constant_c() const { return fixed_c; }
    void begin(const Part &, float *) {}
    int64_t spare(int64_t) const { return 0; }
    const float *A(int64_t d) const { return rates_of + d * states; }
    Vec rates(Vec stored) const { return stored; }

    void stage_projection(const T *data, const int64_t *strides, const Part &part, int64_t start, int64_t tokens,
                          float *out) const {
        const T *first = data + part.batch * strides[0] + part.group * strides[1];
        const int64_t state = strides[2];
        route.pieces(start, tokens, [&](int64_t done, int64_t token, int64_t step, int64_t count) {
            const T *from = first + token * strides[3];
            float *to = out + done * states;
            for (int64_t i = 0; i < count; ++i, from += step * strides[3], to += states) {
                for (int64_t j = 0; j < states; ++j) to[j] = to_float(from[j * state]);
            }
        });
    }
    void stage_projections(const Part &part, int64_t start, int64_t tokens, float *B, float *C) const {
        if (B) stage_projection(B_data, B_strides, part, start, tokens, B);
        if (C) stage_projection(C_data, C_strides, part, start, tokens, C);
    }
    void constants(int64_t d, int lanes, float *B, float *C) const {
        if (B) gather(B_data + d * B_strides[0], B_strides[0], B_strides[2], lanes, states, B);
        if (C) gather(C_data + d * C_strides[0], C_strides[0], C_strides[2], lanes, states, C);
    }
    Rows stage(const Part &part, int64_t d, int lanes, int64_t start, int64_t tokens, const Staged &to) const {
        const Vec shift = bias ? load_lanes(bias + d, 1, lanes) : broadcast(0.0f);
        const int64_t t = route.token(start), way = route.reverse ? -1 : 1;
        const Rows x = rows_of(u.at(part.batch, d, t), u.channel, way * u.token, lanes, tokens, to.tiles);
        const Rows raw = rows_of(delta.at(part.batch, d, t), delta.channel, way * delta.token, lanes, tokens,
                                 to.tiles + CHUNK * LANES);
        stage_rows(tokens, raw, shift, softplus_steps, x, to);
        return x;
    }
};

// What each worker of a scan needs, its `source` having `spare(blocks)` floats of its own.
template <class Source>
struct ScanMemory {
    Workspace work;
    float *spare;

    ScanMemory(Cursor memory, const Sizes &sizes, int64_t blocks, const Source &source)
        : work(memory, sizes, blocks), spare(memory.take(source.spare(blocks))), floats(memory.used) {}
    int64_t floats;
};

// Run all directions of a scan: `sources` has one for each.
template <class T>
int scan(const Given<T> *sources, const Sizes &sizes, const Output<T> &output, const Kept &kept,
         const Threads &threads) {
    const Partition partition(sizes, sizes.batch, slices_for(threads, sizes.batch * sizes.groups));
    const int64_t floats = ScanMemory<Given<T>>({nullptr}, sizes, partition.blocks, sources[0]).floats;
    const Memory memory(floats * threads.count);
    if (memory.data() == nullptr) return OUT_OF_MEMORY;
    for_each_task(threads, partition.tasks(), [&](int64_t task, int64_t worker) {
        const Part part = partition.part(task, 0);
        const ScanMemory<Given<T>> own({memory.data() + worker * floats}, sizes, partition.blocks, sources[0]);
        for (int64_t s = 0; s < sizes.directions; ++s) {
            Given<T> source = sources[s];
            scan_part(source, sizes, part, s, Span{0, sizes.length}, own.work, kept, own.spare,
                      [&](const Part &p, int64_t d, int lanes, int64_t start, int64_t tokens, const Scanned &y,
                          float *tiles) {
                          output.take(p, source.route.reverse, s == 0, s == sizes.directions - 1, lanes, d, start,
                                      tokens, y, tiles);
                      });
        }
    });
    return OK;
}
