#include "cuts.cuh"
#include "scan_backward.cuh"

template <class Value>
static int run(const Launch& launch, Arguments& arguments) {
    scan::BackwardParameters<Value> p;
    p.shape = scan::shape_of(arguments);
    p.inputs = scan::inputs_of<Value>(arguments);
    p.z = arguments.sequence();
    p.dout = arguments.sequence();
    p.sum = arguments.sequence();
    p.y = arguments.sequence();
    p.dz = arguments.sequence();
    p.du = arguments.sequence();
    p.ddelta = arguments.sequence();
    p.accumulate = arguments.flag();
    p.with_skip = arguments.flag();
    p.borders = arguments.pointer<const Value>();
    p.borders_batch = arguments.integer();
    p.borders_chunk = arguments.integer();
    p.dlast = arguments.pointer<const Value>();
    p.dA = arguments.pointer<Value>();
    p.dB = arguments.pointer<Value>();
    p.dC = arguments.pointer<Value>();
    p.dD = arguments.pointer<float>();
    p.dbias = arguments.pointer<float>();
    if (!arguments.complete() || !p.shape.fits()) return WRONG_ARGUMENTS;
    return scan::with_cut<Value>(p.shape.states, [&](auto cut) {
        using Cut = decltype(cut);
        return launch.run(scan::backward<Cut>, Cut::grid(p.shape), Cut::THREADS, p);
    });
}

EXPORT int scan_backward(const int64_t* values, int64_t count) {
    Arguments arguments(values, count);
    const Launch launch(arguments);
    return arguments.flag() ? run<Complex>(launch, arguments) : run<float>(launch, arguments);
}
