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
constexpr int TILE = Vec::registers == 32 ? 8 : 2;  // states swept together

// What one direction stages for a vector of channels and a chunk: (CHUNK, LANES) each.
struct Staged {
    float *dt, *weighted, *y;
    float *reach;  // (LANES,): the largest |dt| of the chunk
};

inline Vec magnitude(Vec a) { return broadcast(0.0f) - negative_magnitude(a); }

// Of B and C, varying ones are staged per chunk as (CHUNK, n), constant ones per vector of channels as (n, LANES).
template <int COUNT, bool CONSTANT_B, bool CONSTANT_C, bool BOUNDED>
inline void sweep_tile(const Staged &staged, int64_t tokens, int64_t states, const float *B, const float *C,
                       const float *A, float *h) {
    Vec a[COUNT], s[COUNT];
    for (int j = 0; j < COUNT; ++j) {
        a[j] = load(A + j * LANES);
        s[j] = load(h + j * LANES);
    }
    for (int64_t t = 0; t < tokens; ++t) {
        const Vec dt = load(staged.dt + t * LANES), x = load(staged.weighted + t * LANES);
        Vec y = load(staged.y + t * LANES);
        for (int j = 0; j < COUNT; ++j) {
            const Vec b = CONSTANT_B ? load(B + j * LANES) : broadcast(B[t * states + j]);
            const Vec c = CONSTANT_C ? load(C + j * LANES) : broadcast(C[t * states + j]);
            s[j] = fma(exp2<BOUNDED>(dt * a[j]), s[j], x * b);
            y = fma(s[j], c, y);
        }
        store(staged.y + t * LANES, y);
    }
    for (int j = 0; j < COUNT; ++j) store(h + j * LANES, s[j]);
}

template <bool CONSTANT_B, bool CONSTANT_C, bool BOUNDED>
void sweep(const Staged &staged, int64_t tokens, int64_t states, const float *B, const float *C, const float *A,
           float *h) {
    int64_t n = 0;
    const auto b = [&] { return B + (CONSTANT_B ? n * LANES : n); };
    const auto c = [&] { return C + (CONSTANT_C ? n * LANES : n); };
    for (; n + TILE <= states; n += TILE) {
        sweep_tile<TILE, CONSTANT_B, CONSTANT_C, BOUNDED>(staged, tokens, states, b(), c(), A + n * LANES,
                                                          h + n * LANES);
    }
    for (; n < states; ++n) {
        sweep_tile<1, CONSTANT_B, CONSTANT_C, BOUNDED>(staged, tokens, states, b(), c(), A + n * LANES, h + n * LANES);
    }
}

using Sweep = void (*)(const Staged &, int64_t, int64_t, const float *, const float *, const float *, float *);

template <bool BOUNDED>
inline Sweep sweep_for(bool constant_b, bool constant_c) {
    if (constant_b) return constant_c ? sweep<true, true, BOUNDED> : sweep<true, false, BOUNDED>;
    return constant_c ? sweep<false, true, BOUNDED> : sweep<false, false, BOUNDED>;
}

// Whether every |dt * A'| of a chunk and a vector of channels is small enough for the bounded exponential.
inline bool is_bounded(const Staged &staged, const float *largest_rate) {
    float products[LANES];
    store(products, load(staged.reach) * load(largest_rate));
    for (int i = 0; i < LANES; ++i) {
        if (!(products[i] <= 126.0f)) return false;
    }
    return true;
}

constexpr float LOG2_E = 1.44269504088896341f;

// Where one task works: a picture, a group, and channels of it counted from the first of all channels.
struct Part {
    int64_t batch, group, first, last;
};

// The sizes that every part of a scan shares.
struct Sizes {
    int64_t batch, channels, length, states, groups, directions;
    int64_t group_channels() const { return channels / groups; }
};

// How the batch, the groups and slices of their channels are dealt out as tasks.
struct Partition {
    const Sizes &sizes;
    int64_t slices, blocks;  // slices of a group; vectors of channels of the largest slice

