// Threads for an operation: those of PyTorch's OpenMP runtime, or else a pool of our own.
#pragma once

#include <functional>

namespace zokern {

// Runs task(0) … task(threads - 1), not always at once; returns when all are done.
// float32 denormals are kept inside the tasks, whatever the caller's mode. Safe after fork.
void run_on_threads(int threads, const std::function<void(int)>& task);

}  // namespace zokern
