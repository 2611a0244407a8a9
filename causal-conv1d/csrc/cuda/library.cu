// The library of the CUDA kernels as Python calls it: integers in, 0 or an error out.
#include "conv1d.cuh"
#include "conv1d_update.cuh"

DESCRIBE_LIBRARY

conv1d::Inputs::Inputs(Arguments& arguments) {
    x = arguments.sequence();
    weight = arguments.pointer<const float>();
    bias = arguments.pointer<const float>();
    documents = arguments.pointer<const int>();
    shape.batch = arguments.size();
    shape.channels = arguments.size();
    shape.length = arguments.size();
    shape.width = arguments.size();
    shape.silu = arguments.flag();
    shape.reverse = arguments.flag();
}

EXPORT int conv1d_forward(const int64_t* values, int64_t count) {
    Arguments arguments(values, count);
    const Launch launch(arguments);
    conv1d::Parameters p(arguments);
    p.out = arguments.sequence();
    if (!arguments.complete() || !p.shape.fits()) return WRONG_ARGUMENTS;
    const auto kernel = p.shape.width == 4 ? conv1d::forward<4> : conv1d::forward<0>;
    return launch.run(kernel, p.shape.grid(), conv1d::THREADS, p);
}

EXPORT int conv1d_backward(const int64_t* values, int64_t count) {
    Arguments arguments(values, count);
    const Launch launch(arguments);
    conv1d::BackwardParameters p(arguments);
    p.dout = arguments.sequence();
    p.dx = arguments.sequence();
    p.sums = arguments.pointer<float>();
    if (!arguments.complete() || !p.shape.fits()) return WRONG_ARGUMENTS;
    const auto kernel = p.shape.width == 4 ? conv1d::backward<4> : conv1d::backward<0>;
    return launch.run(kernel, p.shape.grid(), conv1d::THREADS, p);
}

EXPORT int conv1d_update(const int64_t* values, int64_t count) {
    Arguments arguments(values, count);
    const Launch launch(arguments);
    conv1d::UpdateParameters p;
    p.x = arguments.sequence();
    p.out = arguments.sequence();
    p.state = arguments.sequence();
    p.stored = arguments.pointer<const int>();
    p.weight = arguments.pointer<const float>();
    p.bias = arguments.pointer<const float>();
    p.batch = arguments.size();
    p.channels = arguments.size();
    p.length = arguments.size();
    p.width = arguments.size();
    p.size = arguments.size();
    p.silu = arguments.flag();
    if (!arguments.complete() || p.batch > MAX_GRID_Y) return WRONG_ARGUMENTS;
    return launch.run(conv1d::update, p.grid(), conv1d::UPDATE_THREADS, p);
}
