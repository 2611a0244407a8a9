// Work on the threads of the session that runs a node, never on others.
#pragma once

#include <onnxruntime_c_api.h>
#include <parallel.h>

#include <atomic>

// How many threads a node may count on. ONNX Runtime does not tell, so that some calls ask for one per processor and
// see how many come. No result depends on it: with too many the work is cut finer than it need be, no more.
class Team {
public:
    int64_t size();
    void saw(int64_t threads);

private:
    std::atomic<int64_t> calls_{0}, most_{1};
};

// The threads during one call. While it lasts, the kernels that this thread runs find them by `fork`.
class Session {
public:
    Session(OrtKernelContext *context, Team &team);
    Session(const Session &) = delete;
    Session &operator=(const Session &) = delete;
    ~Session();

    Fork fork() const { return count_ > 1 ? share : nullptr; }
    int64_t count() const { return count_; }
    bool failed() const { return failed_; }

private:
    struct Piece;
    static void share(void (*work)(void *), void *data, unsigned count, unsigned flags);

    OrtKernelContext *const context_;
    Team &team_;
    const int64_t count_;
    Session *const outer_;
    bool failed_ = false;
};
