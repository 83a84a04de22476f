// The module zokern._C: pointers, sizes and streams come in as integers; Python owns the checks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "deltas.h"
#include "sweep.h"

namespace py = pybind11;

// An opaque object, not a list.
PYBIND11_MAKE_OPAQUE(std::vector<zokern::ValueTensor>)

namespace zokern {
namespace {

using Ints = std::vector<int64_t>;
using Pointers = std::vector<uintptr_t>;
using Floats = std::vector<float>;

// (data, Storage) of an element of a dense direction.
using Dense = std::pair<uintptr_t, int>;

DenseTensor dense_tensor(const Dense& dense) {
    return {reinterpret_cast<const void*>(dense.first), Storage(dense.second)};
}

// An opaque object, made once for tensors that are swept again and again.
struct SweepTensors {
    std::vector<SweepTensor> tensors;
};

SweepTensors make_sweep_tensors(const Pointers& params, const Pointers& residuals,
                                const Pointers& masters, const Ints& outs,
                                const std::vector<std::vector<Dense>>& dense, const Ints& numels,
                                const Ints& offsets, const Ints& row_lengths,
                                const Ints& row_strides, const Pointers& rows,
                                const std::vector<uint64_t>& tensor_ids,
                                const std::vector<int>& storages) {
    SweepTensors made;
    for (size_t i = 0; i < params.size(); ++i) {
        SweepTensor tensor{};
        tensor.param = reinterpret_cast<void*>(params[i]);
        tensor.residual = reinterpret_cast<void*>(residuals.at(i));
        if (!masters.empty()) tensor.master = reinterpret_cast<float*>(masters.at(i));
        if (!outs.empty()) tensor.out = reinterpret_cast<void*>(outs.at(i));
        for (size_t j = 0; j < dense.size(); ++j) tensor.dense[j] = dense_tensor(dense[j].at(i));
        tensor.numel = numels.at(i);
        tensor.offset = offsets.at(i);
        tensor.row_length = row_lengths.at(i);
        tensor.row_stride = row_strides.at(i);
        tensor.rows = reinterpret_cast<const int64_t*>(rows.at(i));
        tensor.tensor_id = tensor_ids.at(i);
        tensor.storage = Storage(storages.at(i));
        made.tensors.push_back(tensor);
    }
    return made;
}

// A sweep and where its tensors' outs are counted from.
struct PackedSweep : Sweep {
    uintptr_t outs = 0;

    void move_outs(uintptr_t to) {
        if (to == outs) return;
        for (SweepTensor& tensor : tensors)
            tensor.out = reinterpret_cast<void*>(uintptr_t(tensor.out) - outs + to);
        outs = to;
    }

