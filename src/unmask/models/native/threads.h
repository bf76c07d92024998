// How the threads of a parallel region share work and wait for each other.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

struct Range {
    int64_t from, to;
};

// Waits a little in a loop, then sleeps: OpenMP's own barrier keeps spinning, which costs a whole time slice each time another
// program has taken the core of a thread that is waited for.
class Barrier {
  public:
    void wait(int count) {
        const int round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.fetch_add(1);
            if (sleeping_.load() > 0) futex(FUTEX_WAKE_PRIVATE, INT_MAX);
            return;
        }
        for (int i = 0; i < kSpins; i++) {
            if (round_.load(std::memory_order_acquire) != round) return;
            __builtin_ia32_pause();
        }
        sleeping_.fetch_add(1);
        while (round_.load() == round) futex(FUTEX_WAIT_PRIVATE, round);
        sleeping_.fetch_sub(1);
    }

  private:
    static constexpr int kSpins = 1000;  // tens of microseconds, more than a balanced phase makes anyone wait

    void futex(int operation, int value) { syscall(SYS_futex, &round_, operation, value, nullptr, nullptr, 0); }

    std::atomic<int> arrived_{0}, round_{0}, sleeping_{0};
};

// One thread of `count`.
struct Worker {
    int index, count;
    Barrier& barrier;

    Range share_of(int64_t size) const { return {size * index / count, size * (index + 1) / count}; }
    void wait() const { barrier.wait(count); }
};
