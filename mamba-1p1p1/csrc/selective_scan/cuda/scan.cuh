// The selective scan, forward.
//
//     b batch, d channels, l length, n state, g groups, k = d / g channels of a group, t a token in visiting order
//
// A thread keeps OWN states of one channel in registers and walks through time; LANES neighbouring threads share a
// channel. The inputs of CHUNK tokens lie in shared memory, read in the order that suits their layout, so that every
// layout is the same from there on, and B and C are read once for all channels of a block. So each state update costs
// one exponential, four multiply-adds and less than one read of shared memory: no scan over lanes, nothing is padded
// along the sequence.
//
// What does not fit into one launch is summed up over several, in fp32: the directions of a bidirectional block, and
// more states than OWN x LANES.
#pragma once

#include "platform.cuh"
#include "value.cuh"

namespace scan {

constexpr int CHUNK = 32;  // tokens between kept states, as in selective_scan_torch.py

// B or C: (b, g, n, l) in any strides, (re, im) pairs of complex values one after the other along l; or constant
// (d, n), contiguous, in fp32.
struct Projection {
    void* data;
    int64_t batch, group, state, step;
    Element element;
    bool varies;
};

inline Projection projection_of(Arguments& arguments) {
    Projection made;
    made.data = arguments.pointer<void>();
    made.batch = arguments.integer();
    made.group = arguments.integer();
    made.state = arguments.integer();
    made.step = arguments.integer();
    made.element = static_cast<Element>(arguments.integer());
    made.varies = arguments.flag();
    return made;
}

struct Shape {
    int batch, channels, length, groups;
    int states;        // of the tensors
    int first_state;   // of this launch
    bool softplus, reverse;

    bool fits() const { return batch <= MAX_GRID_Y && groups > 0 && channels % groups == 0; }
};

inline Shape shape_of(Arguments& arguments) {
    Shape shape;
    shape.batch = arguments.size();
    shape.channels = arguments.size();
    shape.length = arguments.size();
    shape.groups = arguments.size();
    shape.states = arguments.size();
    shape.first_state = arguments.size();
    shape.softplus = arguments.flag();
    shape.reverse = arguments.flag();
    return shape;
}

// One direction's inputs.
template <class Value>
struct Inputs {
    Sequence u, delta;
    Projection B, C;
    const Value* A;       // (d, n)
    const float* D;       // (d,) or null
    const float* bias;    // (d,) or null, added to delta
};

template <class Value>
Inputs<Value> inputs_of(Arguments& arguments) {
    Inputs<Value> made;
    made.u = arguments.sequence();
    made.delta = arguments.sequence();
    made.A = arguments.pointer<const Value>();
    made.B = projection_of(arguments);
    made.C = projection_of(arguments);
    made.D = arguments.pointer<const float>();
    made.bias = arguments.pointer<const float>();
    return made;
}

template <class Value>
struct Parameters {
    Shape shape;
    Inputs<Value> inputs;
    Sequence z;        // null: no gate
    Sequence out;      // in fp32 unless `last_launch`
    Sequence sum;      // fp32, what earlier launches summed up; null: nothing
    bool with_skip;    // whether D * u is added in this launch
    Value* last;       // (b, d, n)
    Value* borders;    // (b, chunks, directions, g, n, k), this direction's; null: not kept
    int64_t borders_batch, borders_chunk;
};

// How a kernel is cut: THREADS threads, LANES for a channel, OWN states for a thread. The compiler leaves registers for
// BLOCKS blocks on a multiprocessor, for BACKWARD_BLOCKS of the backward: as many as it can have and spill none.
template <class V, int THREADS_, int LANES_, int OWN_, int BLOCKS_, int BACKWARD_BLOCKS_>
struct Cut {
    using Value = V;
    static constexpr int THREADS = THREADS_, LANES = LANES_, OWN = OWN_, BLOCKS = BLOCKS_;
    static constexpr int BACKWARD_BLOCKS = BACKWARD_BLOCKS_;
    static constexpr int STATES = LANES * OWN;
    static constexpr int SUB = OWN * sizeof(Value) < 16 ? 8 : 4;  // tokens whose states the backward has in registers
    static constexpr int CHANNELS = THREADS / LANES;
    static constexpr int ROW = CHANNELS + 1;  // an odd distance keeps the threads of a warp on banks of their own
    using Chunk = Windows<THREADS, CHUNK, CHANNELS>;

    static int blocks_of_group(const Shape& shape) {
        return (shape.channels / shape.groups + CHANNELS - 1) / CHANNELS;
    }
    static dim3 grid(const Shape& shape) {
        return dim3(static_cast<unsigned>(blocks_of_group(shape)) * shape.groups, shape.batch);
    }
};

// Where a block and a thread are.
template <class Cut>
struct Place {
    int group, block;      // of channels, within the group
    int first, channels;   // of the block
    int c, lane_state;     // of the thread: its channel within the block, its first state
    bool live;             // whether that channel exists

