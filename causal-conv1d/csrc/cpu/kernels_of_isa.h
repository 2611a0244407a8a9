// The kernels of one instruction set: included in a namespace of that set, with its SIMD_ macro defined.

#include "simd.h"

#include "tile.h"

#include "conv1d.h"

#include "conv1d_backward.h"

#include "conv1d_update.h"

template <class T>
int conv1d_of(Arguments &a, Threads threads) {
    const Sequence<const T> x = sequence<const T>(a);
    const Sequence<T> out = sequence<T>(a);
    const float *weight = a.pointer<const float>(), *bias = a.pointer<const float>();
    const int64_t batch = a.integer(), channels = a.integer(), length = a.integer(), width = a.integer();
    const bool activate = a.integer() != 0, reverse = a.integer() != 0;
    if (!a.complete()) return WRONG_ARGUMENTS;
    return conv1d_forward(x, out, Taps{weight, bias, width}, batch, channels, length, activate, reverse, threads);
}

int conv1d(Arguments &a) {
    const Threads threads = a.threads();
    return a.integer() == BFLOAT16 ? conv1d_of<bfloat16>(a, threads) : conv1d_of<float>(a, threads);
}

template <class T>
int conv1d_backward_of(Arguments &a, Threads threads) {
    const Sequence<const T> x = sequence<const T>(a), dout = sequence<const T>(a);
    const Sequence<T> dx = sequence<T>(a);
    const float *weight = a.pointer<const float>(), *bias = a.pointer<const float>();
    float *sums = a.pointer<float>();
    const int64_t batch = a.integer(), channels = a.integer(), length = a.integer(), width = a.integer();
    const bool activate = a.integer() != 0, reverse = a.integer() != 0, accumulate = a.integer() != 0;
    if (!a.complete()) return WRONG_ARGUMENTS;
    return conv1d_backward_of_all(x, dout, dx, Taps{weight, bias, width}, sums, batch, channels, length, activate,
                                  reverse, accumulate, threads);
}

int conv1d_backward(Arguments &a) {
    const Threads threads = a.threads();
    return a.integer() == BFLOAT16 ? conv1d_backward_of<bfloat16>(a, threads) : conv1d_backward_of<float>(a, threads);
}

template <class T>
int conv1d_update_of(Arguments &a, Threads threads) {
    const Sequence<const T> x = sequence<const T>(a);
    const Sequence<T> out = sequence<T>(a), state = sequence<T>(a);
    const int64_t *stored = a.pointer<const int64_t>();
    const float *weight = a.pointer<const float>(), *bias = a.pointer<const float>();
    const int64_t batch = a.integer(), channels = a.integer(), length = a.integer(), width = a.integer();
    const int64_t size = a.integer();
    const bool activate = a.integer() != 0;
    if (!a.complete() || size < width - 1) return WRONG_ARGUMENTS;
    return conv1d_update_of_all(x, out, state, stored, Taps{weight, bias, width}, batch, channels, length, size,
                                activate, threads);
}

int conv1d_update(Arguments &a) {
    const Threads threads = a.threads();
    return a.integer() == BFLOAT16 ? conv1d_update_of<bfloat16>(a, threads) : conv1d_update_of<float>(a, threads);
}

constexpr Kernels kernels(const char *name) { return {name, conv1d, conv1d_backward, conv1d_update}; }
