// One or several new columns after the history in a state, which takes them in: a thread for each channel of a sequence.
//
//     b batch, d channels, l new columns, s columns of the state, w conv width
#pragma once

#include "platform.cuh"

namespace conv1d {

constexpr int UPDATE_THREADS = 64;

struct UpdateParameters {
    Sequence x, out, state;
    const int* stored;  // (b,), how many columns the circular buffer of each sequence took in; null: a sliding window
    const float* weight;
    const float* bias;
    int batch, channels, length, width, size;
    bool silu;

    dim3 grid() const { return dim3((channels + UPDATE_THREADS - 1) / UPDATE_THREADS, batch); }
};

// value mod size, for values that may be negative.
__device__ inline int wrapped(int64_t value, int size) {
    const int rest = static_cast<int>(value % size);
    return rest < 0 ? rest + size : rest;
}

__global__ void __launch_bounds__(UPDATE_THREADS) update(const __grid_constant__ UpdateParameters p) {
    const int d = blockIdx.x * UPDATE_THREADS + threadIdx.x, b = blockIdx.y;
    if (d >= p.channels) return;
    const bool circular = p.stored != nullptr;
    const int64_t start = circular ? p.stored[b] : p.size;
    const float* taps = p.weight + static_cast<int64_t>(d) * p.width;
    const auto place = [&](int64_t column) { return circular ? wrapped(start + column, p.size) : start + column; };

    for (int column = 0; column < p.length; ++column) {
        float sum = p.bias == nullptr ? 0.0f : p.bias[d];
        for (int k = 0; k < p.width; ++k) {
            const int read = column - (p.width - 1) + k;
            const Sequence& from = read < 0 ? p.state : p.x;
            sum += taps[k] * element_of(from, from.at(b, d, read < 0 ? place(read) : read));
        }
        if (p.silu) sum = silu(sum);
        with_dtype(p.out.data, p.out.element, [&](auto* data) {
            data[p.out.at(b, d, column)] = rounded<std::remove_reference_t<decltype(*data)>>(sum);
        });
    }
    with_dtype(p.state.data, p.state.element, [&](auto* data) {
        using T = std::remove_reference_t<decltype(*data)>;
        if (circular) {  // of more columns than the buffer holds, the last ones stay
            for (int column = max(0, p.length - p.size); column < p.length; ++column)
                data[p.state.at(b, d, place(column))] = rounded<T>(element_of(p.x, p.x.at(b, d, column)));
            return;
        }
        for (int kept = 0; kept < p.size; ++kept) {
            const int from = kept + p.length;
            data[p.state.at(b, d, kept)] = from < p.size
                ? data[p.state.at(b, d, from)]
                : rounded<T>(element_of(p.x, p.x.at(b, d, from - p.size)));
        }
    });
}

}  // namespace conv1d