    __device__ explicit Place(const Shape& shape) {
        const int of_group = shape.channels / shape.groups;
        const int blocks = (of_group + Cut::CHANNELS - 1) / Cut::CHANNELS;
        group = static_cast<int>(blockIdx.x) / blocks;
        block = static_cast<int>(blockIdx.x) % blocks;
        first = group * of_group + block * Cut::CHANNELS;
        channels = min(Cut::CHANNELS, of_group - block * Cut::CHANNELS);
        c = static_cast<int>(threadIdx.x) / Cut::LANES;
        lane_state = static_cast<int>(threadIdx.x) % Cut::LANES * Cut::OWN;
        live = c < channels;
    }

    __device__ Window window(const Shape& shape, int chunk) const {
        // Unknown to the compiler, or it would work out every offset ahead of the loop over chunks, and spill.
        int batch = blockIdx.y, thread = threadIdx.x;
        asm volatile("" : "+r"(batch), "+r"(thread));
        Window window;
        window.batch = batch;
        window.thread = thread;
        window.channel = first;
        window.channels = channels;
        window.first = chunk * CHUNK;
        window.count = min(CHUNK, shape.length - window.first);
        window.length = shape.length;
        window.reverse = shape.reverse;
        return window;
    }
};

// B or C of a chunk, (CHUNK, STATES), or of the block's channels, (CHANNELS, STATES), if it is constant; zero for
// states that do not exist, whose channel then stays zero.
template <class Cut>
struct ProjectionTile {
    using Value = typename Cut::Value;
    static constexpr int ROWS = CHUNK > Cut::CHANNELS ? CHUNK : Cut::CHANNELS;
    // Rows begin on 16 bytes, and on other banks than their neighbours.
    static constexpr int ROW = Cut::STATES == 1 ? 1 : Cut::STATES + 16 / static_cast<int>(sizeof(Value));
    Value values[ROWS][ROW];

    __device__ void read_constant(const Projection& from, const Shape& shape, const Place<Cut>& place) {
        for (int index = threadIdx.x; index < Cut::CHANNELS * Cut::STATES; index += Cut::THREADS) {
            const int c = index / Cut::STATES, n = index % Cut::STATES, state = shape.first_state + n;
            const bool there = c < place.channels && state < shape.states;
            values[c][n] = there ? static_cast<const Value*>(from.data)[int64_t(place.first + c) * shape.states + state]
                                 : Value{};
        }
    }

    __device__ void read_chunk(const Projection& from, const Shape& shape, const Place<Cut>& place,
                               const Window& window) {
        with_dtype(from.data, from.element, [&](auto* data) {
            data += window.batch * from.batch + place.group * from.group;
            const bool along_tokens = from.step == 1;
            for (int index = window.thread; index < CHUNK * Cut::STATES; index += Cut::THREADS) {
                const int t = along_tokens ? index % CHUNK : index / Cut::STATES;
                const int n = along_tokens ? index / CHUNK : index % Cut::STATES;
                const int state = shape.first_state + n;
                const bool there = t < window.count && state < shape.states;
                values[t][n] = there ? value_at<Value>(data + state * from.state, from.step,
                                                       window.position(window.first + t))
                                     : Value{};
            }
        });
    }

    // The values of a thread at a token; those of the next token are next(varies) further.
    __device__ const Value* of(bool varies, const Place<Cut>& place, int t) const {
        return &values[varies ? t : place.c][place.lane_state];
    }
    __device__ static int next(bool varies) { return varies ? ROW : 0; }
};

// The states of a thread, and what they are made of.
template <class Cut>
struct Recurrence {
    using Value = typename Cut::Value;
    Value state[Cut::OWN];
    Value rate[Cut::OWN];  // what a step is multiplied with to give the exponent: A log2(e), for complex A its real part

    __device__ void start(const Inputs<Value>& inputs, const Shape& shape, const Place<Cut>& place) {
#pragma unroll
        for (int s = 0; s < Cut::OWN; ++s) {
            const int n = shape.first_state + place.lane_state + s;
            const bool there = place.live && n < shape.states;
            rate[s] = there ? rate_of(inputs.A[int64_t(place.first + place.c) * shape.states + n]) : Value{};
            state[s] = Value{};
        }
    }

    __device__ void step(float dt, float driven, const Value* B) {
#pragma unroll
        for (int s = 0; s < Cut::OWN; ++s) state[s] = decay(rate[s], dt) * state[s] + driven * B[s];
    }
};

// Steps and inputs of a chunk; zero, which changes no state, where a channel or a token does not exist.
template <class Cut>
struct SequenceTile {
    float dt[CHUNK][Cut::ROW];  // after bias and softplus
    float u[CHUNK][Cut::ROW];

    // Zero all from a token on, before it is read.
    __device__ void clear(int from) {
        for (int index = from * Cut::ROW + threadIdx.x; index < CHUNK * Cut::ROW; index += Cut::THREADS)
            (&dt[0][0])[index] = (&u[0][0])[index] = 0.0f;
    }

