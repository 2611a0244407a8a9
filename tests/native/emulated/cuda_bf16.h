// bf16 as CUDA names it, for tests without a GPU: the upper half of an fp32, rounded to the nearest even one.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
    const uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &wide, 4);
    return result;
}

inline __nv_bfloat16 __float2bfloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    if (value != value) return {static_cast<uint16_t>((wide >> 16) | 0x40)};
    return {static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};
}
