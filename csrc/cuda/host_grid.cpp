// The kernels over a simulated grid: every block and thread in turn.
#include "cuda.h"
#include "delta_body.h"
#include "dispatch.h"
#include "l1_body.h"
#include "merge_body.h"
#include "plan.h"
#include "product_body.h"
#include "sample_body.h"
#include "select_body.h"
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
        with_directions<law>(launch.batch.directions, [&](auto directions) {
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

void run(const MergeLaunch& launch) {
    with_masters(launch.storage, launch.masters, [&](auto storage, auto masters) {
        run_grid(launch.blocks,
                 [&](HostContext at) { merge_body<storage(), masters()>(at, launch.batch); });
    });
}

template <Law law>
void run(const ProductLaunch& launch) {
    std::vector<ExactProducts> shared(kThreads);
    for (uint32_t block = 0; block < launch.blocks; ++block)
        product_body<law>(HostBlock{block, kThreads}, launch.batch, shared.data());
}

// Of bodies for whole blocks, which share `sums`.
template <class Launch, class Sum, class Body>
void run_blocks(const std::vector<Launch>& launches, std::vector<Sum>& sums, const Body& body) {
    for (const Launch& launch : launches) {
        for (uint32_t block = 0; block < launch.blocks; ++block)
            body(HostBlock{block, kThreads}, launch.batch, sums.data());
    }
}

void run_counts(const ValueLaunch& launch) {
    std::vector<uint32_t> shared(launch.shared_bytes / sizeof(uint32_t));
    for (uint32_t index = 0; index < launch.blocks; ++index) {
        const HostBlock block{index, kCountThreads};
        if (launch.batch.first_pass)
            count_first_digit(block, launch.batch, shared.data());
        else
            count_next_digit(block, launch.batch);
    }
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

void host_grid_merge_step(const MergeStep& step) {
    for (const MergeLaunch& launch : plan_merge(step)) run(launch);
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

void host_grid_select(const Selection& selection, const Thresholds& out, size_t shared_bytes) {
    const size_t bytes = select_scratch(selection, shared_bytes);
    std::vector<Counter> scratch((bytes + sizeof(Counter) - 1) / sizeof(Counter));
    std::vector<Counter> sums(kThreads);
    const auto blocks = [&](const auto& launches, const auto& body) {
        run_blocks(launches, sums, body);
    };
    const SelectPlan plan = plan_select(selection, out, scratch.data(), shared_bytes);
    for (const SelectPlan::Pass& pass : plan.passes) {
        for (const ValueLaunch& launch : pass.counts) run_counts(launch);
        blocks(pass.decisions, [](const auto&... arguments) { decide_digit(arguments...); });
    }
    blocks(plan.ties, [](const auto&... arguments) { count_ties(arguments...); });
    blocks(plan.tie_decisions, [](const auto&... arguments) { decide_ties(arguments...); });
    blocks(plan.ties, [](const auto&... arguments) { find_tie(arguments...); });
    for (const AnswerLaunch& launch : plan.answers)
        run_grid(launch.blocks, [&](HostContext at) { answer_body(at, launch.batch); });
}

void host_grid_l1_sums(const L1Sums& l1, double* out) {
    std::vector<ExactSums> partials(l1_scratch(l1) / sizeof(ExactSums)), sums(kThreads);
    const SumPlan plan = plan_l1_sums(l1, out, partials.data());
    run_blocks(plan.sums, sums, [](const auto&... arguments) { l1_body(arguments...); });
    run_blocks(plan.totals, sums, [](const auto&... arguments) { total_body(arguments...); });
}

}  // namespace zokern
