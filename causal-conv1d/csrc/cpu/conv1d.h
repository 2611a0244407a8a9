// The causal depthwise convolution. Included once per instruction set, after simd.h.
//
//     out[t] = act(bias + sum over k of weight[k] * x[t - (w - 1) + k]),  x before the first token being zero
//
// b batch, d channels, l length, w conv width. A reversed convolution is the same one over a view whose rows run the
// other way, so nothing below knows about direction.

struct Taps {
    const float *weight;  // (d, w)
    const float *bias;    // (d,) or null
    int64_t width;
};

// Convolution and SiLU of LANES channels: `tokens` rows at out, out + step, ...
//
// `packed` holds the taps of these channels and their bias as (w + 1, LANES), `x` their rows from the first of these
// tokens on; the `before` rows in front of it, w - 1 at most, are read too.
template <int WIDTH>
inline void convolve_known(Rows x, const float *packed, bool activate, int64_t begin, int64_t tokens, float *out,
                           int64_t step) {
    Vec taps[WIDTH];
    for (int k = 0; k < WIDTH; ++k) taps[k] = load(packed + k * LANES);
    const Vec bias = load(packed + WIDTH * LANES);
    in_groups(tokens - begin, [=](int64_t i, auto count) ALWAYS_INLINE {
        constexpr int n = decltype(count)::value;
        const int64_t t = begin + i;
        Vec y[n];
        for (int j = 0; j < n; ++j) {
            y[j] = fma(x[t + j], taps[WIDTH - 1], bias);
            for (int k = WIDTH - 2; k >= 0; --k) y[j] = fma(x[t + j - (WIDTH - 1) + k], taps[k], y[j]);
        }
        if (activate) silu_each<n>(y);
        for (int j = 0; j < n; ++j) store(out + (t + j) * step, y[j]);
    });
}

inline void convolve(Rows x, int64_t before, const float *packed, int64_t width, bool activate, int64_t tokens,
                     float *out, int64_t step) {
    // Tokens that some taps find nothing before; all of them for widths without a loop of their own.
    const int64_t missing = width - 1 - before, some = width == 4 && missing < tokens ? missing : tokens;
    for (int64_t t = 0; t < some; ++t) {
        Vec y = load(packed + width * LANES);
        for (int64_t k = width - 1; k >= 0 && t - (width - 1) + k >= -before; --k) {
            y = fma(x[t - (width - 1) + k], load(packed + k * LANES), y);
        }
        store(out + t * step, activate ? silu(y) : y);
    }
    if (width == 4) convolve_known<4>(x, packed, activate, some, tokens, out, step);
}

// `convolve` of tokens start to start + tokens of channels d to d + lanes of a sequence; `tile` has room for
// (w - 1 + tokens, LANES).
template <class T>
inline void convolve_span(const Sequence<const T> &x, int64_t b, int64_t d, int lanes, int64_t start, int64_t tokens,
                          const float *packed, int64_t width, bool activate, float *tile, float *out, int64_t step) {
    const int64_t before = start < width - 1 ? start : width - 1;
    Rows rows = rows_of(x.at(b, d, start - before), x.channel, x.token, lanes, before + tokens, tile);
    rows.data += before * rows.step;
    convolve(rows, before, packed, width, activate, tokens, out, step);
}

// The taps of `lanes` channels from `first`, then their bias, as (w + 1, LANES), zero above.
inline void pack_taps(const Taps &taps, int64_t first, int lanes, float *packed) {
    gather(taps.weight + first * taps.width, taps.width, 1, lanes, taps.width, packed);
    store(packed + taps.width * LANES, taps.bias ? load_lanes(taps.bias + first, 1, lanes) : broadcast(0.0f));
}

constexpr int64_t CONV_TOKENS = 64;   // tokens that a block of channels takes at a time
constexpr int64_t CONV_CHANNELS = 64; // channels of a task: whole cache lines

template <class T>
int conv1d_forward(Sequence<const T> x, Sequence<T> out, Taps taps, int64_t batch, int64_t channels, int64_t length,
                   bool activate, bool reverse, Threads threads) {
    if (reverse) {
        x = x.reversed(length);
        out = out.reversed(length);
    }
    const int64_t slices = (channels + CONV_CHANNELS - 1) / CONV_CHANNELS;
    // Sequences are cut, too: a task reads the w - 1 tokens before its own again.
    const int64_t pieces = length > 4096 ? (length + 2047) / 2048 : 1;
    const int64_t floats = (2 * CONV_TOKENS + 2 * taps.width + 1) * LANES;
    const Memory scratch(threads.count * floats);
    if (scratch.data() == nullptr) return OUT_OF_MEMORY;
    for_each_task(threads, batch * slices * pieces, [&](int64_t task, int64_t worker) {
        const int64_t piece = task % pieces, slice = task / pieces % slices, b = task / pieces / slices;
        const int64_t begin = piece * length / pieces, end = (piece + 1) * length / pieces;
        const int64_t first = slice * CONV_CHANNELS;
        const int64_t last = first + CONV_CHANNELS < channels ? first + CONV_CHANNELS : channels;
        float *packed = scratch.data() + worker * floats;
        float *tile = packed + (taps.width + 1) * LANES, *result = tile + (CONV_TOKENS + taps.width) * LANES;
        for (int64_t start = begin; start < end; start += CONV_TOKENS) {
            const int64_t tokens = end - start < CONV_TOKENS ? end - start : CONV_TOKENS;
            for (int64_t d = first; d < last; d += LANES) {
                const int lanes = static_cast<int>(last - d < LANES ? last - d : LANES);
                pack_taps(taps, d, lanes, packed);
                const Target<T> target{out.at(b, d, start), out.channel, out.token, lanes, result};
                convolve_span(x, b, d, lanes, start, tokens, packed, taps.width, activate, tile, target.rows(),
                              target.step());
                target.written(tokens);
            }
        }
    });
    return OK;
}
