// What the kernels of both packages share: the arguments of a call, sequences of any layout and dtype, sums over lanes.
//
//     b batch, d channels, l length, t a token in the order in which a kernel visits them
//
// Nothing here knows torch. On a machine without a GPU, tests compile these files with a C++ compiler and headers of
// their own in the place of CUDA's (tests/native/emulated).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#define EXPORT extern "C" __attribute__((visibility("default")))

// --- a call ---------------------------------------------------------------------------------------------------------

constexpr int64_t ABI = 1;               // as in backend/cuda.py
constexpr int WRONG_ARGUMENTS = 1;       // what a call returns: 0, this, or this number and an error of CUDA
constexpr int CUDA_FAILED = 1000;

enum class Element : int { fp32 = 0, bf16 = 1, fp16 = 2 };

// A tensor (b, d, l) of any strides, counted in elements; data is null if it was not given.
struct Sequence {
    void* data;
    int64_t batch, channel, step;
    Element element;

    __device__ int64_t at(int64_t b, int64_t d, int64_t l) const { return b * batch + d * channel + l * step; }
};

// Reads the arguments of a call one by one.
class Arguments {
public:
    Arguments(const int64_t* values, int64_t count) : next_(values), end_(values + count) {}

    int64_t integer() {
        if (next_ == end_) {
            complete_ = false;
            return 0;
        }
        return *next_++;
    }
    int size() { return static_cast<int>(integer()); }
    bool flag() { return integer() != 0; }
    template <class T>
    T* pointer() {
        return reinterpret_cast<T*>(integer());
    }
    Sequence sequence() {
        Sequence made;
        made.data = pointer<void>();
        made.batch = integer();
        made.channel = integer();
        made.step = integer();
        made.element = static_cast<Element>(integer());
        return made;
    }
    // Whether there were as many as were read.
    bool complete() const { return complete_ && next_ == end_; }

private:
    const int64_t* next_;
    const int64_t* end_;
    bool complete_ = true;
};

struct Launch {
    int device;
    cudaStream_t stream;

    explicit Launch(Arguments& arguments) {
        device = arguments.size();
        stream = arguments.pointer<CUstream_st>();
    }

    // Run a kernel on the grid; what a call returns.
    template <class Kernel, class Parameters>
    int run(Kernel* kernel, dim3 grid, unsigned threads, const Parameters& parameters) const {
        int current = device;  // as the caller made it; another copy of CUDA's runtime, in torch, should tell this one
        cudaError_t error = cudaGetDevice(&current);
        if (error == cudaSuccess && current != device) error = cudaSetDevice(device);
        if (error == cudaSuccess) {
            cudaLaunchConfig_t config = {};
            config.gridDim = grid;
            config.blockDim = dim3(threads);
            config.stream = stream;
            error = cudaLaunchKernelEx(&config, kernel, parameters);
        }
        if (error == cudaSuccess) return 0;
        cudaGetLastError();  // or later calls would find it
        return CUDA_FAILED + static_cast<int>(error);
    }
};

constexpr int64_t MAX_GRID_Y = 65535;

// What every library says of itself.
#define DESCRIBE_LIBRARY                                                                          \
    EXPORT int64_t cuda_abi() { return ABI; }                                                     \
    EXPORT int64_t cuda_runtime_version() { return CUDART_VERSION; }                              \
    __global__ void probe() {}                                                                    \
    EXPORT int64_t cuda_has_no_code() { /* for the current GPU: 0, or an error */                 \
        cudaFuncAttributes attributes;                                                            \
        const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);                      \
        if (error == cudaSuccess) return 0;                                                       \
        cudaGetLastError();                                                                       \
        return CUDA_FAILED + static_cast<int>(error);                                             \
    }                                                                                             \
    EXPORT int64_t cuda_driver_version() { /* 0 without a driver */                               \
        int version = 0;                                                                          \
        return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;                       \
    }                                                                                             \
    EXPORT const char* cuda_architectures() { return AS_TEXT((__CUDA_ARCH_LIST__)); }             \
    EXPORT const char* cuda_error(int64_t code) {                                                 \
        return cudaGetErrorString(static_cast<cudaError_t>(code - CUDA_FAILED));                  \
    }
#define AS_TEXT(list) AS_TEXT_OF list
#define AS_TEXT_OF(...) #__VA_ARGS__

// --- elements -------------------------------------------------------------------------------------------------------

