// "v2" blocks in one call: of each residual addition and norm, input projection, the inside, output projection.
// Included once per instruction set, after inner.h, gemm.h and norm.h.
//
// m model channels, e inner channels

struct Block {
    const float *x, *residual;  // (rows, m), contiguous; the residual may be null
    float *out, *stored;        // (rows, m): may be x, and the residual; `stored` takes their sum
    const float *norm_weight, *norm_bias;
    NormSizes norm;
    Linear in, to_out;
    float scale;
};

// How many rows each task takes, so that all threads get the same number of tasks of about `most` rows: whole tiles of
// a product.
inline int64_t rows_of_task(int64_t rows, const Threads &threads, int64_t most) {
    const int64_t rounds = (rows + threads.count * most - 1) / (threads.count * most);
    const int64_t tasks = threads.count * (rounds < 1 ? 1 : rounds);
    return ((rows + tasks - 1) / tasks + GEMM_ROWS - 1) / GEMM_ROWS * GEMM_ROWS;
}

constexpr int64_t BLOCK_ROWS = 256;

// What the blocks of a call share, `rows` being the tokens of all pictures.
struct BlockMemory {
    int64_t task_rows;                  // of a task
    int64_t own;                        // floats of a worker
    float *xz, *y, *normed;             // (rows, 2 e), (rows, e), (workers, own)
    float *in_panels, *to_out_panels;
    int64_t floats;

    BlockMemory(Cursor memory, const Block &block, int64_t channels, const Threads &threads) {
        const int64_t rows = block.norm.rows, m = block.norm.features;
        task_rows = rows_of_task(rows, threads, BLOCK_ROWS);
        own = (task_rows * m + m + LANES + 15) / 16 * 16;
        xz = memory.take(rows * 2 * channels);
        y = memory.take(rows * channels);
        normed = memory.take(own * threads.count);
        in_panels = memory.take(block.in.packed());
        to_out_panels = memory.take(block.to_out.packed());
        floats = memory.used;
    }
};

inline int run_block(Block &block, Computed<float> *directions, const Sizes &sizes, const BlockMemory &shared,
                     const Threads &threads) {
    const int64_t rows = block.norm.rows, m = block.norm.features, e = sizes.channels, wide = 2 * e;
    const int64_t each = shared.task_rows, tasks = (rows + each - 1) / each, own = shared.own;
    float *const xz = shared.xz, *const y = shared.y, *const normed = shared.normed;
    block.in.panels = shared.in_panels;
    block.to_out.panels = shared.to_out_panels;

    const int64_t panels = block.in.count();
    for_each_task(threads, panels + block.to_out.count(), [&](int64_t task, int64_t) {
        if (task < panels) return block.in.pack(task);
        block.to_out.pack(task - panels);
    });
    for_each_task(threads, tasks, [&](int64_t task, int64_t worker) {
        const int64_t begin = task * each, end = begin + each < rows ? begin + each : rows, first = begin * m;
        float *tile = normed + worker * own;
        add_norm_rows(block.x + first, block.residual ? block.residual + first : nullptr, tile,
                      block.stored + first, block.norm_weight, block.norm_bias, block.norm,
                      begin, end, tile + each * m);
        apply(block.in, tile, m, end - begin, xz + begin * wide, wide);
    });

    const int64_t length = sizes.length;
    const Sequence<const float> x{xz, length * wide, 1, wide}, z{xz + e, length * wide, 1, wide};
    const Sequence<float> inside{y, length * e, 1, e};
    for (int64_t s = 0; s < sizes.directions; ++s) directions[s].x = directions[s].reverse ? x.reversed(length) : x;
    const Output<float> output{inside, z, inside, length, block.scale};
    const int code = bidirectional(directions, sizes, output, threads);
    if (code != OK) return code;

    for_each_task(threads, tasks, [&](int64_t task, int64_t) {
        const int64_t begin = task * each, end = begin + each < rows ? begin + each : rows;
        apply(block.to_out, y + begin * e, e, end - begin, block.out + begin * m, m);
    });
    return OK;
}
