#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace zokern {
namespace {

// The bits of the sums and products must not depend on the mode that the caller's thread is in.
class DefaultFloatMode {
  public:
#if defined(__x86_64__)
    DefaultFloatMode() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
    ~DefaultFloatMode() { _mm_setcsr(before_); }

  private:
    unsigned before_;
#endif
};

class Pool {
  public:
    void run(int threads, const std::function<void(int)>& task) {
        std::unique_lock<std::mutex> turn(turn_);
        while (int(workers_.size()) < threads - 1) {
            const int index = int(workers_.size()) + 1;
            workers_.emplace_back([this, index, seen = generation_] { work(index, seen); });
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task_ = &task;
            threads_ = threads;
            pending_ = threads - 1;
            ++generation_;
        }
        start_.notify_all();
        {
            DefaultFloatMode mode;
            task(0);
        }
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return pending_ == 0; });
    }

  private:
    void work(int index, uint64_t seen) {
        DefaultFloatMode mode;
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            start_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (index >= threads_) continue;
            const std::function<void(int)>& task = *task_;
            lock.unlock();
            task(index);
            lock.lock();
            if (--pending_ == 0) done_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable start_, done_;
    std::vector<std::thread> workers_;
    const std::function<void(int)>* task_ = nullptr;
    int threads_ = 0, pending_ = 0;
    uint64_t generation_ = 0;
};

// The OpenMP runtime that PyTorch has loaded, if it has GNU's entry points (LLVM's has them too).
// After each of PyTorch's own parallel loops its threads stay awake for some milliseconds to wait
// for the next: other threads would share the processors with them, while these take the work up
// at once.
struct OpenMp {
    using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
    using Number = int (*)();
    Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    Number thread = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    Number threads = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));

    bool found() const { return parallel != nullptr && thread != nullptr && threads != nullptr; }
};

const OpenMp& open_mp() {
    static const OpenMp found;
    return found;
}

struct Tasks {
    const std::function<void(int)>* task;
    int count;
};

// What each thread of a team runs. A team can be smaller than it was asked to be.
void run_share(void* data) {
    const Tasks& tasks = *static_cast<const Tasks*>(data);
    DefaultFloatMode mode;
    for (int i = open_mp().thread(); i < tasks.count; i += open_mp().threads()) (*tasks.task)(i);
}

// A forked child has none of OpenMP's threads, and GNU's runtime would wait for them.
std::atomic<bool> forked{false};

// Never destroyed: its threads run until the process ends. A forked child has none of them, so it
// leaves its copy of the pool alone and starts another.
Pool* pool = nullptr;
std::mutex creation;

[[maybe_unused]] const int watching_forks =
    pthread_atfork([] { creation.lock(); }, [] { creation.unlock(); },
                   [] {
                       forked = true;
                       pool = nullptr;
                       creation.unlock();
                   });

Pool& current_pool() {
    std::lock_guard<std::mutex> lock(creation);
    if (pool == nullptr) pool = new Pool;
    return *pool;
}

}  // namespace

void run_on_threads(int threads, const std::function<void(int)>& task) {
    if (threads <= 1) {
        DefaultFloatMode mode;
        task(0);
        return;
    }
    if (open_mp().found() && !forked) {
        Tasks tasks{&task, threads};
        open_mp().parallel(run_share, &tasks, unsigned(threads), 0);
        return;
    }
    current_pool().run(threads, task);
}

}  // namespace zokern
