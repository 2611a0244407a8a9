// A linear layer whose weight is int8. Included once per instruction set, after block.h.

// out (rows, columns) = a (rows, depth) through `linear`.
inline int multiply_int8_rows(Linear linear, const float *a, int64_t rows, float *out, const Threads &threads) {
    if (rows * linear.columns == 0) return OK;
    const bool few = rows <= FEW_ROWS;
    const int64_t each = rows_of_task(rows, threads, few ? NORM_ROWS : BLOCK_ROWS), tasks = (rows + each - 1) / each;
    const int64_t row = linear.row_floats(), depth = linear.depth, columns = linear.columns;
    const int64_t panels = few ? GEMM_GROUP * linear.panel_floats() * threads.count : linear.packed();
    const Memory memory(panels + (few ? rows : each * threads.count) * row);
    if (memory.data() == nullptr) return OUT_OF_MEMORY;
    float *const quantized = memory.data() + panels;
    linear.panels = memory.data();
    const auto taken = [&](int64_t task, float *to) {
        const int64_t begin = task * each, count = begin + each < rows ? each : rows - begin;
        linear.taken(a + begin * depth, depth, count, to);
        return count;
    };
    if (few) {
        for_each_task(threads, tasks, [&](int64_t task, int64_t) { taken(task, quantized + task * each * row); });
        for_each_task(threads, group_count(linear, threads), [&](int64_t group, int64_t worker) {
            float *own = linear.panels + worker * GEMM_GROUP * linear.panel_floats();
            apply_group(linear, group, group_panels(linear, threads), own, quantized, row, rows, out, columns);
        });
        return OK;
    }
    for_each_task(threads, linear.count(), [&](int64_t panel, int64_t) { linear.pack(panel); });
    for_each_task(threads, tasks, [&](int64_t task, int64_t worker) {
        float *own = quantized + worker * each * row;
        const int64_t count = taken(task, own);
        apply(linear, own, row, count, out + task * each * columns, columns);
    });
    return OK;
}
