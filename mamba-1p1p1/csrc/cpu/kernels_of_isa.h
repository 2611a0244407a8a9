// The kernels of one instruction set: included in a namespace of that set, with its SIMD_ macro defined.

#include "simd.h"

#include "conv1d.h"

#include "scan.h"

#include "inner.h"

template <class T>
Output<T> read_output(Arguments &a, const Sizes &sizes) {
    const Sequence<T> out = sequence<T>(a);
    const Sequence<const T> z = sequence<const T>(a);
    const Sequence<float> sum = sequence<float>(a);
    return {out, z, sum, sizes.length, sizes.directions, static_cast<float>(a.number())};
}

inline Sizes read_sizes(Arguments &a) {
    Sizes sizes;
    sizes.batch = a.integer();
    sizes.channels = a.integer();
    sizes.length = a.integer();
    sizes.states = a.integer();
    sizes.groups = a.integer();
    sizes.directions = a.integer();
    return sizes;
}

template <class T>
void read_projection(Arguments &a, const T *&data, int64_t *strides, bool &constant) {
    data = a.pointer<const T>();
    for (int i = 0; i < 4; ++i) strides[i] = a.integer();
    constant = a.integer() != 0;
}

template <class T>
Given<T> read_given(Arguments &a, const Sizes &sizes) {
    Given<T> given;
    given.u = sequence<const T>(a);
    given.delta = sequence<const T>(a);
    given.rates_of = a.pointer<const float>();
    read_projection(a, given.B_data, given.B_strides, given.fixed_b);
    read_projection(a, given.C_data, given.C_strides, given.fixed_c);
    given.D = a.pointer<const float>();
    given.bias = a.pointer<const float>();
    given.softplus_steps = a.integer() != 0;
    given.reverse = a.integer() != 0;
    given.states = sizes.states;
    given.length = sizes.length;
    return given;
}

constexpr int64_t DIRECTIONS = 2;  // at most

template <class T>
int selective_scan_of(Arguments &a, Threads threads) {
    const Sizes sizes = read_sizes(a);
    const Output<T> output = read_output<T>(a, sizes);
    float *last = a.pointer<float>(), *borders = a.pointer<float>();
    if (sizes.directions > DIRECTIONS) return WRONG_ARGUMENTS;
    Given<T> directions[DIRECTIONS];
    for (int64_t s = 0; s < sizes.directions; ++s) directions[s] = read_given<T>(a, sizes);
    if (!a.complete()) return WRONG_ARGUMENTS;
    return scan(directions, sizes, output, Kept{last, borders}, threads);
}

int selective_scan(Arguments &a) {
    const Threads threads = a.threads();
    return a.integer() == BFLOAT16 ? selective_scan_of<bfloat16>(a, threads) : selective_scan_of<float>(a, threads);
}

template <class T>
Computed<T> read_computed(Arguments &a, const Sizes &sizes, const Sequence<const T> &x, int64_t width, int64_t rank) {
    Computed<T> computed{};
    const float *weight = a.pointer<const float>();
    computed.taps = {weight, a.pointer<const float>(), width};
    computed.x_proj = a.pointer<const float>();
    computed.dt_proj = a.pointer<const float>();
    computed.A_log = a.pointer<const float>();
    computed.D = a.pointer<const float>();
    computed.bias = a.pointer<const float>();
    computed.projected = a.pointer<float>();
    computed.reverse = a.integer() != 0;
    computed.x = computed.reverse ? x.reversed(sizes.length) : x;
    computed.states = sizes.states;
    computed.rank = rank;
    computed.length = sizes.length;
    computed.channels = sizes.channels;
    return computed;
}

template <class T>
int bidirectional_inner_of(Arguments &a, Threads threads) {
    const Sizes sizes = read_sizes(a);
    const Output<T> output = read_output<T>(a, sizes);
    const Sequence<const T> x = sequence<const T>(a);
    const int64_t width = a.integer(), rank = a.integer();
    if (sizes.directions > DIRECTIONS || sizes.groups != 1) return WRONG_ARGUMENTS;
    Computed<T> directions[DIRECTIONS];
    for (int64_t s = 0; s < sizes.directions; ++s) directions[s] = read_computed<T>(a, sizes, x, width, rank);
    if (!a.complete()) return WRONG_ARGUMENTS;
    return bidirectional(directions, sizes, output, threads);
}

int bidirectional_inner(Arguments &a) {
    const Threads threads = a.threads();
    return a.integer() == BFLOAT16 ? bidirectional_inner_of<bfloat16>(a, threads)
                                   : bidirectional_inner_of<float>(a, threads);
}

constexpr Kernels kernels(const char *name) { return {name, selective_scan, bidirectional_inner}; }
