// The gradients of the causal depthwise convolution. Included once per instruction set, after conv1d.h.
//
//     g[t] = dout[t] * act'(y[t]),   y the convolution before its activation, computed again
//     dx[t] = sum over k of weight[k] * g[t + (w - 1) - k]
//     dweight[k] = sum over t of g[t] * x[t - (w - 1) + k],   dbias = sum over t of g[t]
//
// Tokens come from the last to the first, some at a time: dx reads the w - 1 rows of g behind its own, which the turn
// before left. How the work is cut, and with it every sum, does not depend on the number of threads.

constexpr int64_t CONV_PIECE = 2048;  // tokens of a task in a long sequence

// What a worker needs for the channels of a task, `w` being the width of the convolution.
struct ConvBackwardWork {
    float *packed, *sums, *behind;  // a block each: (w + 1, LANES), (w + 1, LANES), (w - 1, LANES)
    float *x, *y, *g;               // (w - 1 + tokens, LANES), (tokens, LANES), (tokens + w - 1, LANES)
    int64_t floats;

    ConvBackwardWork(Cursor memory, int64_t width) {
        constexpr int64_t blocks = CONV_CHANNELS / LANES;
        packed = memory.take(blocks * (width + 1) * LANES);
        sums = memory.take(blocks * (width + 1) * LANES);
        behind = memory.take(blocks * width * LANES);
        x = memory.take((CONV_TOKENS + width) * LANES);
        y = memory.take(CONV_TOKENS * LANES);
        g = memory.take((CONV_TOKENS + width) * LANES);
        floats = memory.used;
    }
};

// One task: channels first to last of a picture, and some of its tokens.
template <class T>
struct ConvBackward {
    const Sequence<const T> &x, &dout;
    const Sequence<T> &dx;
    int64_t width, length;
    bool activate, accumulate;
    const ConvBackwardWork &work;
    int64_t b, first, last;

    int lanes(int64_t d) const { return static_cast<int>(last - d < LANES ? last - d : LANES); }

    // g of some tokens of a block, at work.g; returns the rows of x that it read, from the first token on.
    Rows slopes(int64_t d, int64_t start, int64_t tokens) const {
        const float *packed = work.packed + (d - first) * (width + 1);
        const int64_t before = start < width - 1 ? start : width - 1;
        Rows rows = rows_of(x.at(b, d, start - before), x.channel, x.token, lanes(d), before + tokens, work.x);
        rows.data += before * rows.step;
        gather(dout.at(b, d, start), dout.channel, dout.token, lanes(d), tokens, work.g);
        if (!activate) return rows;
        convolve(rows, before, packed, width, false, tokens, work.y, LANES);
        in_groups(tokens, [&](int64_t t, auto count) {
            constexpr int n = decltype(count)::value;
            Vec y[n], divisors[n];
            for (int i = 0; i < n; ++i) y[i] = load(work.y + (t + i) * LANES);
            one_plus_exp_each<n>(y, divisors);
            for (int i = 0; i < n; ++i) {
                const Vec one = broadcast(1.0f), open = one / divisors[i];
                float *g = work.g + (t + i) * LANES;
                store(g, load(g) * (open * fma(y[i], one - open, one)));
            }
        });
        return rows;
    }

    // WIDTH 0: any.
    template <int WIDTH>
    void correlate(Rows before, const float *packed, int64_t tokens, float *to, int64_t step) const {
        const int64_t taps = WIDTH ? WIDTH : width;
        for (int64_t t = 0; t < tokens; ++t) {
            Vec sum = before[t];
            for (int64_t k = 0; k < taps; ++k) {
                sum = fma(load(work.g + (t + taps - 1 - k) * LANES), load(packed + k * LANES), sum);
            }
            store(to + t * step, sum);
        }
    }

    // dx from work.g and the w - 1 rows behind it. Overwrites work.x.
    void write_dx(int64_t d, int64_t start, int64_t tokens) const {
        const float *packed = work.packed + (d - first) * (width + 1);
        const Target<T> target{dx.at(b, d, start), dx.channel, dx.token, lanes(d), work.y};
        Rows before{work.x, 0};
        if (accumulate) before = rows_of(dx.at(b, d, start), dx.channel, dx.token, lanes(d), tokens, work.x);
        else store(work.x, broadcast(0.0f));
        if (width == 4) correlate<4>(before, packed, tokens, target.rows(), target.step());
        else correlate<0>(before, packed, tokens, target.rows(), target.step());
        target.written(tokens);
    }

    // COUNT sums from the tap `first` on, of tokens whose rows of x are all there.
    template <int COUNT>
    void add_sums_from(int64_t first_tap, int64_t begin, int64_t tokens, Rows rows, float *sums) const {
        Vec total[2 * COUNT];
        for (Vec &each : total) each = broadcast(0.0f);
        int64_t t = begin;
        for (; t + 2 <= tokens; t += 2) {
            const Vec g = load(work.g + t * LANES), next = load(work.g + (t + 1) * LANES);
            for (int k = 0; k < COUNT; ++k) {
                const int64_t from = t + first_tap + k - (width - 1);
                total[2 * k] = fma(g, rows[from], total[2 * k]);
                total[2 * k + 1] = fma(next, rows[from + 1], total[2 * k + 1]);
            }
        }
        for (; t < tokens; ++t) {
            const Vec g = load(work.g + t * LANES);
            for (int k = 0; k < COUNT; ++k) total[2 * k] = fma(g, rows[t + first_tap + k - (width - 1)], total[2 * k]);
        }
        for (int k = 0; k < COUNT; ++k) {
            float *to = sums + (first_tap + k) * LANES;
            store(to, load(to) + (total[2 * k] + total[2 * k + 1]));
        }
    }

