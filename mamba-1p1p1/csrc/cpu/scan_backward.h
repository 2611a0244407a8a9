// The gradients of the selective scan, one direction or the two of a bidirectional block. Included once per instruction
// set, after scan.h.
//
//     g[t] = C[t] dy[t] + decay[t+1] g[t+1],  dy = dout * silu(z)         q[t] = g[t] decay[t] h[t-1]
//     dB[t] = sum over channels of dt[t] u[t] g[t]                        dC[t] = sum over channels of dy[t] h[t]
//     du[t] = dt[t] <B[t], g[t]> + D dy[t]                                dA = sum over t of dt[t] q[t]
//     ddt[t] = u[t] <B[t], g[t]> + <A, q[t]>                              dz[t] = dout[t] silu'(z[t]) y[t]
//
// Chunks come from the last to the first. The states of one, for a few n at a time, are computed again from the kept
// state before it and stay in the first cache, like everything else of LANES channels and a chunk.
//
// Sums over tokens are sums of the chunks' sums, which keep more digits. How the work is cut does not depend on the
// number of threads, and neither do the sums, to the last bit.

constexpr int64_t BACKWARD_CHANNELS = 64;  // of a task; a multiple of every LANES

// What one direction stages for a vector of channels and a chunk: (CHUNK, LANES) each.
struct Slopes {
    static constexpr int64_t COUNT = 9;
    float *dt, *rise, *u, *weighted;  // ddelta = rise * ddt: the derivative of the softplus
    float *dy, *slope, *y;            // dz = slope * y
    float *through_input, *through_decay;
    float *reach;  // (LANES,), as of `Staged`

    explicit Slopes(Cursor &memory) {
        float **const all[COUNT] = {&dt, &rise, &u, &weighted, &dy, &slope, &y, &through_input, &through_decay};
        for (float **each : all) *each = memory.take(CHUNK * LANES);
        reach = memory.take(LANES);
    }
};

// Add the sums over lanes of COUNT vectors, times `weight`, to the numbers at `to`.
template <int COUNT>
inline void add_lanes(float *to, const float *from, Vec weight = broadcast(1.0f)) {
    const auto term = [=](int j) ALWAYS_INLINE { return load(from + j * LANES) * weight; };
    if (COUNT == 4) return add_sums(to, term(0), term(1), term(2), term(3));
    for (int j = 0; j < COUNT; ++j) to[j] += sum(term(j));
}

// A chunk's B or C and its gradient: (CHUNK, n) if it varies, (n, LANES) if it is constant; likewise below.
struct Projection {
    const float *value;
    float *gradient;
};

