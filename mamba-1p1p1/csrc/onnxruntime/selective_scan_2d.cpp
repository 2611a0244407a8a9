// The sum of the selective scans of pictures in four directions.
//
// b batch, h height, w width, d channels, n state, r dt rank

#include "op.h"

namespace {

constexpr int64_t DIRECTIONS = 4;

// (by columns, from the end) of each direction, as ROUTES in reference.py.
struct Routes {
    const char *name;
    int64_t of[DIRECTIONS][2];
};
constexpr Routes ROUTES[] = {
    {"cross", {{0, 0}, {1, 0}, {0, 1}, {1, 1}}},
    {"rows", {{0, 0}, {0, 0}, {0, 0}, {0, 0}}},
    {"both", {{0, 0}, {0, 0}, {0, 1}, {0, 1}}},
};

struct SelectiveScan2D {
    static constexpr const char *NAME = "SelectiveScan2D";
    static constexpr size_t OUTPUTS = 1;
    static constexpr Input INPUTS[] = {
        {"x", "(b, h, w, d)"},
        {"projected", "(b, h, w, 4, r + 2 n)"},
        {"dt_weight", "(4, d, r)"},
        {"A", "(4, d, n)"},
        {"D", "(4, d)", true},
        {"dt_bias", "(4, d)", true},
    };

    const Routes *routes = nullptr;

    explicit SelectiveScan2D(Attributes &attributes) {
        const std::string wanted = attributes.word("directions");
        for (const Routes &each : ROUTES) {
            if (wanted == each.name) routes = &each;
        }
        if (routes == nullptr) {
            attributes.refuse("the attribute `directions` must be cross, rows or both, got \"" + wanted + "\"");
        }
    }

    OrtStatus *compute(Call &call) const {
        const Tensor x = call.input(0, {ANY, ANY, ANY, ANY});
        if (call.refused()) return call.end();
        const int64_t b = x.sizes[0], h = x.sizes[1], w = x.sizes[2], d = x.sizes[3];
        const Tensor dt_weight = call.input(2, {DIRECTIONS, d, ANY}), A = call.input(3, {DIRECTIONS, d, ANY});
        if (call.refused()) return call.end();
        const int64_t r = dt_weight.sizes[2], n = A.sizes[2];
        if (r == 0) call.refuse("`dt_weight` must have a rank r of 1 or more");
        call.integers({b, h, w, d, n, r});
        call.address(x.data);
        call.address(call.input(1, {b, h, w, DIRECTIONS, r + 2 * n}).data);
        call.address(dt_weight.data);
        call.address(A.data);
        call.address(call.input(4, {DIRECTIONS, d}).data);
        call.address(call.input(5, {DIRECTIONS, d}).data);
        for (const auto &route : routes->of) call.integers({route[0], route[1]});
        call.address(call.output(0, x.sizes));
        call.address(nullptr);
        return call.end(b * h * w * d > 0 ? kernels().selective_scan_2d : nullptr);
    }
};

}  // namespace

const OrtCustomOp *selective_scan_2d_op(int form) { return form_of<SelectiveScan2D>(form); }
