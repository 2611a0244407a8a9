// The selective scan of sequences, in one direction.
//
// b batch, d channels, l length, n state, g groups

#include "op.h"

#include <algorithm>

namespace {

struct SelectiveScan {
    static constexpr const char *NAME = "SelectiveScan";
    static constexpr size_t OUTPUTS = 2;
    static constexpr Input INPUTS[] = {
        {"u", "(b, d, l)"},
        {"delta", "(b, d, l)"},
        {"A", "(d, n)"},
        {"B", "(b, g, n, l) or (d, n)"},
        {"C", "(b, g, n, l) or (d, n)"},
        {"D", "(d,)", true},
        {"delta_bias", "(d,)", true},
        {"z", "(b, d, l)", true},
    };

    bool softplus, reverse;

    explicit SelectiveScan(Attributes &attributes)
        : softplus(attributes.flag("softplus")), reverse(attributes.flag("reverse")) {}

    OrtStatus *compute(Call &call) const {
        const Tensor u = call.input(0, {ANY, ANY, ANY});
        if (call.refused()) return call.end();
        const int64_t b = u.sizes[0], d = u.sizes[1], l = u.sizes[2];
        const Tensor A = call.input(2, {d, ANY});
        if (call.refused()) return call.end();
        const int64_t n = A.sizes[1];
        const Sizes sequence = u.sizes, constant = A.sizes;
        const auto groups = [](const Tensor &of, int64_t otherwise) {
            return of.sizes.size() == 4 ? of.sizes[1] : otherwise;
        };
        const Tensor B = call.input(3, {b, ANY, n, l}, constant);
        const Tensor C = call.input(4, {b, groups(B, ANY), n, l}, constant);
        if (call.refused()) return call.end();
        const int64_t g = groups(B, groups(C, 1));
        if (g == 0 || d % g) {
            call.refuse("its " + std::to_string(d) + " channels are not divisible by " + std::to_string(g) + " groups");
        }
        const auto whole = [&](const float *data) { call.sequence(data, d * l, l, 1); };
        float *const out = call.output(0, sequence), *const last = call.output(1, {b, d, n});
        call.integers({b, d, l, n, g, 1});
        whole(out);
        const Tensor z = call.input(7, sequence);
        if (z.given) {
            whole(z.data);
        } else {
            call.sequence(nullptr, 0, 0, 0);
        }
        whole(out);
        call.number(1.0);
        call.address(last);
        call.address(nullptr);
        whole(u.data);
        whole(call.input(1, sequence).data);
        call.address(A.data);
        for (const Tensor &projection : {B, C}) {
            const bool fixed = projection.sizes.size() == 2;
            call.address(projection.data);
            call.integers({fixed ? n : g * n * l, fixed ? 0 : n * l, fixed ? 1 : l, fixed ? 0 : 1, fixed});
        }
        call.address(call.input(5, {d}).data);
        call.address(call.input(6, {d}).data);
        call.integers({softplus, reverse, 0, 0});
        if (last && b * d * l == 0) std::fill_n(last, b * d * n, 0.0f);
        return call.end(b * d * l > 0 ? kernels().selective_scan : nullptr);
    }
};

}  // namespace

const OrtCustomOp *selective_scan_op(int form) { return form_of<SelectiveScan>(form); }
