#include "sweep_kernel.cuh"

template zokern::SweepKernel zokern::sweep_kernel<zokern::Law::rademacher>(Storage, uint32_t);
template zokern::UpdateKernel zokern::update_kernel<zokern::Law::rademacher>(Storage, bool);
