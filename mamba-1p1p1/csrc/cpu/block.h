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
constexpr int64_t FEW_ROWS = 1024;  // up to which threads share the columns of a product, not its rows

// What the blocks of a call share, `rows` being the tokens of all pictures.
struct BlockMemory {
    bool few;                          // rows
    int64_t task_rows, own, panels;    // rows of a task; floats of a worker for them, and for panels of weights
    int64_t tile;                      // of `own`, for normed rows; then one row, then quantised rows
    float *xz, *y, *normed;            // (rows, 2 e), (rows, e), (workers, own) and, of few rows, (rows, taken m)
    float *in_panels, *to_out_panels;  // of few rows the first is (workers, panels)
    int64_t floats;

    BlockMemory(Cursor memory, const Block &block, int64_t channels, const Threads &threads) {
        const int64_t rows = block.norm.rows, m = block.norm.features;
        few = rows <= FEW_ROWS;
        task_rows = rows_of_task(rows, threads, few ? NORM_ROWS : BLOCK_ROWS);
        const int64_t in_row = block.in.row_floats(), out_row = block.to_out.row_floats();
        const int64_t in_panel = block.in.panel_floats(), out_panel = block.to_out.panel_floats();
        tile = few && !block.in.int8 ? 0 : task_rows * m;
        const int64_t taken = block.in.int8 ? task_rows * (in_row > out_row ? in_row : out_row) : 0;
        own = (tile + m + LANES + taken + 15) / 16 * 16;
        panels = GEMM_GROUP * (in_panel > out_panel ? in_panel : out_panel);
        xz = memory.take(rows * 2 * channels);
        y = memory.take(rows * channels);
        normed = memory.take(own * threads.count + (few ? rows * in_row : 0));
        in_panels = memory.take(few ? panels * threads.count : block.in.packed());
        to_out_panels = memory.take(few ? 0 : block.to_out.packed());
        floats = memory.used;
    }
};

inline int run_block(Block &block, Computed<float> *directions, const Sizes &sizes, const BlockMemory &shared,
                     const Threads &threads) {
    const int64_t rows = block.norm.rows, m = block.norm.features, e = sizes.channels, wide = 2 * e;
    const int64_t each = shared.task_rows, tasks = (rows + each - 1) / each, own = shared.own;
    const int64_t quantized = shared.tile + m + LANES;  // where in a worker's memory
    float *const xz = shared.xz, *const y = shared.y, *const normed = shared.normed;
    block.in.panels = shared.in_panels;
    block.to_out.panels = shared.to_out_panels;

    // Returns how many rows a task has; they are in `out`, which int8 weights take quantised.
    const auto norm_rows = [&](int64_t task, float *out, int64_t worker) {
        const int64_t begin = task * each, end = begin + each < rows ? begin + each : rows, first = begin * m;
        float *tile = block.in.int8 ? normed + worker * own : out, *row = normed + worker * own + shared.tile;
        add_norm_rows(block.x + first, block.residual ? block.residual + first : nullptr, tile, block.stored + first,
                      block.norm_weight, block.norm_bias, block.norm, begin, end, row);
        block.in.taken(tile, m, end - begin, out);
        return end - begin;
    };
    const auto columns_of = [&](const Linear &linear, const float *a, float *out, int64_t group, int64_t worker) {
        apply_group(linear, group, group_panels(linear, threads), shared.in_panels + worker * shared.panels, a,
                    linear.row_floats(), rows, out, linear.columns);
    };

    Inner<float> inner(directions, sizes, threads);
    if (!inner.has_memory()) return OUT_OF_MEMORY;
    const int64_t packing = inner.packing_tasks();
    if (shared.few) {
        float *all = normed + own * threads.count;
        for_each_task(threads, tasks, [&](int64_t task, int64_t worker) {
            norm_rows(task, all + task * each * block.in.row_floats(), worker);
        });
        const int64_t groups = group_count(block.in, threads);
        for_each_task(threads, groups + packing, [&](int64_t task, int64_t worker) {
            if (task >= groups) return inner.pack(task - groups);
            columns_of(block.in, all, xz, task, worker);
        });
    } else {
        const int64_t panels = block.in.count() + block.to_out.count();
        for_each_task(threads, panels + packing, [&](int64_t task, int64_t) {
            if (task >= panels) return inner.pack(task - panels);
            if (task < block.in.count()) return block.in.pack(task);
            block.to_out.pack(task - block.in.count());
        });
        for_each_task(threads, tasks, [&](int64_t task, int64_t worker) {
            float *taken = normed + worker * own + (block.in.int8 ? quantized : 0);
            const int64_t count = norm_rows(task, taken, worker);
            apply(block.in, taken, block.in.row_floats(), count, xz + task * each * wide, wide);
        });
    }

    const int64_t length = sizes.length;
    const Sequence<const float> x{xz, length * wide, 1, wide}, z{xz + e, length * wide, 1, wide};
    const Sequence<float> inside{y, length * e, 1, e};
    for (int64_t s = 0; s < sizes.directions; ++s) directions[s].x = directions[s].reverse ? x.reversed(length) : x;
    inner.run({inside, z, inside, length, block.scale});

    const auto inner_rows = [&](int64_t task, float *to) {
        const int64_t begin = task * each, end = begin + each < rows ? begin + each : rows;
        return block.to_out.taken(y + begin * e, e, end - begin, to);
    };
    if (shared.few) {
        const float *taken = y;
        if (block.to_out.int8) {
            for_each_task(threads, tasks, [&](int64_t task, int64_t) {
                inner_rows(task, xz + task * each * block.to_out.row_floats());
            });
            taken = xz;  // which has been read
        }
        for_each_task(threads, group_count(block.to_out, threads), [&](int64_t group, int64_t worker) {
            columns_of(block.to_out, taken, block.out, group, worker);
        });
        return OK;
    }
    for_each_task(threads, tasks, [&](int64_t task, int64_t worker) {
        const int64_t begin = task * each, count = begin + each < rows ? each : rows - begin;
        apply(block.to_out, inner_rows(task, normed + worker * own + quantized), block.to_out.row_floats(), count,
              block.out + begin * m, m);
    });
    return OK;
}