    template <class Value>
    __device__ void read(const Inputs<Value>& inputs, const Shape& shape, const Window& window) {
        Cut::Chunk::read(inputs.delta, window, [&](int t, int c, float raw) {
            if (inputs.bias != nullptr) raw += inputs.bias[window.channel + c];
            dt[t][c] = shape.softplus ? softplus(raw) : raw;
        });
        Cut::Chunk::read(inputs.u, window, [&](int t, int c, float value) { u[t][c] = value; });
    }
};

// Where the kept states of a channel start, for the thread's first state; states are k apart.
template <class Cut>
__device__ inline int64_t border_at(const Shape& shape, const Place<Cut>& place, int64_t batch, int64_t chunk, int at) {
    const int64_t of_group = shape.channels / shape.groups;
    const int64_t state = int64_t(place.group) * shape.states + shape.first_state + place.lane_state;
    return blockIdx.y * batch + at * chunk + state * of_group + place.block * Cut::CHANNELS + place.c;
}

template <class Cut>
__global__ void __launch_bounds__(Cut::THREADS, Cut::BLOCKS) forward(const __grid_constant__ Parameters<typename Cut::Value> p) {
    using Value = typename Cut::Value;
    constexpr int STEPS = Cut::LANES < 4 ? 4 : Cut::LANES < 8 ? Cut::LANES : 8;  // whose read-outs are summed at once
    using Sum = ScatteredSum<STEPS, Cut::LANES, 1>;
    __shared__ SequenceTile<Cut> sequence;
    __shared__ ProjectionTile<Cut> B, C;
    const Shape& shape = p.shape;
    const Place<Cut> place(shape);
    const int64_t of_group = shape.channels / shape.groups;
    const bool writes = place.live && Sum::is_first_copy(threadIdx.x);
    const float skip = p.with_skip && p.inputs.D != nullptr && place.live ? p.inputs.D[place.first + place.c] : 0.0f;
    if (!p.inputs.B.varies) B.read_constant(p.inputs.B, shape, place);
    if (!p.inputs.C.varies) C.read_constant(p.inputs.C, shape, place);
    Recurrence<Cut> recurrence;
    recurrence.start(p.inputs, shape, place);
    const int next_b = ProjectionTile<Cut>::next(p.inputs.B.varies), next_c = ProjectionTile<Cut>::next(p.inputs.C.varies);
    sequence.clear(0);
    __syncthreads();

    const int chunks = (shape.length + CHUNK - 1) / CHUNK;
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const Window window = place.window(shape, chunk);
        if (p.borders != nullptr && place.live) {
            const int64_t at = border_at<Cut>(shape, place, p.borders_batch, p.borders_chunk, chunk);
#pragma unroll
            for (int s = 0; s < Cut::OWN; ++s)
                if (shape.first_state + place.lane_state + s < shape.states)
                    p.borders[at + s * of_group] = recurrence.state[s];
        }
        if (window.count < CHUNK) sequence.clear(window.count);
        sequence.read(p.inputs, shape, window);
        if (p.inputs.B.varies) B.read_chunk(p.inputs.B, shape, place, window);
        if (p.inputs.C.varies) C.read_chunk(p.inputs.C, shape, place, window);
        __syncthreads();
        for (int first = 0; first < window.count; first += STEPS) {
            const Value *b = B.of(p.inputs.B.varies, place, first), *c = C.of(p.inputs.C.varies, place, first);
            float y[STEPS];
#pragma unroll
            for (int i = 0; i < STEPS; ++i) {
                const float dt = sequence.dt[first + i][place.c], u = sequence.u[first + i][place.c];
                recurrence.step(dt, dt * u, b + i * next_b);
                y[i] = 0.0f;
#pragma unroll
                for (int s = 0; s < Cut::OWN; ++s) y[i] += read_out(c[i * next_c + s], recurrence.state[s]);
            }
            const int own = first + Sum::run(y, threadIdx.x);
            __syncwarp();  // all lanes have read what is overwritten now
#pragma unroll
            for (int k = 0; k < Sum::KEPT; ++k) {
                const int t = own + k;
                if (writes && t < window.count)
                    sequence.u[t][place.c] = y[k] + skip * sequence.u[t][place.c];
            }
        }
        __syncthreads();
        if (p.sum.data != nullptr) {
            Cut::Chunk::read(p.sum, window, [&](int t, int c, float value) { sequence.u[t][c] += value; });
            __syncthreads();
        }
        if (p.z.data != nullptr) {
            Cut::Chunk::read(p.z, window, [&](int t, int c, float value) { sequence.u[t][c] *= silu(value); });
            __syncthreads();
        }
        Cut::Chunk::write(p.out, window, [&](int t, int c) { return sequence.u[t][c]; });
        __syncthreads();
    }
    if (p.last == nullptr || !place.live) return;
    const int64_t at = (int64_t(blockIdx.y) * shape.channels + place.first + place.c) * shape.states;
#pragma unroll
    for (int s = 0; s < Cut::OWN; ++s) {
        const int n = shape.first_state + place.lane_state + s;
        if (n < shape.states) p.last[at + n] = recurrence.state[s];
    }
}

}  // namespace scan
