// The cuts that are compiled. A launch takes the first that holds the states; more go through several launches.
#pragma once

#include "scan.cuh"

namespace scan {

// Call work(Cut{}) with the cut for `states` states.
template <class Value, class Work>
int with_cut(int states, Work work) {
    if constexpr (std::is_same_v<Value, float>) {
        if (states == 1) return work(Cut<float, 64, 1, 1, 4, 4>{});
        if (states <= 16) return work(Cut<float, 128, 4, 4, 6, 3>{});
        return work(Cut<float, 128, 16, 4, 3, 2>{});
    } else {
        if (states <= 16) return work(Cut<Complex, 128, 8, 2, 3, 2>{});
        return work(Cut<Complex, 128, 16, 2, 3, 2>{});
    }
}

}  // namespace scan
