// The causal depthwise convolution. Included once per instruction set, after simd.h.
//
//     out[t] = act(bias + sum over k of weight[k] * x[t - (w - 1) + k]),  x before the first token being zero
//
// b batch, d channels, l length, w conv width. A reversed convolution is the same one over a view whose rows run the
// other way, so nothing below knows about direction.

// A tensor (b, d, l) or a tensor's view, with strides in elements.
template <class T>
struct Sequence {
    T *data;
    int64_t batch, channel, token;

    T *at(int64_t b, int64_t d, int64_t t) const { return data + b * batch + d * channel + t * token; }
    // The same elements with the last token first.
    Sequence reversed(int64_t length) const { return {data + (length - 1) * token, batch, channel, -token}; }
};

template <class T>
Sequence<T> sequence(Arguments &a) {
    T *data = a.pointer<T>();
    const int64_t batch = a.integer(), channel = a.integer();
    return {data, batch, channel, a.integer()};
}

struct Taps {
    const float *weight;  // (d, w)
    const float *bias;    // (d,) or null
    int64_t width;
};

// `convolve_block` for the usual width, the last three rows in registers.
template <bool DENSE, class T>
inline void convolve_four(const T *x, int64_t channel, int64_t token, int lanes, const float *packed, Vec bias,
                          bool activate, int64_t start, int64_t stop, float *out, int64_t step) {
    const Vec w0 = load(packed), w1 = load(packed + LANES), w2 = load(packed + 2 * LANES), w3 = load(packed + 3 * LANES);
    const Vec zero = broadcast(0.0f);
    Vec x0 = start > 2 ? load_row<DENSE>(x + (start - 3) * token, channel, lanes) : zero;
    Vec x1 = start > 1 ? load_row<DENSE>(x + (start - 2) * token, channel, lanes) : zero;
    Vec x2 = start > 0 ? load_row<DENSE>(x + (start - 1) * token, channel, lanes) : zero;
    x += start * token;
    for (int64_t t = start; t < stop; ++t, x += token, out += step) {
        const Vec x3 = load_row<DENSE>(x, channel, lanes);
        Vec y = fma(x3, w3, bias);
        y = fma(x2, w2, y);
        y = fma(x1, w1, y);
        y = fma(x0, w0, y);
        store(out, activate ? silu(y) : y);
        x0 = x1;
        x1 = x2;
        x2 = x3;
    }
}

// Convolution and SiLU of up to LANES channels: at out, out + step, ... for tokens start to stop.
//
// `packed` holds the taps of these channels as (w, LANES).
template <class T>
inline void convolve_block(const T *x, int64_t channel, int64_t token, int lanes, const float *packed, Vec bias,
                           int64_t width, bool activate, int64_t start, int64_t stop, float *out, int64_t step) {
    if (width == 4 && lanes == LANES && channel == 1) {
        return convolve_four<true>(x, channel, token, lanes, packed, bias, activate, start, stop, out, step);
    }
    if (width == 4) {
        return convolve_four<false>(x, channel, token, lanes, packed, bias, activate, start, stop, out, step);
    }
    for (int64_t t = start; t < stop; ++t, out += step) {
        Vec y = bias;
        for (int64_t k = width - 1; k >= 0 && t - (width - 1) + k >= 0; --k) {
            y = fma(load_lanes(x + (t - (width - 1) + k) * token, channel, lanes), load(packed + k * LANES), y);
        }
        store(out, activate ? silu(y) : y);
    }
}

// The taps of `lanes` channels from `first` as (w, LANES), zero above.
inline Vec pack_taps(const Taps &taps, int64_t first, int lanes, float *packed) {
    for (int64_t k = 0; k < taps.width; ++k) {
        store(packed + k * LANES, load_lanes(taps.weight + first * taps.width + k, taps.width, lanes));
    }
    return taps.bias ? load_lanes(taps.bias + first, 1, lanes) : broadcast(0.0f);
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
    const Memory scratch(threads.count * (CONV_TOKENS + taps.width) * LANES);
    if (scratch.data() == nullptr) return OUT_OF_MEMORY;
    for_each_task(threads, batch * slices * pieces, [&](int64_t task, int64_t worker) {
        const int64_t piece = task % pieces, slice = task / pieces % slices, b = task / pieces / slices;
        const int64_t begin = piece * length / pieces, end = (piece + 1) * length / pieces;
        const int64_t first = slice * CONV_CHANNELS;
        const int64_t last = first + CONV_CHANNELS < channels ? first + CONV_CHANNELS : channels;
        float *packed = scratch.data() + worker * (CONV_TOKENS + taps.width) * LANES;
        float *tile = packed + taps.width * LANES;
        for (int64_t start = begin; start < end; start += CONV_TOKENS) {
            const int64_t stop = start + CONV_TOKENS < end ? start + CONV_TOKENS : end;
            for (int64_t d = first; d < last; d += LANES) {
                const int lanes = static_cast<int>(last - d < LANES ? last - d : LANES);
                const Vec bias = pack_taps(taps, d, lanes, packed);
                convolve_block(x.at(b, d, 0), x.channel, x.token, lanes, packed, bias, taps.width, activate, start,
                               stop, tile, LANES);
                for (int64_t t = start; t < stop; ++t) {
                    store_lanes(out.at(b, d, t), out.channel, lanes, load(tile + (t - start) * LANES));
                }
            }
        }
    });
    return OK;
}