// Sweep COUNT states from `before`, (n, LANES), to the end of the chunk and back.
//
// `A`, `carry` and `dA` are (n, LANES): the rates A', the gradient of the state after the chunk, which becomes that of
// the state before it, and the sums over all chunks.
template <int COUNT, bool CONSTANT_B, bool CONSTANT_C, bool BOUNDED>
void sweep_back_tile(const Slopes at, int64_t tokens, int64_t states, Projection B, Projection C, const float *A,
                     const float *before, float *carry, float *dA) {
    alignas(64) float factors[CHUNK * COUNT * LANES], h[(CHUNK + 1) * COUNT * LANES];
    const auto b = [=](int64_t t, int j) ALWAYS_INLINE {
        return CONSTANT_B ? load(B.value + j * LANES) : broadcast(B.value[t * states + j]);
    };
    const auto c = [=](int64_t t, int j) ALWAYS_INLINE {
        return CONSTANT_C ? load(C.value + j * LANES) : broadcast(C.value[t * states + j]);
    };
    Vec s[COUNT], total[COUNT];
    for (int j = 0; j < COUNT; ++j) {
        decays<COUNT, BOUNDED>(at.dt, tokens, load(A + j * LANES), factors + j * LANES);
        s[j] = load(before + j * LANES);
        store(h + j * LANES, s[j]);
        if (CONSTANT_C) total[j] = broadcast(0.0f);
    }
    for (int64_t t = 0; t < tokens; ++t) {
        const Vec x = load(at.weighted + t * LANES), dy = load(at.dy + t * LANES);
        Vec y = load(at.y + t * LANES);
        for (int j = 0; j < COUNT; ++j) {
            s[j] = fma(load(factors + (t * COUNT + j) * LANES), s[j], x * b(t, j));
            store(h + ((t + 1) * COUNT + j) * LANES, s[j]);
            y = fma(s[j], c(t, j), y);
            if (CONSTANT_C) total[j] = fma(s[j], dy, total[j]);
        }
        store(at.y + t * LANES, y);
    }
    Vec g[COUNT], rates[COUNT];
    for (int j = 0; j < COUNT; ++j) {
        if (CONSTANT_C) add_to(C.gradient + j * LANES, total[j]);
        if (CONSTANT_B) total[j] = broadcast(0.0f);
        g[j] = load(carry + j * LANES);
        rates[j] = broadcast(0.0f);
    }
    for (int64_t t = tokens - 1; t >= 0; --t) {
        const Vec x = load(at.weighted + t * LANES), dy = load(at.dy + t * LANES), dt = load(at.dt + t * LANES);
        Vec input = load(at.through_input + t * LANES), decay = load(at.through_decay + t * LANES);
        for (int j = 0; j < COUNT; ++j) {
            g[j] = fma(dy, c(t, j), g[j]);
            input = fma(g[j], b(t, j), input);
            float *factor = factors + (t * COUNT + j) * LANES;
            const Vec behind = g[j];
            g[j] = behind * load(factor);
            if (CONSTANT_B) total[j] = fma(behind, x, total[j]);
            else store(factor, behind * x);
            const Vec q = g[j] * load(h + (t * COUNT + j) * LANES);
            rates[j] = fma(q, dt, rates[j]);
            decay = fma(q, load(A + j * LANES), decay);
        }
        store(at.through_input + t * LANES, input);
        store(at.through_decay + t * LANES, decay);
    }
    for (int j = 0; j < COUNT; ++j) {
        if (CONSTANT_B) add_to(B.gradient + j * LANES, total[j]);
        store(carry + j * LANES, g[j]);
        add_to(dA + j * LANES, rates[j]);
    }
    // Sums across lanes take long: here one does not wait for the other.
    if (!CONSTANT_B) {
        for (int64_t t = 0; t < tokens; ++t) add_lanes<COUNT>(B.gradient + t * states, factors + t * COUNT * LANES);
    }
    if (CONSTANT_C) return;
    for (int64_t t = 0; t < tokens; ++t) {
        add_lanes<COUNT>(C.gradient + t * states, h + (t + 1) * COUNT * LANES, load(at.dy + t * LANES));
    }
}

template <bool CONSTANT_B, bool CONSTANT_C>
void sweep_back(const Slopes &at, int64_t tokens, int64_t states, Projection B, Projection C, const float *A,
                const float *before, float *carry, float *dA) {
    const auto from = [](Projection p, int64_t first) -> Projection { return {p.value + first, p.gradient + first}; };
    int64_t n = 0;
    const auto some = [&](auto count) {
        constexpr int COUNT = decltype(count)::value;
        const int64_t first = n * LANES;
        const auto tile = bounded<COUNT>(A + first, at.reach) ? sweep_back_tile<COUNT, CONSTANT_B, CONSTANT_C, true>
                                                              : sweep_back_tile<COUNT, CONSTANT_B, CONSTANT_C, false>;
        tile(at, tokens, states, from(B, CONSTANT_B ? first : n), from(C, CONSTANT_C ? first : n), A + first,
             before + first, carry + first, dA + first);
        n += COUNT;
    };
    while (n + TILE <= states) some(Count<TILE>());
    while (n < states) some(Count<1>());
}

using SweepBack = void (*)(const Slopes &, int64_t, int64_t, Projection, Projection, const float *, const float *,
                           float *, float *);

inline SweepBack sweep_back_for(bool constant_b, bool constant_c) {
    if (constant_b) return constant_c ? sweep_back<true, true> : sweep_back<true, false>;
    return constant_c ? sweep_back<false, true> : sweep_back<false, false>;
}

