// A pool of threads for one operation at a time.
#pragma once

#include <functional>

namespace zokern {

// Runs task(0) … task(threads - 1), the first on the calling thread; returns when all are done.
// float32 denormals are kept inside the tasks, whatever the caller's mode. Safe after fork.
void run_on_threads(int threads, const std::function<void(int)>& task);

}  // namespace zokern