    // By one row of numbers for all tensors.
    void renumber(uintptr_t to, uint64_t new_seed, Ints new_draws, Floats new_coeffs,
                  Floats new_scales) {
        move_outs(to);
        for (SweepTensor& tensor : tensors) tensor.row = 0;
        seed = new_seed;
        draws = std::move(new_draws);
        coeffs = std::move(new_coeffs);
        scales = std::move(new_scales);
        rest = int64_t(draws.size());
    }
};

PackedSweep make_sweep(const SweepTensors& tensors, uintptr_t outs, const Pointers& momenta,
                       const std::vector<int>& coeff_rows, const Floats& decays,
                       const Floats& steps, int law, uint64_t seed, Ints draws, Floats coeffs,
                       Floats scales, int64_t rest, bool sign, Floats gradient, int64_t rounding,
                       bool plain) {
    PackedSweep sweep;
    sweep.tensors = tensors.tensors;
    sweep.move_outs(outs);
    sweep.law = Law(law);
    sweep.seed = seed;
    for (size_t i = 0; i < sweep.tensors.size(); ++i) {
        SweepTensor& tensor = sweep.tensors[i];
        if (!momenta.empty()) tensor.momentum = reinterpret_cast<float*>(momenta.at(i));
        tensor.row = coeff_rows.at(i);
        if (!gradient.empty()) {
            tensor.decay = decays.at(i);
            tensor.step = steps.at(i);
        }
    }
    sweep.draws = std::move(draws);
    sweep.coeffs = std::move(coeffs);
    sweep.scales = std::move(scales);
    sweep.rest = rest;
    sweep.updates = !gradient.empty();
    sweep.sign = sign;
    sweep.gradient = std::move(gradient);
    sweep.rounding = rounding;
    sweep.plain = plain;
    return sweep;
}

Products make_products(const std::vector<Dense>& vectors, const Ints& numels, const Ints& offsets,
                       const Ints& row_lengths, const Ints& row_strides,
                       const std::vector<uint64_t>& tensor_ids, int law, uint64_t seed,
                       uint32_t draw) {
    Products products{{}, Law(law), seed, draw};
    for (size_t i = 0; i < vectors.size(); ++i) {
        products.tensors.push_back({dense_tensor(vectors[i]), numels.at(i), offsets.at(i),
                                    row_lengths.at(i), row_strides.at(i), tensor_ids.at(i)});
    }
    return products;
}

// (values, starts, places); (0, …) where there is no τ.
TauTensor make_tau(const Dense& values, uintptr_t starts, uintptr_t places) {
    return {dense_tensor(values), reinterpret_cast<const int64_t*>(starts),
            reinterpret_cast<const uint16_t*>(places)};
}

// `ratios`, `thresholds` and `cuts` have a row for each model with a number for each tensor; 0
// where there are none.
DeltaMerge make_merge(const std::vector<Dense>& outs, const std::vector<Dense>& bases,
                      const std::vector<std::vector<Dense>>& models, const Ints& numels,
                      const std::vector<uint64_t>& tensor_ids, const Floats& weights,
                      uintptr_t ratios, uintptr_t thresholds, uintptr_t cuts,
                      const std::vector<uint64_t>& limits, const std::vector<uint32_t>& draws,
                      uint64_t seed, bool rounded, int votes, bool zero_up, int combine,
                      float divisor, float scale) {
    const size_t count = outs.size();
    const auto entry = [](auto* numbers, size_t i) { return numbers ? numbers + i : nullptr; };
    DeltaMerge merge;
    merge.rules = {int(models.size()), seed,    rounded, zero_up, Votes(votes),
                   Combine(combine),   divisor, scale};
    for (size_t i = 0; i < count; ++i) {
        merge.tensors.push_back({reinterpret_cast<void*>(outs[i].first), Storage(outs[i].second),
                                 bases.empty() ? DenseTensor{} : dense_tensor(bases.at(i)),
                                 numels.at(i), tensor_ids.at(i), int64_t(merge.sources.size())});
        for (size_t m = 0; m < models.size(); ++m) {
            const size_t at = m * count + i;
            merge.sources.push_back({dense_tensor(models[m].at(i)),
                                     entry(reinterpret_cast<const float*>(ratios), at),
                                     entry(reinterpret_cast<const float*>(thresholds), at),
                                     entry(reinterpret_cast<const int64_t*>(cuts), at),
                                     weights.at(m), draws.at(m), limits.at(m)});
        }
    }
    return merge;
}

// What values are computed from. Adam's are those of tensors with moments.
using Values = std::vector<ValueTensor>;

Values make_values(const std::vector<Dense>& tensors, const Ints& numels,
                   const std::vector<Dense>& bases, bool rounded,
                   const std::vector<Dense>& exp_avgs, const std::vector<Dense>& exp_avg_sqs,
                   const Pointers& cached, uintptr_t numbers, uintptr_t merges) {
    Values values;
    for (size_t i = 0; i < tensors.size(); ++i) {
        ValueTensor value{};
        value.numel = numels.at(i);
        if (exp_avgs.empty()) {
            value.tensor = dense_tensor(tensors[i]);
            if (!bases.empty()) value.base = dense_tensor(bases.at(i));
            value.rounded = rounded && !bases.empty();
        } else {
            value.adam = {dense_tensor(tensors[i]),
                          dense_tensor(exp_avgs[i]),
                          dense_tensor(exp_avg_sqs.at(i)),
                          cached.empty() ? nullptr : reinterpret_cast<const float*>(cached.at(i)),
                          reinterpret_cast<const AdamNumbers*>(numbers) + i,
                          reinterpret_cast<const int64_t*>(merges) + i};
        }
        values.push_back(value);
    }
    return values;
}

Thresholds make_thresholds(uintptr_t thresholds, uintptr_t cuts, uintptr_t largest) {
    return {reinterpret_cast<float*>(thresholds), reinterpret_cast<int64_t*>(cuts),
            reinterpret_cast<float*>(largest)};
}

// For each tensor a mask, at random where there are no thresholds.
struct Masks {
    std::vector<MaskTensor> masks;
    uint64_t seed;
};

Masks make_masks(uintptr_t thresholds, uintptr_t cuts, uintptr_t draws, uintptr_t limits,
                 const Ints& offsets, const Ints& row_lengths, const Ints& row_strides,
                 const std::vector<uint64_t>& tensor_ids, uint64_t seed) {
    Masks result{{}, seed};
    for (size_t i = 0; i < tensor_ids.size(); ++i) {
        MaskTensor mask{};
        if (thresholds != 0) {
            mask.threshold = reinterpret_cast<const float*>(thresholds) + i;
            mask.cut = reinterpret_cast<const int64_t*>(cuts) + i;
        }
        mask.draw = reinterpret_cast<const int64_t*>(draws) + i;
        mask.limit = reinterpret_cast<const int64_t*>(limits) + i;
        mask.offset = offsets.at(i);
        mask.row_length = row_lengths.at(i);
        mask.row_stride = row_strides.at(i);
        mask.tensor_id = tensor_ids[i];
        result.masks.push_back(mask);
    }
    return result;
}

// The values are Adam's, whose moments are written.
MergeStep make_merge_step(const Pointers& params, const Pointers& residuals,
                          const Pointers& masters, const std::vector<int>& storages,
                          const Values& values, const Masks& masks,
                          const std::vector<TauTensor>& taus, int method) {
    MergeStep step{{}, Method(method), masks.seed};
    for (size_t i = 0; i < params.size(); ++i) {
        step.tensors.push_back(
            {reinterpret_cast<void*>(params[i]), reinterpret_cast<void*>(residuals.at(i)),
             reinterpret_cast<float*>(masters.at(i)), values.at(i).numel, Storage(storages.at(i)),
             values[i].adam, masks.masks.at(i), taus.at(i)});
    }
    return step;
}

}  // namespace
}  // namespace zokern