// What the gradients of one direction's arguments are written to.
template <class T>
struct Gradients {
    Sequence<T> u, delta;
    float *B, *C;  // of varying ones: (b, g, l, n), n contiguous, a distance `row` apart along l, `outer` along (b, g)
    int64_t row, outer;
    bool adds;          // to the gradient of u that is there; without a gate
    float *parameters;  // A, then constant B and constant C, (d, n) each, then D and delta_bias, (d,) each
};

// What arrives from behind a scan: the gradients of its output and, for one direction, of its last state (b, d, n), or
// null; and what the scan kept.
template <class T>
struct Incoming {
    Sequence<const T> out;
    Sequence<const T> z;  // data may be null: no gate
    const float *last, *states;
    float scale;  // what the output was multiplied with
};

// The memory of a worker, for `blocks` vectors of channels.
struct BackwardWork {
    Slopes at;
    float *A, *carry, *dA, *before;                      // (block, n, LANES) each; `before` of one block
    float *B, *C, *B_gradient, *C_gradient;              // gradients of constant ones (block, n, LANES)
    float *D_gradient, *bias_gradient;                   // (block, LANES)
    float *y;                                            // (block, l, LANES) of the first of two directions
    float *low_rank;                                     // (block, rank, LANES)
    int64_t floats;

    BackwardWork(Cursor memory, const Sizes &sizes, int64_t blocks, bool keeps_y, int64_t rank) : at(memory) {
        const int64_t all = blocks * sizes.states * LANES, chunk = sizes.states * CHUNK, one = sizes.states * LANES;
        A = memory.take(all);
        carry = memory.take(all);
        dA = memory.take(all);
        before = memory.take(one);
        B = memory.take(chunk > one ? chunk : one);
        C = memory.take(chunk > one ? chunk : one);
        B_gradient = memory.take(chunk > all ? chunk : all);
        C_gradient = memory.take(chunk > all ? chunk : all);
        D_gradient = memory.take(blocks * LANES);
        bias_gradient = memory.take(blocks * LANES);
        y = memory.take(keeps_y ? blocks * sizes.length * LANES : 0);
        low_rank = memory.take(blocks * rank * LANES);
        floats = memory.used;
    }
};

// One direction of one task, its arguments and where its parts of the sums go.
template <class T>
struct BackwardPart {
    const Given<T> &given;
    const Gradients<T> &to;
    const Incoming<T> &in;
    const Sequence<T> &dz;
    const Sizes &sizes;
    const Part &part;
    const BackwardWork &work;
    int64_t direction;
    float *B_part, *C_part;  // (l, n) of varying ones
    float *record;           // like Gradients::parameters

    int64_t block_of(int64_t d) const { return (d - part.first) / LANES; }
    int64_t token(int64_t t) const { return given.route.token(t); }

    template <class S>
    void read(const Sequence<S> &from, int64_t d, int lanes, int64_t start, int64_t tokens, float *tile) const {
        given.route.pieces(start, tokens, [&](int64_t first, int64_t t, int64_t step, int64_t count) {
            gather(from.at(part.batch, d, t), from.channel, step * from.token, lanes, count, tile + first * LANES);
        });
    }
    void write(const Sequence<T> &out, int64_t d, int lanes, int64_t start, int64_t tokens, const float *tile) const {
        given.route.pieces(start, tokens, [&](int64_t first, int64_t t, int64_t step, int64_t count) {
            scatter(tile + first * LANES, lanes, count, out.at(part.batch, d, t), out.channel, step * out.token);
        });
    }

