// The kernels of one instruction set: included in a namespace of that set, with its SIMD_ macro defined.

#include "simd.h"

#include "tile.h"

#include "conv1d.h"

#include "scan.h"

#include "scan_2d.h"

#include "scan_backward.h"

#include "int8.h"

#include "gemm.h"

#include "inner.h"

#include "norm.h"

#include "block.h"

#include "int8_linear.h"

template <class T>
Output<T> read_output(Arguments &a, const Sizes &sizes) {
    const Sequence<T> out = sequence<T>(a);
    const Sequence<const T> z = sequence<const T>(a);
    const Sequence<float> sum = sequence<float>(a);
    return {out, z, sum, sizes.length, static_cast<float>(a.number())};
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
    const bool reverse = a.integer() != 0;
    given.route = {sizes.length, 1, reverse};
    given.low_rank.weight = a.pointer<const float>();
    given.low_rank.rank = a.integer();
    given.states = sizes.states;
    return given;
}

constexpr int64_t ENDS = 2;  // directions of a sequence, at most

inline bool scannable(const Sizes &sizes) {
    return sizes.groups > 0 && sizes.channels >= sizes.groups && sizes.directions <= ENDS;
}

template <class T>
bool of_one_rank(const Given<T> *directions, const Sizes &sizes) {
    for (int64_t s = 1; s < sizes.directions; ++s) {
        if (directions[s].low_rank.rank != directions[0].low_rank.rank) return false;
    }
    return true;
}

template <class T>
int selective_scan_of(Arguments &a, Threads threads) {
    const Sizes sizes = read_sizes(a);
    const Output<T> output = read_output<T>(a, sizes);
    float *last = a.pointer<float>(), *borders = a.pointer<float>();
    if (!scannable(sizes)) return WRONG_ARGUMENTS;
    Given<T> directions[ENDS];
    for (int64_t s = 0; s < sizes.directions; ++s) directions[s] = read_given<T>(a, sizes);
    if (!a.complete() || !of_one_rank(directions, sizes)) return WRONG_ARGUMENTS;
    return scan(directions, sizes, output, Kept{last, borders, nullptr}, threads);
}

int selective_scan(Arguments &a) {
    const Threads threads = a.threads();
    return a.integer() == BFLOAT16 ? selective_scan_of<bfloat16>(a, threads) : selective_scan_of<float>(a, threads);
}

template <class T>
int selective_scan_backward_of(Arguments &a, Threads threads) {
    const Sizes sizes = read_sizes(a);
    Incoming<T> in;
    in.out = sequence<const T>(a);
    in.z = sequence<const T>(a);
    const Sequence<T> dz = sequence<T>(a);
    in.last = a.pointer<const float>();
    in.states = a.pointer<const float>();
    in.scale = static_cast<float>(a.number());
    if (!scannable(sizes)) return WRONG_ARGUMENTS;
    Given<T> directions[ENDS];
    Gradients<T> gradients[ENDS];
    for (int64_t s = 0; s < sizes.directions; ++s) {
        directions[s] = read_given<T>(a, sizes);
        gradients[s].u = sequence<T>(a);
        gradients[s].delta = sequence<T>(a);
        gradients[s].B = a.pointer<float>();
        gradients[s].C = a.pointer<float>();
        gradients[s].row = a.integer();
        gradients[s].outer = a.integer();
        gradients[s].adds = false;
        gradients[s].parameters = a.pointer<float>();
    }
    if (!a.complete() || !of_one_rank(directions, sizes)) return WRONG_ARGUMENTS;
    return scan_backward(directions, gradients, sizes, in, dz, threads);
}

int selective_scan_backward(Arguments &a) {
    const Threads threads = a.threads();
    return a.integer() == BFLOAT16 ? selective_scan_backward_of<bfloat16>(a, threads)
                                   : selective_scan_backward_of<float>(a, threads);
}

// Pictures that four directions scan, each pixel once: all of one length and of one low rank.
struct Pictures {
    static constexpr int64_t DIRECTIONS = 4;
    Sizes sizes;
    Given<float> directions[DIRECTIONS];
    int64_t pixels, across;  // floats of a picture and of a pixel in `projected`: of each direction (r, B, C)

