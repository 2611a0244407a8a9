// Reading the integers of a call in order.
#pragma once

#include "parallel.h"

class Arguments {
public:
    Arguments(const int64_t *values, int64_t count) : values_(values), left_(count) {}

    int64_t integer() {
        if (left_ == 0) {
            short_ = true;
            return 0;
        }
        --left_;
        return *values_++;
    }

    template <class T>
    T *pointer() {
        return reinterpret_cast<T *>(static_cast<uintptr_t>(integer()));
    }

    double number() {
        const int64_t bits = integer();
        double value;
        memcpy(&value, &bits, sizeof value);
        return value;
    }

    Threads threads() {
        const Fork fork = reinterpret_cast<Fork>(static_cast<uintptr_t>(integer()));
        const int64_t count = integer();
        return {fork, count < 1 ? 1 : count};
    }

    int64_t left() const { return left_; }

    // Whether exactly all integers were read.
    bool complete() const { return !short_ && left_ == 0; }

private:
    const int64_t *values_;
    int64_t left_;
    bool short_ = false;
};

// Memory of one call; null where there is none left.
class Memory {
public:
    explicit Memory(int64_t floats) {
#if defined(_WIN32)
        data_ = static_cast<float *>(_aligned_malloc(bytes(floats), 64));
#else
        data_ = static_cast<float *>(aligned_alloc(64, bytes(floats)));
#endif
    }
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;
    ~Memory() {
#if defined(_WIN32)
        _aligned_free(data_);
#else
        free(data_);
#endif
    }
    float *data() const { return data_; }

private:
    static size_t bytes(int64_t floats) { return (static_cast<size_t>(floats) * sizeof(float) + 64) / 64 * 64; }
    float *data_;
};

// Deals out memory in turn; over null it only counts.
struct Cursor {
    float *base;
    int64_t used = 0;

    float *take(int64_t floats) {
        float *taken = base ? base + used : nullptr;
        used += (floats + 15) / 16 * 16;
        return taken;
    }
};