    void prepare() const {
        const int64_t n = sizes.states, whole = (part.last - part.first + LANES - 1) / LANES * LANES;
        const auto clear = [](float *p, int64_t floats) { memset(p, 0, static_cast<size_t>(floats) * sizeof(float)); };
        clear(work.dA, whole * n);
        clear(work.carry, whole * n);
        clear(work.D_gradient, whole);
        clear(work.bias_gradient, whole);
        if (given.fixed_b) clear(work.B_gradient, whole * n);
        if (given.fixed_c) clear(work.C_gradient, whole * n);
        if (given.low_rank.weight) given.low_rank.pack(part, work.low_rank);
        for (int64_t d = part.first; d < part.last; d += LANES) {
            const int lanes = lanes_at(d, part.last);
            float *A = work.A + (d - part.first) * n;
            gather(given.A(d), n, 1, lanes, n, A);
            for (int64_t j = 0; j < n; ++j) store(A + j * LANES, load(A + j * LANES) * broadcast(LOG2_E));
            if (in.last == nullptr || direction != 0) continue;
            gather(in.last + (part.batch * sizes.channels + d) * n, n, 1, lanes, n, work.carry + (d - part.first) * n);
        }
    }

    void stage(int64_t d, int lanes, int64_t start, int64_t tokens) const {
        const Slopes &at = work.at;
        const Vec shift = given.bias ? load_lanes(given.bias + d, 1, lanes) : broadcast(0.0f);
        Vec reach = broadcast(0.0f);
        read(given.u, d, lanes, start, tokens, at.u);
        if (given.low_rank.weight) {
            const float *packed = work.low_rank + (d - part.first) * given.low_rank.rank;
            given.low_rank.expand(given.delta, given.route, part.batch, packed, start, tokens, at.dt);
        } else {
            read(given.delta, d, lanes, start, tokens, at.dt);
        }
        read(in.out, d, lanes, start, tokens, at.dy);
        if (in.z.data) read(in.z, d, lanes, start, tokens, at.slope);
        in_groups(tokens, [&](int64_t t, auto count) {
            constexpr int n = decltype(count)::value;
            const auto row = [&](float *tile, int i) { return tile + (t + i) * LANES; };
            Vec dt[n], rise[n], z[n], divisors[n];
            for (int i = 0; i < n; ++i) dt[i] = load(row(at.dt, i)) + shift;
            if (given.softplus_steps) {
                softplus_and_slope_each<n>(dt, rise);
                for (int i = 0; i < n; ++i) store(row(at.rise, i), rise[i]);
            }
            for (int i = 0; i < n; ++i) {
                const Vec x = load(row(at.u, i));
                reach = larger_bits(reach, magnitude(dt[i]));
                store(row(at.dt, i), dt[i]);
                store(row(at.weighted, i), dt[i] * x);
                store(row(at.y, i), broadcast(0.0f));
                store(row(at.through_input, i), broadcast(0.0f));
                store(row(at.through_decay, i), broadcast(0.0f));
                store(row(at.dy, i), load(row(at.dy, i)) * broadcast(in.scale));
            }
            if (in.z.data == nullptr) return;
            for (int i = 0; i < n; ++i) z[i] = load(row(at.slope, i));
            one_plus_exp_each<n>(z, divisors);
            for (int i = 0; i < n; ++i) {
                const Vec one = broadcast(1.0f), open = one / divisors[i], dout = load(row(at.dy, i));
                store(row(at.dy, i), dout * (z[i] * open));
                store(row(at.slope, i), dout * (open * fma(z[i], one - open, one)));
            }
        });
        store(at.reach, reach);
    }

    void finish(int64_t d, int lanes, int64_t start, int64_t tokens) const {
        const Slopes &at = work.at;
        const Vec skip = given.D ? load_lanes(given.D + d, 1, lanes) : broadcast(0.0f);
        float *D_sum = work.D_gradient + d - part.first, *bias_sum = work.bias_gradient + d - part.first;
        Vec skips = broadcast(0.0f), shifts = broadcast(0.0f);
        for (int64_t t = 0; t < tokens; ++t) {
            float *input_row = at.through_input + t * LANES, *decay_row = at.through_decay + t * LANES;
            const Vec input = load(input_row), u = load(at.u + t * LANES), dy = load(at.dy + t * LANES);
            Vec ddt = fma(input, u, load(decay_row) * broadcast(1.0f / LOG2_E));
            if (given.softplus_steps) ddt = ddt * load(at.rise + t * LANES);
            store(input_row, fma(input, load(at.dt + t * LANES), skip * dy));
            store(decay_row, ddt);
            skips = fma(u, dy, skips);
            shifts = shifts + ddt;
        }
        add_to(D_sum, skips);
        add_to(bias_sum, shifts);
        if (to.adds) {
            read(to.u, d, lanes, start, tokens, at.y);
            for (int64_t t = 0; t < tokens; ++t) add_to(at.through_input + t * LANES, load(at.y + t * LANES));
        }
        write(to.u, d, lanes, start, tokens, at.through_input);
        write(to.delta, d, lanes, start, tokens, at.through_decay);
        if (in.z.data) finish_gate(d, lanes, start, tokens);
    }

