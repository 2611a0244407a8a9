// The "v2" bidirectional mixer between its outer projections, time first.
//
// b batch, e inner channels, l length, n state, r dt rank, w conv width

#include "op.h"

namespace {

constexpr size_t PER_DIRECTION = 7;

struct BidirectionalInner {
    static constexpr const char *NAME = "BidirectionalInner";
    static constexpr size_t OUTPUTS = 1;
    static constexpr Input INPUTS[] = {
        {"xz", "(l, b, 2 e)"},
        {"conv_weight", "(e, 1, w)"},
        {"conv_bias", "(e,)", true},
        {"x_proj", "(r + 2 n, e)"},
        {"dt_proj", "(e, r)"},
        {"A_log", "(e, n)"},
        {"D", "(e,)", true},
        {"dt_bias", "(e,)", true},
        {"conv_weight_b", "(e, 1, w)"},
        {"conv_bias_b", "(e,)", true},
        {"x_proj_b", "(r + 2 n, e)"},
        {"dt_proj_b", "(e, r)"},
        {"A_log_b", "(e, n)"},
        {"D_b", "(e,)", true},
        {"dt_bias_b", "(e,)", true},
    };

    float scale;

    explicit BidirectionalInner(Attributes &attributes) : scale(attributes.number("scale")) {}

    OrtStatus *compute(Call &call) const {
        const Tensor A_log = call.input(5, {ANY, ANY});
        if (call.refused()) return call.end();
        const int64_t e = A_log.sizes[0], n = A_log.sizes[1];
        const Tensor xz = call.input(0, {ANY, ANY, 2 * e});
        const Tensor taps = call.input(1, {e, 1, ANY}), dt_proj = call.input(4, {e, ANY});
        if (call.refused()) return call.end();
        const int64_t l = xz.sizes[0], b = xz.sizes[1], w = taps.sizes[2], r = dt_proj.sizes[1];
        if (w == 0) call.refuse("`conv_weight` must have a width w of 1 or more");
        float *const y = call.output(0, {l, b, e});
        call.integers({b, e, l, n, 1, 2});
        call.sequence(y, e, 1, b * e);
        call.sequence(xz.data + e, 2 * e, 1, 2 * b * e);
        call.sequence(y, e, 1, b * e);
        call.number(scale);
        call.sequence(xz.data, 2 * e, 1, 2 * b * e);
        call.integers({w, r});
        const Sizes shapes[PER_DIRECTION] = {{e, 1, w}, {e}, {r + 2 * n, e}, {e, r}, {e, n}, {e}, {e}};
        for (int64_t s = 0; s < 2; ++s) {
            for (size_t i = 0; i < PER_DIRECTION; ++i) {
                call.address(call.input(1 + s * PER_DIRECTION + i, shapes[i]).data);
            }
            call.integers({s, 0});  // reversed or not, nothing kept
        }
        call.address(nullptr);
        return call.end(l * b * e > 0 ? kernels().bidirectional_inner : nullptr);
    }
};

}  // namespace

const OrtCustomOp *bidirectional_inner_op(int form) { return form_of<BidirectionalInner>(form); }
