// The numbers a state is made of: real ones, or complex ones.
#pragma once

#include "platform.cuh"

struct Complex {
    float re, im;
};

__device__ inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
__device__ inline Complex operator*(Complex a, Complex b) {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
__device__ inline Complex operator*(float a, Complex b) { return {a * b.re, a * b.im}; }
__device__ inline Complex& operator+=(Complex& a, Complex b) { return a = a + b; }

__device__ inline float conjugate(float a) { return a; }
__device__ inline Complex conjugate(Complex a) { return {a.re, -a.im}; }
__device__ inline float& part_of(float& a, int) { return a; }
__device__ inline float& part_of(Complex& a, int part) { return part == 0 ? a.re : a.im; }
__device__ inline float real_part(float a) { return a; }
__device__ inline float real_part(Complex a) { return a.re; }

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// What a step is multiplied with, and what exp(step * A) is made of it.
// Never infinite: a step of zero then still means no decay.
__device__ inline float rate_of(float A) { return A < -2e38f ? -3e38f : A * LOG2_E; }
__device__ inline Complex rate_of(Complex A) { return {rate_of(A.re), A.im}; }
__device__ inline float decay(float rate, float step) { return exp2_of(step * rate); }
__device__ inline Complex decay(Complex rate, float step) {
    const float size = exp2_of(step * rate.re);
    float sine, cosine;
    sincosf(step * rate.im, &sine, &cosine);
    return {size * cosine, size * sine};
}
__device__ inline float exponent_of(float rate) { return rate * LN_2; }
__device__ inline Complex exponent_of(Complex rate) { return {rate.re * LN_2, rate.im}; }

// A state's share in the output; and the factor that the output's gradient gets from it.
__device__ inline float read_out(float C, float state) { return C * state; }
__device__ inline float read_out(Complex C, Complex state) { return 2.0f * (C.re * state.re - C.im * state.im); }
template <class Value>
constexpr float READ_OUT_FACTOR = std::is_same_v<Value, float> ? 1.0f : 2.0f;

// The value at a position of a sequence of numbers, or of (re, im) pairs of them.
template <class Value, class T>
__device__ inline Value value_at(const T* data, int64_t step, int64_t position) {
    if constexpr (std::is_same_v<Value, float>)
        return widened(data[position * step]);
    else
        return {widened(data[2 * position * step]), widened(data[(2 * position + 1) * step])};
}
