// The kernels over a simulated grid: every block and thread in turn.
#include "cuda.h"
#include "dispatch.h"
#include "plan.h"
#include "sample_body.h"
#include "sweep_body.h"

namespace zokern {
namespace {

template <class Body>
void run_grid(uint32_t blocks, const Body& body) {
    for (uint32_t block = 0; block < blocks; ++block)
        for (uint32_t thread = 0; thread < kThreads; ++thread) body(HostContext{block, thread});
}

}  // namespace

void host_grid_sweep(const Sweep& sweep) {
    for (const SweepLaunch& launch : plan_sweep(sweep)) {
        with_direction(sweep.law, [&](auto law) {
            with_storage(launch.storage, [&](auto storage) {
                with_directions(launch.batch.directions, [&](auto directions) {
                    run_grid(launch.blocks, [&](HostContext at) {
                        sweep_body<law(), storage(), directions()>(at, launch.batch);
                    });
                });
            });
        });
    }
}

void host_grid_sample(Law law, int64_t numel, uint64_t seed, uint32_t draw, uint64_t tensor_id,
                      int64_t offset, void* out) {
    const SampleLaunch launch = plan_sample(law, numel, seed, draw, tensor_id, offset, out);
    with_law(law, [&](auto law) {
        run_grid(launch.blocks, [&](HostContext at) { sample_body<law()>(at, launch.batch); });
    });
}

}  // namespace zokern
