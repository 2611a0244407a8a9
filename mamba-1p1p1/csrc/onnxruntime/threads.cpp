#include "op.h"

#include <thread>

constexpr int64_t LOOKS = 16;        // first calls that look how many threads come
constexpr int64_t LOOKS_AGAIN = 64;  // and every so many calls after: a busy machine may have kept some away

static thread_local Session *current = nullptr;

int64_t Team::size() {
    static const int64_t processors = std::thread::hardware_concurrency();
    const int64_t call = calls_.fetch_add(1, std::memory_order_relaxed);
    const int64_t most = most_.load(std::memory_order_relaxed);
    return processors > most && (call < LOOKS || call % LOOKS_AGAIN == 0) ? processors : most;
}

void Team::saw(int64_t threads) {
    int64_t most = most_.load(std::memory_order_relaxed);
    while (most < threads && !most_.compare_exchange_weak(most, threads, std::memory_order_relaxed)) {
    }
}

Session::Session(OrtKernelContext *context, Team &team)
    : context_(context), team_(team), count_(team.size()), outer_(current) {
    current = this;
}

Session::~Session() { current = outer_; }

// What is shared, and by how many threads so far. Its number tells a thread whether it has been here before.
struct Session::Piece {
    void (*work)(void *);
    void *data;
    const int64_t number;
    std::atomic<int64_t> threads;

    static void enter(void *raw, size_t) {
        static thread_local int64_t last = 0;
        Piece &piece = *static_cast<Piece *>(raw);
        if (last != piece.number) {
            last = piece.number;
            piece.threads.fetch_add(1, std::memory_order_relaxed);
        }
        piece.work(piece.data);
    }
};

void Session::share(void (*work)(void *), void *data, unsigned count, unsigned) {
    static std::atomic<int64_t> pieces{0};
    Piece piece{work, data, pieces.fetch_add(1, std::memory_order_relaxed) + 1, {0}};
    OrtStatus *const status = ort->KernelContext_ParallelFor(current->context_, Piece::enter, count, 0, &piece);
    if (status) {
        ort->ReleaseStatus(status);
        current->failed_ = true;
    }
    current->team_.saw(piece.threads.load(std::memory_order_relaxed));
}
