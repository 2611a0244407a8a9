// Work on the threads that the process already has: the pool of the OpenMP runtime that PyTorch loaded.
//
// The kernels link no threading library. The loader finds the runtime's fork function (of GOMP's interface, which the
// OpenMP runtimes of GCC, LLVM and Intel all offer) and hands it in with each call, so there is never a second pool.
#pragma once

#include "platform.h"

using Fork = void (*)(void (*)(void *), void *, unsigned, unsigned);

struct Threads {
    Fork fork;  // null: one thread
    int64_t count;
};

template <class Body>
struct Shared {
    const Body *body;
    int64_t tasks;
    int64_t next;
    int64_t workers;

    static void enter(void *raw) {
        Shared &shared = *static_cast<Shared *>(raw);
        const int64_t worker = __atomic_fetch_add(&shared.workers, 1, __ATOMIC_RELAXED);
        for (;;) {
            const int64_t task = __atomic_fetch_add(&shared.next, 1, __ATOMIC_RELAXED);
            if (task >= shared.tasks) return;
            (*shared.body)(task, worker);
        }
    }
};

// Call body(task, worker) for each task below `tasks`; workers are numbered from 0 and below threads.count.
template <class Body>
void for_each_task(const Threads &threads, int64_t tasks, const Body &body) {
    Shared<Body> shared{&body, tasks, 0, 0};
    const int64_t count = threads.count < tasks ? threads.count : tasks;
    if (threads.fork == nullptr || count < 2) {
        Shared<Body>::enter(&shared);
    } else {
        threads.fork(Shared<Body>::enter, &shared, static_cast<unsigned>(count), 0);
    }
}

// Into how many slices to cut each of `parts` equal pieces of work so that all threads get the same number.
inline int64_t slices_for(const Threads &threads, int64_t parts) {
    int64_t a = threads.count, b = parts;
    while (b) {
        const int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return threads.count / (a ? a : 1);
}