    void add_sums_of(int64_t d, int64_t start, int64_t tokens, Rows rows) const {
        float *sums = work.sums + (d - first) * (width + 1), *bias = sums + width * LANES;
        Vec total = broadcast(0.0f);
        for (int64_t t = 0; t < tokens; ++t) total = total + load(work.g + t * LANES);
        store(bias, load(bias) + total);
        if (width == 4 && start >= width - 1) return add_sums_from<4>(0, 0, tokens, rows, sums);
        for (int64_t k = 0; k < width; ++k) {
            const int64_t early = width - 1 - k - start, missing = early < 0 ? 0 : early;  // x before the first is zero
            if (missing < tokens) add_sums_from<1>(k, missing, tokens, rows, sums);
        }
    }

    // Tokens begin to end; the sums are added up in work.sums.
    void run(const Taps &taps, int64_t begin, int64_t end) const {
        const size_t row = static_cast<size_t>(LANES) * sizeof(float), history = static_cast<size_t>(width - 1) * row;
        const int64_t after = length - end < width - 1 ? length - end : width - 1;
        for (int64_t d = first; d < last; d += LANES) {
            pack_taps(taps, d, lanes(d), work.packed + (d - first) * (width + 1));
            float *behind = work.behind + (d - first) * width;
            memset(behind, 0, history);
            for (int64_t done = 0; done < after; done += CONV_TOKENS) {
                const int64_t left = after - done, tokens = left < CONV_TOKENS ? left : CONV_TOKENS;
                slopes(d, end + done, tokens);
                memcpy(behind + done * LANES, work.g, static_cast<size_t>(tokens) * row);
            }
        }
        for (int64_t stop = end; stop > begin; stop -= CONV_TOKENS) {
            const int64_t tokens = stop - begin < CONV_TOKENS ? stop - begin : CONV_TOKENS, start = stop - tokens;
            for (int64_t d = first; d < last; d += LANES) {
                float *behind = work.behind + (d - first) * width;
                const Rows rows = slopes(d, start, tokens);
                memcpy(work.g + tokens * LANES, behind, history);
                add_sums_of(d, start, tokens, rows);
                write_dx(d, start, tokens);
                memcpy(behind, work.g, history);
            }
        }
    }
};

// `sums`: (d, w + 1), the gradients of the taps and of the bias. `accumulate`: add to what dx holds.
template <class T>
int conv1d_backward_of_all(Sequence<const T> x, Sequence<const T> dout, Sequence<T> dx, const Taps &taps, float *sums,
                           int64_t batch, int64_t channels, int64_t length, bool activate, bool reverse,
                           bool accumulate, const Threads &threads) {
    if (reverse) {
        x = x.reversed(length);
        dout = dout.reversed(length);
        dx = dx.reversed(length);
    }
    const int64_t slices = (channels + CONV_CHANNELS - 1) / CONV_CHANNELS, record = taps.width + 1;
    const int64_t pieces = length > 2 * CONV_PIECE ? (length + CONV_PIECE - 1) / CONV_PIECE : 1;
    const int64_t floats = ConvBackwardWork({nullptr}, taps.width).floats, parts = batch * pieces;
    const Memory memory(threads.count * floats + parts * channels * record);
    if (memory.data() == nullptr) return OUT_OF_MEMORY;
    float *const all = memory.data() + threads.count * floats;
    for_each_task(threads, parts * slices, [&](int64_t task, int64_t worker) {
        const int64_t part = task / slices, first = task % slices * CONV_CHANNELS;
        const int64_t last = first + CONV_CHANNELS < channels ? first + CONV_CHANNELS : channels;
        const ConvBackwardWork work({memory.data() + worker * floats}, taps.width);
        const int64_t piece = part % pieces, b = part / pieces;
        const ConvBackward<T> one{x, dout, dx, taps.width, length, activate, accumulate, work, b, first, last};
        memset(work.sums, 0, static_cast<size_t>(CONV_CHANNELS * record) * sizeof(float));
        one.run(taps, piece * length / pieces, (piece + 1) * length / pieces);
        for (int64_t d = first; d < last; d += LANES) {
            scatter(work.sums + (d - first) * record, one.lanes(d), record, all + (part * channels + d) * record,
                    record, 1);
        }
    });
    memcpy(sums, all, static_cast<size_t>(channels * record) * sizeof(float));
    for (int64_t part = 1; part < parts; ++part) {
        const float *own = all + part * channels * record;
        for (int64_t i = 0; i < channels * record; ++i) sums[i] += own[i];
    }
    return OK;
}
