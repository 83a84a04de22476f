#include "sweep_kernel.cuh"

template zokern::SweepKernel zokern::sweep_kernel<zokern::Law::normal>(Storage, uint32_t);
template zokern::UpdateKernel zokern::update_kernel<zokern::Law::normal>(Storage, bool);
