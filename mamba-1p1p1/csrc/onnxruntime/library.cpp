// What the library exports.

#include "op.h"

// glibc gives freed memory back to the system above a threshold, which rises with the largest block that was mapped and
// freed: each node would page its memory in anew. One block, never touched, settles it.
static void keep_freed_memory() {
    void *volatile block = malloc(30 << 20);
    free(block);
}

// The domain of the ops, which sessions use as long as the process lives.
static OrtStatus *make_domain(OrtCustomOpDomain *&domain) {
    keep_freed_memory();
    OrtStatus *status = ort->CreateCustomOpDomain("mamba_ssm", &domain);
    for (int form = 0; form < FORMS; ++form) {
        for (const OrtCustomOp *op : {bidirectional_inner_op(form), selective_scan_op(form), selective_scan_2d_op(form)}) {
            if (status == nullptr) status = ort->CustomOpDomain_Add(domain, op);
        }
    }
    return status;
}

KERNELS_EXPORT OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    const OrtApi *const api = base->GetApi(LEAST_API);
    if (api == nullptr) {
        const std::string found = base->GetVersionString(), least = std::to_string(LEAST_API);
        const std::string sentence = "these ops need onnxruntime 1." + least + " or later, and this is " + found;
        return base->GetApi(1)->CreateStatus(ORT_FAIL, sentence.c_str());
    }
    ort = api;
    static OrtCustomOpDomain *domain = nullptr;
    static OrtStatus *const failure = make_domain(domain);
    if (failure) return ort->CreateStatus(ort->GetErrorCode(failure), ort->GetErrorMessage(failure));
    return ort->AddCustomOpDomain(options, domain);
}