__device__ inline float widened(float value) { return value; }
__device__ inline float widened(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widened(__half value) { return __half2float(value); }

template <class T>
__device__ inline T rounded(float value);
template <>
__device__ inline float rounded<float>(float value) {
    return value;
}
template <>
__device__ inline __nv_bfloat16 rounded<__nv_bfloat16>(float value) {
    return __float2bfloat16(value);
}
template <>
__device__ inline __half rounded<__half>(float value) {
    return __float2half(value);
}

// Call work(T*) with the data in its dtype. All threads take the same branch.
template <class Work>
__device__ __forceinline__ void with_dtype(void* data, Element element, Work work) {
    switch (element) {
        case Element::fp32: work(static_cast<float*>(data)); break;
        case Element::bf16: work(static_cast<__nv_bfloat16*>(data)); break;
        case Element::fp16: work(static_cast<__half*>(data)); break;
    }
}

// 2^x to 2 units in the last place; results below 2^-126 are zero.
__device__ inline float exp2_of(float x) {
#ifdef __CUDA_ARCH__
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return exp2f(x);
#endif
}

// e^x and 1 / x, likewise to a few units in the last place: what x log2(e) loses in rounding is given back. Beyond
// [e^-150, e^88] the result stays that of the bound; NaN stays NaN.
__device__ inline float exp_of(float x) {
    constexpr float LOG2_E = 1.44269504f, REST = 1.92596303e-8f, LN_2 = 0.69314718f;
    x = x < -150.0f ? -150.0f : x > 88.0f ? 88.0f : x;
    const float exponent = x * LOG2_E, lost = fmaf(x, LOG2_E, -exponent) + x * REST, e = exp2_of(exponent);
    return fmaf(e, lost * LN_2, e);
}
__device__ inline float reciprocal(float x) { return __fdividef(1.0f, x); }

// log(1 + e^x), x itself above 20. With e = e^-|x| it is max(x, 0) + 2 atanh(e / (2 + e)), whose series keeps all digits
// of small results.
__device__ inline float softplus(float x) {
    const float e = exp_of(-fabsf(x)), s = e * reciprocal(2.0f + e), q = s * s;
    float series = 1.0f / 9 + q * (1.0f / 11 + q * (1.0f / 13 + q * (1.0f / 15)));
    series = 1.0f + q * (1.0f / 3 + q * (1.0f / 5 + q * (1.0f / 7 + q * series)));
    return x > 20.0f ? x : fmaxf(x, 0.0f) + 2.0f * s * series;
}

__device__ inline float sigmoid(float x) { return reciprocal(1.0f + exp_of(-x)); }
__device__ inline float silu(float x) { return x * sigmoid(x); }
__device__ inline float silu_slope(float x) {
    const float s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}

// --- tiles ----------------------------------------------------------------------------------------------------------

// Where a kernel is: `count` tokens from `first` on, in visiting order, and `channels` channels from `channel` on; all of
// them exist.
struct Window {
    int thread;  // of the block
    int batch, channel, channels, first, count, length;
    bool reverse;

    __device__ int64_t position(int t) const { return reverse ? length - 1 - t : t; }
};

// Windows of up to TOKENS tokens and CHANNELS channels, both powers of two. A thread takes EACH elements, which lie
// `stride` apart in memory, so that it finds its place once and has the loads of BATCH elements under way at a time.
// Neighbouring threads take neighbours in memory.
template <int THREADS, int TOKENS, int CHANNELS>
class Windows {
public:
    // Read a window into store(t, c, value), in fp32.
    template <class Store>
    __device__ __forceinline__ static void read(const Sequence& sequence, const Window& window, Store store) {
        const Walk walk(sequence, window);
#pragma unroll 1
        for (int first = 0; first < EACH; first += BATCH) {
            float values[BATCH] = {};
            with_dtype(sequence.data, sequence.element, [&](auto* data) {
                auto* from = data + walk.at + first * walk.stride;
                std::remove_reference_t<decltype(*data)> raw[BATCH] = {};
#pragma unroll
                for (int i = 0; i < BATCH; ++i)
                    if (first + i < walk.count) raw[i] = from[i * walk.stride];
#pragma unroll
                for (int i = 0; i < BATCH; ++i) values[i] = widened(raw[i]);
            });
#pragma unroll
            for (int i = 0; i < BATCH; ++i)
                if (first + i < walk.count)
                    store(walk.t + (first + i) * walk.tokens, walk.c + (first + i) * walk.channels, values[i]);
        }
    }

    // Write value(t, c) to a window.
    template <class Value>
    __device__ __forceinline__ static void write(const Sequence& sequence, const Window& window, Value value) {
        const Walk walk(sequence, window);
#pragma unroll 1
        for (int first = 0; first < EACH; first += BATCH) {
            float values[BATCH] = {};
#pragma unroll
            for (int i = 0; i < BATCH; ++i)
                if (first + i < walk.count)
                    values[i] = value(walk.t + (first + i) * walk.tokens, walk.c + (first + i) * walk.channels);
            with_dtype(sequence.data, sequence.element, [&](auto* data) {
                auto* to = data + walk.at + first * walk.stride;
#pragma unroll
                for (int i = 0; i < BATCH; ++i)
                    if (first + i < walk.count)
                        to[i * walk.stride] = rounded<std::remove_reference_t<decltype(*data)>>(values[i]);
            });
        }
    }

private:
    static constexpr int EACH = TOKENS * CHANNELS / THREADS, BATCH = EACH < 8 ? EACH : 8;
    static_assert(TOKENS * CHANNELS % THREADS == 0 && EACH % BATCH == 0, "the threads share a window evenly");

    // The elements of a thread: the first token and channel, and the steps from one to the next.
    struct Walk {
        int t, c, tokens, channels, count;
        int64_t at, stride;

        __device__ __forceinline__ Walk(const Sequence& sequence, const Window& window) {
            const bool along_tokens = sequence.step == 1 || sequence.step == -1;
            const int64_t step = window.reverse ? -sequence.step : sequence.step;
            const int width = along_tokens ? TOKENS : CHANNELS;  // threads beside each other
            const int beside = window.thread % width, below = window.thread / width, next = THREADS / width;
            t = along_tokens ? beside : below;
            c = along_tokens ? below : beside;
            tokens = along_tokens ? 0 : next;
            channels = along_tokens ? next : 0;
            const int left = along_tokens ? window.channels - c : window.count - t;
            const bool inside = along_tokens ? t < window.count : c < window.channels;
            count = inside && left > 0 ? (left + next - 1) / next : 0;
            at = sequence.at(window.batch, window.channel + c, window.position(window.first + t));
            stride = along_tokens ? next * sequence.channel : next * step;
        }
    };
};

// The element of a sequence in fp32, where it is not read as a window.
__device__ inline float element_of(const Sequence& sequence, int64_t at) {
    float value = 0;
    with_dtype(sequence.data, sequence.element, [&](auto* data) { value = widened(data[at]); });
    return value;
}

// --- sums over lanes ------------------------------------------------------------------------------------------------

constexpr unsigned ALL_LANES = 0xffffffffu;

// Sum COUNT values over LANES lanes of a warp that are STRIDE apart. The sums are spread over the lanes: values[k], for
// k < KEPT, is that of the value `returned + k`. Lanes beyond COUNT hold copies; `is_first_copy` is one lane of each.
// A tree that halves what a lane carries: 7 exchanges for 8 values over 8 lanes, where one by one they take 24.
template <int COUNT, int LANES, int STRIDE>
struct ScatteredSum {
    static constexpr int KEPT = COUNT > LANES ? COUNT / LANES : 1;

    __device__ static int run(float (&values)[COUNT], int lane) {
        int first = 0;
        halve<COUNT, LANES>(values, lane, first);
        return first;
    }
    __device__ static bool is_first_copy(int lane) {
        return LANES <= COUNT || (lane / STRIDE) % LANES < COUNT;
    }

private:
    // The lowest bits of the lane choose halves, so that the lanes of the first copy are the first ones.
    template <int LEFT, int OVER>
    __device__ static void halve(float (&values)[COUNT], int lane, int& first) {
        if constexpr (OVER > 1) {
            constexpr int distance = STRIDE * (LANES / OVER);
            if constexpr (LEFT > 1) {
                constexpr int half = LEFT / 2;
                const bool upper = lane & distance;
#pragma unroll
                for (int k = 0; k < half; ++k) {
                    const float sent = upper ? values[k] : values[k + half];
                    const float kept = upper ? values[k + half] : values[k];
                    values[k] = kept + __shfl_xor_sync(ALL_LANES, sent, distance);
                }
                if (upper) first += half;
                halve<half, OVER / 2>(values, lane, first);
            } else {
                values[0] += __shfl_xor_sync(ALL_LANES, values[0], distance);
                halve<1, OVER / 2>(values, lane, first);
            }
        }
    }
};
