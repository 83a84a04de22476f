// The kernels of a merging optimizer's step on the device.
#pragma once

#include "plan.h"

namespace zokern {

using MergeKernel = void (*)(const MergeBatch);

MergeKernel merge_kernel(Storage storage, bool masters);

}  // namespace zokern
