// A pool of threads that share the ranges of a loop.
//
// The caller publishes a loop and works at it; threads of the pool join when they run. Ranges are taken one after the other by
// whoever is free, so a thread that has lost its core to another program costs at most the range it holds, and the caller never
// waits for threads that have not begun. Waiting spins for microseconds, then sleeps: OpenMP's threads spin for a core that
// others use.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#endif

struct Range {
    int64_t from, to;
};

// Tells the processor that a loop only waits.
static inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

// A number that threads wait for a change of.
class Signal {
  public:
    uint32_t value() const { return value_.load(std::memory_order_acquire); }
    void reset() { value_.store(0, std::memory_order_relaxed); }

    void add(uint32_t amount) {
        value_.fetch_add(amount);
        if (sleepers_.load() > 0) wake();
    }

    void wait_while(uint32_t old) {
        for (int i = 0; i < kSpins; i++) {
            if (value() != old) return;
            relax();
        }
        sleepers_.fetch_add(1);
        sleep_while(old);
        sleepers_.fetch_sub(1);
    }

  private:
    static constexpr int kSpins = 1000;  // tens of microseconds, more than a balanced loop makes anyone wait

#if defined(__linux__)
    void sleep_while(uint32_t old) {
        while (value_.load() == old) syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
    }
    void wake() { syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }
#else
    void sleep_while(uint32_t old) {
        pthread_mutex_lock(&mutex_);
        while (value_.load() == old) pthread_cond_wait(&changed_, &mutex_);
        pthread_mutex_unlock(&mutex_);
    }
    void wake() {
        pthread_mutex_lock(&mutex_);
        pthread_cond_broadcast(&changed_);
        pthread_mutex_unlock(&mutex_);
    }
    pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t changed_ = PTHREAD_COND_INITIALIZER;
#endif

    std::atomic<uint32_t> value_{0};
    std::atomic<int> sleepers_{0};
};

// The threads of the process. One call at a time has them.
class Pool {
  public:
    using Body = void (*)(const void* context, Range range, int thread);

    // How many threads this call may use, at most `wanted`: the calling one alone if another call has the pool.
    int acquire(int wanted);
    void release() { busy_.store(false, std::memory_order_release); }

    // Calls body(context, range, thread) for ranges that together are [0, size), each but the last a multiple of `grain`.
    void run(Body body, const void* context, uint32_t size, uint32_t grain, int threads) {
        const uint64_t loop = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
        // No range can be taken while the loop is described: who reads any of it finds a ticket that has changed.
        ticket_.store(loop << 32 | kClosed, std::memory_order_relaxed);
        body_.store(body, std::memory_order_release);
        context_.store(context, std::memory_order_release);
        size_.store(size, std::memory_order_release);
        grain_.store(grain, std::memory_order_release);
        threads_.store(threads, std::memory_order_release);
        done_.reset();
        ticket_.store(loop << 32, std::memory_order_release);
        loops_.add(1);
        work(0);
        for (uint32_t done; (done = done_.value()) != size;) done_.wait_while(done);
    }

  private:
    static constexpr uint32_t kClosed = UINT32_MAX;

    // Takes ranges of the current loop until there are none left.
    void work(int thread) {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        for (;;) {
            const Body body = body_.load(std::memory_order_acquire);
            const void* context = context_.load(std::memory_order_acquire);
            const uint32_t size = size_.load(std::memory_order_acquire), grain = grain_.load(std::memory_order_acquire);
            const int threads = threads_.load(std::memory_order_acquire);
            const uint32_t next = uint32_t(ticket);
            if (next >= size || thread >= threads) return;
            // Large ranges first, small ones to even out the end.
            const uint32_t share = uint32_t(uint64_t(size - next) * 4 / (5 * uint32_t(threads))) / grain * grain;
            const uint32_t count = std::min(std::max(share, grain), size - next);
            if (!ticket_.compare_exchange_weak(ticket, ticket + count, std::memory_order_acq_rel, std::memory_order_acquire))
                continue;
            body(context, {next, next + count}, thread);
            done_.add(count);
            ticket = ticket_.load(std::memory_order_acquire);
        }
    }

    void serve(int thread) {
        for (;;) {
            const uint32_t seen = loops_.value();
            work(thread);
            loops_.wait_while(seen);
        }
    }

    static void* serve_as(void* thread);
    static void after_fork();
    static bool start(int thread);

    std::atomic<bool> busy_{false};
    int started_ = 0;  // belongs to whoever has the pool
    // Number of the loop, and first item that nobody has taken.
    std::atomic<uint64_t> ticket_{kClosed};
    std::atomic<Body> body_{nullptr};
    std::atomic<const void*> context_{nullptr};
    std::atomic<uint32_t> size_{0}, grain_{1};
    std::atomic<int> threads_{0};
    alignas(128) Signal done_;   // items of the current loop
    alignas(128) Signal loops_;  // that were ever published
};

static Pool pool;  // never destroyed: its threads sleep until the process ends

static bool forks_are_handled = false;

inline int Pool::acquire(int wanted) {
    if (wanted <= 1 || busy_.exchange(true, std::memory_order_acquire)) return 1;
    if (!forks_are_handled) forks_are_handled = pthread_atfork(nullptr, nullptr, after_fork) == 0;
    while (started_ + 1 < wanted && start(started_ + 1)) started_++;
    if (started_ == 0) release();
    return std::min(wanted, started_ + 1);
}

// A child process has the memory of its parent, and none of its threads.
inline void Pool::after_fork() { new (&pool) Pool; }

inline void* Pool::serve_as(void* thread) {
    pool.serve(int(reinterpret_cast<intptr_t>(thread)));
    return nullptr;
}

inline bool Pool::start(int thread) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are Python's, on its own threads
    pthread_t id;
    const bool started = pthread_create(&id, nullptr, serve_as, reinterpret_cast<void*>(intptr_t(thread))) == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (started) pthread_detach(id);
    return started;
}

// The threads of one call of the library.
class Team {
  public:
    explicit Team(int wanted) : threads_(pool.acquire(wanted)) {}
    ~Team() {
        if (threads_ > 1) pool.release();
    }
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int threads() const { return threads_; }

    // Calls f(range, thread), thread < the number wanted, for ranges that together are [0, size); returns when all are done. A loop of
    // no more than `alone` items is the calling thread's.
    template <class F>
    void share(int64_t size, int64_t grain, const F& f, int64_t alone = 0) const {
        if (threads_ == 1 || size <= std::max(grain, alone)) return f(Range{0, size}, 0);
        const Pool::Body body = [](const void* context, Range range, int thread) {
            (*static_cast<const F*>(context))(range, thread);
        };
        pool.run(body, &f, uint32_t(size), uint32_t(grain), threads_);
    }

  private:
    int threads_;
};
