// An op as ONNX Runtime calls it: its inputs checked, its outputs made, its kernel run on the session's own threads.
//
// Through the C interface: a library compiled with the headers of one version runs in every version from LEAST_API on,
// and no exception meets the kernels, which are compiled without.
#pragma once

#include <kernels.h>
#include <onnxruntime_c_api.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "threads.h"

constexpr uint32_t LEAST_API = 17;  // of ONNX Runtime 1.17
extern const OrtApi *ort;           // set before any op is called

using Sizes = std::vector<int64_t>;
constexpr int64_t ANY = -1;

// An input of an op, with its axes by their letters.
struct Input {
    const char *name, *axes;
    bool optional = false;
};

struct Tensor {
    const float *data = nullptr;
    Sizes sizes;
    bool given = false;
};

// A call of an op. The first complaint about it stays; what is read afterwards is empty.
class Call {
public:
    Call(OrtKernelContext *context, Team &team, const Input *inputs)
        : context_(context), inputs_(inputs), session_(context, team),
          values_{static_cast<int64_t>(reinterpret_cast<uintptr_t>(session_.fork())), session_.count(), FLOAT32} {}

    // The input of this number, not `given` if it is left out. It must have these sizes, each a number or ANY, or the
    // others.
    Tensor input(size_t index, const Sizes &sizes, const Sizes &others = {});
    // Room for an output; null if it is empty or nobody asks for it.
    float *output(size_t index, const Sizes &sizes);

    void refuse(const std::string &sentence) {
        if (complaint_.empty()) complaint_ = sentence;
    }
    bool refused() const { return !complaint_.empty(); }

    // The arguments of the kernel, in its order.
    void integers(std::initializer_list<int64_t> values) { values_.insert(values_.end(), values); }
    void address(const float *data) { integers({static_cast<int64_t>(reinterpret_cast<uintptr_t>(data))}); }
    void sequence(const float *data, int64_t batch, int64_t channel, int64_t token) {
        address(data);
        integers({batch, channel, token});
    }
    void number(double value) {
        int64_t bits;
        memcpy(&bits, &value, sizeof bits);
        integers({bits});
    }
    // How the call ended; null is well. Without a kernel: nothing is left to compute.
    OrtStatus *end(int (*kernel)(Arguments &) = nullptr);

private:
    bool failed(OrtStatus *status);
    Sizes sizes_of(const OrtValue *value);

    OrtKernelContext *const context_;
    const Input *const inputs_;
    Session session_;
    std::vector<int64_t> values_;
    std::string complaint_;
};

// The attributes of a node.
class Attributes {
public:
    explicit Attributes(const OrtKernelInfo *info) : info_(info) {}
    float number(const char *name);
    bool flag(const char *name);
    std::string word(const char *name);
    void refuse(const std::string &sentence) {
        if (complaint_.empty()) complaint_ = sentence;
    }
    OrtStatus *end() const {
        return complaint_.empty() ? nullptr : ort->CreateStatus(ORT_INVALID_ARGUMENT, complaint_.c_str());
    }

private:
    bool found(OrtStatus *status, const char *name);

    const OrtKernelInfo *const info_;
    std::string complaint_;
};

// Describes to ONNX Runtime an op whose nodes are `Node`s: these offer NAME, INPUTS, OUTPUTS, of which those after the
// first are optional, a constructor from Attributes, and compute(call).
template <class Node>
struct Op : OrtCustomOp {
    struct Kernel {
        Node node;
        Team team;
    };

    std::string name = Node::NAME;

    Op() : OrtCustomOp{} {
        version = LEAST_API;
        GetName = [](const OrtCustomOp *op) { return static_cast<const Op *>(op)->name.c_str(); };
        GetExecutionProviderType = [](const OrtCustomOp *) -> const char * { return nullptr; };
        GetInputTypeCount = [](const OrtCustomOp *) { return sizeof Node::INPUTS / sizeof(Input); };
        GetOutputTypeCount = [](const OrtCustomOp *) { return Node::OUTPUTS; };
        GetInputType = GetOutputType = [](const OrtCustomOp *, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
        GetInputCharacteristic = [](const OrtCustomOp *, size_t index) {
            return Node::INPUTS[index].optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
        };
        GetOutputCharacteristic = [](const OrtCustomOp *, size_t index) {
            return index ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
        };
        GetInputMemoryType = [](const OrtCustomOp *, size_t) { return OrtMemTypeDefault; };
        GetStartVersion = GetEndVersion = [](const OrtCustomOp *) { return 1; };
        CreateKernelV2 = [](const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *info, void **kernel) {
            Attributes attributes(info);
            auto *made = new Kernel{Node(attributes), {}};
            OrtStatus *const status = attributes.end();
            if (status) delete made;
            *kernel = status ? nullptr : made;
            return status;
        };
        KernelComputeV2 = [](void *raw, OrtKernelContext *context) {
            Kernel &kernel = *static_cast<Kernel *>(raw);
            Call call(context, kernel.team, Node::INPUTS);
            return kernel.node.compute(call);
        };
        KernelDestroy = [](void *raw) { delete static_cast<Kernel *>(raw); };
    }
};

// A file defines an op once for each size that it is used with, and runtimes tell these definitions apart by name alone:
// NAME, NAME_2, NAME_3 ... are one op.
constexpr int FORMS = 32;

template <class Node>
const OrtCustomOp *form_of(int form) {
    static const Op<Node> *const forms = [] {
        auto *made = new Op<Node>[FORMS];
        for (int i = 1; i < FORMS; ++i) made[i].name += "_" + std::to_string(i + 1);
        return made;
    }();
    return forms + form;
}

// The kernels for this machine.
const Kernels &kernels();

// The ops, each in its own file; forms count from 0.
const OrtCustomOp *bidirectional_inner_op(int form);
const OrtCustomOp *selective_scan_op(int form);
const OrtCustomOp *selective_scan_2d_op(int form);
