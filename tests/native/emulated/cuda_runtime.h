// CUDA for tests on a machine without a GPU: the kernels of csrc/cuda, compiled by a C++ compiler, on CPU tensors.
//
// Blocks run one after the other. The threads of a block are fibers of one thread of the system, and change only where
// threads of a GPU wait for each other: at __syncthreads and at exchanges within a warp. Which of them go first turns
// around with every launch, so that a missing barrier shows in one order or the other. Threads that wait at different
// barriers for ever, as a GPU's would, end the process with a message.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

using std::max;
using std::min;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __CUDA_ARCH_LIST__ emulated
#define CUDART_VERSION 0

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
    return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }

namespace emulated {

constexpr int WARP = 32;
constexpr size_t STACK = 128 << 10;

enum class State { ready, at_block, at_warp, done };

struct Thread {
    dim3 index;
    State state = State::ready;
    int exchanges = 0;  // even and odd ones use rooms of their own, so that one barrier for each is enough
    bool started = false;
    ucontext_t context;
    jmp_buf resume;
    std::unique_ptr<char[]> stack;
};

struct Warp {
    uint32_t values[2][WARP];
};

inline Thread* current = nullptr;
inline dim3 block_index, grid_size;
inline std::vector<Warp> warps;
inline jmp_buf scheduler;
inline std::function<void()> body;

inline void wait(State state) {
    current->state = state;
    if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

inline void entry() {
    body();
    current->state = State::done;
    _longjmp(scheduler, 1);
}

inline void resume(Thread& thread) {
    current = &thread;
    thread.state = State::ready;
    if (_setjmp(scheduler) != 0) return;
    if (thread.started) _longjmp(thread.resume, 1);
    thread.started = true;
    setcontext(&thread.context);
}

// Release the threads of [first, last) that wait at a barrier, if all that live do; whether any was released.
inline bool release(std::vector<Thread>& threads, size_t first, size_t last, State barrier) {
    bool any = false;
    for (size_t i = first; i < last; ++i) {
        if (threads[i].state == State::done) continue;
        if (threads[i].state != barrier) return false;
        any = true;
    }
    for (size_t i = first; i < last; ++i)
        if (threads[i].state == barrier) threads[i].state = State::ready;
    return any;
}

inline void run_block(std::vector<Thread>& threads, bool backwards) {
    for (Thread& thread : threads) {
        thread.state = State::ready;
        thread.started = false;
        thread.exchanges = 0;
        getcontext(&thread.context);
        thread.context.uc_stack = {thread.stack.get(), 0, STACK};
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, entry, 0);
    }
    const size_t count = threads.size();
    for (;;) {
        bool ran = false, live = false;
        for (size_t i = 0; i < count; ++i) {
            Thread& thread = threads[backwards ? count - 1 - i : i];
            live |= thread.state != State::done;
            if (thread.state != State::ready) continue;
            resume(thread);
            ran = true;
        }
        if (!live) return;
        bool released = release(threads, 0, count, State::at_block);
        for (size_t first = 0; first < count; first += WARP)
            released |= release(threads, first, std::min(first + WARP, count), State::at_warp);
        if (!ran && !released) {
            fprintf(stderr, "emulated CUDA: the threads of a block wait at different barriers\n");
            abort();
        }
    }
}

template <class Value>
Value exchange(Value value, int other) {
    static_assert(sizeof(Value) == 4, "values of a warp have 32 bits");
    const int index = static_cast<int>(current->index.x), lane = index % WARP;
    Warp& warp = warps[index / WARP];
    auto& room = warp.values[current->exchanges++ % 2];
    std::memcpy(&room[lane], &value, 4);
    wait(State::at_warp);
    std::memcpy(&value, &room[other], 4);
    return value;
}

}  // namespace emulated

#define threadIdx (emulated::current->index)
inline const dim3 &blockIdx = emulated::block_index, &gridDim = emulated::grid_size;

inline float __fdividef(float a, float b) { return a / b; }
inline void __syncthreads() { emulated::wait(emulated::State::at_block); }
inline void __syncwarp(unsigned = 0) { emulated::wait(emulated::State::at_warp); }
template <class Value>
Value __shfl_xor_sync(unsigned, Value value, int lanes) {
    return emulated::exchange(value, static_cast<int>(threadIdx.x % emulated::WARP) ^ lanes);
}
template <class Value>
Value __shfl_sync(unsigned, Value value, int lane) {
    return emulated::exchange(value, lane);
}

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
    using namespace emulated;
    const dim3 grid = config->gridDim, block = config->blockDim;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || block.x == 0 || block.x > 1024)
        return cudaErrorInvalidConfiguration;
    static bool backwards = false;
    backwards = !backwards;
    std::vector<Thread> threads(block.x);
    for (unsigned i = 0; i < block.x; ++i) {
        threads[i].index = dim3(i, 0, 0);
        threads[i].stack.reset(new char[STACK]);
    }
    grid_size = grid;
    warps.resize((block.x + WARP - 1) / WARP);
    body = [&] { kernel(arguments...); };
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                block_index = dim3(x, y, z);
                run_block(threads, backwards);
            }
    body = nullptr;
    return cudaSuccess;
}
