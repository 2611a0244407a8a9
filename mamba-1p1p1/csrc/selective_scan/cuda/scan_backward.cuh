// The gradients of the selective scan.
//
// A block takes the chunks from the last to the first. For each it computes the states again from the one kept before
// the chunk: once to know those before each SUB tokens, once more, SUB tokens at a time, to have them and their decays
// in registers for the way back. There
//
//     g[t] = conj(C[t]) dy[t] + conj(decay[t+1]) g[t+1]
//
// gives all gradients: of B[t] and C[t], dt u g and conj(h) dy, summed over channels by a tree over lanes and then over
// the warps of a block; of u and delta, sums over states, by a tree over lanes as well. What blocks have to share
// (B, C: channels; parameters: the batch) each writes on its own, for a sum in a fixed order: the same bits each time.
#pragma once

#include "scan.cuh"

namespace scan {

template <class Value>
struct BackwardParameters {
    Shape shape;
    Inputs<Value> inputs;
    Sequence z, dout;
    Sequence sum, y;       // fp32: read-outs of earlier launches; where to write those with this launch's. Null: none
    Sequence dz;           // written by the launch that has all read-outs; null: no gate, or not yet
    Sequence du, ddelta;   // in fp32 if several launches add to them
    bool accumulate;       // whether an earlier launch wrote du, ddelta and dbias
    bool with_skip;        // whether D's share is this launch's
    const Value* borders;
    int64_t borders_batch, borders_chunk;
    const Value* dlast;    // (b, d, n) or null
    Value* dA;             // (b, d, n)
    Value* dB;             // (b, g, blocks, l, n) if it varies, else (b, d, n)
    Value* dC;
    float* dD;             // (b, d) or null
    float* dbias;          // (b, d)
};

// Sums over the channels of a warp, of SUB tokens.
template <class Cut>
struct Shares {
    static constexpr int WARPS = Cut::THREADS / 32, CHANNELS = 32 / Cut::LANES;
    static constexpr int SUB = Cut::SUB;
    using Sum = ScatteredSum<SUB, CHANNELS, Cut::LANES>;
    typename Cut::Value values[WARPS][SUB][Cut::STATES];

    // Take a thread's shares (tokens, states).
    __device__ void put(typename Cut::Value (&shares)[SUB][Cut::OWN], int lane_state) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        constexpr int PARTS = sizeof(typename Cut::Value) / sizeof(float);
#pragma unroll
        for (int s = 0; s < Cut::OWN; ++s) {
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                float column[SUB];
#pragma unroll
                for (int i = 0; i < SUB; ++i) column[i] = part_of(shares[i][s], part);
                const int first = Sum::run(column, lane);
                if (Sum::is_first_copy(lane)) {
#pragma unroll
                    for (int k = 0; k < Sum::KEPT; ++k)
                        part_of(values[warp][first + k][lane_state + s], part) = column[k];
                }
            }
        }
    }

    // Write the sums over the warps of the tokens from `first` on, to (l, n).
    __device__ void write(typename Cut::Value* to, const Shape& shape, const Window& window, int first) const {
        for (int index = threadIdx.x; index < SUB * Cut::STATES; index += Cut::THREADS) {
            const int i = index / Cut::STATES, n = index % Cut::STATES, state = shape.first_state + n;
            if (first + i >= window.count || state >= shape.states) continue;
            typename Cut::Value sum = values[0][i][n];
#pragma unroll
            for (int warp = 1; warp < WARPS; ++warp) sum += values[warp][i][n];
            to[int64_t(window.position(window.first + first + i)) * shape.states + state] = sum;
        }
    }
};