    // The gate was applied to the sum of all directions: the last one, which comes second, finds the others' y.
    void finish_gate(int64_t d, int lanes, int64_t start, int64_t tokens) const {
        const Slopes &at = work.at;
        const Vec skip = given.D ? load_lanes(given.D + d, 1, lanes) : broadcast(0.0f);
        for (int64_t t = 0; t < tokens; ++t) add_to(at.y + t * LANES, skip * load(at.u + t * LANES));
        float *others = work.y + block_of(d) * sizes.length * LANES;
        if (direction < sizes.directions - 1) {
            for (int64_t t = 0; t < tokens; ++t) store(others + token(start + t) * LANES, load(at.y + t * LANES));
            return;
        }
        for (int64_t t = 0; t < tokens; ++t) {
            Vec y = load(at.y + t * LANES);
            if (direction) y = y + load(others + token(start + t) * LANES);
            store(at.y + t * LANES, load(at.slope + t * LANES) * y);
        }
        write(dz, d, lanes, start, tokens, at.y);
    }

    void run() const {
        const int64_t n = sizes.states, k = sizes.group_channels();
        const SweepBack sweep = sweep_back_for(given.fixed_b, given.fixed_c);
        prepare();
        for (int64_t chunk = sizes.chunks() - 1; chunk >= 0; --chunk) {
            const int64_t start = chunk * CHUNK, left = sizes.length - start, tokens = left < CHUNK ? left : CHUNK;
            given.stage_projections(part, start, tokens, given.fixed_b ? nullptr : work.B,
                                    given.fixed_c ? nullptr : work.C);
            const size_t rows = static_cast<size_t>(tokens * n) * sizeof(float);
            if (!given.fixed_b) memset(work.B_gradient, 0, rows);
            if (!given.fixed_c) memset(work.C_gradient, 0, rows);
            const int64_t border = (part.batch * sizes.chunks() + chunk) * sizes.directions + direction;
            const float *kept = in.states + (border * sizes.groups + part.group) * n * k;
            for (int64_t d = part.first; d < part.last; d += LANES) {
                const int lanes = lanes_at(d, part.last);
                const int64_t first = (d - part.first) * n;
                gather(kept + d - part.group * k, 1, k, lanes, n, work.before);
                given.constants(d, lanes, given.fixed_b ? work.B : nullptr, given.fixed_c ? work.C : nullptr);
                stage(d, lanes, start, tokens);
                sweep(work.at, tokens, n, {work.B, work.B_gradient + (given.fixed_b ? first : 0)},
                      {work.C, work.C_gradient + (given.fixed_c ? first : 0)}, work.A + first, work.before,
                      work.carry + first, work.dA + first);
                finish(d, lanes, start, tokens);
            }
            for (int64_t t = 0; t < tokens; ++t) {
                const int64_t to_row = token(start + t) * n;
                const size_t row = static_cast<size_t>(n) * sizeof(float);
                if (B_part) memcpy(B_part + to_row, work.B_gradient + t * n, row);
                if (C_part) memcpy(C_part + to_row, work.C_gradient + t * n, row);
            }
        }
        record_parameters();
    }