    Partition(const Sizes &all, const Threads &threads) : sizes(all) {
        const int64_t vectors = (all.group_channels() + LANES - 1) / LANES;
        slices = slices_for(threads, all.batch * all.groups);
        if (slices > vectors) slices = vectors;
        blocks = (vectors + slices - 1) / slices;
    }
    int64_t tasks() const { return sizes.batch * sizes.groups * slices; }
    Part part(int64_t task) const {
        const int64_t slice = task % slices, group = task / slices % sizes.groups, k = sizes.group_channels();
        const int64_t first = slice * blocks * LANES, last = first + blocks * LANES;
        return {task / slices / sizes.groups, group, group * k + (first < k ? first : k),
                group * k + (last < k ? last : k)};
    }
};

// The states of one direction's task: A' and h as (block, n, LANES), the largest |A'| of each channel, B and C of a
// chunk, staging space.
struct Workspace {
    float *A, *h, *B, *C, *largest;
    Staged staged;

    static int64_t floats(const Sizes &sizes, int64_t blocks) {
        const int64_t projected = sizes.states * (CHUNK > LANES ? CHUNK : LANES);
        return (2 * sizes.states + 1) * blocks * LANES + 2 * projected + (3 * CHUNK + 1) * LANES;
    }
    Workspace(float *memory, const Sizes &sizes, int64_t blocks) {
        const int64_t projected = sizes.states * (CHUNK > LANES ? CHUNK : LANES);
        A = memory;
        h = A + blocks * sizes.states * LANES;
        B = h + blocks * sizes.states * LANES;
        C = B + projected;
        staged.dt = C + projected;
        staged.weighted = staged.dt + CHUNK * LANES;
        staged.y = staged.weighted + CHUNK * LANES;
        staged.reach = staged.y + CHUNK * LANES;
        largest = staged.reach + LANES;
    }
};

// What a scan writes, beside y: the last state (b, d, n) and the states before each chunk (b, chunks, s, g, n, k).
struct Kept {
    float *last, *borders;
};

// Run one direction of one task.
//
// `source` offers: constant_b(), constant_c(); begin(part, spare) with memory of its own; A(d) the n rates of a channel, contiguous;
//     stage_projections(part, start, tokens, B, C) for varying ones, or constants(d, lanes, B, C) for constant ones;
//     stage(part, d, lanes, start, tokens, staged).
// `finish(part, d, lanes, start, tokens, y)` takes the (tokens, LANES) outputs, in the order of the direction.
template <class Source, class Finish>
void scan_part(Source &source, const Sizes &sizes, const Part &part, int64_t direction, const Workspace &work,
               const Kept &kept, float *spare, const Finish &finish) {
    const int64_t n = sizes.states, k = sizes.group_channels(), chunks = (sizes.length + CHUNK - 1) / CHUNK;
    const bool constant_b = source.constant_b(), constant_c = source.constant_c();
    const Sweep bounded = sweep_for<true>(constant_b, constant_c), full = sweep_for<false>(constant_b, constant_c);
    source.begin(part, spare);
    for (int64_t d = part.first, block = 0; d < part.last; d += LANES, ++block) {
        const int lanes = static_cast<int>(part.last - d < LANES ? part.last - d : LANES);
        Vec largest = broadcast(0.0f);
        for (int64_t j = 0; j < n; ++j) {
            const Vec rates = source.rates(load_lanes(source.A(d) + j, n, lanes)) * broadcast(LOG2_E);
            store(work.A + (block * n + j) * LANES, rates);
            store(work.h + (block * n + j) * LANES, broadcast(0.0f));
            largest = larger(largest, magnitude(rates));
        }
        store(work.largest + block * LANES, largest);
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t start = chunk * CHUNK;
        const int64_t tokens = sizes.length - start < CHUNK ? sizes.length - start : CHUNK;
        source.stage_projections(part, start, tokens, constant_b ? nullptr : work.B, constant_c ? nullptr : work.C);
        for (int64_t d = part.first, block = 0; d < part.last; d += LANES, ++block) {
            const int lanes = static_cast<int>(part.last - d < LANES ? part.last - d : LANES);
            float *h = work.h + block * n * LANES;
            if (kept.borders) {
                const int64_t border = ((part.batch * chunks + chunk) * sizes.directions + direction) * sizes.groups;
                float *before = kept.borders + (border + part.group) * n * k + d - part.group * k;
                for (int64_t j = 0; j < n; ++j) store_lanes(before + j * k, 1, lanes, load(h + j * LANES));
            }
            source.constants(d, lanes, constant_b ? work.B : nullptr, constant_c ? work.C : nullptr);
            source.stage(part, d, lanes, start, tokens, work.staged);
            const Sweep run = is_bounded(work.staged, work.largest + block * LANES) ? bounded : full;
            run(work.staged, tokens, n, work.B, work.C, work.A + block * n * LANES, h);
            finish(part, d, lanes, start, tokens, work.staged.y);
        }
    }
    if (kept.last == nullptr || direction != 0) return;
    for (int64_t d = part.first, block = 0; d < part.last; d += LANES, ++block) {
        const int lanes = static_cast<int>(part.last - d < LANES ? part.last - d : LANES);
        for (int64_t j = 0; j < n; ++j) {
            float *state = kept.last + (part.batch * sizes.channels + d) * n + j;
            store_lanes(state, n, lanes, load(work.h + (block * n + j) * LANES));
        }
    }
}

