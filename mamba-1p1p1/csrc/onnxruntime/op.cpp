#include "op.h"

const OrtApi *ort = nullptr;

const Kernels &kernels() {
    static const Kernels &chosen = kernels_for_this_machine();
    return chosen;
}

// Take a failure of ONNX Runtime itself, as it says it.
bool Call::failed(OrtStatus *status) {
    if (status == nullptr) return false;
    refuse(ort->GetErrorMessage(status));
    ort->ReleaseStatus(status);
    return true;
}

static std::string text_of(const Sizes &sizes) {
    std::string text = "(";
    for (size_t i = 0; i < sizes.size(); ++i) {
        text += (i ? ", " : "") + (sizes[i] == ANY ? "any" : std::to_string(sizes[i]));
    }
    return text + (sizes.size() == 1 ? ",)" : ")");
}

static bool agree(const Sizes &found, const Sizes &wanted) {
    bool same = found.size() == wanted.size();
    for (size_t i = 0; same && i < wanted.size(); ++i) same = wanted[i] == ANY || wanted[i] == found[i];
    return same;
}

Tensor Call::input(size_t index, const Sizes &sizes, const Sizes &others) {
    const Input &about = inputs_[index];
    const std::string name = "`" + std::string(about.name) + "`";
    const OrtValue *value = nullptr;
    size_t count = 0;
    if (refused() || failed(ort->KernelContext_GetInputCount(context_, &count))) return {};
    if (index < count && failed(ort->KernelContext_GetInput(context_, index, &value))) return {};
    if (value == nullptr) {
        if (!about.optional) refuse(name + " is missing");
        return {};
    }
    Tensor tensor{nullptr, sizes_of(value), true};
    if (!refused() && !agree(tensor.sizes, sizes) && (others.empty() || !agree(tensor.sizes, others))) {
        std::string wanted = sizes == Sizes(sizes.size(), ANY) ? "" : " = " + text_of(sizes);
        if (!others.empty()) wanted += " or " + text_of(others);
        refuse(name + " must have shape " + about.axes + wanted + ", got " + text_of(tensor.sizes));
    }
    void *data = nullptr;
    if (refused() || failed(ort->GetTensorMutableData(const_cast<OrtValue *>(value), &data))) return {};
    tensor.data = static_cast<const float *>(data);
    return tensor;
}

Sizes Call::sizes_of(const OrtValue *value) {
    OrtTensorTypeAndShapeInfo *info = nullptr;
    size_t axes = 0;
    Sizes sizes;
    if (failed(ort->GetTensorTypeAndShape(value, &info))) return {};
    if (!failed(ort->GetDimensionsCount(info, &axes))) {
        sizes.resize(axes);
        failed(ort->GetDimensions(info, sizes.data(), axes));
    }
    ort->ReleaseTensorTypeAndShapeInfo(info);
    return sizes;
}

float *Call::output(size_t index, const Sizes &sizes) {
    OrtValue *value = nullptr;
    size_t count = 0;
    if (refused() || failed(ort->KernelContext_GetOutputCount(context_, &count)) || index >= count) return nullptr;
    if (failed(ort->KernelContext_GetOutput(context_, index, sizes.data(), sizes.size(), &value))) return nullptr;
    void *data = nullptr;
    if (value == nullptr || failed(ort->GetTensorMutableData(value, &data))) return nullptr;
    return static_cast<float *>(data);
}

OrtStatus *Call::end(int (*kernel)(Arguments &)) {
    if (kernel && !refused()) {
        Arguments arguments(values_.data(), static_cast<int64_t>(values_.size()));
        const int code = kernel(arguments);
        if (code == OUT_OF_MEMORY) return ort->CreateStatus(ORT_RUNTIME_EXCEPTION, "there is no memory left for it");
        if (code != OK) return ort->CreateStatus(ORT_FAIL, "its kernel got a wrong list of arguments");
        if (session_.failed()) return ort->CreateStatus(ORT_FAIL, "its work could not be given to the threads");
    }
    return refused() ? ort->CreateStatus(ORT_INVALID_ARGUMENT, complaint_.c_str()) : nullptr;
}

// Whether an attribute was read.
bool Attributes::found(OrtStatus *status, const char *name) {
    if (status == nullptr) return true;
    ort->ReleaseStatus(status);
    refuse("the attribute `" + std::string(name) + "` is missing or of another type");
    return false;
}

float Attributes::number(const char *name) {
    float value = 0.0f;
    found(ort->KernelInfoGetAttribute_float(info_, name, &value), name);
    return value;
}

bool Attributes::flag(const char *name) {
    int64_t value = 0;
    if (found(ort->KernelInfoGetAttribute_int64(info_, name, &value), name) && value != 0 && value != 1) {
        refuse("the attribute `" + std::string(name) + "` must be 0 or 1, got " + std::to_string(value));
    }
    return value == 1;
}

std::string Attributes::word(const char *name) {
    size_t size = 0;
    if (!found(ort->KernelInfoGetAttribute_string(info_, name, nullptr, &size), name)) return "";
    std::string value(size, '\0');  // with the zero at its end
    found(ort->KernelInfoGetAttribute_string(info_, name, value.data(), &size), name);
    return value.c_str();
}