template <class Cut>
__device__ inline float sum_over_lanes(float value) {
#pragma unroll
    for (int distance = 1; distance < Cut::LANES; distance *= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
    return value;
}

template <class Cut>
__global__ void __launch_bounds__(Cut::THREADS, Cut::BACKWARD_BLOCKS)
    backward(const __grid_constant__ BackwardParameters<typename Cut::Value> p) {
    using Value = typename Cut::Value;
    constexpr int OWN = Cut::OWN, SUB = Cut::SUB;
    using Sum = ScatteredSum<SUB, Cut::LANES, 1>;
    constexpr float FACTOR = READ_OUT_FACTOR<Value>;
    __shared__ SequenceTile<Cut> sequence;
    __shared__ float dy[CHUNK][Cut::ROW];
    __shared__ ProjectionTile<Cut> B, C;
    __shared__ Shares<Cut> of_B, of_C;
    __shared__ Value before[CHUNK / SUB][OWN][Cut::THREADS];  // states before each SUB tokens
    const Shape& shape = p.shape;
    const Place<Cut> place(shape);
    // Computed anew where they are needed, which takes fewer registers than to keep them.
    const auto own_states = [&] {  // in (b, d, n)
        return (int64_t(blockIdx.y) * shape.channels + place.first + place.c) * shape.states + shape.first_state +
               place.lane_state;
    };
    const auto own_sums = [&] {  // in (b, g, blocks, l, n)
        return (int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * shape.length * shape.states;
    };
    const bool writes = place.live && Sum::is_first_copy(threadIdx.x);
    const float skip = p.with_skip && p.inputs.D != nullptr && place.live ? p.inputs.D[place.first + place.c] : 0.0f;
    if (!p.inputs.B.varies) B.read_constant(p.inputs.B, shape, place);
    if (!p.inputs.C.varies) C.read_constant(p.inputs.C, shape, place);

    const int next_b = ProjectionTile<Cut>::next(p.inputs.B.varies), next_c = ProjectionTile<Cut>::next(p.inputs.C.varies);
    sequence.clear(0);
    for (int index = threadIdx.x; index < CHUNK * Cut::ROW; index += Cut::THREADS) (&dy[0][0])[index] = 0.0f;
    __syncthreads();

    Recurrence<Cut> recurrence;
    recurrence.start(p.inputs, shape, place);
    const auto exists = [&](int s) { return place.live && shape.first_state + place.lane_state + s < shape.states; };
    Value carry[OWN], dA[OWN];
    float dD = 0.0f, dbias = 0.0f;
#pragma unroll
    for (int s = 0; s < OWN; ++s) {
        carry[s] = p.dlast != nullptr && exists(s) ? p.dlast[own_states() + s] : Value{};
        dA[s] = Value{};
        if (!p.inputs.B.varies && exists(s)) p.dB[own_states() + s] = Value{};
        if (!p.inputs.C.varies && exists(s)) p.dC[own_states() + s] = Value{};
    }
    // Add a thread's shares to the gradient of a constant B or C, which is in memory: registers are for what varies.
    const auto add = [&](Value* to, const Value(&shares)[SUB][OWN]) {
#pragma unroll
        for (int s = 0; s < OWN; ++s) {
            Value sum = shares[0][s];
#pragma unroll
            for (int i = 1; i < SUB; ++i) sum += shares[i][s];
            if (exists(s)) to[own_states() + s] += sum;
        }
    };

    for (int chunk = (shape.length - 1) / CHUNK; chunk >= 0; --chunk) {
        const Window window = place.window(shape, chunk);
        sequence.read(p.inputs, shape, window);
        Cut::Chunk::read(p.dout, window, [&](int t, int c, float value) { dy[t][c] = value; });
        if (p.inputs.B.varies) B.read_chunk(p.inputs.B, shape, place, window);
        if (p.inputs.C.varies) C.read_chunk(p.inputs.C, shape, place, window);
        if (p.z.data != nullptr) {
            __syncthreads();
            Cut::Chunk::read(p.z, window, [&](int t, int c, float value) { dy[t][c] *= silu(value); });
        }
        __syncthreads();

        const int64_t border = border_at<Cut>(shape, place, p.borders_batch, p.borders_chunk, chunk);
        const int64_t of_group = shape.channels / shape.groups;
#pragma unroll
        for (int s = 0; s < OWN; ++s) {
            recurrence.state[s] = exists(s) ? p.borders[border + s * of_group] : Value{};
            before[0][s][threadIdx.x] = recurrence.state[s];
        }
        const int last = (window.count - 1) / SUB;
        for (int part = 0; part < last; ++part) {
            const Value* b = B.of(p.inputs.B.varies, place, part * SUB);
#pragma unroll
            for (int i = 0; i < SUB; ++i) {
                const float dt = sequence.dt[part * SUB + i][place.c], u = sequence.u[part * SUB + i][place.c];
                recurrence.step(dt, dt * u, b + i * next_b);
            }
#pragma unroll
            for (int s = 0; s < OWN; ++s) before[part + 1][s][threadIdx.x] = recurrence.state[s];
        }

        for (int part = last; part >= 0; --part) {
            const int first = part * SUB;
            // The decays and states of SUB tokens; on the way back each becomes a share in the gradients of B and C.
            Value decays[SUB][OWN], states[SUB][OWN];
            float y[SUB], through_input[SUB], through_decay[SUB];
            const Value *b = B.of(p.inputs.B.varies, place, first), *c = C.of(p.inputs.C.varies, place, first);
#pragma unroll
            for (int i = 0; i < SUB; ++i) {
                const float dt = sequence.dt[first + i][place.c];
                const float u = sequence.u[first + i][place.c];
                y[i] = 0.0f;
#pragma unroll
                for (int s = 0; s < OWN; ++s) {
                    const Value previous = i == 0 ? before[part][s][threadIdx.x] : states[i - 1][s];
                    decays[i][s] = decay(recurrence.rate[s], dt);
                    states[i][s] = decays[i][s] * previous + (dt * u) * b[i * next_b + s];
                    y[i] += read_out(c[i * next_c + s], states[i][s]);
                }
            }
            const int own = first + Sum::run(y, threadIdx.x);
            __syncwarp();  // for the compiler: it reads B and C again rather than keep those of SUB tokens in registers
#pragma unroll
            for (int i = SUB - 1; i >= 0; --i) {
                const float dt = sequence.dt[first + i][place.c];
                const float u = sequence.u[first + i][place.c];
                const float slope = FACTOR * dy[first + i][place.c];
                through_input[i] = through_decay[i] = 0.0f;
#pragma unroll
                for (int s = 0; s < OWN; ++s) {
                    const Value previous = i == 0 ? before[part][s][threadIdx.x] : states[i - 1][s];
                    const Value g = slope * conjugate(c[i * next_c + s]) + carry[s];
                    const Value of_exponent = g * conjugate(decays[i][s] * previous);
                    dA[s] += dt * of_exponent;
                    through_decay[i] += real_part(of_exponent * conjugate(exponent_of(recurrence.rate[s])));
                    through_input[i] += real_part(g * conjugate(b[i * next_b + s]));
                    carry[s] = conjugate(decays[i][s]) * g;
                    decays[i][s] = (dt * u) * g;
                    states[i][s] = slope * conjugate(states[i][s]);
                }
            }

            Sum::run(through_input, threadIdx.x);
            Sum::run(through_decay, threadIdx.x);
            __syncwarp();  // all lanes have read what is overwritten now
#pragma unroll
            for (int k = 0; k < Sum::KEPT; ++k) {
                const int t = own + k;
                if (!writes || t >= window.count) continue;
                float &dt = sequence.dt[t][place.c], &u = sequence.u[t][place.c], &slope = dy[t][place.c];
                float of_step = through_decay[k] + through_input[k] * u;
                if (shape.softplus) of_step *= -expm1f(-dt);  // the slope of softplus, by its value
                const float of_input = through_input[k] * dt + skip * slope;
                const float output = y[k] + skip * u;
                dbias += of_step;
                dD += slope * u;
                dt = of_step;
                u = of_input;
                slope = output;
            }
            if (p.inputs.B.varies)
                of_B.put(decays, place.lane_state);
            else
                add(p.dB, decays);
            if (p.inputs.C.varies)
                of_C.put(states, place.lane_state);
            else
                add(p.dC, states);
            if (p.inputs.B.varies || p.inputs.C.varies) {
                __syncthreads();
                if (p.inputs.B.varies) of_B.write(p.dB + own_sums(), shape, window, first);
                if (p.inputs.C.varies) of_C.write(p.dC + own_sums(), shape, window, first);
                __syncthreads();
            }
        }
        __syncthreads();

        if (p.accumulate) {
            Cut::Chunk::read(p.du, window, [&](int t, int c, float value) { sequence.u[t][c] += value; });
            Cut::Chunk::read(p.ddelta, window, [&](int t, int c, float value) { sequence.dt[t][c] += value; });
        }
        if (p.sum.data != nullptr)
            Cut::Chunk::read(p.sum, window, [&](int t, int c, float value) { dy[t][c] += value; });
        __syncthreads();
        Cut::Chunk::write(p.du, window, [&](int t, int c) { return sequence.u[t][c]; });
        Cut::Chunk::write(p.ddelta, window, [&](int t, int c) { return sequence.dt[t][c]; });
        if (p.y.data != nullptr) Cut::Chunk::write(p.y, window, [&](int t, int c) { return dy[t][c]; });
        if (p.dz.data != nullptr) {
            Cut::Chunk::read(p.z, window, [&](int t, int c, float value) { dy[t][c] *= silu_slope(value); });
            __syncthreads();
            Cut::Chunk::read(p.dout, window, [&](int t, int c, float value) { dy[t][c] *= value; });
            __syncthreads();
            Cut::Chunk::write(p.dz, window, [&](int t, int c) { return dy[t][c]; });
        }
        __syncthreads();
    }

    dbias = sum_over_lanes<Cut>(dbias);
    dD = sum_over_lanes<Cut>(dD);
    if (!place.live) return;
    const int64_t channel = int64_t(blockIdx.y) * shape.channels + place.first + place.c;  // in (b, d)
    if (place.lane_state == 0) {
        p.dbias[channel] = p.accumulate ? p.dbias[channel] + dbias : dbias;
        if (p.with_skip && p.dD != nullptr) p.dD[channel] = dD;
    }
#pragma unroll
    for (int s = 0; s < OWN; ++s)
        if (exists(s)) p.dA[own_states() + s] = dA[s];
}

}  // namespace scan
