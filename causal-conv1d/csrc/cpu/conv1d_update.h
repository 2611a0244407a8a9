// The causal depthwise convolution of new tokens behind those kept in a state, which takes them in. Included once per
// instruction set, after conv1d.h.
//
// b batch, d channels, l new tokens, s tokens of the state, w conv width, s >= w - 1

// `stored`: for each sequence how many tokens its state, a circular buffer, took in so far; null for a state that holds
// the last s tokens in order.
template <class T>
int conv1d_update_of_all(const Sequence<const T> &x, const Sequence<T> &out, const Sequence<T> &state,
                         const int64_t *stored, const Taps &taps, int64_t batch, int64_t channels, int64_t length,
                         int64_t size, bool activate, const Threads &threads) {
    const int64_t blocks = (channels + LANES - 1) / LANES, packed_floats = (taps.width + 1) * LANES;
    const int64_t floats = (packed_floats + (size + 2 * length) * LANES + 15) / 16 * 16;
    const Memory memory(threads.count * floats);
    if (memory.data() == nullptr) return OUT_OF_MEMORY;
    for_each_task(threads, batch * blocks, [&](int64_t task, int64_t worker) {
        const int64_t b = task / blocks, d = task % blocks * LANES;
        const int lanes = static_cast<int>(channels - d < LANES ? channels - d : LANES);
        float *packed = memory.data() + worker * floats;
        float *window = packed + packed_floats, *fresh = window + size * LANES, *result = fresh + length * LANES;
        pack_taps(taps, d, lanes, packed);
        // The window holds the state from its oldest token on, then the new tokens.
        const int64_t oldest = stored && size ? stored[b] % size : 0;
        gather(state.at(b, d, oldest), state.channel, state.token, lanes, size - oldest, window);
        gather(state.at(b, d, 0), state.channel, state.token, lanes, oldest, window + (size - oldest) * LANES);
        gather(x.at(b, d, 0), x.channel, x.token, lanes, length, fresh);
        convolve(Rows{fresh, LANES}, taps.width - 1, packed, taps.width, activate, length, result, LANES);
        scatter(result, lanes, length, out.at(b, d, 0), out.channel, out.token);
        const int64_t next = stored && size ? (stored[b] + length) % size : 0;
        const float *kept = window + length * LANES;
        scatter(kept, lanes, size - next, state.at(b, d, next), state.channel, state.token);
        scatter(kept + (size - next) * LANES, lanes, next, state.at(b, d, 0), state.channel, state.token);
    });
    return OK;
}
