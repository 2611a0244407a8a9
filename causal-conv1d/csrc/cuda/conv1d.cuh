// The causal depthwise convolution, forward and backward.
//
//     b batch, d channels, l length, w conv width, t a token in the order in which a block visits them
//
// A block takes TOKENS tokens of CHANNELS channels. It reads them, and the w - 1 tokens before them, into shared memory
// in the order that suits their layout; from there on every layout is the same. `reverse` visits tokens from the last.
#pragma once

#include "platform.cuh"

namespace conv1d {

constexpr int THREADS = 128;
constexpr int CHANNELS = 32;
constexpr int TOKENS = 64;
constexpr int MAX_WIDTH = 32;  // as in conv1d_cuda.py
constexpr int ROW = CHANNELS + 1;  // an odd distance keeps the threads of a warp on banks of their own

struct Shape {
    int batch, channels, length, width;
    bool silu, reverse;

    __host__ __device__ int blocks_of_tokens() const { return (length + TOKENS - 1) / TOKENS; }
    dim3 grid() const {
        return dim3((channels + CHANNELS - 1) / CHANNELS * static_cast<unsigned>(blocks_of_tokens()), batch);
    }
    bool fits() const { return width >= 1 && width <= MAX_WIDTH && batch <= MAX_GRID_Y; }
    // This block's tokens.
    __device__ Window window() const {
        const int tiles = (channels + CHANNELS - 1) / CHANNELS;
        const int channel = static_cast<int>(blockIdx.x) % tiles * CHANNELS;
        const int first = static_cast<int>(blockIdx.x) / tiles * TOKENS;
        Window window;
        window.thread = threadIdx.x;
        window.batch = blockIdx.y;
        window.channel = channel;
        window.channels = min(CHANNELS, channels - channel);
        window.first = first;
        window.count = min(TOKENS, length - first);
        window.length = length;
        window.reverse = reverse;
        return window;
    }
};

// The `history` tokens before a block's, of which the first block has none, and those behind it.
__device__ inline Window before(Window window, int history) {
    window.count = window.first == 0 ? 0 : history;
    window.first -= history;
    return window;
}
__device__ inline Window behind(Window window, int history) {
    window.first += TOKENS;
    window.count = max(0, min(history, window.length - window.first));
    return window;
}

using Own = Windows<THREADS, TOKENS, CHANNELS>;
template <int WIDTH>
using Halo = Windows<THREADS, WIDTH ? 4 : MAX_WIDTH, CHANNELS>;

struct Inputs {
    Shape shape;
    Sequence x;
    const float* weight;    // (d, w)
    const float* bias;      // (d,) or null
    const int* documents;   // (b, l) or null: a tap counts only where its token has the index of the output's

    explicit Inputs(Arguments& arguments);
};

struct Parameters : Inputs {
    using Inputs::Inputs;
    Sequence out;
};

struct BackwardParameters : Inputs {
    using Inputs::Inputs;
    Sequence dout, dx;
    float* sums;  // (b, blocks of tokens, d, w + 1), filled with the shares in the gradients of the taps and the bias
};

// Taps and biases of the channels of a window.
struct Taps {
    float weight[MAX_WIDTH][CHANNELS];
    float bias[CHANNELS];