    explicit Pictures(Arguments &a) {
        sizes.batch = a.integer();
        const int64_t height = a.integer();
        sizes.length = height * a.integer();
        sizes.channels = a.integer();
        sizes.states = a.integer();
        sizes.groups = 1;
        sizes.directions = DIRECTIONS;
        const int64_t rank = a.integer(), n = sizes.states, d = sizes.channels, own = rank + 2 * n;
        across = DIRECTIONS * own;
        pixels = sizes.length * across;
        const float *x = a.pointer<const float>(), *projected = a.pointer<const float>();
        const float *weight = a.pointer<const float>(), *rates = a.pointer<const float>();
        const float *skip = a.pointer<const float>(), *bias = a.pointer<const float>();
        for (int64_t s = 0; s < DIRECTIONS; ++s, projected += own) {
            const bool by_columns = a.integer() != 0, reverse = a.integer() != 0;
            Given<float> &to = directions[s];
            to.u = {x, sizes.length * d, 1, d};
            to.delta = {projected, pixels, 1, across};
            to.rates_of = rates + s * d * n;
            to.B_data = projected + rank;
            to.C_data = projected + rank + n;
            const int64_t strides[4] = {pixels, 0, 1, across};
            memcpy(to.B_strides, strides, sizeof strides);
            memcpy(to.C_strides, strides, sizeof strides);
            to.fixed_b = to.fixed_c = false;
            to.D = skip ? skip + s * d : nullptr;
            to.bias = bias ? bias + s * d : nullptr;
            to.softplus_steps = true;
            to.route = {sizes.length, by_columns ? height : 1, reverse};
            to.states = n;
            to.low_rank = {weight + s * d * rank, rank};
        }
    }
    // A low rank of none would be taken for steps that are given as they are.
    bool scannable() const { return sizes.channels > 0 && directions[0].low_rank.rank > 0; }
    template <class T>
    Sequence<T> maps(T *data) const {
        return {data, sizes.length * sizes.channels, 1, sizes.channels};
    }
};

int selective_scan_2d(Arguments &a) {
    const Threads threads = a.threads();
    if (a.integer() != FLOAT32) return WRONG_ARGUMENTS;
    const Pictures pictures(a);
    const Sequence<float> out = pictures.maps(a.pointer<float>());
    float *borders = a.pointer<float>();
    if (!a.complete() || !pictures.scannable()) return WRONG_ARGUMENTS;
    return scan_pictures(pictures.directions, pictures.sizes, out, borders, threads);
}

// The gradients of `projected` are filled but for those of r: the steps' are (4, b, l, d). Those of the parameters of a
// direction are (A, D, bias), as in `Gradients`.
int selective_scan_2d_backward(Arguments &a) {
    const Threads threads = a.threads();
    if (a.integer() != FLOAT32) return WRONG_ARGUMENTS;
    const Pictures pictures(a);
    const Sizes &sizes = pictures.sizes;
    Incoming<float> in{};
    in.out = pictures.maps(a.pointer<const float>());
    in.states = a.pointer<const float>();
    in.scale = 1.0f;
    const Sequence<float> du = pictures.maps(a.pointer<float>());
    float *steps = a.pointer<float>(), *projected = a.pointer<float>(), *parameters = a.pointer<float>();
    if (!a.complete() || !pictures.scannable()) return WRONG_ARGUMENTS;
    Gradients<float> gradients[Pictures::DIRECTIONS];
    const int64_t rank = pictures.directions[0].low_rank.rank, n = sizes.states;
    for (int64_t s = 0; s < sizes.directions; ++s, projected += rank + 2 * n) {
        const Sequence<float> ddelta = pictures.maps(steps + s * sizes.batch * sizes.length * sizes.channels);
        float *own = parameters + s * sizes.channels * (n + 2);
        gradients[s] = {du, ddelta, projected + rank, projected + rank + n, pictures.across, pictures.pixels, s > 0,
                        own};
    }
    return scan_backward(pictures.directions, gradients, sizes, in, Sequence<float>{}, threads);
}

inline Linear read_linear(Arguments &a, int64_t columns, int64_t depth, bool has_bias, const Int8Products *int8) {
    Linear linear{a.pointer<const float>(), nullptr, columns, depth, nullptr};
    if (has_bias) linear.bias = a.pointer<const float>();
    if (int8 == nullptr) return linear;
    linear.int8 = int8;
    linear.scales = a.pointer<const float>();
    linear.step = a.pointer<const float>();
    return linear;
}

