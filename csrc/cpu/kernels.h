// The table of CPU kernels that each instruction set fills in.
//
// The files that are compiled for an instruction set keep all they define in unnamed namespaces and
// instantiate no library templates: code for AVX-512 must not serve as the one copy of an inline
// function that an older CPU runs too.
#pragma once

#include "../deltas.h"
#include "../magnitudes.h"
#include "../merging.h"
#include "../sums.h"
#include "../sweep.h"

namespace zokern {

// What a sweep does to one tensor; see sweep.h.
struct Directions {
    Law law;
    uint64_t seed;
    int64_t count, rest;
    const int64_t* draws;
    const float* coeffs;
    const float* scales;
    const float* gradient;  // or null: then the sweep does not update
    bool sign, plain;
    int64_t rounding;  // see Sweep
};

// Counters of each bin of a histogram.
constexpr int kCopies = 4;

// More magnitudes than a block of values has are written at once.
constexpr int64_t kRoomOfBlock = 4096;

// What a histogram says besides its counts.
struct Tally {
    int64_t above;     // how many magnitudes are above the bracket
    uint32_t largest;  // magnitude
};

struct CpuKernels {
    const char* name;
    // Moves elements [begin, end) of one tensor.
    void (*sweep)(const Directions&, const SweepTensor&, int64_t begin, int64_t end);
    // Adds the products of elements [begin, end) of a vector with a draw.
    void (*products)(Law, const Stream&, const ProductTensor&, int64_t begin, int64_t end,
                     ExactProducts& sums);
    // Writes elements [begin, end) of a draw from `out` on: float for directions, int64 for words.
    void (*sample)(Law, const Stream&, int64_t begin, int64_t end, void* out);
    // The values of given groups of four words; a multiple of 16 groups; types as for sample.
    void (*values)(Law, const uint32_t* words, int64_t groups, void* out);
    // Adds elements [begin, end), at most 2^31, to the counts, kCopies for each bin, and the tally.
    void (*histogram)(const ValueTensor&, int64_t begin, int64_t end, const Bracket&,
                      uint32_t* counts, Tally&);
    // Appends the bins of those of elements [begin, end) that lie in the bracket; false where there
    // may not be room for all.
    bool (*collect)(const ValueTensor&, int64_t begin, int64_t end, const Bracket&, uint32_t* bins,
                    int64_t room, int64_t& count, Tally&);
    // How many of elements [begin, end) are of a magnitude, and which is number `rank` of them.
    int64_t (*count_equals)(const ValueTensor&, int64_t begin, int64_t end, uint32_t magnitude);
    int64_t (*find_equal)(const ValueTensor&, int64_t begin, int64_t end, uint32_t magnitude,
                          int64_t rank);
    // Adds the magnitudes of elements [begin, end), and of those that the mask keeps.
    void (*l1_sums)(const ValueTensor&, const MaskTensor&, uint64_t seed, int64_t begin,
                    int64_t end, ExactSum& all, ExactSum& kept);
    // Takes elements [begin, end) of one tensor through a merging optimizer's step.
    void (*merge_step)(Method, uint64_t seed, const MergeTensor&, int64_t begin, int64_t end);
    // Merges elements [begin, end) of a tensor.
    void (*merge_deltas)(const DeltaRules&, const DeltaTensor&, const DeltaSource* sources,
                         int64_t begin, int64_t end);
};

extern const CpuKernels kPortableKernels;
#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
#endif

}  // namespace zokern