    __device__ void read(const Shape& shape, const Window& window, const float* weights, const float* biases) {
        for (int index = threadIdx.x; index < window.channels * shape.width; index += THREADS) {
            const int c = index / shape.width, k = index - c * shape.width;
            weight[k][c] = weights[static_cast<int64_t>(window.channel) * shape.width + index];
        }
        for (int c = threadIdx.x; c < window.channels; c += THREADS)
            bias[c] = biases == nullptr ? 0.0f : biases[window.channel + c];
    }
};

// Whether the tokens visited at `one` and `other` belong to the same document.
__device__ inline bool together(const int* documents, const Window& window, int one, int other) {
    if (documents == nullptr) return true;
    const int* own = documents + static_cast<int64_t>(window.batch) * window.length;
    return own[window.position(one)] == own[window.position(other)];
}

// The sum over the taps of the token visited at `visited`, whose own column is columns[row].
template <int ROWS>
__device__ inline float convolve(const float (&columns)[ROWS][ROW], const Taps& taps, int width, const Window& window,
                                 const int* documents, int row, int visited, int c) {
    float sum = taps.bias[c];
#pragma unroll
    for (int back = 0; back < width; ++back)
        if (visited >= back && together(documents, window, visited, visited - back))
            sum += taps.weight[width - 1 - back][c] * columns[row - back][c];
    return sum;
}

// WIDTH is the width if the compiler knows it, else 0.
template <int WIDTH>
__global__ void __launch_bounds__(THREADS) forward(const __grid_constant__ Parameters p) {
    __shared__ float columns[TOKENS + (WIDTH ? WIDTH : MAX_WIDTH) - 1][ROW];
    __shared__ Taps taps;
    const int width = WIDTH ? WIDTH : p.shape.width, history = width - 1;
    const Window own = p.shape.window();
    taps.read(p.shape, own, p.weight, p.bias);
    Own::read(p.x, own, [&](int t, int c, float value) { columns[history + t][c] = value; });
    Halo<WIDTH>::read(p.x, before(own, history), [&](int t, int c, float value) { columns[t][c] = value; });
    __syncthreads();
    Own::write(p.out, own, [&](int t, int c) {
        const float sum = convolve(columns, taps, width, own, p.documents, t + history, own.first + t, c);
        return p.shape.silu ? silu(sum) : sum;
    });
}

// The gradient of a causal correlation is the same correlation, run the other way; that of a tap is a sum over tokens.
template <int WIDTH>
__global__ void __launch_bounds__(THREADS) backward(const __grid_constant__ BackwardParameters p) {
    constexpr int HISTORY = (WIDTH ? WIDTH : MAX_WIDTH) - 1;
    __shared__ float columns[TOKENS + 2 * HISTORY][ROW];  // from `history` tokens before to `history` behind
    __shared__ float slopes[TOKENS + HISTORY][ROW];       // of the sums of the taps, from the first token on
    __shared__ Taps taps;
    const int width = WIDTH ? WIDTH : p.shape.width, history = width - 1;
    const Window own = p.shape.window(), ahead = behind(own, history);
    taps.read(p.shape, own, p.weight, p.bias);
    Own::read(p.x, own, [&](int t, int c, float value) { columns[history + t][c] = value; });
    Halo<WIDTH>::read(p.x, before(own, history), [&](int t, int c, float value) { columns[t][c] = value; });
    Halo<WIDTH>::read(p.x, ahead, [&](int t, int c, float value) { columns[history + TOKENS + t][c] = value; });
    __syncthreads();
    const auto take = [&](int t, int c, float value) {
        if (p.shape.silu)
            value *= silu_slope(convolve(columns, taps, width, own, p.documents, t + history, own.first + t, c));
        slopes[t][c] = value;
    };
    Own::read(p.dout, own, take);
    Halo<WIDTH>::read(p.dout, ahead, [&](int t, int c, float value) { take(TOKENS + t, c, value); });
    __syncthreads();
    Own::write(p.dx, own, [&](int t, int c) {
        const int visited = own.first + t;
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < width; ++k)
            if (visited + k < p.shape.length && together(p.documents, own, visited, visited + k))
                sum += taps.weight[width - 1 - k][c] * slopes[t + k][c];
        return sum;
    });
    // A thread sums one tap, or the bias, of one channel: in an order of its own that never changes.
    for (int index = threadIdx.x; index < own.channels * (width + 1); index += THREADS) {
        const int c = index % own.channels, tap = index / own.channels, back = width - 1 - tap;
        float sum = 0.0f;
        for (int t = 0; t < own.count; ++t) {
            const int visited = own.first + t;
            if (tap == width)
                sum += slopes[t][c];
            else if (visited >= back && together(p.documents, own, visited, visited - back))
                sum += slopes[t][c] * columns[t + history - back][c];
        }
        const int64_t block = static_cast<int64_t>(own.batch) * p.shape.blocks_of_tokens() + own.first / TOKENS;
        p.sums[(block * p.shape.channels + own.channel + c) * (width + 1) + tap] = sum;
    }
}

}  // namespace conv1d
