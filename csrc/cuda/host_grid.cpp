// The kernels over a simulated grid: every block and thread in turn.
#include "cuda.h"
#include "delta_body.h"
#include "dispatch.h"
#include "plan.h"
#include "product_body.h"
#include "sample_body.h"
#include "sweep_body.h"
#include "update_body.h"

namespace zokern {
namespace {

template <class Body>
void run_grid(uint32_t blocks, const Body& body) {
    for (uint32_t block = 0; block < blocks; ++block)
        for (uint32_t thread = 0; thread < kThreads; ++thread) body(HostContext{block, thread});
}

template <Law law>
void run(const SweepLaunch& launch) {
    with_storage(launch.storage, [&](auto storage) {
        with_directions(launch.batch.directions, [&](auto directions) {
            run_grid(launch.blocks, [&](HostContext at) {
                sweep_body<law, storage(), directions()>(at, launch.batch);
            });
        });
    });
}

template <Law law>
void run(const UpdateLaunch& launch) {
    with_masters(launch.storage, launch.masters, [&](auto storage, auto masters) {
        run_grid(launch.blocks,
                 [&](HostContext at) { update_body<law, storage(), masters()>(at, launch.batch); });
    });
}

template <Law law>
void run(const ProductLaunch& launch) {
    std::vector<ExactProducts> shared(kThreads);
    for (uint32_t block = 0; block < launch.blocks; ++block)
        product_body<law>(HostBlock{block, kThreads}, launch.batch, shared.data());
}

template <class Launch>
void run_all(Law law, const std::vector<Launch>& launches) {
    with_direction(law, [&](auto law) {
        for (const Launch& launch : launches) run<law()>(launch);
    });
}

}  // namespace

void host_grid_sweep(const Sweep& sweep) {
    if (sweep.plain)
        run_all(sweep.law, plan_sweep(sweep));
    else
        run_all(sweep.law, plan_update(sweep));
}

void host_grid_inner_products(const Products& products, double* out) {
    std::vector<ExactProducts> partials(count_partials(products));
    run_all(products.law, plan_products(products, partials.data()));
    sum_partials(products, partials.data(), out);
}

void host_grid_merge_deltas(const DeltaMerge& merge) {
    for (const DeltaLaunch& launch : plan_merge(merge)) {
        run_grid(launch.blocks, [&](HostContext at) {
            if (merge.rules.votes == Votes::none)
                delta_body<false>(at, launch.batch);
            else
                delta_body<true>(at, launch.batch);
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