// The gate, the output, and the sum over directions: the first direction writes, the last one adds, scales and gates.
template <class T>
struct Output {
    Sequence<T> out;
    Sequence<const T> z;   // data may be null: no gate
    Sequence<float> sum;   // where directions meet; the same memory as `out` where that is in fp32
    int64_t length, directions;
    float scale;

    // `reverse`: the tokens of y run from the end.
    void take(const Part &part, int64_t direction, bool reverse, int64_t d, int lanes, int64_t start, int64_t tokens,
              const float *y) const {
        const bool dense = lanes == LANES && out.channel == 1 && sum.channel == 1 && (!z.data || z.channel == 1);
        if (dense) {
            take_rows<true>(part, direction, reverse, d, lanes, start, tokens, y);
        } else {
            take_rows<false>(part, direction, reverse, d, lanes, start, tokens, y);
        }
    }

    template <bool DENSE>
    void take_rows(const Part &part, int64_t direction, bool reverse, int64_t d, int lanes, int64_t start,
                   int64_t tokens, const float *y) const {
        const int64_t t = reverse ? length - 1 - start : start, way = reverse ? -1 : 1;
        float *partial = sum.at(part.batch, d, t);
        const int64_t partial_step = way * sum.token, partial_lane = sum.channel;
        const bool add = direction != 0;
        if (direction != directions - 1) {
            for (int64_t i = 0; i < tokens; ++i, partial += partial_step, y += LANES) {
                const Vec value = load(y);
                const float *before = partial;
                store_row<DENSE>(partial, partial_lane, lanes,
                                 add ? value + load_row<DENSE>(before, partial_lane, lanes) : value);
            }
            return;
        }
        T *to = out.at(part.batch, d, t);
        const T *gate = z.data ? z.at(part.batch, d, t) : nullptr;
        const int64_t to_step = way * out.token, to_lane = out.channel, gate_step = way * z.token, gate_lane = z.channel;
        const Vec factor = broadcast(scale);
        for (int64_t i = 0; i < tokens; ++i, partial += partial_step, to += to_step, y += LANES) {
            Vec value = load(y);
            if (add) value = value + load_row<DENSE>(static_cast<const float *>(partial), partial_lane, lanes);
            if (gate) {
                value = value * silu(load_row<DENSE>(gate, gate_lane, lanes));
                gate += gate_step;
            }
            store_row<DENSE>(to, to_lane, lanes, value * factor);
        }
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
    bool softplus_steps, reverse;
    int64_t states, length;

    bool constant_b() const { return fixed_b; }
    bool constant_c() const { return fixed_c; }
    void begin(const Part &, float *) {}
    int64_t spare(int64_t) const { return 0; }
    const float *A(int64_t d) const { return rates_of + d * states; }
    Vec rates(Vec stored) const { return stored; }

    void stage_projection(const T *data, const int64_t *strides, const Part &part, int64_t start, int64_t tokens,
                          float *out) const {
        const T *from = data + part.batch * strides[0] + part.group * strides[1];
        for (int64_t i = 0; i < tokens; ++i) {
            const int64_t t = reverse ? length - 1 - (start + i) : start + i;
            for (int64_t j = 0; j < states; ++j) out[i * states + j] = to_float(from[j * strides[2] + t * strides[3]]);
        }
    }
    void stage_projections(const Part &part, int64_t start, int64_t tokens, float *B, float *C) const {
        if (B) stage_projection(B_data, B_strides, part, start, tokens, B);
        if (C) stage_projection(C_data, C_strides, part, start, tokens, C);
    }
    void constants(int64_t d, int lanes, float *B, float *C) const {
        for (int64_t j = 0; j < states; ++j) {
            if (B) store(B + j * LANES, load_lanes(B_data + d * B_strides[0] + j * B_strides[2], B_strides[0], lanes));
            if (C) store(C + j * LANES, load_lanes(C_data + d * C_strides[0] + j * C_strides[2], C_strides[0], lanes));
        }
    }
    void stage(const Part &part, int64_t d, int lanes, int64_t start, int64_t tokens, const Staged &staged) const {
        if (lanes == LANES && u.channel == 1 && delta.channel == 1) {
            stage_rows<true>(part, d, lanes, start, tokens, staged);
        } else {
            stage_rows<false>(part, d, lanes, start, tokens, staged);
        }
    }

    template <bool DENSE>
    void stage_rows(const Part &part, int64_t d, int lanes, int64_t start, int64_t tokens, Staged to) const {
        const Vec shift = bias ? load_lanes(bias + d, 1, lanes) : broadcast(0.0f);
        const Vec skip = D ? load_lanes(D + d, 1, lanes) : broadcast(0.0f);
        const int64_t t = reverse ? length - 1 - start : start, way = reverse ? -1 : 1;
        const T *x = u.at(part.batch, d, t), *step = delta.at(part.batch, d, t);
        const int64_t x_step = way * u.token, x_lane = u.channel, step_step = way * delta.token;
        const int64_t step_lane = delta.channel;
        const bool positive = softplus_steps, skips = D != nullptr;
        Vec reach = broadcast(0.0f);
        for (int64_t i = 0; i < tokens; ++i, x += x_step, step += step_step) {
            const Vec value = load_row<DENSE>(x, x_lane, lanes);
            Vec dt = load_row<DENSE>(step, step_lane, lanes) + shift;
            if (positive) dt = softplus(dt);
            reach = larger(reach, magnitude(dt));
            store(to.dt + i * LANES, dt);
            store(to.weighted + i * LANES, dt * value);
            store(to.y + i * LANES, skips ? skip * value : broadcast(0.0f));
        }
        store(to.reach, reach);
    }
};

// Run all directions of a scan: `sources` has one for each, and each may use `spare(blocks)` floats a thread.
template <class T, class Source>
int scan(Source *sources, const Sizes &sizes, const Output<T> &output, const Kept &kept, const Threads &threads) {
    const Partition partition(sizes, threads);
    const int64_t used = Workspace::floats(sizes, partition.blocks);
    const int64_t floats = (used + sources[0].spare(partition.blocks) + 15) / 16 * 16;
    const Memory memory(floats * threads.count);
    if (memory.data() == nullptr) return OUT_OF_MEMORY;
    for_each_task(threads, partition.tasks(), [&](int64_t task, int64_t worker) {
        const Part part = partition.part(task);
        float *own = memory.data() + worker * floats;
        const Workspace work(own, sizes, partition.blocks);
        for (int64_t s = 0; s < sizes.directions; ++s) {
            Source source = sources[s];
            const bool reverse = source.reverse;
            scan_part(source, sizes, part, s, work, kept, own + used,
                      [&](const Part &p, int64_t d, int lanes, int64_t start, int64_t tokens, const float *y) {
                          output.take(p, s, reverse, d, lanes, start, tokens, y);
                      });
        }
    });
    return OK;
}