template <class T>
Computed<T> read_computed(Arguments &a, const Sizes &sizes, const Sequence<const T> &x, int64_t width, int64_t rank,
                          const Int8Products *int8 = nullptr) {
    Computed<T> computed{};
    const float *weight = a.pointer<const float>();
    computed.taps = {weight, a.pointer<const float>(), width};
    computed.x_proj = read_linear(a, rank + 2 * sizes.states, sizes.channels, false, int8);
    computed.dt_proj = a.pointer<const float>();
    computed.A_log = a.pointer<const float>();
    computed.D = a.pointer<const float>();
    computed.bias = a.pointer<const float>();
    computed.reverse = a.integer() != 0;
    computed.x = computed.reverse ? x.reversed(sizes.length) : x;
    computed.states = sizes.states;
    computed.rank = rank;
    computed.channels = sizes.channels;
    computed.length = sizes.length;
    return computed;
}

template <class T>
int bidirectional_inner_of(Arguments &a, Threads threads) {
    const Sizes sizes = read_sizes(a);
    const Output<T> output = read_output<T>(a, sizes);
    const Sequence<const T> x = sequence<const T>(a);
    const int64_t width = a.integer(), rank = a.integer();
    if (sizes.directions != ENDS || sizes.groups != 1) return WRONG_ARGUMENTS;
    Computed<T> directions[ENDS];
    for (int64_t s = 0; s < sizes.directions; ++s) {
        directions[s] = read_computed<T>(a, sizes, x, width, rank);
        directions[s].kept = a.pointer<float>();
    }
    float *borders = a.pointer<float>();
    if (!a.complete()) return WRONG_ARGUMENTS;
    return bidirectional(directions, sizes, output, borders, threads);
}

int bidirectional_inner(Arguments &a) {
    const Threads threads = a.threads();
    return a.integer() == BFLOAT16 ? bidirectional_inner_of<bfloat16>(a, threads)
                                   : bidirectional_inner_of<float>(a, threads);
}

template <class T, class R>
int read_add_norm(Arguments &a, Threads threads) {
    const T *x = a.pointer<const T>();
    const R *residual = a.pointer<const R>();
    T *y = a.pointer<T>();
    R *stored = a.pointer<R>();
    const float *weight = a.pointer<const float>(), *bias = a.pointer<const float>();
    NormSizes sizes;
    sizes.rows = a.integer();
    sizes.features = a.integer();
    sizes.eps = static_cast<float>(a.number());
    sizes.rms = a.integer() != 0;
    if (!a.complete()) return WRONG_ARGUMENTS;
    return add_norm_of(x, residual, y, stored, weight, bias, sizes, threads);
}

int add_norm(Arguments &a) {
    const Threads threads = a.threads();
    const bool narrow = a.integer() == BFLOAT16, narrow_sum = a.integer() == BFLOAT16;
    if (!narrow) return narrow_sum ? WRONG_ARGUMENTS : read_add_norm<float, float>(a, threads);
    return narrow_sum ? read_add_norm<bfloat16, bfloat16>(a, threads) : read_add_norm<bfloat16, float>(a, threads);
}

int add_norm_backward(Arguments &a) {
    const Threads threads = a.threads();
    if (a.integer() != FLOAT32) return WRONG_ARGUMENTS;
    NormGradients gradients;
    gradients.dy = a.pointer<const float>();
    gradients.s = a.pointer<const float>();
    gradients.ds = a.pointer<const float>();
    gradients.weight = a.pointer<const float>();
    gradients.out = a.pointer<float>();
    gradients.parameters = a.pointer<float>();
    NormSizes sizes;
    sizes.rows = a.integer();
    sizes.features = a.integer();
    sizes.eps = static_cast<float>(a.number());
    sizes.rms = a.integer() != 0;
    if (!a.complete()) return WRONG_ARGUMENTS;
    return gradients.run(sizes, threads);
}

constexpr int64_t BLOCK_ARGUMENTS = 6 + 2 * 8;
constexpr int64_t INT8_ARGUMENTS = 2 * (2 + 2);  // more of a block with weights in int8

// Blocks in turn, on some pictures. `a` stands before the first block's arguments.
inline int run_blocks(Arguments a, Block block, const Sizes &sizes, int64_t width, int64_t rank, int64_t count,
                      const BlockMemory &shared, const Threads &threads) {
    for (int64_t index = 0; index < count; ++index) {
        block.norm_weight = a.pointer<const float>();
        block.norm_bias = a.pointer<const float>();
        block.in = read_linear(a, 2 * sizes.channels, block.norm.features, true, block.in.int8);
        block.to_out = read_linear(a, block.norm.features, sizes.channels, true, block.to_out.int8);
        Computed<float> directions[ENDS];
        const Sequence<const float> none{};  // what the directions read is computed first
        for (int64_t s = 0; s < sizes.directions; ++s) {
            directions[s] = read_computed<float>(a, sizes, none, width, rank, block.in.int8);
        }
        const int code = run_block(block, directions, sizes, shared, threads);
        if (code != OK) return code;
        block.x = block.out;
        block.residual = block.stored;
    }
    return OK;
}

