// Threads for the kernels that a sanitizer sees start, meet and end; those of torch's OpenMP runtime it does not.
#include <pthread.h>

namespace {
struct Work {
    void (*enter)(void *);
    void *data;
    pthread_barrier_t *start;
};

void *run(void *raw) {
    const Work &work = *static_cast<const Work *>(raw);
    pthread_barrier_wait(work.start);  // else the first thread has done a small piece of work before the second is there
    work.enter(work.data);
    return nullptr;
}
}  // namespace

// As the fork function of an OpenMP runtime: enter(data) on `count` threads, of which the caller is one.
extern "C" void fork_threads(void (*enter)(void *), void *data, unsigned count, unsigned) {
    constexpr unsigned MOST = 64;
    pthread_t threads[MOST];
    count = count < MOST ? count : MOST;
    pthread_barrier_t start;
    pthread_barrier_init(&start, nullptr, count);
    Work work{enter, data, &start};
    for (unsigned i = 1; i < count; ++i) {
        if (pthread_create(&threads[i], nullptr, run, &work)) __builtin_trap();
    }
    run(&work);
    for (unsigned i = 1; i < count; ++i) pthread_join(threads[i], nullptr);
    pthread_barrier_destroy(&start);
}
