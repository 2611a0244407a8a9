#include "cuts.cuh"

template <class Value>
static int run(const Launch& launch, Arguments& arguments) {
    scan::Parameters<Value> p;
    p.shape = scan::shape_of(arguments);
    p.inputs = scan::inputs_of<Value>(arguments);
    p.z = arguments.sequence();
    p.out = arguments.sequence();
    p.sum = arguments.sequence();
    p.with_skip = arguments.flag();
    p.last = arguments.pointer<Value>();
    p.borders = arguments.pointer<Value>();
    p.borders_batch = arguments.integer();
    p.borders_chunk = arguments.integer();
    if (!arguments.complete() || !p.shape.fits()) return WRONG_ARGUMENTS;
    return scan::with_cut<Value>(p.shape.states, [&](auto cut) {
        using Cut = decltype(cut);
        return launch.run(scan::forward<Cut>, Cut::grid(p.shape), Cut::THREADS, p);
    });
}

EXPORT int scan_forward(const int64_t* values, int64_t count) {
    Arguments arguments(values, count);
    const Launch launch(arguments);
    return arguments.flag() ? run<Complex>(launch, arguments) : run<float>(launch, arguments);
}