// Pictures enough for all threads are dealt out whole, so that what a thread works on stays in its own cache and no
// thread waits for another; all threads share each of those that are left.
inline int bidirectional_blocks_of(Arguments &a, const Int8Products *int8) {
    const Threads threads = a.threads(), one{nullptr, 1};
    if (a.integer() != FLOAT32) return WRONG_ARGUMENTS;
    const Sizes sizes = read_sizes(a);
    Block block;
    block.x = a.pointer<const float>();
    block.residual = a.pointer<const float>();
    block.out = a.pointer<float>();
    block.stored = a.pointer<float>();
    block.norm.features = a.integer();
    block.norm.eps = static_cast<float>(a.number());
    block.norm.rms = a.integer() != 0;
    block.scale = static_cast<float>(a.number());
    const int64_t width = a.integer(), rank = a.integer(), count = a.integer();
    if (sizes.directions != ENDS || sizes.groups != 1) return WRONG_ARGUMENTS;
    if (a.left() != count * (BLOCK_ARGUMENTS + (int8 ? INT8_ARGUMENTS : 0))) return WRONG_ARGUMENTS;
    if (sizes.batch * sizes.length == 0) return OK;
    block.in = {nullptr, nullptr, 2 * sizes.channels, block.norm.features, nullptr, int8};
    block.to_out = {nullptr, nullptr, block.norm.features, sizes.channels, nullptr, int8};

    const int64_t whole = threads.count > 1 ? sizes.batch / threads.count * threads.count : 0;
    const auto some = [&](int64_t first, int64_t pictures) {
        Block part = block;
        const int64_t skipped = first * sizes.length * block.norm.features;
        part.x += skipped;
        if (part.residual) part.residual += skipped;
        part.out += skipped;
        part.stored += skipped;
        part.norm.rows = pictures * sizes.length;
        return part;
    };
    const auto of = [&](int64_t pictures) {
        Sizes part = sizes;
        part.batch = pictures;
        return part;
    };
    if (whole) {
        const int64_t floats = BlockMemory({nullptr}, some(0, 1), sizes.channels, one).floats;
        const Memory memory(floats * threads.count);
        if (memory.data() == nullptr) return OUT_OF_MEMORY;
        int codes = OK;  // any failure of a picture
        for_each_task(threads, whole, [&](int64_t picture, int64_t worker) {
            const Block part = some(picture, 1);
            const BlockMemory own({memory.data() + worker * floats}, part, sizes.channels, one);
            const int code = run_blocks(a, part, of(1), width, rank, count, own, one);
            if (code != OK) __atomic_store_n(&codes, code, __ATOMIC_RELAXED);
        });
        if (codes != OK) return codes;
    }
    if (whole == sizes.batch) return OK;
    const Block rest = some(whole, sizes.batch - whole);
    const Memory memory(BlockMemory({nullptr}, rest, sizes.channels, threads).floats);
    if (memory.data() == nullptr) return OUT_OF_MEMORY;
    const BlockMemory shared({memory.data()}, rest, sizes.channels, threads);
    return run_blocks(a, rest, of(sizes.batch - whole), width, rank, count, shared, threads);
}

int bidirectional_blocks(Arguments &a) { return bidirectional_blocks_of(a, nullptr); }

int int8_blocks(Arguments &a) { return bidirectional_blocks_of(a, &int8_products()); }

int int8_linear(Arguments &a) {
    const Threads threads = a.threads();
    if (a.integer() != FLOAT32) return WRONG_ARGUMENTS;
    const float *rows = a.pointer<const float>();
    float *out = a.pointer<float>();
    const int64_t count = a.integer(), columns = a.integer(), depth = a.integer();
    const Linear linear = read_linear(a, columns, depth, true, &int8_products());
    return a.complete() ? multiply_int8_rows(linear, rows, count, out, threads) : WRONG_ARGUMENTS;
}

constexpr Kernels kernels(const char *name) {
    return {name, selective_scan, selective_scan_backward, selective_scan_2d, selective_scan_2d_backward,
            bidirectional_inner, bidirectional_blocks, int8_blocks, int8_linear,
            add_norm, add_norm_backward};
}