    void record_parameters() const {
        const int64_t n = sizes.states;
        for (int64_t d = part.first; d < part.last; d += LANES) {
            const int lanes = lanes_at(d, part.last);
            const int64_t first = (d - part.first) * n, all = sizes.channels * n;
            float *p = record;
            scatter(work.dA + first, lanes, n, p + d * n, n, 1);
            p += all;
            if (given.fixed_b) {
                scatter(work.B_gradient + first, lanes, n, p + d * n, n, 1);
                p += all;
            }
            if (given.fixed_c) {
                scatter(work.C_gradient + first, lanes, n, p + d * n, n, 1);
                p += all;
            }
            store_lanes(p + d, 1, lanes, load(work.D_gradient + d - part.first));
            store_lanes(p + sizes.channels + d, 1, lanes, load(work.bias_gradient + d - part.first));
        }
    }
};

// out[i] = the sum of `count` numbers at p[i], p[i + step], ..., in this order; `rows` times.
inline void sum_parts(const float *p, int64_t step, int64_t count, int64_t rows, int64_t size, float *out,
                      int64_t out_row) {
    for (int64_t row = 0; row < rows; ++row, p += size, out += out_row) {
        for (int64_t i = 0; i < size; ++i) out[i] = p[i];
        for (int64_t part = 1; part < count; ++part) {
            for (int64_t i = 0; i < size; ++i) out[i] += p[part * step + i];
        }
    }
}

// `given` and `to` have one entry for each direction.
template <class T>
int scan_backward(const Given<T> *given, const Gradients<T> *to, const Sizes &sizes, const Incoming<T> &in,
                  const Sequence<T> &dz, const Threads &threads) {
    const int64_t k = sizes.group_channels();
    const Partition partition(sizes, sizes.batch, (k + BACKWARD_CHANNELS - 1) / BACKWARD_CHANNELS);
    const bool keeps_y = in.z.data && sizes.directions > 1;
    const int64_t rank = given[0].low_rank.rank;  // of all directions
    const int64_t floats = BackwardWork({nullptr}, sizes, partition.blocks, keeps_y, rank).floats;
    const int64_t rows = sizes.length * sizes.states, outer = sizes.batch * sizes.groups;
    const int64_t fixed = 1 + given[0].fixed_b + given[0].fixed_c;
    const int64_t record = sizes.channels * (fixed * sizes.states + 2);
    const int64_t B_floats = given[0].fixed_b ? 0 : rows, C_floats = given[0].fixed_c ? 0 : rows;
    const int64_t of_task = B_floats + C_floats, parts = partition.tasks() * of_task, records = sizes.batch * record;
    const Memory memory(floats * threads.count + sizes.directions * (parts + records));
    if (memory.data() == nullptr) return OUT_OF_MEMORY;
    float *const sums = memory.data() + floats * threads.count;
    const auto parts_of = [&](int64_t s) { return sums + s * (parts + records); };

    for_each_task(threads, partition.tasks(), [&](int64_t task, int64_t worker) {
        const Part part = partition.part(task, 0);
        const BackwardWork work({memory.data() + worker * floats}, sizes, partition.blocks, keeps_y, rank);
        for (int64_t s = 0; s < sizes.directions; ++s) {
            float *B = parts_of(s) + task * of_task, *C = B + B_floats;
            const BackwardPart<T> one{given[s], to[s], in, dz, sizes, part, work, s, B_floats ? B : nullptr,
                                      C_floats ? C : nullptr, parts_of(s) + parts + part.batch * record};
            one.run();
        }
    });
    for_each_task(threads, sizes.directions * (outer + 1), [&](int64_t task, int64_t) {
        const int64_t s = task / (outer + 1), index = task % (outer + 1);
        const float *all = parts_of(s);
        if (index == outer) return sum_parts(all + parts, record, sizes.batch, 1, record, to[s].parameters, record);
        const float *own = all + index * partition.slices * of_task;
        const auto sum = [&](const float *first, float *out) {
            sum_parts(first, of_task, partition.slices, sizes.length, sizes.states, out + index * to[s].outer,
                      to[s].row);
        };
        if (B_floats) sum(own, to[s].B);
        if (C_floats) sum(own + B_floats, to[s].C);
    });
    return OK;
}