PYBIND11_MODULE(_C, m) {
    using namespace zokern;

    py::class_<SweepTensors>(m, "SweepTensors")
        .def(py::init(&make_sweep_tensors), py::kw_only(), py::arg("params"), py::arg("residuals"),
             py::arg("masters"), py::arg("outs"), py::arg("dense"), py::arg("numels"),
             py::arg("offsets"), py::arg("row_lengths"), py::arg("row_strides"), py::arg("rows"),
             py::arg("tensor_ids"), py::arg("storages"));
    py::class_<Sweep>(m, "AnySweep");
    py::class_<PackedSweep, Sweep>(m, "Sweep")
        .def(py::init(&make_sweep), py::kw_only(), py::arg("tensors"), py::arg("outs"),
             py::arg("momenta"), py::arg("coeff_rows"), py::arg("decays"), py::arg("steps"),
             py::arg("law"), py::arg("seed"), py::arg("draws"), py::arg("coeffs"),
             py::arg("scales"), py::arg("rest"), py::arg("sign"), py::arg("gradient"),
             py::arg("rounding"), py::arg("plain"))
        .def("renumber", &PackedSweep::renumber);
    py::class_<Products>(m, "Products")
        .def(py::init(&make_products), py::kw_only(), py::arg("vectors"), py::arg("numels"),
             py::arg("offsets"), py::arg("row_lengths"), py::arg("row_strides"),
             py::arg("tensor_ids"), py::arg("law"), py::arg("seed"), py::arg("draw"));
    py::class_<DeltaMerge>(m, "DeltaMerge")
        .def(py::init(&make_merge), py::kw_only(), py::arg("outs"), py::arg("bases"),
             py::arg("models"), py::arg("numels"), py::arg("tensor_ids"), py::arg("weights"),
             py::arg("ratios"), py::arg("thresholds"), py::arg("cuts"), py::arg("limits"),
             py::arg("draws"), py::arg("seed"), py::arg("rounded"), py::arg("votes"),
             py::arg("zero_up"), py::arg("combine"), py::arg("divisor"), py::arg("scale"));

    py::class_<TauTensor>(m, "TauTensor").def(py::init(&make_tau));
    py::class_<Values>(m, "Values")
        .def(py::init(&make_values), py::kw_only(), py::arg("tensors"), py::arg("numels"),
             py::arg("bases"), py::arg("rounded"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
             py::arg("cached"), py::arg("numbers"), py::arg("merges"));
    py::class_<Masks>(m, "Masks")
        .def(py::init(&make_masks), py::kw_only(), py::arg("thresholds"), py::arg("cuts"),
             py::arg("draws"), py::arg("limits"), py::arg("offsets"), py::arg("row_lengths"),
             py::arg("row_strides"), py::arg("tensor_ids"), py::arg("seed"));
    py::class_<Selection>(m, "Selection")
        .def(py::init([](const Values& values, Ints k, bool joined) {
                 return Selection{values, std::move(k), joined};
             }),
             py::kw_only(), py::arg("values"), py::arg("k"), py::arg("joined"));
    py::class_<L1Sums>(m, "L1Sums")
        .def(py::init([](const Values& values, const Masks& masks) {
                 return L1Sums{values, masks.masks, masks.seed};
             }),
             py::kw_only(), py::arg("values"), py::arg("masks"));
    py::class_<MergeStep>(m, "MergeStep")
        .def(py::init(&make_merge_step), py::kw_only(), py::arg("params"), py::arg("residuals"),
             py::arg("masters"), py::arg("storages"), py::arg("values"), py::arg("masks"),
             py::arg("taus"), py::arg("method"));

    const auto no_gil = py::call_guard<py::gil_scoped_release>();
    m.def("cpu_capabilities", &cpu_capabilities);
    m.def("cpu_sweep", &cpu_sweep, no_gil);
    m.def("cpu_merge_step", &cpu_merge_step, no_gil);
    m.def(
        "cpu_inner_products",
        [](const Products& products, uintptr_t out, const std::string& capability, int threads) {
            cpu_inner_products(products, reinterpret_cast<double*>(out), capability, threads);
        },
        no_gil);
    m.def(
        "cpu_sample",
        [](int law, int64_t numel, uint64_t seed, uint32_t draw, uint64_t tensor_id, int64_t offset,
           uintptr_t out, const std::string& capability, int threads) {
            cpu_sample(Law(law), numel, seed, draw, tensor_id, offset, reinterpret_cast<void*>(out),
                       capability, threads);
        },
        no_gil);
    m.def(
        "cpu_values",
        [](int law, uintptr_t words, int64_t groups, uintptr_t out, const std::string& capability) {
            cpu_values(Law(law), reinterpret_cast<const uint32_t*>(words), groups,
                       reinterpret_cast<void*>(out), capability);
        },
        no_gil);

    m.def("cpu_merge_deltas", &cpu_merge_deltas, no_gil);
    m.def(
        "cpu_select",
        [](const Selection& selection, uintptr_t thresholds, uintptr_t cuts, uintptr_t largest,
           const std::string& capability, int threads) {
            cpu_select(selection, make_thresholds(thresholds, cuts, largest), capability, threads);
        },
        no_gil);
    m.def(
        "cpu_l1_sums",
        [](const L1Sums& sums, uintptr_t out, const std::string& capability, int threads) {
            cpu_l1_sums(sums, reinterpret_cast<double*>(out), capability, threads);
        },
        no_gil);
    m.def(
        "cpu_histogram",
        [](const Values& values, uintptr_t lows, int shift, int64_t bins, uintptr_t out,
           const std::string& capability, int threads) {
            cpu_histogram(values, reinterpret_cast<const int64_t*>(lows), shift, bins,
                          reinterpret_cast<int64_t*>(out), capability, threads);
        },
        no_gil);
    m.def(
        "cpu_equal_counts",
        [](const Values& values, uintptr_t magnitudes, uintptr_t edges, int64_t ranges,
           uintptr_t out, const std::string& capability, int threads) {
            cpu_equal_counts(values, reinterpret_cast<const int64_t*>(magnitudes),
                             reinterpret_cast<const int64_t*>(edges), ranges,
                             reinterpret_cast<int64_t*>(out), capability, threads);
        },
        no_gil);

    m.def("host_grid_merge_deltas", &host_grid_merge_deltas, no_gil);
    m.def("host_grid_sweep", &host_grid_sweep, no_gil);
    m.def("host_grid_merge_step", &host_grid_merge_step, no_gil);
    m.def(
        "host_grid_inner_products",
        [](const Products& products, uintptr_t out) {
            host_grid_inner_products(products, reinterpret_cast<double*>(out));
        },
        no_gil);
    m.def(
        "host_grid_sample",
        [](int law, int64_t numel, uint64_t seed, uint32_t draw, uint64_t tensor_id, int64_t offset,
           uintptr_t out) {
            host_grid_sample(Law(law), numel, seed, draw, tensor_id, offset,
                             reinterpret_cast<void*>(out));
        },
        no_gil);

    m.def(
        "host_grid_select",
        [](const Selection& selection, uintptr_t thresholds, uintptr_t cuts, uintptr_t largest,
           size_t shared_bytes) {
            host_grid_select(selection, make_thresholds(thresholds, cuts, largest), shared_bytes);
        },
        no_gil);
    m.def(
        "host_grid_l1_sums",
        [](const L1Sums& sums, uintptr_t out) {
            host_grid_l1_sums(sums, reinterpret_cast<double*>(out));
        },
        no_gil);

#ifdef ZOKERN_WITH_CUDA
    m.def("cuda_architectures", &cuda_architectures);
    m.def("cuda_why_not", &cuda_why_not);
    m.def("cuda_sweep", &cuda_sweep, no_gil);
    m.def("cuda_merge_deltas", &cuda_merge_deltas, no_gil);
    m.def("cuda_merge_step", &cuda_merge_step, no_gil);
    m.def("count_partials", &count_partials);
    m.def(
        "cuda_inner_products",
        [](const Products& products, uintptr_t partials, int device, uintptr_t stream) {
            cuda_inner_products(products, reinterpret_cast<ExactProducts*>(partials), device,
                                stream);
        },
        no_gil);
    m.def(
        "sum_partials",
        [](const Products& products, uintptr_t partials, uintptr_t out) {
            sum_partials(products, reinterpret_cast<const ExactProducts*>(partials),
                         reinterpret_cast<double*>(out));
        },
        no_gil);
    m.def(
        "cuda_sample",
        [](int law, int64_t numel, uint64_t seed, uint32_t draw, uint64_t tensor_id, int64_t offset,
           uintptr_t out, int device, uintptr_t stream) {
            cuda_sample(Law(law), numel, seed, draw, tensor_id, offset,
                        reinterpret_cast<void*>(out), device, stream);
        },
        no_gil);
    m.def("cuda_select_scratch", &cuda_select_scratch);
    m.def(
        "cuda_select",
        [](const Selection& selection, uintptr_t thresholds, uintptr_t cuts, uintptr_t largest,
           uintptr_t scratch, int device, uintptr_t stream) {
            cuda_select(selection, make_thresholds(thresholds, cuts, largest),
                        reinterpret_cast<void*>(scratch), device, stream);
        },
        no_gil);
    m.def("l1_scratch", &l1_scratch);
    m.def(
        "cuda_l1_sums",
        [](const L1Sums& sums, uintptr_t out, uintptr_t scratch, int device, uintptr_t stream) {
            cuda_l1_sums(sums, reinterpret_cast<double*>(out), reinterpret_cast<void*>(scratch),
                         device, stream);
        },
        no_gil);
#else
    m.def("cuda_architectures", [] { return std::vector<int>(); });
#endif
}
